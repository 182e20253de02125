# SPDX-License-Identifier: Apache-2.0
"""The figures of a report, as PNG bytes: each is made only where there is data for it."""

import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from rapid_jax.evaluate import plotting
from rapid_jax.evaluate.results import Outcome, Results, mode_of, named
from rapid_jax.evaluate.statistics import Estimate
from rapid_jax.evaluate.summary import Row, acceptances, cells_of, estimate, overall, rows, speeds
from rapid_jax.runtime.errors import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_DEPTHS = 12  # more different ones are put together by tenths
_ONE_NEEDLE = ("needle", "qa")  # suites; of RULER only niah_single_*
_SCORE, _LENGTH = "score, %", "length, tokens"
# Setting -> its name in a figure, and whether its axis is of lengths.
_ABLATED: Mapping[str, tuple[str, bool]] = {
    "speculation.eta": ("eta", False),
    "retrieval.min_tokens": ("retrieved tokens", True),
}


@dataclass(frozen=True)
class Drawn:
    """A figure."""

    file: str
    caption: str
    png: bytes


def draw(results: Results) -> list[Drawn]:
    """All figures that there is data for, in the order of the report. Equal results give equal bytes."""
    results = _printable(results)
    with plotting.texts_as_they_are():
        made = [_scores(results), _one_length(results), _tasks(results), _depths(results), _speed(results)]
        made += [_ablation(results, setting) for setting in _ABLATED]
    return [figure for figure in made if figure]


def _printable(results: Results) -> Results:
    """The same with names that any font and any terminal can show."""
    by_label = {
        printable(label): tuple(replace(outcome, task=printable(outcome.task)) for outcome in outcomes)
        for label, outcomes in results.by_label.items()
    }
    return replace(results, by_label=by_label)


def _scores(results: Results) -> Drawn | None:
    lengths = _lengths(results)
    if len(lengths) < 2:
        return None
    figure, axes = plotting.panels(1, columns=1, size=(6.4, 4))
    averages = {length: overall(cells_of(results), [length]) for length in lengths}
    _score_lines(axes[0], results, averages)
    axes[0].set(ylabel=_SCORE, title=" / ".join(dict.fromkeys(row.name for row in averages.values())))
    plotting.from_zero(axes, most=100)
    plotting.legend(figure, axes, results.labels)
    return Drawn("scores.png", "Score by length, with 95 % intervals.", plotting.png(figure))


def _one_length(results: Results) -> Drawn | None:
    """Instead of lines by length: a mark a task and label."""
    count = len(results.labels)
    if len(results.lengths) != 1 or count * len(results.tasks) < 2:
        return None
    length = results.lengths[0]
    table = rows(results.suite, cells_of(results), length)
    height = 0.12 + 0.16 * count
    figure, axes = plotting.panels(1, columns=1, size=(6.4, 0.9 + height * len(table)))
    for index, label in enumerate(results.labels):
        found = [(place, estimate(row, results.by_label[label])) for place, row in enumerate(table)]
        beside = 0.7 * ((index + 0.5) / count - 0.5)
        plotting.dots(axes[0], [(place + beside, _point(0, got)) for place, got in found if got], label, index)
    axes[0].set_yticks(range(len(table)), [row.name for row in table])
    axes[0].set(xlabel=_SCORE, xlim=(-2, 104), ylim=(len(table) - 0.5, -0.5))
    axes[0].grid(alpha=0.3, axis="x")
    plotting.legend(figure, axes, results.labels)
    return Drawn("scores.png", "Scores with 95 % intervals.", plotting.png(figure))


def _tasks(results: Results) -> Drawn | None:
    lengths = _lengths(results)
    if len(lengths) < 2 or len(results.tasks) < 2:
        return None
    figure, axes = plotting.panels(len(results.tasks), columns=4, size=(3.1, 2.5))
    for panel, task in zip(axes, results.tasks, strict=True):
        _score_lines(panel, results, {length: Row(task, {(task, length): 1.0}) for length in lengths}, thin=True)
        panel.set_title(task, fontsize=10)
        panel.set_xlabel("")
    plotting.from_zero(axes, most=100)
    figure.supxlabel(_LENGTH, fontsize=10)
    figure.supylabel(_SCORE, fontsize=10)
    plotting.legend(figure, axes, results.labels)
    return Drawn("tasks.png", "Score by length, a panel a task, with 95 % intervals.", plotting.png(figure))


