# SPDX-License-Identifier: Apache-2.0
"""The attention algebra against dense attention."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rapid_jax.attention.attend import attend_self
from rapid_jax.attention.online_softmax import (
    Slots,
    SoftmaxState,
    attend_block,
    attend_blockwise,
    finish,
    fold,
    merge,
    nothing_seen,
    unfold,
)
from rapid_jax.attention.strategy import Strategy
from tests.reference import dense_attention, visible


@dataclass(frozen=True)
class Case:
    batch: int
    time: int
    slots: int
    heads: int
    kv_heads: int
    head_dim: int
    block: int
    branches: bool = False


CASES = {
    "one head": Case(1, 7, 16, 1, 1, 4, 8),
    "grouped heads": Case(2, 5, 24, 6, 2, 8, 8),
    "block does not divide": Case(2, 6, 23, 4, 4, 8, 8),
    "block larger than slots": Case(1, 3, 10, 4, 1, 8, 64),
    "branches": Case(2, 9, 21, 4, 2, 8, 5, branches=True),
}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Arrays:
    q_BTNH: jax.Array
    k_BSKH: jax.Array
    v_BSKH: jax.Array
    q_pos_BT: jax.Array
    kv_pos_BS: jax.Array
    q_branch_BT: jax.Array | None
    kv_branch_BS: jax.Array | None

    @property
    def seen_BTS(self) -> np.ndarray:
        return visible(self.q_pos_BT, self.kv_pos_BS, self.q_branch_BT, self.kv_branch_BS)


def arrays_of(case: Case, dtype=jnp.float32) -> Arrays:
    """Positions in no order, a fifth of the slots empty, one padded query and one query before every key."""
    rng = np.random.default_rng(case.slots)
    B, T, S, N, K, H = case.batch, case.time, case.slots, case.heads, case.kv_heads, case.head_dim
    kv_pos = rng.permuted(np.tile(np.arange(5, 5 + S), (B, 1)), axis=1)
    kv_pos[rng.random((B, S)) < 0.2] = -1
    q_pos = rng.integers(5, 5 + S, (B, T))
    q_pos[:, 0], q_pos[:, 1] = -1, 3
    branches = [jnp.asarray(rng.integers(0, 3, (B, size))) if case.branches else None for size in (T, S)]
    q, k, v = (rng.normal(size=shape) for shape in ((B, T, N, H), (B, S, K, H), (B, S, K, H)))
    q, k, v = (jnp.asarray(x, dtype) for x in (2 * q, k, v))
    return Arrays(q, k, v, jnp.asarray(q_pos), jnp.asarray(kv_pos), branches[0], branches[1])


def slots_of(a: Arrays, span: slice = slice(None)) -> Slots:
    branch = None if a.kv_branch_BS is None else a.kv_branch_BS[:, span]
    return Slots(a.k_BSKH[:, span].swapaxes(1, 2), a.v_BSKH[:, span].swapaxes(1, 2), a.kv_pos_BS[:, span], branch)


@functools.partial(jax.jit, static_argnames=("block", "skip"))
def blockwise(a: Arrays, block: int, used: jax.Array | None = None, skip: bool = False) -> jax.Array:
    q_BTNH = a.q_BTNH
    rows = fold(q_BTNH, a.q_pos_BT, a.k_BSKH.shape[2], a.q_branch_BT)
    partial = attend_blockwise(rows, slots_of(a), scale=q_BTNH.shape[-1] ** -0.5, block=block, used=used, skip=skip)
    return unfold(finish(partial, q_BTNH.dtype), q_BTNH.shape[1])


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_blockwise_is_dense_attention(case):
    a = arrays_of(case)
    truth = dense_attention(a.q_BTNH, a.k_BSKH, a.v_BSKH, a.seen_BTS)
    for block, skip in ((case.block, False), (case.block, True), (case.slots, False)):
        np.testing.assert_allclose(blockwise(a, block, skip=skip), truth, atol=1e-5)
    assert not np.any(a.seen_BTS[:, :2]), "the first two queries were meant to see nothing"
    assert not np.any(truth[:, :2])
    np.testing.assert_array_equal(np.any(truth[:, 2:], axis=(2, 3)), np.any(a.seen_BTS[:, 2:], axis=-1))
    np.testing.assert_array_equal(blockwise(a, case.block)[:, :2], 0.0)


@pytest.mark.parametrize(
    ("name", "skip"), [("grouped heads", False), ("block does not divide", True), ("branches", False)]
)
def test_gradients_are_those_of_dense_attention(name, skip):
    case = CASES[name]
    a = arrays_of(case)
    weight = jnp.asarray(np.random.default_rng(9).normal(size=a.q_BTNH.shape), jnp.float32)

    def loss(attention):
        return lambda q, k, v: jnp.sum(weight * attention(q, k, v))

    def ours(q, k, v):
        return blockwise(replace(a, q_BTNH=q, k_BSKH=k, v_BSKH=v), case.block, skip=skip)

    def truth(q, k, v):
        return dense_attention(q, k, v, seen_BTS, xp=jnp)

    seen_BTS = a.seen_BTS
    arguments = (a.q_BTNH, a.k_BSKH, a.v_BSKH)
    got = jax.jit(jax.grad(loss(ours), (0, 1, 2)))(*arguments)
    want = jax.jit(jax.grad(loss(truth), (0, 1, 2)))(*arguments)
    for name, g, w in zip("qkv", got, want, strict=True):
        assert np.all(np.isfinite(g)), name
        np.testing.assert_allclose(g, w, atol=1e-4, err_msg=name)
    np.testing.assert_array_equal(got[0][:, :2], 0.0)  # of the queries that see nothing


def test_used_bounds_what_is_visited():
    case = Case(2, 4, 37, 4, 2, 8, 8)
    a = arrays_of(case)
    used = 19
    emptied = replace(a, kv_pos_BS=jnp.where(jnp.arange(37) < used, a.kv_pos_BS, -1))
    truth = blockwise(emptied, case.block)
    for bound in (used, 37):
        np.testing.assert_allclose(blockwise(emptied, case.block, jnp.int32(bound)), truth, atol=1e-6)
    # Blocks beyond `used` are not read at all: NaN there changes nothing.
    poisoned = replace(emptied, k_BSKH=a.k_BSKH.at[:, 24:32].set(jnp.nan))
    np.testing.assert_allclose(blockwise(poisoned, case.block, jnp.int32(used)), truth, atol=1e-6)


def test_blocks_that_nobody_sees_are_left_out_and_blocks_that_all_see_need_no_mask():
    """Keys of the unseen block are NaN; between the others stand one seen whole and one seen in part."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(1, size, 2, 4)), jnp.float32) for size in (6, 12, 12))
    q_pos, kv_pos = jnp.arange(4, 10)[None], jnp.asarray([[0, 1, 2, 3, 4, 5, -1, 7, 20, 21, 22, -1]])
    a = Arrays(q, k, v, q_pos, kv_pos, None, None)
    truth = dense_attention(q, k, v, a.seen_BTS)
    poisoned = replace(a, k_BSKH=k.at[:, 8:].set(jnp.nan), v_BSKH=v.at[:, 8:].set(jnp.nan))
    np.testing.assert_allclose(blockwise(poisoned, 4, skip=True), truth, atol=1e-5)


