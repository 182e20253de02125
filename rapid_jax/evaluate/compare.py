# SPDX-License-Identifier: Apache-2.0
"""Two evaluations side by side: `rapid compare DIR1 DIR2`. Samples are paired, so small differences show."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from rapid_jax.evaluate.details import NAMED, value_text
from rapid_jax.evaluate.page import Block, Bold, Heading, Table, Verbatim, markdown, plain, text
from rapid_jax.evaluate.results import Outcome, Results, named, read
from rapid_jax.evaluate.summary import (
    NEEDED,
    Cell,
    Row,
    difference,
    difference_text,
    estimate,
    overall,
    percent,
    rows,
)
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.files import replace_file
from rapid_jax.runtime.storage import AnyPlace, full_name

FILE = "contrast.md"
RIGHT = 0.5  # a score from which an answer counts as right, where changed answers are listed
_LISTED = 10  # changed answers a direction and label
_WIDTH = 100  # of an answer in the list

Pair = tuple[Outcome, Outcome]


@dataclass(frozen=True)
class _Compared:
    """One label's samples that both have and that ask the same."""

    label: str
    pairs: tuple[Pair, ...]
    left_out: int  # samples that only one has
    changed: int  # samples of one id that ask something else

    @property
    def ones(self) -> list[Outcome]:
        return [one for one, _ in self.pairs]

    @property
    def others(self) -> list[Outcome]:
        return [other for _, other in self.pairs]


def compare(one: AnyPlace, other: AnyPlace, out: AnyPlace | None = None) -> str:
    """A plain text of how `other` differs from `one`: a table a label that both have, and the answers that changed.

    A sample is paired with the one of the same suite, id, question and right answers; its prompt may differ (another
    tokenizer, another template). With `out` the same goes into contrast.md there. Raises InputError for different
    suites, no label in common and no sample in common.
    """
    if out is not None and out.exists() and not out.is_dir():
        raise InputError(f"{out}: expected a folder to write to, got a file")
    results = read(one), read(other)
    compared = _compared(*results)
    names = _names(one, other)
    blocks = _blocks(results, names, compared)
    if out is not None:
        with replace_file(out / FILE) as temporary:
            temporary.write_bytes(markdown(blocks).encode("utf-8", "replace"))
    return plain(blocks)


def _compared(one: Results, other: Results) -> list[_Compared]:
    if one.suite != other.suite:
        raise InputError(f"expected evaluations of one suite, got {one.suite} and {other.suite}")
    labels = [label for label in one.labels if label in other.by_label]
    if not labels:
        raise InputError(
            f"expected a mode that both have, got {', '.join(one.labels)} in {one.folder} and "
            f"{', '.join(other.labels)} in {other.folder}"
        )
    compared = []
    for label in labels:
        mine = {outcome.id: outcome for outcome in one.by_label[label]}
        theirs = {outcome.id: outcome for outcome in other.by_label[label]}
        both = [(mine[id], theirs[id]) for id in mine if id in theirs]
        pairs = tuple(pair for pair in both if _asks(pair[0]) == _asks(pair[1]))
        compared.append(_Compared(label, pairs, len(mine) + len(theirs) - 2 * len(both), len(both) - len(pairs)))
    if not any(item.pairs for item in compared):
        asked = [", ".join(f"{name} {value}" for name, value in x.options.items()) or "nothing" for x in (one, other)]
        raise InputError(
            f"expected evaluations with samples in common, got none: asked for were {asked[0]} and {asked[1]}"
        )
    return [item for item in compared if item.pairs]


def _asks(outcome: Outcome) -> tuple:
    """What makes two samples the same question: another seed gives others under the same id."""
    return outcome.task, outcome.length, outcome.metric, outcome.question, outcome.answers


def _names(one: AnyPlace, other: AnyPlace) -> tuple[str, str]:
    """The last parts of the paths, as many as it takes to tell them apart."""
    parts = PurePosixPath(full_name(one)).parts, PurePosixPath(full_name(other)).parts
    for count in range(1, min(map(len, parts)) + 1):
        names = tuple("/".join(path[-count:]) for path in parts)
        if names[0] != names[1]:
            return names[0], names[1]
    return str(one), str(other)


def _blocks(results: Sequence[Results], names: Sequence[str], compared: Sequence[_Compared]) -> list[Block]:
    one, other = names
    blocks: list[Block] = [Heading(f"{other} against {one} on {results[0].suite}", 1)]
    blocks.append(text("Scores in %; differences in points with 95 % intervals, paired by sample."))
    blocks.append(text(NEEDED))
    blocks.append(text(f"Right: a score of {percent(RIGHT)} or more."))
    asked = _different(*(found.options for found in results))
    if asked:
        blocks.append(text(f"Not the same was asked for: {_said(asked)}."))
    blocks.append(Table(["of", one, other], _about(*results)))
    for label in dict.fromkeys(label for found in results for label in found.labels):
        if label not in {item.label for item in compared}:
            blocks.append(text(f"Not compared, since the other has no such samples: {label}."))
    whole = _different(*(found.settings for found in results))
    for item in compared:
        blocks.append(Heading(item.label))
        blocks.append(text(_count_text(item)))
        here = _different(*(found.settings_of(item.label) for found in results))
        if here != whole:
            blocks.append(text(f"In this mode not the same is set: {_said(here) or 'nothing'}."))
        blocks.append(Table(["task", "samples", one, other, "difference", "verdict"], _lines(results[0].suite, item)))
        blocks += _changed(item, names)
    return blocks


