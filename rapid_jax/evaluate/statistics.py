# SPDX-License-Identifier: Apache-2.0
"""How sure a mean of scores, or of paired differences of them, is: a bootstrap of questions."""

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np

from rapid_jax.runtime.errors import InputError

FEW = 20  # questions below which a bootstrap interval is too narrow to be relied on
_BLOCK = 1 << 22  # numbers drawn at a time


class Cell(NamedTuple):
    """Scores that are averaged alike, as of a task at a length, and what their mean counts in the whole."""

    weight: float
    scores: Sequence[tuple[Hashable, float]]  # (the question, its score)


class Estimate(NamedTuple):
    """A mean and the ends of its interval: from 0 to 1 or, of differences, from -1 to 1."""

    mean: float
    low: float
    high: float
    scores: int  # how many, or pairs of them
    questions: int  # different ones

    @property
    def few(self) -> bool:
        """Whether the interval is too narrow to be relied on."""
        return self.questions < FEW

    @property
    def clear(self) -> bool:
        """Of a difference: whether its interval leaves out 0; if not, it is to be reported as none."""
        return self.low > 0 or self.high < 0

    @property
    def sure(self) -> bool:
        """Of a difference: whether it is clear, and the interval to be relied on."""
        return self.clear and not self.few

    @property
    def verdict(self) -> str:
        """Of a difference: what is to be said of it."""
        said = "no difference" if not self.clear else "better" if self.mean > 0 else "worse"
        return f"{said} (few samples)" if self.few else said


def estimate(cells: Sequence[Cell], *, seed: int = 0, resamples: int = 2000, level: float = 0.95) -> Estimate:
    """The weighted sum of the cells' means, and its percentile bootstrap interval.

    What is drawn with replacement are questions, each with all of its scores: one that is asked at several lengths or
    in several tasks is one piece of evidence, not several. Questions are drawn among those of their own cell, and of
    cells that share some; the cells are taken as given, so the interval is of these tasks, not of tasks like them.
    A question adds weight (score - mean) / count of each of its scores' cells: exactly the mean of what is drawn where
    every question is in the same cells, else to first order.

    Equal arguments give equal results, in any order of cells and scores. Scores that are all the same give that value
    three times; so does a single score. Such an interval of no width says that the scores do not vary, not that the
    mean is known: with few scores (ten of ten right) the truth may well lie outside. Below FEW questions the interval
    is too narrow in general. Raises InputError for no cells, no scores in one, a number that is not finite, a weight
    that is not above 0, and a level outside (0, 1).
    """
    if resamples < 1 or not 0 < level < 1:
        raise InputError(f"expected resamples >= 1 and a level between 0 and 1, got {resamples} and {level}")
    weights, values = _checked(cells)
    # The least and the most that a draw can be.
    mean, least, most = (float(weights @ [of(scores) for scores in values]) for of in (_mean, np.min, np.max))
    generator = np.random.default_rng(seed)
    draws = np.full(resamples, mean)
    strata = _strata(cells)
    for parts in strata:
        draws += parts.size * _means(parts, generator, resamples)
    draws = np.clip(np.round(draws, 12), least, most)  # a draw of 0 is 0, not a little above
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    questions = sum(parts.size for parts in strata)
    return Estimate(mean, float(low), float(high), sum(scores.size for scores in values), questions)


def _checked(cells: Sequence[Cell]) -> tuple[np.ndarray, list[np.ndarray]]:
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


def _strata(cells: Sequence[Cell]) -> list[np.ndarray]:
    """What each question moves the mean by, put together by the questions that are drawn among each other."""
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
    return [np.asarray(parts) for parts in sorted(map(sorted, found.values()))]


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
