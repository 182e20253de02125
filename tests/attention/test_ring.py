# SPDX-License-Identifier: Apache-2.0
"""Attention over a mesh of 8 fake devices against dense attention: values and gradients, in any order of tokens."""

import re
from dataclasses import dataclass, replace
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rapid_jax.attention.attend import attend_chunk, attend_prefix_tail, attend_self
from rapid_jax.attention.cache import KV, Prefix, Tail
from rapid_jax.attention.order import inverse, zigzag
from rapid_jax.attention.strategy import Strategy
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.mesh import MeshConfig, make_mesh
from tests.reference import dense_attention, visible

H = 8


def mesh_of(**sizes: int):
    config = MeshConfig(**sizes)
    count = config.data * config.fsdp * config.context * config.model
    return make_mesh(config, jax.devices()[:count])


@dataclass(frozen=True)
class Case:
    """Sequences of `time` tokens, row b of which ends at `ends[b]`; branches start at `branch_at`."""

    time: int
    heads: int = 4
    kv_heads: int = 2
    ends: tuple[int, ...] = (0,)  # 0: no padding
    branch_at: tuple[int, ...] = ()
    window: int | None = None

    def positions(self) -> np.ndarray:
        index = np.arange(self.time)
        rows = []
        for end in self.ends:
            pos = index.copy()
            for start in self.branch_at[1:]:  # later branches restart where the first began
                pos[start:] = np.arange(self.time - start) + self.branch_at[0]
            rows.append(np.where(index < (end or self.time), pos, -1))
        return np.stack(rows).astype(np.int32)

    def branches(self) -> np.ndarray | None:
        if not self.branch_at:
            return None
        tags = np.searchsorted(np.array(self.branch_at), np.arange(self.time), side="right")
        return np.tile(tags.astype(np.int32), (len(self.ends), 1))

    def qkv(self, dtype=np.float32):
        rng = np.random.default_rng(self.time)
        shapes = [(len(self.ends), self.time, heads, H) for heads in (self.heads, self.kv_heads, self.kv_heads)]
        return tuple(jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)


CASES = {
    "grouped heads": Case(48),
    "every query head its own": Case(32, heads=2, kv_heads=2),
    "one kv head of many": Case(32, heads=8, kv_heads=1),
    "padding, a row that ends early": Case(64, ends=(0, 19)),
    "branches": Case(64, branch_at=(30, 45)),
    "branches and padding": Case(64, ends=(61, 50), branch_at=(21, 40)),
}


def gradients_of(attention, qkv):
    """(gradients of q, k, v under a fixed random cotangent, output)."""
    weight = jnp.asarray(np.random.default_rng(7).normal(size=qkv[0].shape), jnp.float32)

    def weighed(*qkv):
        out = attention(*qkv)
        return jnp.sum(weight * out.astype(jnp.float32)), out

    return jax.jit(jax.grad(weighed, (0, 1, 2), has_aux=True))(*qkv)


def on_mesh(case: Case, strategy: Strategy, order: np.ndarray):
    """The case's attention with its tokens in this order; what comes out is in the tokens' own order again."""
    pos_BT, branch_BT = case.positions()[:, order], case.branches()
    tags = None if branch_BT is None else jnp.asarray(branch_BT[:, order])
    runs = 2 if branch_BT is None and strategy.context > 1 else 0
    back = inverse(order)

    def attention(q, k, v):
        attend = attend_self(jnp.asarray(pos_BT), strategy, branch_BT=tags, runs=runs)
        return attend(q[:, order], k[:, order], v[:, order], None, case.window)[0][:, back]

    return attention


def dense(case: Case, xp=jnp):
    seen = visible(case.positions(), case.positions(), case.branches(), case.branches(), window=case.window)
    return lambda q, k, v: dense_attention(q, k, v, seen, xp=xp)


def compare(case: Case, strategy: Strategy, order: np.ndarray) -> None:
    qkv = case.qkv()
    (got, out), (want, truth) = gradients_of(on_mesh(case, strategy, order), qkv), gradients_of(dense(case), qkv)
    np.testing.assert_allclose(out, truth, atol=1e-5)
    for name, g, w in zip("qkv", got, want, strict=True):
        np.testing.assert_allclose(g, w, atol=1e-4, err_msg=name)


RINGS = [*((8, name) for name in CASES), (2, "padding, a row that ends early"), (4, "branches and padding")]


@pytest.mark.parametrize(("devices", "name"), RINGS)
def test_a_zigzag_ring_is_dense_attention(devices, name):
    case, strategy = CASES[name], Strategy(block=4, mesh=mesh_of(context=devices), kernel="xla")
    compare(case, strategy, zigzag(case.time, devices))