def _about(one: Results, other: Results) -> list[list[str]]:
    """What a reader wants to know of any run, and all settings that differ."""
    facts = [
        {
            "samples": "-" if found.samples is None else f"{found.samples:,}",
            "lengths": ", ".join(map(named, found.lengths)),
            "templates": found.templates or "-",
        }
        for found in (one, other)
    ]
    lines = [[name, facts[0][name], facts[1][name]] for name in facts[0]]
    different = _different(one.settings, other.settings)
    for name in dict.fromkeys((*NAMED, *different)):
        if name in one.settings or name in other.settings:
            lines.append([name, *different.get(name, [_value(found.settings, name) for found in (one, other)])])
    return lines


def _different(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, list[str]]:
    """Name -> both values, of those that are not the same; long ones from where they part."""
    found = {}
    for name in dict.fromkeys((*one, *other)):
        if one.get(name) != other.get(name):
            values = [_value(settings, name) for settings in (one, other)]
            start = max(0, _parted(*values) - _WIDTH // 4) if max(map(len, values)) > _WIDTH else 0
            found[name] = [_cut("..." * bool(start) + value[start:]) for value in values]
    return found


def _parted(one: str, other: str) -> int:
    """How many characters are the same before the first that is not."""
    both = zip(one, other, strict=False)
    return next((place for place, (a, b) in enumerate(both) if a != b), min(len(one), len(other)))


def _value(settings: Mapping[str, Any], name: str) -> str:
    return value_text(settings[name]) if name in settings else "-"


def _said(different: Mapping[str, Sequence[str]]) -> str:
    return "; ".join(f"{name} {' and '.join(values)}" for name, values in different.items())


def _count_text(item: _Compared) -> str:
    told = [f"{len(item.pairs):,} samples compared"]
    if item.left_out:
        told.append(f"{item.left_out:,} that only one of them has left out")
    if item.changed:
        told.append(f"{item.changed:,} whose question or right answers differ left out")
    return ", ".join(told) + "."


def _lines(suite: str, item: _Compared) -> list[list[str]]:
    """Tasks and averages length by length, then all."""
    cells: list[Cell] = list(dict.fromkeys((outcome.task, outcome.length) for outcome in item.ones))
    lengths = list(dict.fromkeys(length for _, length in cells))
    lengths.sort(key=lambda length: (length is None, length or 0))
    table = [
        (f"{row.name}, {named(length)}" if length is not None else row.name, row)
        for length in lengths
        for row in rows(suite, cells, length)
    ]
    if len(lengths) > 1:
        table.append(("all", overall(cells, lengths)))
    return [_line(name, row, item) for name, row in table]


def _line(name: str, row: Row, item: _Compared) -> list[str]:
    means = [estimate(row, outcomes) for outcomes in (item.ones, item.others)]
    gained = difference(row, item.others, item.ones)
    if gained is None:  # not for rows of the pairs' own cells
        return [name, "0", "-", "-", "-", "-"]
    verdict = Bold(gained.verdict) if gained.clear else gained.verdict
    scores = [percent(got.mean) if got else "-" for got in means]
    return [name, f"{gained.scores:,}", *scores, difference_text(gained), verdict]


def _changed(item: _Compared, names: Sequence[str]) -> list[Block]:
    """The answers that are right in one of the two only."""
    blocks: list[Block] = []
    for said, was_right in (("from right to wrong", True), ("from wrong to right", False)):
        found = [
            pair
            for pair in item.pairs
            if (pair[0].score >= RIGHT) == was_right and (pair[1].score >= RIGHT) != was_right
        ]
        if not found:
            continue
        listed = "" if len(found) <= _LISTED else f", of which {_LISTED}"
        blocks.append(text(f"{len(found):,} went {said}{listed}:"))
        blocks.append(Verbatim("\n".join(_told(pair, names) for pair in found[:_LISTED])))
    return blocks


def _told(pair: Pair, names: Sequence[str]) -> str:
    lines = [f"{pair[0].id}: expected {_cut(' | '.join(pair[0].answers))}"]
    lines += [f"  {name} {percent(x.score)}: {_cut(x.answer)}" for name, x in zip(names, pair, strict=True)]
    return "\n".join(lines)


def _cut(said: str) -> str:
    shown = " ".join(said.split()) or "(empty)"
    return shown if len(shown) <= _WIDTH else shown[: _WIDTH - 3] + "..."
