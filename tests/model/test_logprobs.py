# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities a chunk at a time against the plain log softmax: values, gradients, meshes, what never exists."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from rapid_jax.attention.strategy import Strategy
from rapid_jax.model.logprobs import token_log_probs
from rapid_jax.runtime.axes import PARAM, spec_of
from rapid_jax.runtime.mesh import MeshConfig, make_mesh

B, T, D, V = 2, 48, 16, 40


@dataclass(frozen=True)
class Numbers:
    """What goes in, as float64, and the weights of the sum whose gradient is compared."""

    hidden_BTD: np.ndarray
    weight: np.ndarray
    targets_BT: np.ndarray
    counts_BT: np.ndarray
    d_log_prob_BT: np.ndarray


def numbers(axes: str, time: int = T) -> Numbers:
    rng = np.random.default_rng(3)
    counts_BT = rng.random((B, time)) < 0.6
    counts_BT[:, 12:30] = False  # whole chunks
    weight = rng.normal(size=(D, V))
    return Numbers(
        rng.normal(size=(B, time, D)),
        weight if axes == "DV" else weight.T,
        rng.integers(0, V, (B, time)),
        counts_BT,
        rng.normal(size=(B, time)),
    )


def truth(given: Numbers, axes: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(log-probabilities, gradients of hidden and weight) in float64, written out: dz = d (hit - softmax)."""
    weight_DV = given.weight if axes == "DV" else given.weight.T
    logits = given.hidden_BTD @ weight_DV
    log_softmax = logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
    log_prob = np.take_along_axis(log_softmax, given.targets_BT[..., None], -1)[..., 0] * given.counts_BT
    d_logits = np.eye(V)[given.targets_BT] - np.exp(log_softmax)
    d_logits *= (given.d_log_prob_BT * given.counts_BT)[..., None]
    d_weight_DV = np.einsum("BTD,BTV->DV", given.hidden_BTD, d_logits)
    return log_prob, d_logits @ weight_DV.T, d_weight_DV if axes == "DV" else d_weight_DV.T


def ours(given: Numbers, axes: str, chunk: int, mesh=None, dtype=jnp.float32):
    """The same of `token_log_probs`, from one program."""
    hidden, weight = jnp.asarray(given.hidden_BTD, dtype), jnp.asarray(given.weight, dtype)
    fixed = jnp.asarray(given.targets_BT), jnp.asarray(given.counts_BT)
    if mesh is not None:
        spec = Strategy(block=1, mesh=mesh).spec
        hidden = jax.device_put(hidden, NamedSharding(mesh, spec("hidden_BTD")))
        weight = jax.device_put(weight, NamedSharding(mesh, spec_of(f"head_{axes}", {**PARAM, "D": None})))
        fixed = jax.device_put(fixed, NamedSharding(mesh, spec("targets_BT")))

    def weighed(hidden, weight):
        log_prob: Any = token_log_probs(hidden, weight, *fixed, axes, chunk, mesh)
        return jnp.sum(log_prob * jnp.asarray(given.d_log_prob_BT, jnp.float32)), log_prob

    (d_hidden, d_weight), log_prob = jax.jit(jax.grad(weighed, (0, 1), has_aux=True))(hidden, weight)
    assert log_prob.dtype == jnp.float32 and (d_hidden.dtype, d_weight.dtype) == (dtype, dtype)
    return log_prob, d_hidden, d_weight


def compare(got, want) -> None:
    for name, a, b in zip(("log_prob", "hidden", "weight"), got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5, rtol=0, err_msg=name)


@pytest.mark.parametrize("axes, chunk", [("DV", 6), ("VD", 6), ("DV", 7), ("VD", 48), ("DV", 1000), ("DV", 1)])
def test_values_and_gradients_are_those_of_the_plain_softmax(axes, chunk):
    given = numbers(axes)
    compare(ours(given, axes, chunk), truth(given, axes))


@pytest.mark.parametrize("axes", ["DV", "VD"])
@pytest.mark.parametrize("sizes", [{"context": 8}, {"fsdp": 2, "context": 4}, {"model": 2, "context": 4}])
def test_on_a_mesh(sizes, axes):
    """Of a device's 6 or 12 tokens 4 at a time: neither more nor fewer devices see the same chunks."""
    given = numbers(axes)
    compare(ours(given, axes, 4, make_mesh(MeshConfig(**sizes))), truth(given, axes))


def test_what_does_not_count_changes_nothing_whatever_it_is():
    given = numbers("DV")
    left_out = ~given.counts_BT
    given.hidden_BTD[left_out] = 1e30  # its logits overflow
    given.targets_BT[left_out] = 0
    plain = numbers("DV")
    got, want = ours(given, "DV", 7), ours(plain, "DV", 7)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.any(np.asarray(got[0])[left_out]) and not np.any(np.asarray(got[1])[left_out])


def test_nothing_counts():
    given = numbers("DV")
    given.counts_BT[:] = False
    assert not any(np.any(x) for x in ours(given, "DV", 7))


def test_bfloat16_is_no_further_from_the_truth_than_full_logits_in_bfloat16():
    given = numbers("DV", time=256)
    rounded = [np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64) for x in (given.hidden_BTD, given.weight)]
    exact = truth(replace(given, hidden_BTD=rounded[0], weight=rounded[1]), "DV")

    def weighed(hidden, weight):
        log_softmax = jax.nn.log_softmax((hidden @ weight).astype(jnp.float32))
        log_prob = jnp.take_along_axis(log_softmax, jnp.asarray(given.targets_BT)[..., None], -1)[..., 0]
        log_prob *= jnp.asarray(given.counts_BT)
        return jnp.sum(log_prob * jnp.asarray(given.d_log_prob_BT, jnp.float32)), log_prob

    inputs = [jnp.asarray(x, jnp.bfloat16) for x in rounded]
    (d_hidden, d_weight), log_prob = jax.jit(jax.grad(weighed, (0, 1), has_aux=True))(*inputs)
    for a, b, c in zip(ours(given, "DV", 48, dtype=jnp.bfloat16), (log_prob, d_hidden, d_weight), exact, strict=True):
        error, plain_error = (np.linalg.norm(np.asarray(x, np.float64) - c) for x in (a, b))
        assert error <= 1.1 * plain_error
    # The sums are float32: what is left is the rounding of the given hidden states and weights alone.
    np.testing.assert_allclose(ours(given, "DV", 48, dtype=jnp.bfloat16)[0], exact[0], atol=2e-5)