@pytest.mark.parametrize(("time", "branches"), [(16, False), (18, False), (16, True)])
def test_a_sequence_over_itself_in_tiles(time, branches):
    """Four positions a tile where they divide the sequence; forward and gradients, with a padded end in one row."""
    rng = np.random.default_rng(time)
    q, k, v = (jnp.asarray(rng.normal(size=(2, time, heads, 8)), jnp.float32) for heads in (4, 2, 2))
    pos_BT = np.stack([np.arange(time), np.where(np.arange(time) < 11, np.arange(time), -1)])
    branch_BT = np.where(np.arange(time) < 5, 0, rng.integers(1, 3, (2, time))) if branches else None
    seen_BTS = visible(pos_BT, pos_BT, branch_BT, branch_BT)
    weight = jnp.asarray(rng.normal(size=q.shape), jnp.float32)

    def ours(q, k, v):
        tags = None if branch_BT is None else jnp.asarray(branch_BT)
        return attend_self(jnp.asarray(pos_BT), Strategy(block=4), branch_BT=tags)(q, k, v, None)[0]

    def truth(q, k, v):
        return dense_attention(q, k, v, seen_BTS, xp=jnp)

    def gradients(attention):
        def weighed(*qkv):
            out = attention(*qkv)
            return jnp.sum(weight * out), out

        return jax.jit(jax.grad(weighed, (0, 1, 2), has_aux=True))(q, k, v)

    (got, out), (want, expected) = gradients(ours), gradients(truth)
    np.testing.assert_allclose(out, expected, atol=1e-5)
    for name, g, w in zip("qkv", got, want, strict=True):
        np.testing.assert_allclose(g, w, atol=1e-4, err_msg=name)


