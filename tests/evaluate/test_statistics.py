# SPDX-License-Identifier: Apache-2.0
"""Bootstrap intervals against known answers: constants, the normal approximation, coverage, questions asked again."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
from scipy.stats import binomtest

from rapid_jax.evaluate import statistics
from rapid_jax.evaluate.statistics import FEW, FEWEST, Cell, estimate
from rapid_jax.runtime.errors import InputError


def cell(scores: Sequence[float], name: str = "", weight: float = 1.0) -> Cell:
    """Scores of questions that only cells of the same name have."""
    return Cell(weight, [(f"{name}{number}", score) for number, score in enumerate(scores)])


def interval(scores: Sequence[float], **more) -> tuple:
    return estimate([cell(scores)], **more)[:3]


def test_few_questions_have_no_interval_and_no_verdict():
    for scores in ([0.1] * 7, [0.1], [0.0] * 3, [0.0, 1.0] * 9 + [1.0], [1.0] * (FEW - 1)):
        found = estimate([cell(scores)])
        assert found.mean == pytest.approx(np.mean(scores)) and found[1:3] == (None, None)
        assert not found.clear and found.verdict == "too few questions"
    assert interval([1.0] * FEW)[1] is not None
    # Neither have many scores of few questions, nor averages with a task of few.
    assert estimate([Cell(1.0, [("one", score) for score in [1.0, 0.0] * 50])])[1:3] == (None, None)
    for count, known in ((FEWEST - 1, False), (FEWEST, True)):
        found = estimate([cell([0.0, 1.0] * 50, "many", 0.5), cell([1.0] * count, "few", 0.5)])
        assert (found.low is not None) == known


@pytest.mark.parametrize("count", [FEW, 50, 1000])
def test_where_nothing_varies_the_interval_is_the_exact_one(count: int):
    """A bootstrap of answers that are all right says that the next one will be."""
    low, high = binomtest(count, count).proportion_ci(method="exact")
    assert interval([1.0] * count) == (1.0, pytest.approx(low), pytest.approx(high))
    assert interval([0.0] * count) == (0.0, 0.0, pytest.approx(1 - low))
    assert interval([0.25] * count) == (0.25, pytest.approx(0.25 * low), pytest.approx(1 - 0.75 * low))
    tied = estimate([cell([0.0] * count)], span=(-1, 1))
    assert tied[:3] == (0.0, pytest.approx(low - 1), pytest.approx(1 - low)) and tied.verdict == "no difference"
    won = estimate([cell([1.0] * count)], span=(-1, 1))
    assert won[:3] == (1.0, pytest.approx(2 * low - 1), 1.0) and won.verdict == "better"
    # Of several tasks alike all questions count, of unlike ones none less than it should.
    alike = estimate([cell([1.0] * count, name, 0.25) for name in "abcd"])
    assert alike.low == pytest.approx(binomtest(4 * count, 4 * count).proportion_ci(method="exact").low)
    unlike = estimate([cell([1.0] * count, "a", 0.5), cell([1.0] * 5 * count, "b", 0.5)])
    assert unlike.low == pytest.approx(binomtest(2 * count, 2 * count).proportion_ci(method="exact").low)


def test_an_interval_is_the_normal_one_where_that_holds():
    scores = [1.0] * 300 + [0.0] * 100
    mean, low, high = interval(scores)
    half = 1.96 * math.sqrt(0.75 * 0.25 / 400)
    assert mean == 0.75
    assert low == pytest.approx(0.75 - half, abs=0.006) and high == pytest.approx(0.75 + half, abs=0.006)
    narrow = interval(scores, level=0.5)
    assert narrow[2] - narrow[1] == pytest.approx((high - low) * 0.6745 / 1.96, rel=0.15)


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    generator = np.random.default_rng(0)
    held = 0
    for trial in range(300):
        _, low, high = interval(list(generator.beta(2, 5, size=40)), seed=trial, resamples=400, level=0.9)
        held += low <= 2 / 7 <= high
    assert 0.83 <= held / 300 <= 0.95


def test_so_they_do_where_questions_are_asked_in_several_cells_or_in_some_of_them():
    """A question is hard or easy wherever it is asked; the second cell lacks some, the third asks others."""
    generator = np.random.default_rng(1)
    held, apart = 0, 0
    for trial in range(300):
        hard = generator.beta(0.6, 0.6, size=80)
        asked = (range(40), range(30), range(40, 80))
        cells = [Cell(1 / 3, [(q, float(generator.random() < hard[q])) for q in part]) for part in asked]
        found = estimate(cells, seed=trial, resamples=400, level=0.9)
        held += found.low <= 0.5 <= found.high
        renamed = [Cell(1 / 3, [((place, q), x) for q, x in one.scores]) for place, one in enumerate(cells)]
        found = estimate(renamed, seed=trial, resamples=400, level=0.9)
        apart += found.low <= 0.5 <= found.high
    assert 0.85 <= held / 300 <= 0.95 and apart < held


def test_results_depend_on_the_seed_alone(monkeypatch):
    scores = list(np.random.default_rng(1).uniform(size=50))
    once = interval(scores, seed=3)
    assert once == interval(scores, seed=3) and once[1:] != interval(scores, seed=4)[1:]
    assert once[1:] == interval(scores[::-1], seed=3)[1:]
    monkeypatch.setattr(statistics, "_BLOCK", 120)  # two resamples at a time
    assert interval(scores, seed=3, resamples=501) == interval(scores, seed=3, resamples=501)
    assert interval(scores, seed=3)[1:] == pytest.approx(once[1:], abs=1e-12)


def test_verdicts_need_an_interval_without_zero_and_enough_questions():
    generator = np.random.default_rng(0)
    better = estimate([cell([0.05 + 0.02 * (index % 3 - 1) for index in range(60)])])
    assert better.clear and better.verdict == "better" and 0.04 < better.low < 0.05 < better.high < 0.06
    worse = estimate([cell([-1.0, -0.5] * 10)])
    assert worse.clear and worse.verdict == "worse" and worse.scores == worse.questions == 20
    few = estimate([cell([1.0, 0.5] * 9 + [0.5])])
    assert not few.clear and few.verdict == "too few questions"
    none = estimate([cell([float(x) for x in generator.integers(-1, 2, size=80)])])
    assert none.low < 0 < none.high and not none.clear and none.verdict == "no difference"
    # One of twenty better: an interval that begins at 0 exactly, whatever is rounded.
    for count in range(20, 60):
        assert estimate([cell([1.0] + [0.0] * (count - 1))]).low == 0


def test_tasks_count_by_their_weights_and_are_resampled_apart():
    few, many = cell([1.0] * 5, "few", 0.5), cell([0.0] * 500, "many", 0.5)
    found = estimate([few, many])  # one pool of scores would vary, and have another mean
    assert found.mean == 0.5 and found.low == pytest.approx(0.5 * 0.025 ** (1 / 5))
    assert found.high == pytest.approx(1 - 0.5 * 0.025 ** (1 / 500))
    scores = {"b": [0.0, 1.0] * 50, "a": [1.0, 0.0, 0.0, 0.0] * 25, "c": [0.3] * 5}
    mixed = [cell(found, name, weight) for weight, (name, found) in zip((0.5, 0.3, 0.2), scores.items(), strict=True)]
    found = estimate(mixed)
    assert found.mean == pytest.approx(0.5 * 0.5 + 0.3 * 0.25 + 0.2 * 0.3) and found.scores == found.questions == 205
    half = 1.96 * math.sqrt(0.25 * 0.25 / 100 + 0.09 * 0.1875 / 100)
    assert found.high - found.mean == pytest.approx(half, rel=0.15)
    assert found.mean - found.low == pytest.approx(half, rel=0.15)
    assert found[1:] == estimate(mixed[::-1])[1:]
    assert estimate(mixed, seed=1)[1:3] != found[1:3]


def test_a_question_that_is_asked_again_is_one_piece_of_evidence():
    scores = [float(x) for x in np.random.default_rng(3).integers(0, 2, size=100)]
    once = estimate([cell(scores)])
    twice = estimate([cell(scores, weight=0.5), cell(scores, weight=0.5)])
    assert twice[:3] == pytest.approx(once[:3], abs=1e-9) and (twice.scores, twice.questions) == (200, 100)
    # In one cell, too; other questions narrow the interval.
    pooled = estimate([Cell(1.0, [*cell(scores).scores, *cell(scores).scores])])
    assert pooled[:3] == pytest.approx(once[:3], abs=1e-9)
    others = estimate([cell(scores, weight=0.5), cell(scores, "other", 0.5)])
    assert others.high - others.low == pytest.approx((once.high - once.low) / math.sqrt(2), rel=0.1)
    # Right in one cell where it is wrong in the other: nothing varies.
    against = estimate([cell(scores, weight=0.5), cell([1 - score for score in scores], weight=0.5)])
    half = 0.5 * (1 - 0.025 ** (1 / 100))
    assert against[:3] == pytest.approx((0.5, 0.5 - half, 0.5 + half), abs=1e-9)


def test_what_cannot_be_averaged_is_an_input_error():
    for scores in ([], [0.5, math.nan], [math.inf]):
        with pytest.raises(InputError, match="expected at least one number, all of them finite"):
            interval(scores)
        with pytest.raises(InputError, match="expected at least one number, all of them finite"):
            estimate([cell([1.0]), cell(scores)])
    with pytest.raises(InputError, match="at least one task"):
        estimate([])
    for weight in (0.0, -1.0, math.nan):
        with pytest.raises(InputError, match="expected weights above 0, got"):
            estimate([cell([1.0], weight=weight)])
    for resamples, level in ((10, 1.0), (10, 0.0), (0, 0.5)):
        with pytest.raises(InputError, match="expected resamples >= 1 and a level between 0 and 1"):
            interval([0.0, 1.0], resamples=resamples, level=level)
