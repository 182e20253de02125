# SPDX-License-Identifier: Apache-2.0
"""What choosing gamma by the clock costs: tokens a second against the best fixed gamma's, over answer after answer."""

from collections.abc import Sequence

import numpy as np
import pytest

from rapid_jax.speculative.round_times import RoundTimes
from rapid_jax.speculative.schedule import GAMMAS, AutoGamma, Observation

TOKENS = 192  # of an answer
READ_MISSED = 0.3  # of a plain round's time: 32 tokens that the drafter missed
ROUNDS = {  # what a round with 0, 1, 2, 3, 5, 10 drafts takes
    "8 layers of the 8B shape over 131,072 tokens on an H200": (1.0, 1.25, 1.45, 1.66, 2.1, 3.3),
    "a small drafter": (1.0, 1.08, 1.16, 1.24, 1.4, 1.8),
    "a drafter of half the target": (1.0, 1.5, 1.95, 2.4, 3.3, 5.5),
    "sixteen rows": (1.0, 2.2, 2.8, 3.4, 4.6, 7.6),
    "the third draft costs more": (1.0, 1.15, 1.3, 1.7, 2.6, 4.5),
    "drafts hardly pay": (1.0, 1.75, 2.5, 3.24, 4.7, 8.4),
}
JUMPS = (1.0, 2.5, 2.8, 3.24, 6.2, 8.6)  # the first draft is dear, the next two are cheap, as a kernel's widths make it


def shares(rounds: Sequence[float], acceptances: Sequence[float], rows: int, seed: int) -> list[float]:
    """Of each answer, tokens a second over those of the best gamma; what is learnt is kept from one to the next.

    A call's time is a few percent off, and one of a hundred takes ten times as long. The tokens counted are those
    expected of the gammas chosen, and the seconds those without noise, so that luck is none of the result's.
    """
    rng, times, found, took = np.random.default_rng(seed), RoundTimes(), [], dict(zip(GAMMAS, rounds, strict=True))
    for chance in acceptances:
        expected = {gamma: sum(chance**i for i in range(gamma + 1)) for gamma in GAMMAS}
        schedule = AutoGamma(rounds_per_read=4, costs=times.of("rows"))
        schedule.believe(times.acceptance)
        left, tokens, seconds, missed = np.full(rows, TOKENS), 0.0, 0.0, 0
        while (left > 0).any():
            gamma, count = schedule.choose()
            needed, live = took[gamma] * count, int((left > 0).sum())
            if gamma:
                needed += READ_MISSED * -(-missed // 32)
            missed = 0 if gamma else missed + count
            kept = np.cumprod(rng.random((count, live, gamma)) < chance, axis=-1).sum(-1)
            left[left > 0] -= (kept + 1).sum(0)
            tokens, seconds = tokens + count * expected[gamma], seconds + needed
            seen = needed * np.exp(0.03 * rng.normal()) * (10 if rng.random() < 0.01 else 1)
            of_drafts = count * live, int(kept.sum()), int((kept < gamma).sum())
            schedule.observe(gamma, Observation(seen, count, *of_drafts, 0, 0, int((kept + 1).sum())))
            if gamma:
                times.acceptance = schedule.acceptance
        best = max(expected[gamma] / took[gamma] for gamma in GAMMAS)
        found.append(tokens / seconds / best)
    return found


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("machine", ROUNDS)
def test_answers_lose_less_than_three_percent_to_the_search(machine, rows):
    """The first one included, which searches for all; it alone loses no more than about a tenth."""
    for chance in (0.1, 0.3, 0.6, 0.8, 0.9, 0.95):
        each = np.array([shares(ROUNDS[machine], [chance] * 12, rows, seed) for seed in range(3)])
        assert each.mean() >= 0.97 and each[:, 1:].mean() >= 0.97 and each[:, 0].mean() > 0.85, (chance, each.mean(0))


@pytest.mark.parametrize("rows", [1, 8])
def test_a_gamma_that_no_line_through_the_others_shows_is_found(rows):
    """Nothing that is known says so before it is looked at, so it takes a few answers."""
    for chance in (0.85, 0.9, 0.95):
        each = np.array([shares(JUMPS, [chance] * 12, rows, seed) for seed in range(6)])
        assert each.mean() >= 0.95 and each[:, 6:].mean() >= 0.955, (chance, each.mean(0))


def test_answers_whose_drafts_do_better_or_worse_than_those_before_are_met():
    """A drafter that is worth its time for some questions and not for others."""
    chances = [0.9] * 6 + [0.05] * 6 + [0.9] * 6
    rounds = ROUNDS["8 layers of the 8B shape over 131,072 tokens on an H200"]
    each = np.mean([shares(rounds, chances, 1, seed) for seed in range(6)], axis=0)
    assert each[1:].mean() >= 0.95 and each.min() > 0.8, each
    assert min(each[7:12].mean(), each[13:].mean()) >= 0.95, each
