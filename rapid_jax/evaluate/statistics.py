# SPDX-License-Identifier: Apache-2.0
"""How sure a mean of scores, or of paired differences of them, is: a bootstrap of questions."""

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np

from rapid_jax.runtime.errors import InputError

FEW = 20  # different questions below which there is no interval and no verdict: a bootstrap of them is too narrow
FEWEST = 5  # the same of the questions of any one task in an average
_BLOCK = 1 << 22  # numbers drawn at a time


class Cell(NamedTuple):
    """Scores that are averaged alike, as of a task at a length, and what their mean counts in the whole."""

    weight: float
    scores: Sequence[tuple[Hashable, float]]  # (the question, its score)


class Estimate(NamedTuple):
    """A mean and the ends of its interval: from 0 to 1 or, of differences, from -1 to 1."""

    mean: float
    low: float | None  # both None where there are too few questions for an interval
    high: float | None
    scores: int  # how many, or pairs of them
    questions: int  # different ones

    @property
    def clear(self) -> bool:
        """Of a difference: whether it has an interval that leaves out 0; if not, it is to be reported as none."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)

    @property
    def verdict(self) -> str:
        """Of a difference: what is to be said of it."""
        if self.low is None:
            return "too few questions"
        return "no difference" if not self.clear else "better" if self.mean > 0 else "worse"


class _Stratum(NamedTuple):
    """Questions that are drawn among each other."""

    moves: np.ndarray  # what each of them moves the mean by
    cells: list[int]  # that they are in


def estimate(
    cells: Sequence[Cell],
    *,
    span: tuple[float, float] = (0.0, 1.0),
    seed: int = 0,
    resamples: int = 2000,
    level: float = 0.95,
) -> Estimate:
    """The weighted sum of the cells' means, and its percentile bootstrap interval; scores lie in `span`.

    What is drawn with replacement are questions, each with all of its scores: one that is asked at several lengths or
    in several tasks is one piece of evidence, not several. Questions are drawn among those of their own cell, and of
    cells that share some; the cells are taken as given, so the interval is of these tasks, not of tasks like them.
    A question adds weight (score - mean) / count of each of its scores' cells: exactly the mean of what is drawn where
    every question is in the same cells, else to first order.

    There is no interval of fewer than FEW questions, nor where fewer than FEWEST are drawn among each other. Where no
    draw differs from another (all answers right) a bootstrap says nothing: the interval is then the exact one of how
    often other questions would come out differently (`_unseen`). Equal arguments give equal results, in any order of
    cells and scores. Raises InputError for no cells, no scores in one, a number that is not finite, a weight that is
    not above 0, and a level outside (0, 1).
    """
    if resamples < 1 or not 0 < level < 1:
        raise InputError(f"expected resamples >= 1 and a level between 0 and 1, got {resamples} and {level}")
    weights, values = _check(cells)
    # The least and the most that a draw can be.
    mean, least, most = (float(weights @ [of(scores) for scores in values]) for of in (_mean, np.min, np.max))
    strata = _strata(cells)
    sizes = [moves.size for moves, _ in strata]
    count, questions = sum(scores.size for scores in values), sum(sizes)
    if questions < FEW or min(sizes) < FEWEST:
        return Estimate(mean, None, None, count, questions)
    generator = np.random.default_rng(seed)
    draws = np.full(resamples, mean)
    for moves, _ in strata:
        draws += moves.size * _means(moves, generator, resamples)
    draws = np.clip(np.round(draws, 12), least, most)  # a draw of 0 is 0, not a little above
    low, high = map(float, np.quantile(draws, [(1 - level) / 2, (1 + level) / 2]))
    if draws.min() == draws.max():
        low = mean - _unseen(strata, level, [w * (_mean(x) - span[0]) for w, x in zip(weights, values, strict=True)])
        high = mean + _unseen(strata, level, [w * (span[1] - _mean(x)) for w, x in zip(weights, values, strict=True)])
    return Estimate(mean, float(low), float(high), count, questions)


def _unseen(strata: Sequence[_Stratum], level: float, reaches: Sequence[float]) -> float:
    """How far the mean may be off where all questions came out alike and others could move each cell by its reach.

    Of one stratum of n this is Clopper and Pearson's bound (Biometrika 26, 1934) for none of n, times the reach. Of
    several it is that of the fewest questions for what they count, which is at least as wide (by Jensen's inequality).
    """
    found = [(moves.size, max(sum(reaches[cell] for cell in cells), 0.0)) for moves, cells in strata]
    whole = sum(reach for _, reach in found)
    counts = [size * whole / reach for size, reach in found if reach > 0]
    return whole * (1 - ((1 - level) / 2) ** (1 / min(counts))) if counts else 0.0


def _check(cells: Sequence[Cell]) -> tuple[np.ndarray, list[np.ndarray]]:
    """The weights and the scores of the cells."""
    if not cells:
        raise InputError("expected the scores of at least one task, got none")
    weights = np.asarray([cell.weight for cell in cells], np.float64)
    if not (np.isfinite(weights).all() and (weights > 0).all()):
        raise InputError(f"expected weights above 0, got {weights.tolist()}")
    values = [np.asarray([score for _, score in cell.scores], np.float64) for cell in cells]
    for scores in values:
        if not scores.size or not np.isfinite(scores).all():
            raise InputError(f"expected at least one number, all of them finite, got {scores.size} of them")
    return weights, values


def _strata(cells: Sequence[Cell]) -> list[_Stratum]:
    """All questions, put together by the cells that share some."""
    moves: dict[Hashable, float] = {}
    first: dict[Hashable, int] = {}  # question -> a cell that it is in
    joined = list(range(len(cells)))  # cell -> another cell that shares questions with it, or itself

    def root(cell: int) -> int:
        while joined[cell] != cell:
            cell = joined[cell]
        return cell

    for place, (weight, scores) in enumerate(cells):
        mean = _mean(np.asarray([score for _, score in scores], np.float64))
        for question, score in scores:
            moves[question] = moves.get(question, 0.0) + weight * (score - mean) / len(scores)
            joined[root(place)] = root(first.setdefault(question, place))
    found: dict[int, list[float]] = {}
    for question, move in moves.items():
        found.setdefault(root(first[question]), []).append(move)
    members = {place: [cell for cell in range(len(cells)) if root(cell) == place] for place in found}
    strata = [_Stratum(np.asarray(sorted(parts)), members[place]) for place, parts in found.items()]
    return sorted(strata, key=lambda stratum: stratum.moves.tolist())


def _mean(values: np.ndarray) -> float:
    # The rounded sum of equal values is not always a multiple of them.
    return float(values[0] if (values == values[0]).all() else values.mean())


def _means(values: np.ndarray, generator: np.random.Generator, resamples: int) -> np.ndarray:
    """[resamples]: means of as many values as there are, drawn with replacement."""
    if (values == values[0]).all():
        return np.full(resamples, values[0])
    rows = max(_BLOCK // values.size, 1)
    blocks = [min(rows, resamples - start) for start in range(0, resamples, rows)]
    return np.concatenate([values[generator.integers(values.size, size=(n, values.size))].mean(1) for n in blocks])