def _score_lines(panel: "Axes", results: Results, by_length: Mapping[int, Row], *, thin: bool = False) -> None:
    count = len(results.labels)
    for index, label in enumerate(results.labels):
        found = [(length, estimate(row, results.by_label[label])) for length, row in by_length.items()]
        points = [_point(plotting.beside(length, index, count), got) for length, got in found if got]
        plotting.line(panel, points, label, index, thin=thin)
    plotting.number_axis(panel, list(by_length), _LENGTH, doubling=True)


def _depths(results: Results) -> Drawn | None:
    """A heat map of depth by length a label, of the samples that ask for one thing that lies at one depth."""
    placed = {label: [o for o in found if _at_one_depth(o)] for label, found in results.by_label.items()}
    placed = {label: found for label, found in placed.items() if found}
    everything = [outcome for found in placed.values() for outcome in found]
    names, row_of = _depth_rows(everything)
    if len(names) < 2:
        return None
    lengths = [length for length in results.lengths if any(o.length == length for o in everything)]
    size = (max(2.6, 0.9 + 0.6 * len(lengths)), 0.9 + 0.32 * len(names))
    figure, axes = plotting.panels(len(placed), columns=max(1, int(13 // size[0])), size=size)
    image: Any = None
    for panel, (label, found) in zip(axes, placed.items(), strict=True):
        cells: dict[tuple[int, int], list[float]] = {}
        for outcome in found:
            cells.setdefault((row_of(outcome), lengths.index(outcome.length)), []).append(100 * outcome.score)
        means = {place: statistics.fmean(scores) for place, scores in cells.items()}
        image = plotting.heat(panel, means, len(names), len(lengths))
        panel.set_title(label, fontsize=10)
        panel.set_xticks(range(len(lengths)), [named(length) for length in lengths])
        panel.set_yticks(range(len(names)), names)
    figure.supxlabel(_LENGTH, fontsize=10)
    figure.supylabel("depth, % of the document", fontsize=10)
    figure.colorbar(image, ax=axes, label=_SCORE, aspect=30)
    return Drawn("depths.png", "Score by length and depth of what is asked for.", plotting.png(figure))


def _at_one_depth(outcome: Outcome) -> bool:
    """Not so where there are several needles, of which only the first one's depth is known."""
    one = outcome.suite in _ONE_NEEDLE or outcome.task.startswith("niah_single_")
    return one and outcome.depth is not None


def _depth_rows(outcomes: Iterable[Outcome]) -> tuple[list[str], Callable[[Outcome], int]]:
    """The names of the rows of a heat map, and which is an outcome's."""
    exact = sorted({_depth(outcome) for outcome in outcomes})
    if len(exact) > _DEPTHS:
        return [f"{10 * k} to {10 * (k + 1)}" for k in range(10)], lambda outcome: min(int(10 * _depth(outcome)), 9)
    return [f"{100 * depth:.4g}" for depth in exact], lambda outcome: exact.index(_depth(outcome))


def _depth(outcome: Outcome) -> float:
    return outcome.depth or 0.0


def _speed(results: Results) -> Drawn | None:
    lengths = _lengths(results)
    parts = [part for part in _SPEED if any(part.values(found) for found in results.by_label.values())]
    if len(lengths) < 2 or not parts:
        return None
    figure, axes = plotting.panels(len(parts), columns=2, size=(4.6, 3.6))
    for panel, part in zip(axes, parts, strict=True):
        for index, label in enumerate(results.labels):
            found = [(length, part.values(results.at(label, length))) for length in lengths]
            points = [(length, part.middle(values), None, None) for length, values in found if values]
            plotting.line(panel, points, label, index)
        plotting.number_axis(panel, lengths, _LENGTH, doubling=True)
        panel.set_ylabel(part.name)
        plotting.from_zero([panel], most=part.most)
    plotting.legend(figure, axes, results.labels)
    return Drawn("speed.png", "Acceptance and decoding speed by length.", plotting.png(figure))


@dataclass(frozen=True)
class _Part:
    """A panel of the figure of speed; the first sample of a run may compile, so speeds are medians."""

    name: str
    values: Callable[[Iterable[Outcome]], list[float]]
    middle: Callable[[Iterable[float]], float]
    most: float | None


_SPEED = (
    _Part("accepted drafts, %", acceptances, statistics.fmean, 100),
    _Part("tokens/s, median", speeds, statistics.median, None),
)


def _ablation(results: Results, setting: str) -> Drawn | None:
    """Score and acceptance against one setting: a row of panels a mode, a line a length."""
    series = _series(results, setting)
    if not series:
        return None
    labels = [label for values in series.values() for label in values.values()]
    drafts = any(acceptances(results.by_label[label]) for label in labels)
    name, doubling = _ABLATED[setting]
    figure, axes = plotting.panels(len(series) * (1 + drafts), columns=1 + drafts, size=(4.6, 3.6))
    scored, accepted = axes[:: 1 + drafts], axes[1::2] if drafts else []
    for panel, (title, values) in zip(scored, series.items(), strict=True):
        _ablated_scores(panel, results, values)
        panel.set(title=title, ylabel=_SCORE)
    for panel, (title, values) in zip(accepted, series.items(), strict=bool(accepted)):
        for index, length in enumerate(results.lengths):
            found = [(value, acceptances(results.at(label, length))) for value, label in values.items()]
            points = [(value, statistics.fmean(rates), None, None) for value, rates in found if rates]
            plotting.line(panel, points, named(length), index)
        panel.set(title=title, ylabel="accepted drafts, %")
        plotting.from_zero([panel], most=100)
    for number, values in enumerate(series.values()):
        for panel in axes[number * (1 + drafts) : (number + 1) * (1 + drafts)]:
            plotting.number_axis(panel, list(values), name, doubling=doubling and min(values) > 0)
    plotting.from_zero(scored, most=100)
    plotting.legend(figure, axes, [*map(named, results.lengths), results.labels[0]])
    file = f"{setting.rpartition('.')[2]}.png"
    return Drawn(file, f"Score and acceptance against {name}, a line a length.", plotting.png(figure))


def _ablated_scores(panel: "Axes", results: Results, values: Mapping[float, str]) -> None:
    """A line a length, and dashed the score of the first label, where that is of another mode."""
    first = results.labels[0]
    compared = mode_of(first) not in {mode_of(label) for label in values.values()}
    for index, length in enumerate(results.lengths):
        row = overall(cells_of(results), [length])
        found = [(value, estimate(row, results.by_label[label])) for value, label in values.items()]
        plotting.line(panel, [_point(value, got) for value, got in found if got], named(length), index)
        level = estimate(row, results.by_label[first]) if compared else None
        if level:
            panel.axhline(100 * level.mean, color=plotting.COLOURS[index % 8], linestyle="--", linewidth=1)
    if compared:
        panel.plot([], [], color="grey", linestyle="--", linewidth=1, label=first)


def _series(results: Results, setting: str) -> dict[str, dict[float, str]]:
    """Name -> value of the setting -> label, of labels that differ in nothing else and have two values or more.

    A label that leaves the setting alone has the value of the run's settings.
    """
    groups: dict[str, dict[float, str]] = {}
    named_by: dict[str, bool] = {}
    for label in results.labels:
        changed = dict(results.by_label[label][0].settings)
        if mode_of(label) in ("target", "retrieval") and changed.get("lookup") == "off":
            del changed["lookup"]  # what these modes are without being asked
        said = [key for key in changed if key in (setting, setting.rpartition(".")[2])]
        for key in said:
            del changed[key]
        value = results.settings_of(label).get(setting)
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        words = [part for part in label.split("-")[1:] if part.isalpha()]  # changes without a value: unrelated
        group = "-".join([mode_of(label), *words, *(f"{key}={changed[key]}" for key in sorted(changed))])
        groups.setdefault(group, {})[float(value)] = label
        named_by[group] = named_by.get(group, False) or bool(said)
    return {
        group: dict(sorted(values.items())) for group, values in groups.items() if len(values) > 1 and named_by[group]
    }


def _lengths(results: Results) -> list[int]:
    return [length for length in results.lengths if length is not None]


def _point(place: float, got: Estimate) -> plotting.Point:
    low, high = (None if end is None else 100 * end for end in (got.low, got.high))
    return place, 100 * got.mean, low, high
