# SPDX-License-Identifier: Apache-2.0
"""How sure a mean of scores is: bootstrap intervals of means, of paired differences and of averages over tasks."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from rapid_jax.runtime.errors import InputError

_BLOCK = 1 << 22  # scores drawn at a time


class Interval(NamedTuple):
    """A mean and the ends of its interval."""

    mean: float
    low: float
    high: float


class Difference(NamedTuple):
    """The mean of paired differences, the ends of its interval, and of how many pairs."""

    mean: float
    low: float
    high: float
    pairs: int

    @property
    def clear(self) -> bool:
        """Whether the interval excludes 0; if not, the difference is to be reported as none."""
        return self.low > 0 or self.high < 0


def interval(scores: Sequence[float], *, seed: int = 0, resamples: int = 2000, level: float = 0.95) -> Interval:
    """The mean of the scores and its percentile bootstrap interval; equal arguments give equal results.

    Scores that are all the same give that value three times, exactly; so does a single score. Such an interval of no
    width says that the scores do not vary, not that the mean is known: with few scores (ten of ten right) the truth may
    well lie outside. Below some 20 scores the interval is too narrow in general. Raises InputError for no scores, for
    one that is not finite, and for a level outside (0, 1).
    """
    values = _values(scores, "scores")
    low, high = _ends(_means(values, np.random.default_rng(seed), _checked(resamples, level)), level)
    return Interval(_mean(values), low, high)


def difference(
    a: Mapping[str, float], b: Mapping[str, float], *, seed: int = 0, resamples: int = 2000, level: float = 0.95
) -> Difference:
    """The mean of a - b over the ids that both have, and its bootstrap interval: whole pairs are drawn.

    Pairing takes out what makes a question hard for both: the interval is narrower than one from two separate means.
    What `interval` says of few and of equal scores holds of the differences. Raises InputError if no id is in both.
    """
    common = sorted(a.keys() & b.keys())
    if not common:
        raise InputError(f"expected two runs with questions in common, got {len(a)} and {len(b)} with none")
    pairs = [a[id] - b[id] for id in common]
    return Difference(*interval(pairs, seed=seed, resamples=resamples, level=level), len(common))


def mean_of_tasks(
    by_task: Mapping[str, Sequence[float]], *, seed: int = 0, resamples: int = 2000, level: float = 0.95
) -> Interval:
    """The average of the tasks' means, each task counting the same, and its stratified bootstrap interval.

    Every task is resampled among its own scores; the tasks themselves are taken as given, so the interval is of these
    tasks, not of tasks like them. The order of the mapping does not matter. Raises InputError for no tasks and for one
    without scores.
    """
    if not by_task:
        raise InputError("expected the scores of at least one task, got none")
    generator, resamples = np.random.default_rng(seed), _checked(resamples, level)
    values = {task: _values(by_task[task], f"scores of {task}") for task in sorted(by_task)}
    draws = np.mean([_means(scores, generator, resamples) for scores in values.values()], axis=0)
    mean = np.mean([[_mean(scores)] for scores in values.values()], axis=0)  # added up as the draws are
    return Interval(float(mean[0]), *_ends(draws, level))


def _values(scores: Sequence[float], name: str) -> np.ndarray:
    values = np.asarray(scores, np.float64)
    if values.ndim != 1 or not values.size or not np.isfinite(values).all():
        raise InputError(f"{name}: expected at least one number, all of them finite, got {values.size} of them")
    return values


def _checked(resamples: int, level: float) -> int:
    if resamples < 1 or not 0 < level < 1:
        raise InputError(f"expected resamples >= 1 and a level between 0 and 1, got {resamples} and {level}")
    return resamples


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


def _ends(means: np.ndarray, level: float) -> tuple[float, float]:
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