def sizes(jaxpr) -> set[int]:
    """Of every array of a program and of the programs inside it."""
    found = {value.aval.size for equation in jaxpr.eqns for value in equation.outvars}
    for equation in jaxpr.eqns:
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(inner := getattr(value, "jaxpr", value), "eqns"):
                found |= sizes(inner)
    return found


@pytest.mark.parametrize("chunk", [16, 64])
def test_full_logits_never_exist(chunk):
    """No array of the gradient's program holds the logits of more than one chunk; with one chunk of all, one does."""
    time, vocabulary = 64, 1000

    def loss(hidden, weight):
        zeros = jnp.zeros((1, time), jnp.int32)
        return jnp.sum(token_log_probs(hidden, weight, zeros, zeros == 0, "DV", chunk))

    program = jax.make_jaxpr(jax.grad(loss, (0, 1)))(jnp.zeros((1, time, 4)), jnp.zeros((4, vocabulary)))
    assert max(sizes(program.jaxpr)) == chunk * vocabulary


def test_on_a_mesh_no_device_holds_the_logits_of_another_s_chunk():
    mesh = make_mesh(MeshConfig(fsdp=2, context=4))
    time, vocabulary, chunk = 64, 1000, 8
    spec = Strategy(block=1, mesh=mesh).spec

    def loss(hidden, weight, targets):
        return jnp.sum(token_log_probs(hidden, weight, targets, targets >= 0, "DV", chunk, mesh))

    def shaped(name: str, *shape: int, dtype=jnp.float32):
        where = PartitionSpec() if name == "weight" else spec(name)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, where))

    inputs = (
        shaped("hidden_BTD", 2, time, 4),
        shaped("weight", 4, vocabulary),
        shaped("targets_BT", 2, time, dtype=jnp.int32),
    )
    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(*inputs).compile()
    text, memory = compiled.as_text(), compiled.memory_analysis()
    assert text is not None and memory is not None
    assert f"[1,1,{chunk},{vocabulary}]" in text or f"[{chunk},{vocabulary}]" in text
    assert memory.temp_size_in_bytes < 8 * chunk * vocabulary * 4 < 2 * time * vocabulary * 4
