# SPDX-License-Identifier: Apache-2.0
"""Scores and paired differences of a task or of an average over tasks, with 95 % intervals."""

from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from rapid_jax.evaluate import ruler, statistics
from rapid_jax.evaluate.results import Outcome, Results
from rapid_jax.evaluate.statistics import FEW, FEWEST, Estimate

NEEDED = (
    f"Intervals and verdicts need {FEW} different questions, and {FEWEST} of every task in an average; "
    "without them scores stand alone."
)
Cell: TypeAlias = tuple[str, int | None]  # task and length
_Scores: TypeAlias = Mapping[str, tuple[Hashable, float]]  # id -> (question, score)


@dataclass(frozen=True)
class Row:
    """A task at a length, or an average of several by weights that sum to 1."""

    name: str
    weights: Mapping[Cell, float]


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
    return _estimate(row, _scores(outcomes))


def pooled(outcomes: Iterable[Outcome]) -> Estimate | None:
    """The mean score of all outcomes alike; None of none."""
    scores = [(_asked(outcome), outcome.score) for outcome in outcomes]
    return statistics.estimate([statistics.Cell(1.0, scores)]) if scores else None


def difference(row: Row, one: Iterable[Outcome], other: Iterable[Outcome]) -> Estimate | None:
    """The row's score in `one` less that in `other`, over the samples that both have; None as `estimate`."""
    ones, others = _scores(one), _scores(other)
    pairs: dict[Cell, _Scores] = {}
    for cell in row.weights:
        mine, theirs = ones.get(cell, {}), others.get(cell, {})
        pairs[cell] = {id: (asked, score - theirs[id][1]) for id, (asked, score) in mine.items() if id in theirs}
    return _estimate(row, pairs, span=(-1.0, 1.0))


def acceptances(outcomes: Iterable[Outcome]) -> list[float]:
    """Of those that drafted, in %."""
    return [100 * outcome.acceptance for outcome in outcomes if outcome.acceptance is not None]


def speeds(outcomes: Iterable[Outcome]) -> list[float]:
    """Tokens a second, of those that have them."""
    return [outcome.tokens_per_second for outcome in outcomes if outcome.tokens_per_second]


def _asked(outcome: Outcome) -> Hashable:
    """What makes samples, as of several lengths, one piece of evidence."""
    return outcome.suite, outcome.question, outcome.answers


def _scores(outcomes: Iterable[Outcome]) -> dict[Cell, _Scores]:
    found: dict[Cell, dict[str, tuple[Hashable, float]]] = {}
    for outcome in outcomes:
        found.setdefault((outcome.task, outcome.length), {})[outcome.id] = _asked(outcome), outcome.score
    return {**found}


def _estimate(row: Row, scores: Mapping[Cell, _Scores], span: tuple[float, float] = (0.0, 1.0)) -> Estimate | None:
    cells = [statistics.Cell(weight, list(scores.get(cell, {}).values())) for cell, weight in row.weights.items()]
    return statistics.estimate(cells, span=span) if all(cell.scores for cell in cells) else None


def percent(share: float) -> str:
    """With one decimal, and no minus before a zero."""
    return f"{_tenths(share):.1f}"


def _tenths(share: float) -> float:
    """In %, rounded to what is printed, so that no "-0.0" is."""
    return round(100 * share, 1) + 0.0


def shown(got: Estimate | None) -> str:
    """A score as 75.0 [70.1, 79.8], or 75.0 alone where there are too few questions for an interval."""
    if not got:
        return "-"
    if got.low is None or got.high is None:
        return percent(got.mean)
    return f"{percent(got.mean)} [{percent(got.low)}, {percent(got.high)}]"


def difference_text(got: Estimate | None) -> str:
    """A difference as +2.5 [+0.4, +4.6], or +2.5 alone where there are too few questions for an interval."""
    if not got:
        return "-"
    if got.low is None or got.high is None:
        return f"{_tenths(got.mean):+.1f}"
    return f"{_tenths(got.mean):+.1f} [{_tenths(got.low):+.1f}, {_tenths(got.high):+.1f}]"
