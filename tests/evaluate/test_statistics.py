# SPDX-License-Identifier: Apache-2.0
"""Bootstrap intervals against known answers: constants, the normal approximation, coverage."""

import math

import numpy as np
import pytest

from rapid_jax.evaluate import statistics
from rapid_jax.evaluate.statistics import difference, interval, mean_of_tasks
from rapid_jax.runtime.errors import InputError


def test_equal_scores_and_a_single_one_are_exact():
    for scores in ([0.1] * 7, [0.1], [1.0] * 1000, [0.0] * 3):
        assert interval(scores) == (scores[0], scores[0], scores[0])


def test_an_interval_is_the_normal_one_where_that_holds():
    scores = [1.0] * 300 + [0.0] * 100
    mean, low, high = interval(scores)
    half = 1.96 * math.sqrt(0.75 * 0.25 / 400)
    assert mean == 0.75
    assert low == pytest.approx(0.75 - half, abs=0.006) and high == pytest.approx(0.75 + half, abs=0.006)
    narrow = interval(scores, level=0.5)
    assert narrow.high - narrow.low == pytest.approx((high - low) * 0.6745 / 1.96, rel=0.15)


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    generator = np.random.default_rng(0)
    held = 0
    for trial in range(300):
        _, low, high = interval(list(generator.beta(2, 5, size=40)), seed=trial, resamples=400, level=0.9)
        held += low <= 2 / 7 <= high
    assert 0.83 <= held / 300 <= 0.95


def test_results_depend_on_the_seed_alone(monkeypatch):
    scores = list(np.random.default_rng(1).uniform(size=50))
    once = interval(scores, seed=3)
    assert once == interval(scores, seed=3) and once[1:] != interval(scores, seed=4)[1:]
    monkeypatch.setattr(statistics, "_BLOCK", 120)  # two resamples at a time
    assert interval(scores, seed=3, resamples=501) == interval(scores, seed=3, resamples=501)
    assert interval(scores, seed=3)[1:] == pytest.approx(once[1:], abs=1e-12)


def test_a_difference_is_paired_over_the_common_ids():
    generator = np.random.default_rng(0)
    hardness = {f"q{i}": float(value) for i, value in enumerate(generator.uniform(0, 0.9, size=60))}
    better = {id: value + 0.05 + 0.02 * (index % 3 - 1) for index, (id, value) in enumerate(hardness.items())}
    found = difference({**better, "only here": 0.0}, {"only there": 1.0, **hardness})
    assert found.mean == pytest.approx(0.05) and found.pairs == 60
    assert found.clear and 0.04 < found.low < 0.05 < found.high < 0.06
    # Not so without the pairs: the means' own intervals overlap.
    assert interval(list(better.values())).low < interval(list(hardness.values())).high
    other = difference(hardness, better)
    assert other.clear and other.mean == pytest.approx(-0.05) and other.high < 0
    # The order of the mappings does not matter.
    assert found == difference(dict(reversed(better.items())), hardness)


def test_no_difference_is_not_clear():
    generator = np.random.default_rng(2)
    one, two = ({str(i): float(x) for i, x in enumerate(generator.integers(0, 2, size=80))} for _ in range(2))
    found = difference(one, two)
    assert not found.clear and found.low < 0 < found.high
    same = difference(one, one)
    assert same == (0, 0, 0, 80) and not same.clear
    assert difference({"a": 1.0}, {"a": 0.5}) == (0.5, 0.5, 0.5, 1)


def test_tasks_count_the_same_and_are_resampled_apart():
    scores = {"few": [1.0] * 5, "many": [0.0] * 500}
    assert mean_of_tasks(scores) == (0.5, 0.5, 0.5)  # one pool of scores would vary, and have another mean
    mixed = {"b": [0.0, 1.0] * 50, "a": [1.0, 0.0, 0.0, 0.0] * 25, "c": [0.3]}
    found = mean_of_tasks(mixed)
    assert found.mean == pytest.approx((0.5 + 0.25 + 0.3) / 3)
    half = 1.96 * math.sqrt(0.25 / 100 + 0.1875 / 100) / 3
    assert found.high - found.mean == pytest.approx(half, rel=0.15)
    assert found.mean - found.low == pytest.approx(half, rel=0.15)
    assert found == mean_of_tasks(dict(sorted(mixed.items())))
    assert mean_of_tasks(mixed, seed=1)[1:] != found[1:]
    constant = mean_of_tasks({name: [0.1] * 3 for name in "abcdefg"})
    assert constant.low == constant.mean == constant.high


def test_what_cannot_be_averaged_is_an_input_error():
    for scores in ([], [0.5, math.nan], [math.inf]):
        with pytest.raises(InputError, match="expected at least one number, all of them finite"):
            interval(scores)
    with pytest.raises(InputError, match="scores of vt: expected at least one"):
        mean_of_tasks({"niah": [1.0], "vt": []})
    with pytest.raises(InputError, match="at least one task"):
        mean_of_tasks({})
    with pytest.raises(InputError, match="with none"):
        difference({"a": 1.0}, {"b": 1.0})
    for resamples, level in ((10, 1.0), (10, 0.0), (0, 0.5)):
        with pytest.raises(InputError, match="expected resamples >= 1 and a level between 0 and 1"):
            interval([0.0, 1.0], resamples=resamples, level=level)
