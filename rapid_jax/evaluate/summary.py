# SPDX-License-Identifier: Apache-2.0
"""Scores and paired differences of a task or of an average over tasks, with 95 % intervals."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from rapid_jax.evaluate import ruler, statistics
from rapid_jax.evaluate.results import Outcome, Results

FEW = 20  # samples below which a bootstrap interval is too narrow to be relied on

Cell: TypeAlias = tuple[str, int | None]  # task and length


@dataclass(frozen=True)
class Row:
    """A task at a length, or an average of several by weights that sum to 1."""

    name: str
    weights: Mapping[Cell, float]


@dataclass(frozen=True)
class Estimate:
    """A mean and its interval, from 0 to 1 or, of differences, from -1 to 1."""

    mean: float
    low: float
    high: float
    count: int  # samples, or pairs of them

    @property
    def clear(self) -> bool:
        """Of a difference: whether its interval leaves out 0."""
        return self.low > 0 or self.high < 0

    @property
    def verdict(self) -> str:
        """Of a difference."""
        return "no difference" if not self.clear else "better" if self.mean > 0 else "worse"


def cells_of(results: Results) -> list[Cell]:
    """All tasks and lengths that have a sample, in the order of the files."""
    return list(dict.fromkeys((o.task, o.length) for outcomes in results.by_label.values() for o in outcomes))


def rows(suite: str, cells: Collection[Cell], length: int | None) -> list[Row]:
    """Of one length: its tasks, then the averages: none of one task; of RULER LongPO's too, if all of it is there."""
    tasks = [task for task, at in cells if at == length]
    found = [Row(task, {(task, length): 1.0}) for task in tasks]
    if len(tasks) > 1:
        found.append(overall(cells, [length]))
    groups = ruler.GROUPS
    if suite == "ruler" and all(task in tasks for members in groups.values() for task in members):
        weights = {(task, length): 1 / len(groups) / len(members) for members in groups.values() for task in members}
        found.append(Row(f"average of {', '.join(groups)}", weights))
    return found


def overall(cells: Collection[Cell], lengths: Sequence[int | None]) -> Row:
    """The one number of these lengths: the mean of the means of their tasks, each of which counts the same."""
    some = [cell for cell in cells if cell[1] in lengths]
    tasks = list(dict.fromkeys(task for task, _ in some))
    name = f"average of {len(tasks)} tasks" if len(tasks) > 1 else tasks[0]
    return Row(name, dict.fromkeys(some, 1 / len(some)))


def estimate(row: Row, outcomes: Iterable[Outcome]) -> Estimate | None:
    """The row's score among the outcomes; None if one of its cells has none."""
    return _estimate(row, {cell: list(scores.values()) for cell, scores in _scores(outcomes).items()})


def pooled(outcomes: Iterable[Outcome]) -> Estimate | None:
    """The mean score of all outcomes alike; None of none."""
    scores = [outcome.score for outcome in outcomes]
    return Estimate(*statistics.interval(scores), len(scores)) if scores else None


def difference(row: Row, one: Iterable[Outcome], other: Iterable[Outcome]) -> Estimate | None:
    """The row's score in `one` less that in `other`, over the samples that both have; None as `estimate`."""
    ones, others = _scores(one), _scores(other)
    pairs = {}
    for cell in row.weights:
        mine, theirs = ones.get(cell, {}), others.get(cell, {})
        pairs[cell] = [mine[id] - theirs[id] for id in sorted(mine.keys() & theirs.keys())]
    return _estimate(row, pairs)


def _scores(outcomes: Iterable[Outcome]) -> dict[Cell, dict[str, float]]:
    """Cell -> id -> score."""
    found: dict[Cell, dict[str, float]] = {}
    for outcome in outcomes:
        found.setdefault((outcome.task, outcome.length), {})[outcome.id] = outcome.score
    return found


def _estimate(row: Row, values: Mapping[Cell, Sequence[float]]) -> Estimate | None:
    some = {cell: values.get(cell, ()) for cell in row.weights}
    if not all(some.values()):
        return None
    count = sum(map(len, some.values()))
    if len(some) == 1:
        return Estimate(*statistics.interval(*some.values()), count)
    # mean_of_tasks weighs every task the same: other weights go into the scores.
    scaled = {}
    for (task, length), scores in some.items():
        scale = row.weights[task, length] * len(some)
        even = abs(scale - 1) < 1e-9
        scaled[f"{task}/{length}"] = scores if even else [scale * score for score in scores]
    return Estimate(*statistics.mean_of_tasks(scaled), count)


def percent(share: float) -> str:
    """With one decimal and without a sign of its own."""
    return f"{100 * share:.1f}"


def shown(got: Estimate | None) -> str:
    """A score as 75.0 [70.1, 79.8]."""
    return f"{percent(got.mean)} [{percent(got.low)}, {percent(got.high)}]" if got else "-"


def shown_difference(got: Estimate | None) -> str:
    """A difference as +2.5 [+0.4, +4.6]."""
    if not got:
        return "-"
    mean, low, high = (round(100 * part, 1) + 0.0 for part in (got.mean, got.low, got.high))  # + 0.0: no "-0.0"
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"
