# SPDX-License-Identifier: Apache-2.0
"""RAPID's rule against worked numbers, and the distribution of what it samples against the exact one in float64.

The numbers are the published rule worked by hand and by the released code: p and q over four tokens, what the drafter's
evidence makes of p, what is accepted, what follows a rejection, and the distribution of the emitted token.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rapid_jax.speculative.accept import augment, leading_accepts, leading_agreement, residual, verify
from rapid_jax.speculative.config import Guard, SamplingConfig, SpeculationConfig
from rapid_jax.speculative.sampling import Draw, SamplingParams, SamplingRule, position_keys, warp
from tests.reference import one_step, softmax

P = np.array([0.5, 0.3, 0.15, 0.05])
Q1, Q2 = np.array([0.1, 0.7, 0.15, 0.05]), np.array([0.05, 0.9, 0.03, 0.02])
# q, eta, guard, p_hat, acceptance, residual, distribution of the token, distance of the distribution from p
ORACLES = [
    (Q1, 0, "none", [0.5, 0.3, 0.15, 0.05], 0.6, [1, 0, 0, 0], [0.5, 0.3, 0.15, 0.05], 0),
    (Q1, 1, "none", [0.341058, 0.455423, 0.152640, 0.050880], 0.755423, [1, 0, 0, 0],
     [0.344577, 0.455423, 0.15, 0.05], 0.155423),
    (Q1, 2, "none", [0.205675, 0.611229, 0.137322, 0.045774], 0.894325, [0.959452, 0, 0.030411, 0.010137],
     [0.201390, 0.611229, 0.140535, 0.046845], 0.311229),
    (Q1, 5, "none", [0.027237, 0.892260, 0.060377, 0.020126], 0.807740, [0.798235, 0, 0.151324, 0.050441],
     [0.180706, 0.7, 0.089471, 0.029824], 0.4),
    (Q1, 10, "none", [0.000552, 0.987391, 0.009042, 0.003014], 0.712609, [0.726584, 0, 0.205062, 0.068354],
     [0.209366, 0.7, 0.067975, 0.022658], 0.4),
    (Q1, 20, "none", [0.000000, 0.999776, 0.000168, 0.000056], 0.700224, [0.714514, 0, 0.214115, 0.071372],
     [0.214194, 0.7, 0.064354, 0.021451], 0.4),
    (Q1, 2, "code", [0.205675, 0.611229, 0.137322, 0.045774], 0.894325, [0.959452, 0, 0.030411, 0.010137],
     [0.201390, 0.611229, 0.140535, 0.046845], 0.311229),
    (Q1, 2, "paper", [0.205675, 0.611229, 0.137322, 0.05], 0.898551, [0.969278, 0, 0.030722, 0],
     [0.198332, 0.611229, 0.140438, 0.05], 0.311229),
    (Q1, 5, "paper", [0.5, 0.892260, 0.15, 0.05], 1, None, Q1, 0.4),
    (Q2, 1, "none", [0.304500, 0.522092, 0.127065, 0.046344], 0.622092, [0.75, 0, 0.2, 0.05],
     [0.333431, 0.522092, 0.105582, 0.038895], 0.222092),
    (Q2, 1, "paper", [0.304500, 0.522092, 0.127065, 0.05], 0.622092, [0.75, 0, 0.2, 0.05],
     [0.333431, 0.522092, 0.105582, 0.038895], 0.222092),
    (Q2, 1, "code", [0.401080, 0.438489, 0.120324, 0.040108], 0.538489, [0.75, 0, 0.2, 0.05],
     [0.396133, 0.438489, 0.122302, 0.043076], 0.138489),
    (Q2, 5, "none", [0.008495, 0.971298, 0.013270, 0.006937], 0.928702, [0.732171, 0, 0.203680, 0.064149],
     [0.060697, 0.9, 0.027792, 0.011511], 0.6),
    (Q2, 5, "paper", [0.5, 0.971298, 0.15, 0.05], 1, None, Q2, 0.6),
    (Q2, 5, "code", [0.074342, 0.895921, 0.022303, 0.007434], 0.975658, [0.725499, 0, 0.205876, 0.068625],
     [0.067660, 0.895921, 0.027314, 0.009105], 0.595921),
]  # fmt: skip
Z3, ZQ3 = np.array([2.0, 1, 0, -1]), np.array([1.0, 2, 0, -1])


@functools.partial(jax.jit, static_argnames=("guard", "exact_phat"))
def rule(z_V, q_V, eta, guard: Guard = "none", exact_phat: bool = False):
    """(p_hat, residual normalised, distribution of the token, acceptance) by the functions under test."""
    p_hat_V = jnp.exp(augment(z_V, jnp.log(q_V), eta=eta, alpha=jnp.asarray(0.1, z_V.dtype), guard=guard))
    p_V = jax.nn.softmax(z_V)
    kept_V = q_V * jnp.minimum(1.0, jnp.where(q_V > 0, p_hat_V / jnp.where(q_V > 0, q_V, 1.0), 1.0))
    left_V = residual(p_V, q_V, p_hat_V, exact_phat=exact_phat)
    left_V = left_V / left_V.sum()
    return p_hat_V, left_V, kept_V + (1 - kept_V.sum()) * left_V, kept_V.sum()


def in_float32(z, q, eta, **switches):
    return [np.asarray(x) for x in rule(jnp.float32(z), jnp.float32(q), jnp.float32(eta), **switches)]


@pytest.mark.parametrize("oracle", ORACLES, ids=lambda o: f"q={o[0][1]} eta={o[1]} {o[2]}")
def test_worked_numbers(oracle):
    q, eta, guard, p_hat, acceptance, left, distribution, distance = oracle
    # 2e-6: the numbers are rounded to 5e-7, and float32 rounds eta (q - p), which the exponential takes in whole.
    got_p_hat, got_left, got_distribution, got_acceptance = in_float32(np.log(P), q, eta, guard=guard)
    np.testing.assert_allclose(got_p_hat, p_hat, atol=2e-6)
    np.testing.assert_allclose(got_acceptance, acceptance, atol=2e-6)
    np.testing.assert_allclose(got_distribution, distribution, atol=2e-6)
    np.testing.assert_allclose(0.5 * np.abs(got_distribution - P).sum(), distance, atol=2e-6)
    if left is not None:  # the residual divides by what is left, 0.1 to 0.4 here
        np.testing.assert_allclose(got_left, left, atol=1e-5)


def test_worked_numbers_in_float64():
    with jax.enable_x64(True):
        for q, eta, guard, p_hat, acceptance, left, distribution, _ in ORACLES:
            got = rule(jnp.asarray(np.log(P)), jnp.asarray(q), jnp.asarray(float(eta)), guard=guard)
            assert got[0].dtype == jnp.float64
            for mine, want in zip(got, (p_hat, left, distribution, acceptance), strict=True):
                if want is not None:
                    np.testing.assert_allclose(mine, want, atol=6e-7)


def test_temperature_is_inside_the_shift():
    """Eq. 6 with z / T, Eq. 8 on the raw logits and the worked numbers agree; T -> 0 at fixed eta is greedy."""
    rule = SamplingRule.of(SamplingConfig(), SpeculationConfig(guard="none"), ())

    def p_hat_at(temperature: float) -> np.ndarray:
        params = SamplingParams.of(SamplingConfig(temperature=temperature), SpeculationConfig(eta=10.0))
        z, log_q = (jax.nn.log_softmax(warp(jnp.float32(x), rule, params, None)) for x in (Z3, ZQ3))
        return np.exp(augment(z, log_q, eta=params.eta_B, alpha=params.alpha_B, guard="none"))

    np.testing.assert_allclose(p_hat_at(0.5), [0.000002, 0.999911, 0.000076, 0.000010], atol=1e-6)
    p, q = softmax(Z3 / 0.5), softmax(ZQ3 / 0.5)
    np.testing.assert_allclose(p_hat_at(0.5), softmax((Z3 + 10 * 0.5 * (q - p)) / 0.5), atol=1e-6)
    sweep = {2.0: [0.037991, 0.827458], 1.0: [0.000785, 0.990704], 0.1: [0.000045, 0.999955], 0.01: [1, 0]}
    for temperature, first_two in sweep.items():
        np.testing.assert_allclose(p_hat_at(temperature)[:2], first_two, atol=2e-6)
    np.testing.assert_allclose(p_hat_at(0.05)[:2], [0.5, 0.5], atol=1e-4)  # a tie of two logits near 20


def test_code_guard_masks_by_the_drafter_and_paper_guard_by_p_hat():
    z, q = np.log(P), Q2
    p_hat = in_float32(z, q, 5, guard="code")[0]
    still = q < 0.1 * q.max()
    assert still.tolist() == [True, False, True, True]
    np.testing.assert_allclose(p_hat[still] / p_hat[still].sum(), P[still] / P[still].sum(), atol=1e-6)
    assert p_hat.sum() == pytest.approx(1, abs=1e-6)
    p_hat = in_float32(z, q, 5, guard="paper")[0]
    np.testing.assert_allclose(p_hat[still], P[still], atol=1e-6)
    assert p_hat.sum() == pytest.approx(1.671298, abs=2e-6)


def test_a_filtered_token_stays_impossible_without_nan():
    z, q = np.array([2, 1, -np.inf, -np.inf]), np.array([0, 0.622459, 0.377541, 0])
    # The code guard leaves token 0 in place, which the drafter rules out; the paper guard puts it back to p.
    first_two = {"none": [0.011857, 0.988143], "code": [0.317001, 0.682999], "paper": [0.731059, 0.988143]}
    for guard, want in first_two.items():
        p_hat, left, distribution, acceptance = in_float32(z, q, 5, guard=guard)
        assert all(np.all(np.isfinite(x)) for x in (p_hat, left, distribution)), guard
        assert p_hat[2] == p_hat[3] == 0, guard
        np.testing.assert_allclose(p_hat[:2], want, atol=2e-6)
        np.testing.assert_allclose(acceptance, 0.622459, atol=2e-6)
        np.testing.assert_allclose(left, [1, 0, 0, 0], atol=2e-6)
        np.testing.assert_allclose(distribution, [0.377541, 0.622459, 0, 0], atol=2e-6)


def test_the_shift_is_a_step_down_the_distillation_loss():
    """L = T^2 KL(q || softmax(z / T)): its gradient is T (p - q), and p_hat is p after a step of size eta."""
    z, q, T, eta = jnp.asarray([2.0, 1, 0, -1]), jnp.asarray([0.1, 0.2, 0.3, 0.4]), 0.5, 3.0

    def loss(z):
        return T**2 * jnp.sum(q * (jnp.log(q) - jax.nn.log_softmax(z / T)))

    value, gradient = jax.value_and_grad(loss)(z)
    assert float(value) == pytest.approx(0.716306, abs=1e-6)
    np.testing.assert_allclose(gradient, [0.382477, -0.041471, -0.142079, -0.198928], atol=1e-6)
    stepped = augment(z / T, jnp.log(q), eta=jnp.float32(eta), alpha=jnp.float32(0.1), guard="none")
    np.testing.assert_allclose(stepped, jax.nn.log_softmax((z - eta * gradient) / T), atol=1e-5)


ROUND_P = np.array([[0.5, 0.3, 0.15, 0.05], [0.4, 0.4, 0.1, 0.1], [0.25] * 4, [0.1, 0.2, 0.3, 0.4]])
ROUND_Q = np.array([[0.1, 0.7, 0.15, 0.05], [0.4, 0.3, 0.2, 0.1], [0.7, 0.1, 0.1, 0.1]])
DRAFTS = np.array([1, 2, 0])
# eta, guard, uniforms of the three drafts, uniform of the last token, what is emitted
ROUNDS = [
    (0, "none", (0.5, 0.5, 0.5), 0.35, [0]),
    (2, "none", (0.5, 0.5, 0.5), 0.35, [1, 2, 0, 2]),
    (0, "none", (0.2, 0.4, 0.1), 0.95, [1, 2, 0, 3]),
    (2, "none", (0.2, 0.4, 0.1), 0.95, [1, 2, 0, 3]),
    (0, "none", (0.9, 0.1, 0.1), 0.5, [0]),
    (2, "none", (0.9, 0.1, 0.1), 0.5, [0]),
    (2, "none", (0.9, 0.1, 0.1), 0.98, [2]),
    (0, "none", (0.9, 0.1, 0.1), 0.98, [0]),
    (0, "none", (0.3, 0.3, 0.9), 0.6, [1, 2, 2]),
    (2, "none", (0.3, 0.3, 0.9), 0.6, [1, 2, 2]),
    *((10, guard, r, 0.35, [1, 2, 0, 2]) for guard in ("none", "code", "paper") for r in ((0.5,) * 3, (0.9, 0.1, 0.1))),
]  # fmt: skip


@pytest.mark.parametrize("case", ROUNDS, ids=str)
def test_worked_rounds(case):
    eta, guard, r, u, emitted = case
    log_p, log_q = jnp.log(jnp.float32(ROUND_P)), jnp.log(jnp.float32(ROUND_Q))
    log_p_hat = augment(log_p[:3], log_q, eta=jnp.float32(eta), alpha=jnp.float32(0.1), guard=guard)
    log_ratio = (log_p_hat - log_q)[jnp.arange(3), DRAFTS]
    if eta == 10:
        np.testing.assert_allclose(np.exp(log_ratio), [1.410559, 1.478967, 1.418027], atol=5e-6)
    n = int(leading_accepts(log_ratio[None], jnp.log(jnp.float32(r))[None], jnp.asarray([3]))[0])
    row = ROUND_P[3]
    if n < 3:
        row = np.asarray(
            residual(*(jnp.float32(x) for x in (ROUND_P[n], ROUND_Q[n], np.exp(log_p_hat[n]))), exact_phat=False)
        )
    token = int(np.argmax(u < np.cumsum(row / row.sum())))
    assert [*DRAFTS[:n].tolist(), token] == emitted


def test_leading_runs_stop_at_the_first_miss_and_at_the_length():
    ratio = jnp.asarray([[0.0, -1, 0, 0]] * 4 + [[0.0] * 4, [jnp.nan] * 4])
    r = jnp.asarray([[-0.5, -0.5, -0.5, -0.5]] * 6)
    lengths = jnp.asarray([4, 1, 0, 2, 3, 4])
    assert leading_accepts(ratio, r, lengths).tolist() == [1, 1, 0, 1, 3, 0]
    drawn = jnp.asarray([[1, 2, 3, 4, 9], [1, 9, 3, 4, 9], [7, 2, 3, 4, 9]])
    assert leading_agreement(jnp.asarray([[1, 2, 3, 4]] * 3), drawn, jnp.asarray([3, 4, 4])).tolist() == [3, 1, 0]


def random_pairs(count: int, vocabulary: int = 8):
    """Logits of p and a distribution q; some q nearly equal to p, some with tokens removed."""
    rng = np.random.default_rng(0)
    for index in range(count):
        z = rng.normal(size=vocabulary) * rng.uniform(0.3, 4)
        zq = z + rng.normal(size=vocabulary) * (1e-3 if index % 5 == 0 else 2)
        if index % 3 == 0:
            z = np.where(z < np.sort(z)[3], -np.inf, z)
            zq = np.where(zq < np.sort(zq)[3], -np.inf, zq)
        yield z, softmax(zq), float(rng.choice([0.0, 0.5, 2.0, 10.0]))


@pytest.mark.parametrize("guard", ["code", "paper", "none"])
def test_distribution_of_one_drafted_position(guard):
    for z, q, eta in random_pairs(60):
        want = one_step(z, q, eta=eta, guard=guard)
        p_hat, _, distribution, acceptance = in_float32(z, q, eta, guard=guard)
        np.testing.assert_allclose(p_hat, want.p_hat, atol=5e-6)
        np.testing.assert_allclose(acceptance, want.acceptance, atol=5e-6)
        np.testing.assert_allclose(distribution, want.distribution, atol=2e-5)
        # The distribution is as far from p as the accepted mass exceeds it: 0 when eta is, and only then in general.
        distance, excess = 0.5 * np.abs(want.distribution - want.p).sum(), np.maximum(want.kept - want.p, 0).sum()
        assert distance == pytest.approx(excess, abs=1e-12)
        if eta == 0:
            np.testing.assert_allclose(want.distribution, want.p, atol=1e-12)
        elif guard == "none" and 0.5 * np.abs(q - want.p).sum() > 1e-6:
            assert excess > 0  # RAPID is not lossless


def test_log_ratios_of_p_hat_are_those_of_p_plus_eta_times_the_difference():
    for z, q, eta in random_pairs(30):
        log_p_hat = np.asarray(
            augment(jnp.float32(z), jnp.log(jnp.float32(q)), eta=jnp.float32(eta), alpha=jnp.float32(0.1), guard="none")
        )
        p, finite = softmax(z), np.isfinite(z)
        want = (z + eta * (q - p))[finite]
        got = log_p_hat[finite]
        np.testing.assert_allclose(got - got[0], want - want[0], atol=2e-5)


def test_adding_a_constant_to_the_logits_changes_nothing():
    for z, q, eta in random_pairs(10):
        for guard in ("code", "paper", "none"):
            np.testing.assert_allclose(
                in_float32(z + 7.5, q, eta, guard=guard)[0], in_float32(z, q, eta, guard=guard)[0], atol=1e-5
            )


def test_acceptance_rises_and_then_falls_with_eta():
    acceptance = [float(in_float32(np.log(P), Q1, eta)[3]) for eta in (0, 1, 2, 5, 10, 20, 1000)]
    np.testing.assert_allclose(acceptance[:6], [0.6, 0.755423, 0.894325, 0.807740, 0.712609, 0.700224], atol=2e-6)
    assert acceptance[:3] == sorted(acceptance[:3]) and acceptance[2:] == sorted(acceptance[2:], reverse=True)
    assert acceptance[-1] == pytest.approx(0.7, abs=1e-6)  # p_hat is one token by then, q gives it 0.7


def test_equal_distributions_leave_nothing_to_reject():
    for eta in (0, 10, 1000):
        for guard in ("code", "paper", "none"):
            p_hat, left, _, acceptance = in_float32(np.log(P), P, eta, guard=guard)
            np.testing.assert_allclose(p_hat, P, atol=1e-4)  # eta = 1000 times the rounding of q - p
            assert acceptance == pytest.approx(1, abs=1e-4)
            assert np.all(np.isfinite(left))
    exact = jnp.asarray([0.5, 0.25, 0.25])
    for exact_phat in (False, True):
        np.testing.assert_array_equal(residual(exact, exact, exact, exact_phat=exact_phat), exact)


def test_residual_is_what_p_has_over_the_smaller_of_q_and_p_hat():
    rng = np.random.default_rng(1)
    p, q, p_hat = (jnp.float32(softmax(rng.normal(size=(50, 6)))) for _ in range(3))
    np.testing.assert_array_equal(residual(p, q, p_hat, exact_phat=False), np.maximum(np.maximum(p - q, p - p_hat), 0))
    np.testing.assert_array_equal(residual(p, q, p_hat, exact_phat=True), np.maximum(p_hat - q, 0))


def test_greedy_accepts_the_argmax_and_nothing_else():
    plain = SpeculationConfig(mode="lossless")
    z = np.random.default_rng(4).normal(size=(3, 6))
    rule = SamplingRule.of(SamplingConfig(temperature=0), plain, ())
    best = z.argmax(axis=-1)
    drafts = np.array([[best[0], best[1]], [best[0], best[1] ^ 1], [best[0] ^ 1, best[1]]])
    keys = position_keys(jax.random.split(jax.random.key(0), 3), Draw.TOKEN, jnp.zeros(3, jnp.int32), 3)
    logits = jnp.broadcast_to(jnp.float32(z), (3, 3, 6))
    n, token = verify(
        (keys[:, :2], keys),
        jnp.asarray(drafts),
        jnp.zeros((3, 2, 1)),
        jnp.full(3, 2),
        logits,
        rule,
        SamplingParams.of(SamplingConfig(temperature=0), plain),
    )
    assert n.tolist() == [2, 1, 0]
    assert token.tolist() == [best[2], best[1], best[0]]
