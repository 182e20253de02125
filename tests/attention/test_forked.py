# SPDX-License-Identifier: Apache-2.0
"""A trunk and a tail that forks off it against dense attention with branch tags: values and gradients, on any ring."""

from dataclasses import dataclass, replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longpo_jax.rows import arrangement
from rapid_jax.attention.attend import attend_fork
from rapid_jax.attention.forked import Forked
from rapid_jax.attention.kernels import kernel_of
from rapid_jax.attention.online_softmax import Slots, fold
from rapid_jax.attention.order import inverse
from rapid_jax.attention.strategy import Strategy
from tests.attention.test_kernels import primitives
from tests.attention.test_ring import gradients_of, mesh_of
from tests.reference import dense_attention, visible


@dataclass(frozen=True)
class Case:
    """Rows of (shared positions, positions of the first continuation, of the second); the rest of a row is padding."""

    trunk: int
    tail: int
    rows: tuple[tuple[int, int, int], ...]
    heads: tuple[int, int] = (4, 2)
    H: int = 8
    window: int | None = None

    def places(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(positions, branch tags, reach) in the order of the text."""
        pos = np.full((len(self.rows), self.trunk + self.tail), -1, np.int32)
        tags = np.zeros_like(pos)
        for b, (shared, first, second) in enumerate(self.rows):
            pos[b, : shared + first] = np.arange(shared + first)
            pos[b, self.trunk : self.trunk + second] = shared + np.arange(second)
            tags[b, shared : self.trunk], tags[b, self.trunk :] = 1, 2
        return pos, tags, np.array([shared - 1 for shared, _, _ in self.rows], np.int32)

    def qkv(self, dtype=np.float32) -> tuple[jax.Array, ...]:
        rng = np.random.default_rng(self.trunk)
        B, T, (N, K) = len(self.rows), self.trunk + self.tail, self.heads
        return tuple(jnp.asarray(rng.normal(size=(B, T, heads, self.H)), dtype) for heads in (N, K, K))

    def dense(self):
        pos, tags, _ = self.places()
        seen = visible(pos, pos, tags, tags, window=self.window)
        return lambda q, k, v: dense_attention(q, k, v, seen, xp=jnp)


# Of the first: reach and padding differ; there is no second continuation, of another nothing is shared.
ROWS = ((37, 20, 19), (12, 52, 32), (40, 24, 0), (0, 64, 30))
CASES = {
    "rows of every kind": Case(64, 32, ROWS),
    "no places for a second continuation": Case(64, 0, ((40, 24, 0), (20, 11, 0))),
    "every query head its own": Case(32, 16, ((9, 22, 16), (31, 1, 3)), heads=(2, 2)),
    "a window of 11": Case(64, 32, ROWS, window=11),
    "a window and no second continuation": Case(64, 0, ((40, 24, 0), (20, 11, 0)), window=8),
}


@cache
def truth(name: str):
    return gradients_of(CASES[name].dense(), CASES[name].qkv())


def ours(case: Case, strategy: Strategy):
    """The case's attention with its places in the devices' order; what comes out is in the text's again."""
    order = arrangement(case.trunk, case.tail, strategy.context)
    back = inverse(order)
    pos, _, reach = case.places()

    def attention(q, k, v):
        tail = case.tail // strategy.context
        attend = attend_fork(jnp.asarray(pos[:, order]), jnp.asarray(reach), strategy, tail=tail)
        return attend(q[:, order], k[:, order], v[:, order], None, case.window)[0][:, back]

    return attention


def ring_of(devices: int, **how) -> Strategy:
    return Strategy(**{"block": 8, "mesh": mesh_of(context=devices) if devices > 1 else None, "kernel": "xla"} | how)


def compare(case: Case, strategy: Strategy, expected) -> None:
    (got, out), (want, truth) = gradients_of(ours(case, strategy), case.qkv()), expected
    np.testing.assert_allclose(out, truth, atol=1e-5)
    for name, g, w in zip("qkv", got, want, strict=True):
        np.testing.assert_allclose(g, w, atol=1e-4, err_msg=name)


@pytest.mark.parametrize(
    "name, devices, over",
    [
        *(("rows of every kind", devices, "ring") for devices in (1, 2, 4, 8)),
        *(("rows of every kind", devices, "all_gather") for devices in (2, 8)),
        ("no places for a second continuation", 1, "ring"),
        ("no places for a second continuation", 4, "ring"),
        ("every query head its own", 1, "ring"),
        ("a window of 11", 4, "ring"),
        ("a window and no second continuation", 4, "ring"),
    ],
)
def test_a_fork_is_dense_attention_with_branch_tags(name, devices, over):
    compare(CASES[name], ring_of(devices, over=over), truth(name))


def test_with_rows_and_heads_split_too():
    name = "rows of every kind"
    compare(CASES[name], ring_of(2, mesh=mesh_of(fsdp=2, context=2, model=2)), truth(name))


SPLASH = Case(256, 128, ((150, 90, 128), (31, 225, 77)), heads=(2, 1), H=64)


@pytest.mark.parametrize("devices, window", [(1, None), (2, None), (1, 100)])
def test_splash(devices, window):
    """Interpreted. 128 rows of each part a device are the fewest that the kernels take."""
    case = replace(SPLASH, trunk=256 * devices, tail=128 * devices, window=window)
    compare(case, ring_of(devices, kernel="splash"), gradients_of(case.dense(), case.qkv()))


def test_splash_of_a_window_that_neighbours_have():
    """Of half a device's slots and one, so that what lies before a run is as much as the kernels take."""
    case = Case(512, 0, ((300, 150, 0),), heads=(2, 1), H=64, window=129)
    compare(case, ring_of(2, kernel="splash"), gradients_of(case.dense(), case.qkv()))


def test_splash_decides_nothing_and_attends_in_no_other_way():
    """Three kernels a pass: no block of the tail is attended by the trunk, no branch falls back to plain XLA."""
    case = replace(SPLASH, rows=SPLASH.rows[:1])
    names = list(primitives(jax.make_jaxpr(ours(case, ring_of(1, kernel="splash")))(*case.qkv()).jaxpr))
    assert names.count("pallas_call") == 3 and "cond" not in names


def test_slots_left_unused_are_refused():
    case = CASES["every query head its own"]
    q, k, v = case.qkv()
    pos, _, _ = case.places()
    rows, slots = fold(q, jnp.asarray(pos), 2), Slots(k.swapaxes(1, 2), v.swapaxes(1, 2), jnp.asarray(pos))
    with pytest.raises(ValueError, match="no unused slots"):
        Forked(kernel_of("xla", "cpu", 8), 16).forward(rows, slots, scale=1.0, used=jnp.int32(8))


def test_bfloat16_is_as_close_to_the_truth_as_dense_bfloat16():
    case = Case(384, 128, ((230, 150, 120),))
    qkv = case.qkv(jnp.bfloat16)
    with jax.enable_x64(True):
        exact = gradients_of(case.dense(), tuple(jnp.asarray(np.asarray(x, np.float64)) for x in qkv))
        exact = jax.tree.map(np.asarray, exact)
    plain = gradients_of(case.dense(), qkv)
    forked = gradients_of(ours(case, ring_of(2, block=64)), qkv)
    for a, b, c in zip(*map(jax.tree.leaves, (forked, plain, exact)), strict=True):
        error, dense_error = (np.linalg.norm(np.asarray(x, np.float64) - c) for x in (a, b))
        assert a.dtype == jnp.bfloat16 and c.dtype == np.float64
        assert error <= dense_error
