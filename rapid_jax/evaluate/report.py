# SPDX-License-Identifier: Apache-2.0
"""The report of an evaluation: scores and differences with intervals, what makes scores meaningless, samples, speed."""

import json
from collections.abc import Callable, Iterator, Sequence

from rapid_jax.evaluate import details, figures, plotting
from rapid_jax.evaluate.page import Block, Bold, Heading, Picture, Table, markdown, page, plain, text
from rapid_jax.evaluate.results import Results, named, read
from rapid_jax.evaluate.summary import (
    NEEDED,
    Row,
    cells_of,
    difference,
    difference_text,
    estimate,
    overall,
    pooled,
    rows,
    shown,
)
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.files import replace_file
from rapid_jax.runtime.storage import AnyPlace

_SPLITS = 12  # a tag with more values than this is no split


def report(folder: AnyPlace, out: AnyPlace | None = None) -> tuple[AnyPlace, str]:
    """Writes report.md, report.html and figures (PNG, SVG, CSV) of an evaluation into `out`, by default its folder.

    The HTML page needs nothing else. Equal results give equal files; without matplotlib there are no figures. Returns
    (the page's path, a plain text of the scores); raises InputError where there are no results, or a file is in the
    way.
    """
    results = read(folder)
    place = folder if out is None else out
    if place.exists() and not place.is_dir():
        raise InputError(f"{place}: expected a folder to write to, got a file")
    drawn = [] if plotting.missing() else figures.draw(results)
    blocks = list(_blocks(results, drawn))
    files = {name: content for figure in drawn for name, content in figure.files.named(figure.name).items()}
    pictures = {f"{figure.name}.png": figure.files.uri for figure in drawn}
    files["report.md"] = markdown(blocks).encode("utf-8", "replace")
    files["report.html"] = page(blocks, pictures).encode("utf-8", "replace")
    for name, content in files.items():
        with replace_file(place / name) as temporary:
            temporary.write_bytes(content)
    return place / "report.html", _as_text(results)


def _as_text(results: Results) -> str:
    """The scores as text for a terminal, with what a reader must know of them."""
    blocks = [Heading(f"{results.suite}, scores in %", 1), text(f"{_samples_line(results)} {NEEDED}")]
    blocks += [text(f"Warning: {warning}") for warning in details.warnings(results)]
    return plain([*blocks, *_score_tables(results)])


def _blocks(results: Results, drawn: Sequence[plotting.Drawn]) -> Iterator[Block]:
    yield Heading(f"Evaluation on {results.suite}", 1)
    yield from _about(results)
    yield from _scores(results)
    yield from (Picture(f"{figure.name}.png", figure.caption) for figure in drawn if figure.name != "speed")
    yield from _differences(results)
    yield from details.faults(results)
    yield from details.speed(results)
    yield from (Picture(f"{figure.name}.png", figure.caption) for figure in drawn if figure.name == "speed")
    yield from details.samples(results)


def _samples_line(results: Results) -> str:
    counts = [f"{label} ({len(outcomes):,})" for label, outcomes in results.by_label.items()]
    whole = "" if results.samples is None else f" of {results.samples:,}"
    return f"Samples finished{whole}: {', '.join(counts)}."


def _about(results: Results) -> Iterator[Block]:
    yield text(_samples_line(results))
    yield text(f"Lengths: {', '.join(map(named, results.lengths))}.")
    if results.options:
        options = (f"{name} {json.dumps(value)}" for name, value in results.options.items() if value not in (None, []))
        yield text(f"Asked for: {', '.join(options)}.")
    if results.templates:
        yield text(f"Templates: {results.templates}")
    settings = [(name, results.settings[name]) for name in details.NAMED if name in results.settings]
    if settings:
        said = ", ".join(f"{name} {details.value_text(value)}" for name, value in settings)
        yield text(f"Settings, where a mode's name does not say otherwise: {said}.")
    yield text(f"Scores are in %, brackets are 95 % bootstrap intervals. {NEEDED}")
    if plotting.missing():
        yield text(f"There are no figures, {plotting.missing()}.")
    if None in results.lengths:
        yield text(f"Length {named(None)}: documents have the length they have.")
    for warning in details.warnings(results):
        yield text(Bold("Warning:"), f" {warning}")


def _scores(results: Results) -> Iterator[Block]:
    yield Heading("Scores")
    yield from _score_tables(results)
    yield from _splits(results)


def _score_tables(results: Results) -> Iterator[Block]:
    yield from _tables(results, results.labels, lambda row, label: shown(estimate(row, results.by_label[label])))


def _differences(results: Results) -> Iterator[Block]:
    if len(results.labels) < 2:
        return
    first, *others = results.labels

    def cell(row: Row, label: str) -> str:
        got = difference(row, results.by_label[label], results.by_label[first])
        if got is None:
            return "-"
        said = f"{got.verdict} {difference_text(got)}"
        return Bold(said) if got.clear else said

    yield Heading(f"Differences from {first}")
    yield text(f"In points, over the samples that {first} has answered too; none where the interval holds 0.")
    yield from _tables(results, others, cell)


def _tables(results: Results, labels: Sequence[str], cell: Callable[[Row, str], str]) -> Iterator[Block]:
    """One of all lengths, then one a length with its tasks, where there is more than one of each."""
    cells = cells_of(results)
    by_length = {length: rows(results.suite, cells, length) for length in results.lengths}
    several = any(len(found) > 1 for found in by_length.values())
    if len(results.lengths) > 1:
        summary = [(named(length), overall(cells, [length])) for length in results.lengths]
        summary.append(("all", overall(cells, results.lengths)))
        yield Table(["length", *labels], [[name, *(cell(row, label) for label in labels)] for name, row in summary])
    if several or len(results.lengths) == 1:
        for length, found in by_length.items():
            if length is not None:
                yield Heading(f"At {named(length)}", 3)
            yield Table(["task", *labels], [[row.name, *(cell(row, label) for label in labels)] for row in found])


def _splits(results: Results) -> Iterator[Block]:
    """Scores by the benchmark's own splits, task by task; all lengths together."""
    lines = []
    for task in results.tasks:
        some = {label: [o for o in found if o.task == task] for label, found in results.by_label.items()}
        everything = [outcome for found in some.values() for outcome in found]
        for tag in dict.fromkeys(tag for outcome in everything for tag in outcome.tags):
            values = list(dict.fromkeys(outcome.tags[tag] for outcome in everything if tag in outcome.tags))
            if not 2 <= len(values) <= _SPLITS:
                continue
            for value in values:
                split = [pooled(o for o in found if o.tags.get(tag) == value) for found in some.values()]
                name = f"{tag}: {value}" if len(results.tasks) == 1 else f"{task}, {tag}: {value}"
                lines.append([name, *map(shown, split)])
    if lines:
        yield Heading("By split", 3)
        yield Table(["split", *results.labels], lines)