def parts_of(a: Arrays, cuts: list[int]) -> list[SoftmaxState]:
    rows = fold(a.q_BTNH, a.q_pos_BT, a.k_BSKH.shape[2], a.q_branch_BT)
    attend = jax.jit(attend_block, static_argnames="scale")
    return [attend(rows, slots_of(a, slice(start, stop)), scale=0.3) for start, stop in pairwise(cuts)]


def test_merge_is_associative_and_commutative_with_an_identity():
    a = arrays_of(CASES["branches"])
    x, y, z = parts_of(a, [0, 4, 13, 21])
    whole = parts_of(a, [0, 21])[0]
    nothing = nothing_seen(fold(a.q_BTNH, a.q_pos_BT, 2))
    add = jax.jit(merge)
    out = finish(whole, jnp.float32)
    for merged in (add(add(x, y), z), add(x, add(y, z)), add(add(z, x), y), add(nothing, whole)):
        np.testing.assert_allclose(finish(merged, jnp.float32), out, atol=1e-6)
        np.testing.assert_allclose(merged.sum_BKR, whole.sum_BKR, rtol=1e-6)
        np.testing.assert_allclose(merged.max_BKR, whole.max_BKR, rtol=1e-6)  # products of other widths
    np.testing.assert_array_equal(finish(add(nothing, nothing), jnp.float32), 0.0)


def test_large_scores_neither_overflow_nor_vanish():
    a = arrays_of(CASES["grouped heads"])
    scaled = replace(a, q_BTNH=a.q_BTNH * 1e3)
    q, k, v = (np.asarray(x, np.float64) for x in (scaled.q_BTNH, a.k_BSKH, a.v_BSKH))
    truth = dense_attention(q, k, v, a.seen_BTS)
    np.testing.assert_allclose(blockwise(scaled, 8), truth, atol=1e-3)


def test_bfloat16_is_as_close_to_the_truth_as_dense_bfloat16():
    a = arrays_of(Case(2, 32, 256, 4, 2, 32, 64), jnp.bfloat16)
    q, k, v = (np.asarray(x, np.float64) for x in (a.q_BTNH, a.k_BSKH, a.v_BSKH))
    truth = dense_attention(q, k, v, a.seen_BTS)
    dense = dense_attention(a.q_BTNH, a.k_BSKH, a.v_BSKH, a.seen_BTS, xp=jnp)
    ours = blockwise(a, 64)
    assert ours.dtype == dense.dtype == jnp.bfloat16

    def error(out) -> float:
        return float(np.sqrt(np.mean((np.asarray(out, np.float64) - truth) ** 2)))

    assert error(ours) <= error(dense)
    # What is left is the rounding of the weights and of the result, 2^-9 relative each.
    assert error(ours) < 2**-8 * np.sqrt(np.mean(truth**2))


def arrays_in(jaxpr) -> Iterator[tuple[int, ...]]:
    """The shape of everything that a program computes, loops and branches included."""
    for equation in jaxpr.eqns:
        yield from (v.aval.shape for v in equation.outvars)
        for value in equation.params.values():
            for inner in value if isinstance(value, (list, tuple)) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from arrays_in(inner)


def test_no_array_holds_every_query_and_every_key():
    T, S, H, block = 96, 1536, 8, 128
    q, kv = jnp.ones((1, T, 1, H)), jnp.ones((1, S, 1, H))
    a = Arrays(q, kv, kv, jnp.arange(T)[None], jnp.arange(S)[None], None, None)

    def forward(q, k, v):
        return blockwise(replace(a, q_BTNH=q, k_BSKH=k, v_BSKH=v), block).sum()

    def skipping(q, k, v):
        return blockwise(replace(a, q_BTNH=q, k_BSKH=k, v_BSKH=v), block, skip=True).sum()

    def bounded(q, k, v):
        return blockwise(replace(a, q_BTNH=q, k_BSKH=k, v_BSKH=v), block, jnp.int32(S)).sum()

    for program in (forward, skipping, bounded, jax.grad(forward, (0, 1, 2)), jax.grad(skipping, (0, 1, 2))):
        sizes = [int(np.prod(shape)) for shape in arrays_in(jax.make_jaxpr(program)(q, kv, kv).jaxpr)]
        assert T * block in sizes, "the walk missed the scores of a block"
        assert max(sizes) < T * S / 4
