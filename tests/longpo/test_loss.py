# SPDX-License-Identifier: Apache-2.0
"""The objectives in float64 against numbers of an implementation in numpy, formulas written out, and what must hold.

Log-probabilities are a few tokens' sums here; `z` are the logits of sequences of 14 tokens over 7 words.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longpo_jax.loss import objective, preference

# Of the chosen and the rejected sequence: what is read, and the answers' tokens (None elsewhere), end tokens included.
CHOSEN = (1, 3, 4, 5, 6, 3, 4, 5, 2, 6, 3, 5, 4, 2)
REJECTED = (1, 3, 4, 5, 6, 3, 5, 2, 6, 3, 4, 6, 3, 2)
CHOSEN_ANSWERS, REJECTED_ANSWERS = (6, 7, 8, 11, 12, 13), (6, 7, 10, 11, 12, 13)
# Of each turn's sequence on the short context: the answer's tokens by place.
SHORT_CHOSEN = ({3: 4, 4: 5, 5: 2}, {2: 5, 3: 4, 4: 2})
SHORT_REJECTED = ({3: 5, 4: 2}, {2: 4, 3: 6, 4: 3, 5: 2})
WEIGHTS = {"beta": 0.1, "preference_weight": 1.0, "nll_weight": 1.0, "alpha": 3.0, "distillation_weight": 1.0}


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def one(
    name: str = "longpo", policy=(-120.0, -100.0), reference=(-80.0, -140.0), *, nll: Any = 0.0, long=None, **settings
):
    """(loss, metrics) of one document, numbers."""
    settings = WEIGHTS | settings
    scores = [{"chosen_B": jnp.array([c]), "rejected_B": jnp.array([r])} for c, r in (policy, reference)]
    for score, value in zip(scores, long or (), strict=False):
        score["long_chosen_B"] = jnp.array([value])
    loss_B, metrics = objective(name, scores[0] | {"nll_B": jnp.array([nll])}, scores[1], **settings)
    return loss_B[0], {key: value[0] for key, value in metrics.items()}


def gradient(**how):
    """Of the loss at (chosen, rejected) of the policy."""
    policy = how.pop("policy", (-120.0, -100.0))
    return np.array(jax.grad(lambda policy: one(policy=policy, **how)[0])(policy))


@pytest.mark.parametrize(
    "policy, reference, beta, rewards, loss, d_chosen",
    [
        ((-120, -100), (-80, -140), 0.1, (-4, 4), 8.000335406372896, -0.09996646498695337),
        ((-120, -100), (-80, -140), 0.01, (-0.4, 0.4), 1.1711006659477778, -0.0068997448112761255),
        ((-85, -150), (-80, -140), 0.1, (-0.5, -1.0), 0.4740769841801067, -0.03775406687981454),
        ((-120, -100), (-120, -100), 0.1, (0, 0), math.log(2), -0.05),
        ((-80, -65), (-65, -95), 0.1, (-1.5, 3), 4.511047744848594, -0.09890130573694068),  # sums of two turns
        ((-80, -65), (-65, -95), 0.01, (-0.15, 0.3), 0.9432489459974549, -0.00610639233949222),
    ],
)
def test_one_sigmoid_of_the_sums_of_a_document(policy, reference, beta, rewards, loss, d_chosen):
    policy, reference = (tuple(map(float, pair)) for pair in (policy, reference))
    got, metrics = one("longpo", policy, reference, beta=beta)
    np.testing.assert_allclose(got, loss, rtol=1e-12)
    np.testing.assert_allclose(
        (metrics["rewards/chosen"], metrics["rewards/rejected"]), rewards, rtol=1e-12, atol=1e-15
    )
    np.testing.assert_allclose(metrics["rewards/margins"], rewards[0] - rewards[1], rtol=1e-12, atol=1e-15)
    assert metrics["rewards/accuracies"] == (rewards[0] > rewards[1])
    slope = gradient(policy=policy, reference=reference, beta=beta)
    np.testing.assert_allclose(slope, (d_chosen, -d_chosen), rtol=1e-12)


def toy_logits(time: int, k: int) -> np.ndarray:
    t, v = np.arange(time)[:, None], np.arange(7)[None, :]
    return np.sin(0.7 * (t + 1) * (v + 1) + 0.3 * k) + 0.5 * np.cos(1.3 * v - 0.2 * t * k)


def token_log_probs(z, tokens):
    """Of tokens 1 and on, each predicted by the logits one place before it."""
    return jax.nn.log_softmax(z)[jnp.arange(len(tokens) - 1), jnp.array(tokens[1:])]


def answers(log_prob, places):
    return log_prob[jnp.array(places) - 1].sum()


def reference_sum(turns, first: int) -> float:
    log_softmax = [np.asarray(jax.nn.log_softmax(toy_logits(6, first + turn))) for turn in range(len(turns))]
    return float(
        sum(z[place - 1, token] for z, turn in zip(log_softmax, turns, strict=True) for place, token in turn.items())
    )


def total(z_chosen, z_rejected, *, beta=0.1, scope="full"):
    chosen, rejected = token_log_probs(z_chosen, CHOSEN), token_log_probs(z_rejected, REJECTED)
    policy = answers(chosen, CHOSEN_ANSWERS), answers(rejected, REJECTED_ANSWERS)
    reference = reference_sum(SHORT_CHOSEN, 3), reference_sum(SHORT_REJECTED, 5)
    nll = -chosen.mean() if scope == "full" else -policy[0] / len(CHOSEN_ANSWERS)
    return one("longpo", policy, reference, nll=nll, beta=beta, preference_weight=0.01)


@pytest.mark.parametrize(
    "beta, rewards, preferred, loss",
    [
        (0.1, (0.25400152246627655, -0.10686918262462922), 0.5289027161999447, 2.1172437836055487),
        (0.01, (0.025400152246627655, -0.010686918262462922), 0.6752664210554677, 2.1187074206541037),
    ],
)
def test_token_by_token(beta, rewards, preferred, loss):
    z = toy_logits(14, 1), toy_logits(14, 2)
    got, metrics = total(*z, beta=beta)
    np.testing.assert_allclose(got, loss, rtol=1e-12)
    np.testing.assert_allclose(metrics["nll"], 2.111954756443549, rtol=1e-12)
    np.testing.assert_allclose(metrics["preference"], preferred, rtol=1e-12)
    np.testing.assert_allclose((metrics["rewards/chosen"], metrics["rewards/rejected"]), rewards, rtol=1e-12)
    np.testing.assert_allclose(total(*z, scope="response")[1]["nll"], 14.330660082613806 / 6, rtol=1e-12)


def test_the_gradient_at_the_logits():
    d_chosen, d_rejected = jax.grad(lambda z: total(*z)[0])((toy_logits(14, 1), toy_logits(14, 2)))
    expected = {
        (0, 3): -0.07167798622567798,
        (5, 4): -0.06504308282642582,
        (6, 5): -0.07229560469749813,
        (7, 2): -0.07367285904761055,
        (12, 2): -0.054809474375671796,
        (13, 0): 0.0,
    }
    for place, value in expected.items():
        np.testing.assert_allclose(d_chosen[place], value, rtol=1e-12, err_msg=str(place))
    expected = {
        (5, 5): 0.0003318493367498477,
        (9, 4): 0.00038826849750285216,
        (9, 0): -9.096160748321275e-05,
        (4, 6): 0,
    }
    for place, value in expected.items():
        np.testing.assert_allclose(d_rejected[place], value, rtol=1e-12, err_msg=str(place))


def test_targets_are_shifted_before_they_are_shared_out():
    """Seven devices of two places: each sums what its own places predict, and no prediction at an edge is lost."""
    targets, counts = (*CHOSEN[1:], 0), np.isin(np.arange(1, 15), CHOSEN_ANSWERS)
    log_prob = np.asarray(jax.nn.log_softmax(toy_logits(14, 1)))[np.arange(14), targets] * counts
    shards = [0, 0, -1.8392850804640073, -5.781482615918074, 0, -5.476357942504997, -1.2335344437267264]
    np.testing.assert_allclose(log_prob.reshape(7, 2).sum(axis=1), shards, rtol=1e-12)
    np.testing.assert_allclose(log_prob.sum(), -14.330660082613806, rtol=1e-12)


def test_at_the_start_the_expected_margin_is_negative():
    """The policy on the long context, the reference on the short one: unlike DPO, which starts at ln 2 exactly."""
    short, long = np.array([0.5, 0.3, 0.15, 0.05]), np.array([0.1, 0.2, 0.3, 0.4])
    chosen, rejected = (x.ravel() for x in np.meshgrid(np.arange(4), np.arange(4), indexing="ij"))
    chance = short[chosen] * long[rejected]
    policy, reference = (
        {"chosen_B": jnp.log(jnp.array(p))[chosen], "rejected_B": jnp.log(jnp.array(p))[rejected]}
        for p in (long, short)
    )
    policy["nll_B"] = jnp.zeros(16)
    _, metrics = objective("longpo", policy, reference, **WEIGHTS)
    expected = {name: float(chance @ value) for name, value in metrics.items()}
    np.testing.assert_allclose(expected["rewards/chosen"], 0.1 * -0.7184143344815157, rtol=1e-12)
    np.testing.assert_allclose(expected["rewards/rejected"], 0.1 * 0.797683957974875, rtol=1e-12)
    np.testing.assert_allclose(expected["rewards/margins"], 0.1 * -1.5160982924563906, rtol=1e-12)
    np.testing.assert_allclose(expected["preference"], 0.7751078324379944, rtol=1e-12)


@pytest.mark.parametrize("name", ["longpo", "dpo", "solopo"])
def test_no_gradient_reaches_the_reference(name):
    def loss(reference):
        return one(name, reference=reference[:2], long=(-110.0, reference[2]))[0]

    assert not any(jax.grad(loss)((-80.0, -140.0, -90.0)))


def test_exchanging_chosen_and_rejected_turns_the_margin_around():
    loss, metrics = one("longpo", (-120.0, -100.0), (-80.0, -140.0))
    other, turned = one("longpo", (-100.0, -120.0), (-140.0, -80.0))
    np.testing.assert_allclose(turned["rewards/margins"], -metrics["rewards/margins"], rtol=1e-12)
    np.testing.assert_allclose(loss - other, -metrics["rewards/margins"], rtol=1e-12)


def test_a_constant_in_both_references_shifts_the_rewards_alone():
    loss, metrics = one("longpo", reference=(-80.0, -140.0))
    other, shifted = one("longpo", reference=(-87.0, -147.0))
    np.testing.assert_allclose(other, loss, rtol=1e-12)
    for name in ("rewards/chosen", "rewards/rejected"):
        np.testing.assert_allclose(shifted[name] - metrics[name], 0.1 * 7, rtol=1e-12)


def test_beta_0_is_ln_2_without_a_gradient():
    np.testing.assert_allclose(one("longpo", beta=0.0)[0], math.log(2), rtol=1e-15)
    assert not np.any(gradient(beta=0.0))


def test_without_preference_the_loss_is_the_nll():
    assert one("longpo", nll=1.25, nll_weight=2.0, preference_weight=0.0)[0] == 2.5


def test_turns_in_any_order():
    turns = np.array([[-30.0, -25.0, -20.0, -35.0], [-50.0, -40.0, -45.0, -60.0], [-7.0, -3.0, -1.0, -9.0]])
    losses = set()
    for order in ([0, 1, 2], [2, 0, 1], [1, 0, 2]):
        sums = turns[order].sum(axis=0)
        losses.add(float(one("longpo", tuple(sums[:2]), tuple(sums[2:]))[0]))
    assert len(losses) == 1


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_margins_of_ten_thousand_stay_finite(dtype):
    margins = jnp.array([-1e4, -200.0, 0.0, 200.0, 1e4], dtype)
    loss, slope = jax.vmap(jax.value_and_grad(preference))(margins, jnp.zeros(5, dtype))
    np.testing.assert_allclose(loss, [1e4, 200, math.log(2), 0, 0], rtol=1e-6, atol=1e-30)
    np.testing.assert_allclose(slope, [-1, -1, -0.5, 0, 0], rtol=1e-6, atol=1e-30)


def test_dpo_is_the_same_formula_of_references_on_the_long_context():
    loss, _ = one("dpo", (-85.0, -150.0), (-80.0, -140.0), nll=2.0, preference_weight=0.5)
    np.testing.assert_allclose(loss, 2.0 + 0.5 * math.log(1 + math.exp(-0.1 * ((-85 + 80) - (-150 + 140)))), rtol=1e-12)
    assert one("dpo", nll=2.0) == one("longpo", nll=2.0)


def test_sft_is_the_nll_alone():
    loss_B, metrics = objective("sft", {"nll_B": jnp.array([1.5, 2.0])}, {}, **WEIGHTS | {"nll_weight": 2.0})
    np.testing.assert_array_equal(loss_B, [3.0, 4.0])
    assert set(metrics) == {"nll", "loss"}


@pytest.mark.parametrize("long", [-60.0, -130.0])
def test_solopo_adds_the_distance_of_the_chosen_rewards(long):
    """arXiv 2505.11166: the preference of the short context and alpha |r(short, chosen) - r(long, chosen)|."""
    reference = (-80.0, -140.0, -95.0)
    loss, metrics = one(
        "solopo", (-85.0, -150.0), reference[:2], long=(long, reference[2]), preference_weight=0.5, nll=2.0, alpha=3.0
    )
    chosen, rejected, far = 0.1 * (-85 + 80), 0.1 * (-150 + 140), 0.1 * (long + 95)
    aligned = abs(chosen - far)
    np.testing.assert_allclose(metrics["alignment"], aligned, rtol=1e-12)
    expected = 2 + 0.5 * (math.log(1 + math.exp(rejected - chosen)) + 3 * aligned)
    np.testing.assert_allclose(loss, expected, rtol=1e-12)


def test_opsd_is_the_mean_divergence_beside_the_nll_and_has_no_preference():
    policy = {"nll_B": [1.5, 2.0], "kl_B": [0.25, 1.0], "teacher_rest_B": [0.0, 0.1]}
    policy = {name: jnp.array(values) for name, values in policy.items()}
    loss_B, metrics = objective("opsd", policy, {}, **WEIGHTS | {"nll_weight": 0.5, "distillation_weight": 2.0})
    np.testing.assert_array_equal(loss_B, [1.25, 3.0])
    assert set(metrics) == {"nll", "kl", "teacher_rest", "loss"}


def test_an_unknown_objective_is_refused():
    with pytest.raises(ValueError, match="'ipo'"):
        one("ipo")
