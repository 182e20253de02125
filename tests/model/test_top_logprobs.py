# SPDX-License-Identifier: Apache-2.0
"""The k most probable tokens and the reverse KL divergence to them against a plain truth, on one device and meshes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from rapid_jax.attention.strategy import Strategy
from rapid_jax.model.top_logprobs import TopLogProbs, reverse_kl, top_log_probs
from rapid_jax.runtime.axes import PARAM, spec_of
from rapid_jax.runtime.mesh import MeshConfig, make_mesh
from tests.model.test_logprobs import sizes
from tests.reference import coarse_reverse_kl, softmax

B, T, D, V, K = 2, 32, 8, 24, 5


def numbers() -> dict[str, np.ndarray]:
    """Of a student and a teacher, whose every third place is certain of one token to 1 part in 10^35 and more."""
    rng = np.random.default_rng(7)
    teacher_BTD = rng.normal(size=(B, T, D))
    teacher_BTD[:, ::3] *= 30
    counts_BT = rng.random((B, T)) < 0.7
    counts_BT[:, 8:16] = False  # whole chunks
    weights = {name: rng.normal(size=(D, V)) for name in ("weight", "teacher_weight")}
    sums = {"d_kl_BT": rng.normal(size=(B, T)), "hidden_BTD": rng.normal(size=(B, T, D))}
    return weights | sums | {"teacher_BTD": teacher_BTD, "counts_BT": counts_BT}


def ours(given: dict[str, np.ndarray], mesh, chunk: int) -> tuple[Any, Any, Any, Any]:
    """(teacher, divergences, gradient of hidden, of the weight), from one program."""
    spec = Strategy(block=1, mesh=mesh).spec
    arrays = {name: jnp.asarray(x, jnp.bool if x.dtype == bool else jnp.float32) for name, x in given.items()}
    if mesh is not None:
        at = {name: spec(name) for name in arrays if not name.endswith("weight")}
        at |= dict.fromkeys(("weight", "teacher_weight"), spec_of("head_DV", {**PARAM, "D": None}))
        arrays = {name: jax.device_put(x, NamedSharding(mesh, at[name])) for name, x in arrays.items()}

    @jax.jit
    def program(arrays):
        how = arrays["counts_BT"], "DV", chunk, mesh
        teacher = top_log_probs(arrays["teacher_BTD"], arrays["teacher_weight"], *how, k=K)

        def weighed(hidden, weight):
            kl_BT = reverse_kl(hidden, weight, teacher, *how)
            return jnp.sum(kl_BT * arrays["d_kl_BT"]), kl_BT

        gradients, kl_BT = jax.grad(weighed, (0, 1), has_aux=True)(arrays["hidden_BTD"], arrays["weight"])
        return teacher, kl_BT, *gradients

    return program(arrays)


@pytest.mark.parametrize(("axes", "chunk"), [({}, 6), ({"fsdp": 2, "context": 4}, 4), ({"model": 2, "context": 4}, 4)])
def test_teacher_divergence_and_gradients_are_the_truth_s(axes, chunk):
    given = numbers()
    teacher, kl_BT, d_hidden, d_weight = ours(given, make_mesh(MeshConfig(**axes)) if axes else None, chunk)
    counts = given["counts_BT"]
    z, teacher_z = given["hidden_BTD"] @ given["weight"], given["teacher_BTD"] @ given["teacher_weight"]
    order = np.argsort(-teacher_z, axis=-1, kind="stable")
    log_q = np.take_along_axis(teacher_z, order, -1)  # sorted, and then normalised: nothing is cancelled
    log_q -= log_q[..., :1] + np.log(np.sum(np.exp(log_q - log_q[..., :1]), axis=-1, keepdims=True))
    np.testing.assert_array_equal(teacher.ids_BTJ[counts], order[..., :K][counts])
    np.testing.assert_allclose(teacher.log_probs_BTJ[counts], log_q[..., :K][counts], atol=2e-5, rtol=1e-6)
    rest = np.log(np.sum(np.exp(log_q[..., K:]), axis=-1))
    np.testing.assert_allclose(teacher.rest_BT[counts], rest[counts], atol=2e-5, rtol=1e-6)
    assert rest[counts].min() < -80  # 1 - sum is 0 there even in float64

    want, d_z = np.zeros((B, T)), np.zeros((B, T, V))
    want[counts], d_z[counts] = coarse_reverse_kl(z[counts], teacher_z[counts], K)
    np.testing.assert_allclose(kl_BT, want, atol=3e-5, rtol=1e-6)
    assert want[counts].min() > 0.01 and want.max() > 50
    d_z *= given["d_kl_BT"][..., None]
    expected = d_z @ given["weight"].T, np.einsum("BTD,BTV->DV", given["hidden_BTD"], d_z)
    for name, got, truth in zip(("hidden", "weight"), (d_hidden, d_weight), expected, strict=True):
        np.testing.assert_allclose(got, truth, atol=1e-5 * np.abs(truth).max(), rtol=0, err_msg=name)


def test_a_student_that_is_the_teacher_is_taught_nothing_and_a_mean_student_no_less_than_nothing():
    """Without the bucket of all others the sum would fall below 0 for the second, and be least far from the teacher."""
    given = numbers()
    given |= {"hidden_BTD": given["teacher_BTD"], "weight": given["teacher_weight"]}
    _, kl_BT, d_hidden, d_weight = ours(given, None, 6)
    assert np.abs(kl_BT).max() < 1e-6 and np.abs(d_hidden).max() < 1e-5 and np.abs(d_weight).max() < 1e-5
    given["hidden_BTD"] = -given["teacher_BTD"]  # what it finds least probable
    teacher, kl_BT, _, _ = ours(given, None, 6)
    P = softmax(given["hidden_BTD"] @ given["weight"])
    P_J = np.take_along_axis(P, np.asarray(teacher.ids_BTJ), -1)
    alone = np.sum(P_J * (np.log(P_J) - teacher.log_probs_BTJ), axis=-1)
    counts = given["counts_BT"]
    assert np.all(np.asarray(kl_BT)[counts] > 0.1) and np.mean(alone[counts] < 0) > 0.5


def test_full_logits_never_exist():
    """No array of the gradient's program is larger than the logits of a chunk."""
    time, vocabulary, chunk, k = 64, 1000, 16, 4

    def loss(hidden, weight):
        teacher = TopLogProbs(jnp.zeros((1, time, k), jnp.int32), jnp.zeros((1, time, k)), jnp.zeros((1, time)))
        return jnp.sum(reverse_kl(hidden, weight, teacher, jnp.ones((1, time), bool), "DV", chunk))

    program = jax.make_jaxpr(jax.grad(loss, (0, 1)))(jnp.zeros((1, time, 4)), jnp.zeros((4, vocabulary)))
    assert max(sizes(program.jaxpr)) == chunk * vocabulary