WINDOWED = Case(64, ends=(0, 51))


@pytest.mark.parametrize(
    "devices, window, known",
    [(2, 1, True), (4, 9, True), (4, 9, False), (4, 10, True), (8, 5, True), (8, 200, True)],
)
def test_a_window_over_devices_is_dense_attention(devices, window, known):
    """In zigzag order; of half a device's slots and one, so that neighbours are enough, of less and of more."""
    strategy = Strategy(block=4, mesh=mesh_of(context=devices), kernel="xla")
    case = replace(WINDOWED, window=window)
    ours = on_mesh(case if known else replace(case, window=jnp.int32(window)), strategy, zigzag(case.time, devices))
    (got, out), (want, truth) = gradients_of(ours, case.qkv()), gradients_of(dense(case), case.qkv())
    np.testing.assert_allclose(out, truth, atol=1e-5)
    for name, g, w in zip("qkv", got, want, strict=True):
        np.testing.assert_allclose(g, w, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("window, slots", [(5, {4}), (9, {8}), (10, {16})])
def test_of_a_window_that_neighbours_have_no_more_is_sent(window, slots):
    strategy = Strategy(block=4, mesh=mesh_of(context=4), kernel="xla")
    ours = on_mesh(replace(WINDOWED, window=window), strategy, zigzag(64, 4))
    text = str(jax.make_jaxpr(jax.grad(lambda *qkv: ours(*qkv).sum(), (0, 1, 2)))(*WINDOWED.qkv()))
    sent = re.findall(r"f32\[([\d,]+)\] = ppermute", text)
    assert {int(shape.split(",")[-2]) for shape in sent} == slots and len(sent) > 3


def test_a_window_in_any_order_and_with_branches():
    case = replace(CASES["branches and padding"], window=13)
    places = np.random.default_rng(0).permutation(np.arange(case.time, dtype=np.int32))
    compare(case, Strategy(block=4, mesh=mesh_of(context=4), kernel="xla", over="all_gather"), places)


@pytest.mark.parametrize(
    ("axis", "sizes", "over"),
    [
        ("fsdp", (2, 4), "ring"),
        ("fsdp", (4, 2), "all_gather"),
        ("model", (4, 2), "ring"),
        ("model", (2, 4), "all_gather"),
        ("model", (1, 8), "all_gather"),
    ],
)
def test_meshes_of_two_axes(axis, sizes, over):
    other, context = sizes
    case = Case(32, heads=8, kv_heads=4, ends=(0, 27, 9, 30))
    strategy = Strategy(block=8, mesh=mesh_of(**{axis: other, "context": context}), kernel="xla", over=over)
    compare(case, strategy, zigzag(case.time, context))


@pytest.mark.parametrize("order", ["in sequence", "shuffled"])
def test_any_order_of_tokens_is_right(order):
    case = CASES["branches and padding"]
    places = np.arange(case.time, dtype=np.int32)
    if order == "shuffled":
        places = np.random.default_rng(0).permutation(places)
    compare(case, Strategy(block=4, mesh=mesh_of(context=4), kernel="xla"), places)


@pytest.mark.parametrize("time", [24, 40])
def test_shards_that_are_no_multiple_of_the_block(time):
    """3 and 5 tokens a device in blocks of 4: in sequence, since zigzag needs an even number."""
    case = Case(time, ends=(0, time - 2))
    compare(case, Strategy(block=4, mesh=mesh_of(context=8), kernel="xla"), np.arange(time, dtype=np.int32))


def test_fewer_kv_heads_than_model_devices_are_copied():
    case = Case(16, heads=8, kv_heads=2)
    strategy = Strategy(block=4, mesh=mesh_of(context=2, model=4), kernel="xla")
    assert strategy.kv_heads(2) == 4
    compare(case, strategy, zigzag(case.time, 2))
    with pytest.raises(InputError, match="3 kv heads cannot be shared out over model = 4"):
        strategy.kv_heads(3)


def test_bfloat16_is_as_close_to_the_truth_as_dense_bfloat16():
    case = Case(512, heads=4, kv_heads=2)
    qkv = case.qkv(jnp.bfloat16)
    seen = visible(case.positions(), case.positions())
    exact = tuple(np.asarray(x, np.float64) for x in qkv)
    with jax.enable_x64(True):
        want, truth = gradients_of(dense(case), tuple(jnp.asarray(x) for x in exact))
        want, truth = jax.tree.map(np.asarray, (want, truth))
    np.testing.assert_allclose(truth, dense_attention(*exact, seen), atol=1e-12)
    plain, plain_out = gradients_of(dense(case), qkv)
    strategy = Strategy(block=32, mesh=mesh_of(context=8), kernel="xla")
    ours, out = gradients_of(on_mesh(case, strategy, zigzag(case.time, 8)), qkv)
    for name, a, b, c in zip(("out", "q", "k", "v"), (out, *ours), (plain_out, *plain), (truth, *want), strict=True):
        error, dense_error = (np.linalg.norm(np.asarray(x, np.float64) - c) for x in (a, b))
        assert a.dtype == jnp.bfloat16
        assert error <= dense_error, name


@pytest.mark.parametrize(
    "devices, over, window",
    [
        *((2, "ring", None), (8, "ring", None), (4, "all_gather", 50), (8, "all_gather", None)),
        *((2, "ring", 9), (4, "ring", 5), (4, "ring", 6), (2, "ring", 34), (1, "ring", 34)),
    ],
)
def test_chunks_into_a_sharded_prefix_then_a_tail(devices, over, window):
    """Two rows, one of which ends in the first chunk; then three new tokens over the prefix and the tail."""
    chunk, total, fresh = 32, 64 if window is None else 96, 3
    room = total + chunk  # for a chunk that never comes
    case = Case(total + fresh, heads=4, kv_heads=2, ends=(0, 0))
    q, k, v = case.qkv()
    ends = np.array([total, 21])
    index = np.arange(total)
    pos = np.where(index < ends[:, None], index, -1).astype(np.int32)
    strategy = Strategy(block=8, mesh=mesh_of(context=devices), kernel="xla", over=over, batch=("data",))
    order, share = zigzag(chunk, devices), chunk // devices
    slots = np.zeros((2, 2, devices, room // devices, H), np.float32)
    kept, slot_pos = [slots.copy(), slots.copy()], np.full((2, devices, room // devices), -1, np.int32)

    @jax.jit
    def attend(q, k, v, kv, pos_BT, pos_BS, used):
        return attend_chunk(pos_BT, Prefix((kv,), pos_BS, used), strategy)(q, k, v, kv, window)

    for start in range(0, total, chunk):
        part = start + order
        kv = KV(*(jnp.asarray(x.reshape(2, 2, -1, H)) for x in kept))
        here = pos[:, part]
        out, new = attend(q[:, part], k[:, part], v[:, part], kv, here, slot_pos.reshape(2, -1), np.int32(start))
        truth = dense_attention(q[:, part], k[:, :total], v[:, :total], visible(here, pos, window=window))
        np.testing.assert_allclose(out, truth, atol=1e-5)
        at = slice(start // devices, start // devices + share)
        for store, fresh_kv in zip(kept, (new.k_BKSH, new.v_BKSH), strict=True):
            store[:, :, :, at] = np.asarray(fresh_kv).reshape(2, 2, devices, share, H)
        slot_pos[:, :, at] = here.reshape(2, devices, share)

    prefix = Prefix((), jnp.asarray(slot_pos.reshape(2, -1)), jnp.int32(total))
    tail = Tail((), jnp.asarray(ends), jnp.zeros(2, jnp.int32))
    far = KV(*(jnp.asarray(x.reshape(2, 2, -1, H)) for x in kept))
    near = KV(jnp.zeros((2, 2, 5, H)), jnp.zeros((2, 2, 5, H)))
    tail = replace(tail, layers=(near,))
    new_pos = jnp.asarray(ends[:, None] + np.arange(fresh))
    call = jax.jit(lambda q, k, v: attend_prefix_tail(prefix, tail, new_pos, strategy)(q, k, v, (far, near), window))
    out, kv = call(*(x[:, total:] for x in (q, k, v)))
    every = np.concatenate([pos, np.asarray(new_pos)], axis=1)
    seen = visible(new_pos, every, window=window)
    np.testing.assert_allclose(out, dense_attention(q[:, total:], k, v, seen), atol=1e-5)
    np.testing.assert_array_equal(kv.k_BKSH[:, :, :fresh], k[:, total:].swapaxes(1, 2))


@pytest.mark.parametrize(("size", "devices"), list(product([16, 48], [1, 2, 4, 8])))
def test_zigzag_is_a_permutation_with_equal_work(size, devices):
    order = zigzag(size, devices)
    np.testing.assert_array_equal(np.sort(order), np.arange(size))
    np.testing.assert_array_equal(order[inverse(order)], np.arange(size))
    work = (order.reshape(devices, -1) + 1).sum(axis=1)  # keys that each device's queries see
    assert len(set(work.tolist())) == 1


def test_zigzag_refuses_what_does_not_divide():
    with pytest.raises(InputError, match="multiple of 16 tokens, got 24"):
        zigzag(24, 8)
