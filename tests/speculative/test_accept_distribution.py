# SPDX-License-Identifier: Apache-2.0
"""The distribution of what `verify` samples: every mode and guard against the exact one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rapid_jax.speculative.accept import verify
from rapid_jax.speculative.config import SamplingConfig, SpeculationConfig
from rapid_jax.speculative.sampling import Draw, SamplingParams, SamplingRule, draw, position_keys
from tests.reference import chi_square_p, one_step, softmax

MODES = {
    f"{mode} {guard}": SpeculationConfig(mode=mode, eta=2.0, guard=guard)
    for mode in ("rapid", "lossless", "phat")
    for guard in ("code", "paper", "none")
}
DRAWS = 250_000
VOCABULARY = 6


@functools.partial(jax.jit, static_argnames=("rule", "gamma"))
def drawn_rounds(seed, z_GV, zq_GV, length, rule, params, gamma):
    """Many independent rounds with `gamma` drafts, the first `length` of which count: (drafts, n, token)."""
    keys = jax.random.split(jax.random.key(seed), DRAWS)
    log_q = jnp.broadcast_to(jax.nn.log_softmax(zq_GV), (DRAWS, gamma, VOCABULARY))
    at = jnp.zeros(DRAWS, jnp.int32)
    drafts = draw(position_keys(keys, Draw.DRAFT, at, gamma), log_q, rule, params)
    streams = (position_keys(keys, Draw.ACCEPT, at, gamma), position_keys(keys, Draw.TOKEN, at, gamma + 1))
    z = jnp.broadcast_to(z_GV, (DRAWS, gamma + 1, VOCABULARY))
    return drafts, *verify(streams, drafts, log_q, jnp.full(DRAWS, length), z, rule, params)


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(4)
    z, zq = rng.normal(size=(3, VOCABULARY)), rng.normal(size=(2, VOCABULARY)) * 2
    z[0, 5] = -np.inf  # a token that the target's filters removed and the drafter proposes
    return z, zq


@pytest.mark.parametrize("name", MODES)
def test_verify_samples_its_distribution(rows, name):
    """Two drafts a round: where the first is rejected, where the second is, and the bonus, all at once."""
    z, zq = rows
    speculation = MODES[name]
    rule = SamplingRule.of(SamplingConfig(), speculation, ())
    params = SamplingParams.of(SamplingConfig(), speculation)
    drafts, n, token = (
        np.asarray(x) for x in drawn_rounds(7, jnp.float32(z), jnp.float32(zq), 2, rule, params, gamma=2)
    )
    eta, exact = speculation.effective_eta, speculation.mode == "phat"
    first, second = (
        one_step(z[i], softmax(zq[i]), eta=eta, guard=speculation.guard, exact_phat=exact) for i in range(2)
    )
    # The distribution of one position at the first place: in lossless mode p, in phat mode p_hat.
    emitted = np.where(n > 0, drafts[:, 0], token)
    assert chi_square_p(np.bincount(emitted, minlength=VOCABULARY), first.distribution) > 1e-4
    if speculation.mode == "lossless":
        np.testing.assert_allclose(first.distribution, first.p, atol=1e-12)
    if exact:
        np.testing.assert_allclose(first.distribution, first.p_hat, atol=1e-12)
    assert chi_square_p(np.bincount(n, minlength=3), round_ends(first.acceptance, second.acceptance)) > 1e-4
    assert chi_square_p(np.bincount(token[n == 0], minlength=VOCABULARY), first.residual) > 1e-4
    assert chi_square_p(np.bincount(token[n == 1], minlength=VOCABULARY), second.residual) > 1e-4
    assert chi_square_p(np.bincount(token[n == 2], minlength=VOCABULARY), softmax(z[2])) > 1e-4  # p itself, not p_hat
    joint = np.bincount(drafts[n == 2] @ [VOCABULARY, 1], minlength=VOCABULARY**2)
    assert chi_square_p(joint, np.outer(first.kept, second.kept)) > 1e-4


def round_ends(first: float, second: float) -> np.ndarray:
    return np.array([1 - first, first * (1 - second), first * second])


def test_a_wrong_distribution_is_noticed(rows):
    """The test above has teeth: p where p_hat is sampled, and eta off by a tenth, are both refused."""
    z, zq = rows
    speculation = MODES["phat none"]
    rule, params = SamplingRule.of(SamplingConfig(), speculation, ()), SamplingParams.of(SamplingConfig(), speculation)
    drafts, n, token = (
        np.asarray(x) for x in drawn_rounds(7, jnp.float32(z), jnp.float32(zq), 2, rule, params, gamma=2)
    )
    counts = np.bincount(np.where(n > 0, drafts[:, 0], token), minlength=VOCABULARY)
    assert chi_square_p(counts, softmax(z[0])) < 1e-6
    other = one_step(z[0], softmax(zq[0]), eta=2.2, guard="none", exact_phat=True)
    assert chi_square_p(counts, other.distribution) < 1e-4


def test_a_shorter_draft_ends_in_a_bonus_from_its_own_row(rows):
    z, zq = rows
    speculation = MODES["rapid code"]
    rule, params = SamplingRule.of(SamplingConfig(), speculation, ()), SamplingParams.of(SamplingConfig(), speculation)
    _, n, token = (np.asarray(x) for x in drawn_rounds(3, jnp.float32(z), jnp.float32(zq), 1, rule, params, gamma=2))
    first = one_step(z[0], softmax(zq[0]), eta=2.0, guard="code")
    assert chi_square_p(np.bincount(n, minlength=3), round_ends(first.acceptance, 0.0)) > 1e-4
    assert chi_square_p(np.bincount(token[n == 1], minlength=VOCABULARY), softmax(z[1])) > 1e-4
