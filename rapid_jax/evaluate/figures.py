# SPDX-License-Identifier: Apache-2.0
"""The figures of a report with the numbers in them: each is made only where there is data for it."""

import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from rapid_jax.evaluate import ablation, plotting
from rapid_jax.evaluate.results import Outcome, Results, named
from rapid_jax.evaluate.statistics import Estimate
from rapid_jax.evaluate.summary import Row, acceptances, cells_of, estimate, overall, rows, speeds
from rapid_jax.runtime.errors import printable
from rapid_jax.runtime.figure_files import figure_files

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_DEPTHS = 12  # more different ones are put together by tenths
_ONE_NEEDLE = ("needle", "qa")  # suites; of RULER only niah_single_*
_LENGTH = "length, tokens"


def draw(results: Results) -> list[plotting.Drawn]:
    """All figures that there is data for, in the order of the report. Equal results give equal bytes."""
    results = _printable(results)
    with plotting.texts_as_they_are():
        made = [_scores(results), _one_length(results), _tasks(results), _depths(results), _speed(results)]
        made += [ablation.figure(results, setting) for setting in ablation.SETTINGS]
    return [figure for figure in made if figure]


def _printable(results: Results) -> Results:
    """The same with names that any font and any terminal can show."""
    by_label = {
        printable(label): tuple(replace(outcome, task=printable(outcome.task)) for outcome in outcomes)
        for label, outcomes in results.by_label.items()
    }
    return replace(results, by_label=by_label)


def _scores(results: Results) -> plotting.Drawn | None:
    lengths = _lengths(results)
    if len(lengths) < 2:
        return None
    figure, axes = plotting.panels(1, columns=1, size=(6.4, 4))
    averages = {length: overall(cells_of(results), [length]) for length in lengths}
    rows = _score_lines(axes[0], results, averages)
    axes[0].set(ylabel=plotting.SCORE, title=" / ".join(dict.fromkeys(row.name for row in averages.values())))
    plotting.from_zero(axes, most=100)
    plotting.legend(figure, axes, results.labels)
    return plotting.Drawn("scores", "Score by length, with 95 % intervals.", figure_files(figure, rows))


def _one_length(results: Results) -> plotting.Drawn | None:
    """Instead of lines by length: a mark a task and label."""
    count = len(results.labels)
    if len(results.lengths) != 1 or count * len(results.tasks) < 2:
        return None
    length = results.lengths[0]
    table = rows(results.suite, cells_of(results), length)
    height = 0.12 + 0.16 * count
    numbers = []
    figure, axes = plotting.panels(1, columns=1, size=(6.4, 0.9 + height * len(table)))
    for index, label in enumerate(results.labels):
        found = [(place, estimate(row, results.by_label[label])) for place, row in enumerate(table)]
        numbers += [_numbers(table[place].name, label, length, got) for place, got in found if got]
        beside = 0.7 * ((index + 0.5) / count - 0.5)
        plotting.dots(
            axes[0], [(place + beside, plotting.score_point(0, got)) for place, got in found if got], label, index
        )
    axes[0].set_yticks(range(len(table)), [row.name for row in table])
    axes[0].set(xlabel=plotting.SCORE, xlim=(-2, 104), ylim=(len(table) - 0.5, -0.5))
    axes[0].grid(alpha=0.3, axis="x")
    plotting.legend(figure, axes, results.labels)
    return plotting.Drawn("scores", "Scores with 95 % intervals.", figure_files(figure, numbers))


def _tasks(results: Results) -> plotting.Drawn | None:
    lengths = _lengths(results)
    if len(lengths) < 2 or len(results.tasks) < 2:
        return None
    figure, axes = plotting.panels(len(results.tasks), columns=4, size=(3.1, 2.5))
    numbers = []
    for panel, task in zip(axes, results.tasks, strict=True):
        by_length = {length: Row(task, {(task, length): 1.0}) for length in lengths}
        numbers += _score_lines(panel, results, by_length, thin=True)
        panel.set_title(task, fontsize=10)
        panel.set_xlabel("")
    plotting.from_zero(axes, most=100)
    figure.supxlabel(_LENGTH, fontsize=10)
    figure.supylabel(plotting.SCORE, fontsize=10)
    plotting.legend(figure, axes, results.labels)
    return plotting.Drawn(
        "tasks", "Score by length, a panel a task, with 95 % intervals.", figure_files(figure, numbers)
    )


def _score_lines(
    panel: "Axes", results: Results, by_length: Mapping[int, Row], *, thin: bool = False
) -> list[dict[str, Any]]:
    """Draws a line a label; returns the numbers in it."""
    count, numbers = len(results.labels), []
    for index, label in enumerate(results.labels):
        found = [(length, estimate(row, results.by_label[label])) for length, row in by_length.items()]
        points = [plotting.score_point(plotting.beside(length, index, count), got) for length, got in found if got]
        plotting.line(panel, points, label, index, thin=thin)
        numbers += [_numbers(by_length[length].name, label, length, got) for length, got in found if got]
    plotting.number_axis(panel, list(by_length), _LENGTH, doubling=True)
    return numbers


def _depths(results: Results) -> plotting.Drawn | None:
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
    numbers = []
    for panel, (label, found) in zip(axes, placed.items(), strict=True):
        cells: dict[tuple[int, int], list[float]] = {}
        for outcome in found:
            cells.setdefault((row_of(outcome), lengths.index(outcome.length)), []).append(100 * outcome.score)
        means = {place: statistics.fmean(scores) for place, scores in cells.items()}
        image = plotting.heat(panel, means, len(names), len(lengths))
        numbers += [
            {"mode": label, "depth": names[row], "length": lengths[column], "score": mean}
            for (row, column), mean in sorted(means.items())
        ]
        panel.set_title(label, fontsize=10)
        panel.set_xticks(range(len(lengths)), [named(length) for length in lengths])
        panel.set_yticks(range(len(names)), names)
    figure.supxlabel(_LENGTH, fontsize=10)
    figure.supylabel("depth, % of the document", fontsize=10)
    figure.colorbar(image, ax=axes, label=plotting.SCORE, aspect=30)
    return plotting.Drawn("depths", "Score by length and depth of what is asked for.", figure_files(figure, numbers))


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


def _speed(results: Results) -> plotting.Drawn | None:
    lengths = _lengths(results)
    parts = [part for part in _SPEED if any(part.values(found) for found in results.by_label.values())]
    if len(lengths) < 2 or not parts:
        return None
    figure, axes = plotting.panels(len(parts), columns=2, size=(4.6, 3.6))
    numbers = []
    for panel, part in zip(axes, parts, strict=True):
        for index, label in enumerate(results.labels):
            found = [(length, part.values(results.at(label, length))) for length in lengths]
            points = [(length, part.middle(values), None, None) for length, values in found if values]
            plotting.line(panel, points, label, index)
            numbers += [{"what": part.name, "mode": label, "length": at, "value": middle} for at, middle, *_ in points]
        plotting.number_axis(panel, lengths, _LENGTH, doubling=True)
        panel.set_ylabel(part.name)
        plotting.from_zero([panel], most=part.most)
    plotting.legend(figure, axes, results.labels)
    return plotting.Drawn("speed", "Acceptance and decoding speed by length.", figure_files(figure, numbers))


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


def _lengths(results: Results) -> list[int]:
    return [length for length in results.lengths if length is not None]


def _numbers(task: str, label: str, length: int | None, got: Estimate) -> dict[str, Any]:
    """A score as a row of a table."""
    _, score, low, high = plotting.score_point(0, got)
    return {"task": task, "mode": label, "length": length, "score": score, "low": low, "high": high}
