# SPDX-License-Identifier: Apache-2.0
"""The decoding kernel, interpreted, against the attention algebra and against dense attention in float64."""

from dataclasses import replace
from functools import partial, reduce

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from rapid_jax.attention import flash_decode as flash_decode_module
from rapid_jax.attention.attend import attend_prefix_tail
from rapid_jax.attention.cache import KV, Prefix, Tail
from rapid_jax.attention.decoding import by_blocks, by_kernel, decode_of
from rapid_jax.attention.flash_decode import MOST_ROWS, Shape, fits, flash_decode, flash_decoded
from rapid_jax.attention.online_softmax import Rows, Slots, SoftmaxState, attend_block, finish, merge
from rapid_jax.attention.strategy import Strategy
from rapid_jax.runtime.mesh import make_mesh
from rapid_jax.runtime.mesh_config import MeshConfig
from tests.attention.decode_cases import FLOAT16, Case, Made, Side, made, tagged, truth
from tests.reference import dense_attention, visible

pytestmark = pytest.mark.usefixtures("reads_inside")

SMALL = Shape(rows=128, block=32, warps=4, stages=2, programs=9)
BLOCK = 48  # of the plain path


# Positions ascend over the sides, a row's own among the last `time` of them. Cases of one shape are one program.
ROW = Case((Side(100, 100), Side(8, 3)))
CASES = {
    "one row": ROW,
    "one row, nothing in the tail": replace(ROW, sides=(Side(100, 97, (0, 40)), Side(8, 0))),
    "one row, nothing in the prefix": replace(ROW, sides=(Side(100, 0), Side(8, 1))),
    "one row, nothing anywhere": replace(ROW, sides=(Side(100, 0), Side(8, 0))),
    "rows of 4": Case((Side(96, 70, (20, 45)), Side(20, 5)), batch=2, kv_heads=1, group=4, head_dim=32),
    "21 rows of 7": Case((Side(130, 129, (0, 33)), Side(8, 8)), group=7, time=3),
    "33 rows, some see nothing": Case((Side(75, 64), Side(40, 37)), batch=2, time=33, kv_heads=1, blind=5),
    "8 bits": Case((Side(200, 190, (30, 40), int8=True), Side(8, 6)), batch=2, group=4, time=3, blind=4),
    "8 bits, more than 64 rows": Case((Side(70, 70, int8=True), Side(33, 33)), kv_heads=1, group=4, time=20),
    "one prefix under 3 rows": Case((Side(100, 90, (20, 45), shared=1), Side(8, 5)), batch=3, group=2),
    "one prefix under 12 rows of 28, read twice": Case((Side(75, 75, shared=1), Side(40, 37)), 12, 1, 4, 7, blind=9),
    "2 prefixes under 3 rows each": Case(
        (Side(70, 61, (9, 12), shared=2), Side(8, 5)), batch=6, group=2, time=2, blind=3
    ),
    "3 prefixes in 8 bits under 2 rows each": Case((Side(70, 70, int8=True, shared=3), Side(8, 3)), batch=6, group=2),
    "one prefix in 8 bits under 4 rows": Case((Side(70, 70, int8=True, shared=1), Side(8, 3)), 4, group=2, time=2),
    "one prefix under 2 rows, empty tails": Case((Side(64, 60, shared=1), Side(8, 0)), batch=2),
    "window of 1": replace(ROW, window=1),
    "window of a block": Case((Side(100, 97, (0, 40)), Side(8, 2)), batch=2, group=2, window=32),
    "window of 45, some see nothing": Case((Side(75, 64), Side(40, 37)), batch=2, time=33, blind=5, window=45),
    "window of all, 8 bits": Case((Side(70, 70, int8=True), Side(8, 6)), batch=2, group=4, time=3, window=5000),
    "window of 40, one prefix under 3 rows": Case((Side(100, 90, (60, 70), shared=1), Side(8, 5)), 3, window=40),
    "one prefix, empty, under 2 rows": Case((Side(64, 0, shared=1), Side(8, 2)), batch=2),
}
PARTIAL = {
    "a prefix and a tail": CASES["rows of 4"],
    "a prefix": Case((Side(150, 140, (64, 96)),), batch=2, group=4, time=2, blind=3),
    "a tail of 1": Case((Side(1, 1),), group=7),
    "a tail of 0": Case((Side(1, 0),), group=7),
}


@partial(jax.jit, static_argnames="scale")
def algebra(rows: Rows, sides: tuple[Slots, ...], scale: float) -> SoftmaxState:
    return reduce(merge, [attend_block(rows, side, scale=scale) for side in sides])


@partial(jax.jit, static_argnames=("scale", "shape", "finished"))
def kernel(rows, sides, used, *, scale: float, shape: Shape | None = SMALL, finished: bool = True):
    call = flash_decoded if finished else flash_decode
    return call(rows, sides, used, scale=scale, shape=shape, interpret=True)


@pytest.mark.parametrize("name", CASES)
def test_it_is_dense_attention(name):
    case, given = CASES[name], made(CASES[name])
    got = np.asarray(kernel(given.rows, given.sides, given.used, scale=case.scale))
    np.testing.assert_allclose(got, truth(given), atol=FLOAT16 if case.sides[0].int8 else 1e-5, rtol=0)
    some_BR = np.asarray(given.rows.pos_BR >= 0) & any(side.used for side in case.sides)
    np.testing.assert_array_equal(np.any(got, axis=(1, 3)), some_BR)


@pytest.mark.parametrize("name", PARTIAL)
def test_unfinished_it_is_the_algebra_s_partial(name):
    """Sums and peaks too: they are what is merged over devices."""
    case, given = PARTIAL[name], made(PARTIAL[name])
    want = algebra(given.rows, given.sides, case.scale)
    got = kernel(given.rows, given.sides, given.used, scale=case.scale, finished=False)
    for field in ("max_BKR", "sum_BKR", "out_BKRH"):
        np.testing.assert_allclose(getattr(got, field), getattr(want, field), atol=1e-5, rtol=1e-5, err_msg=field)
        assert getattr(got, field).dtype == jnp.float32
    np.testing.assert_allclose(finish(got, jnp.float32), truth(given), atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", [Shape(16, 16, 2, 1, 1), Shape(16, 32, 4, 2, 9), Shape(128, 256, 4, 2, 6)])
def test_how_it_is_cut_changes_nothing(shape):
    """Also with fewer programs than kv heads, and with blocks larger than the prefix."""
    case, given = CASES["21 rows of 7"], made(CASES["21 rows of 7"])
    want = kernel(given.rows, given.sides, given.used, scale=case.scale)
    got = kernel(given.rows, given.sides, given.used, scale=case.scale, shape=shape)
    np.testing.assert_allclose(got, want, atol=2e-6, rtol=0)
    assert np.any(got != want), "expected sums in another order"


def test_blocks_beyond_what_is_used_are_not_read():
    """And of a block that is read, empty slots count for nothing, whatever lies in them."""
    case = replace(CASES["33 rows, some see nothing"], sides=(Side(75, 33), Side(40, 1)))
    given = made(case)
    want = kernel(given.rows, given.sides, given.used, scale=case.scale)
    for starts, junk in (((64, 32), jnp.nan), ((33, 1), 90.0)):  # SMALL reads 32 slots at once: 0 to 63, and 0 to 31
        sides = tuple(
            replace(side, k_BKSH=side.k_BKSH.at[:, :, start:].set(junk), v_BKSH=side.v_BKSH.at[:, :, start:].set(junk))
            for side, start in zip(given.sides, starts, strict=True)
        )
        np.testing.assert_array_equal(kernel(given.rows, sides, given.used, scale=case.scale), want)


def test_blocks_before_a_window_are_not_read():
    given = made(CASES["window of a block"])
    want = kernel(given.rows, given.sides, given.used, scale=16**-0.5)
    far = given.sides[0]
    spoilt = replace(far, k_BKSH=far.k_BKSH.at[:, :, :64].set(jnp.nan), v_BKSH=far.v_BKSH.at[:, :, :64].set(jnp.nan))
    got = kernel(given.rows, (spoilt, given.sides[1]), given.used, scale=16**-0.5)
    np.testing.assert_array_equal(got, want)


def test_scores_of_thousands():
    """Far apart, so that each row's softmax is one slot's value, found by any of the programs."""
    given = made(ROW)
    given = replace(given, rows=replace(given.rows, q_BKRH=given.rows.q_BKRH * 1e4))
    got = kernel(given.rows, given.sides, given.used, scale=ROW.scale)
    np.testing.assert_allclose(got, truth(given), atol=1e-5, rtol=0)


@partial(jax.jit, static_argnames=("scale", "interpret"))
def both_ways(given: Made, scale: float, interpret: bool) -> tuple[jax.Array, jax.Array]:
    args = given.rows, given.sides, given.used, scale, None
    return by_kernel(*args, block=BLOCK, interpret=interpret), by_blocks(*args, block=BLOCK)


def test_by_kernel_is_by_blocks():
    """Cut as on a GPU."""
    given = made(CASES["8 bits"])
    got, want = both_ways(given, CASES["8 bits"].scale, True)
    np.testing.assert_allclose(want, truth(given), atol=1e-5, rtol=0)
    np.testing.assert_allclose(got, want, atol=FLOAT16, rtol=0)
    assert np.any(got != want), "expected float16"


def test_bfloat16_is_no_worse_than_plain():
    case = CASES["8 bits, more than 64 rows"]  # a third of what is seen is bfloat16
    given = made(case, jnp.bfloat16)
    got, want = both_ways(given, case.scale, True)
    assert got.dtype == jnp.bfloat16
    far, plain_far = (np.sqrt(np.mean((np.asarray(x, np.float64) - truth(given)) ** 2)) for x in (got, want))
    assert 0 < far <= 1.2 * plain_far, far / plain_far


def test_a_prefix_indexed_by_the_row_is_found_out():
    """What a device would read behind the array: the guard of these tests sees it."""
    given = made(CASES["one prefix under 3 rows"])
    with pytest.raises(IndexError, match=r"a block from \[1, "):
        flash_decode_module._shares(given.rows, given.sides, given.used, scale=1.0, shape=SMALL, interpret=True)


def test_a_shared_prefix_is_read_once_for_as_many_rows_as_fit(monkeypatch):
    calls = []
    shares = flash_decode_module._shares
    monkeypatch.setattr(flash_decode_module, "_shares", lambda *args, **how: calls.append(args) or shares(*args, **how))
    given = made(CASES["one prefix under 12 rows of 28, read twice"])
    flash_decoded(given.rows, given.sides, given.used, scale=1.0, shape=SMALL, interpret=True)
    assert [(rows.q_BKRH.shape, len(side)) for rows, side, _ in calls] == [
        ((1, 1, 168, 16), 1),  # six sequences of 28 rows, over the prefix
        ((1, 1, 168, 16), 1),  # the other six
        ((12, 1, 28, 16), 1),  # every sequence over its own tail
    ]


def test_what_the_kernel_takes():
    given = made(ROW)
    far = given.sides[0]
    for head_dim, taken in ((8, False), (16, True), (24, False), (96, False), (128, True), (256, False)):
        assert fits(replace(given.rows, q_BKRH=np.zeros((1, 2, 1, head_dim), np.float32)), far) == taken, head_dim
    for head_dim, taken in ((256, True), (512, False)):
        assert fits(replace(given.rows, q_BKRH=jnp.zeros((1, 2, 1, head_dim), jnp.bfloat16)), far) == taken, head_dim
    for count in (1, MOST_ROWS, MOST_ROWS + 1):
        rows = Rows(np.zeros((1, 2, count, 16), np.float32), np.zeros((1, count), np.int32))
        assert fits(rows, far) == (count <= MOST_ROWS), count
    both = tagged(given)
    assert not fits(both.rows, both.sides[0])
    assert fits(given.rows, both.sides[0]) and fits(both.rows, far)  # a tag of one alone says nothing
    assert not fits(replace(given.rows, reach_BR=given.rows.pos_BR), far)
    with pytest.raises(ValueError, match="interpret"):  # of what fits, the kernel itself is asked for
        by_kernel(given.rows, given.sides, given.used, ROW.scale, None, block=BLOCK)


@pytest.mark.parametrize("why", ["tags", "head size"])
def test_what_it_does_not_take_is_by_blocks(why):
    """Not interpreted: on a CPU the kernel could not run."""
    case = replace(ROW, head_dim=24 if why == "head size" else 16)
    given = tagged(made(case)) if why == "tags" else made(case)
    got, want = both_ways(given, case.scale, False)
    np.testing.assert_array_equal(got, want)
    far = np.max(np.abs(got - truth(given)))  # of attention without tags
    assert far > 0.1 if why == "tags" else far < 1e-5


def test_which_platform_decodes_how():
    chosen = {(name, where): decode_of(name, where, 7) for name in ("auto", "xla") for where in ("gpu", "cpu", "tpu")}
    assert {key for key, decode in chosen.items() if decode.func is by_kernel} == {("auto", "gpu")}
    assert all(decode.keywords == {"block": 7} for decode in chosen.values())


OVER_DEVICES = {  # each device has a part of the prefix, and empty slots in it
    "8 bits": (2, Case((Side(60, 60, (20, 40), int8=True), Side(80, 70)), batch=2, group=4, time=2, blind=2)),
    "one prefix under 3 rows": (2, Case((Side(60, 58, (20, 40), shared=1), Side(8, 5)), batch=3, group=2, blind=1)),
    "devices that hold nothing": (4, Case((Side(64, 14), Side(8, 0)), batch=2, group=2, time=2, blind=3)),
    "one device": (1, Case((Side(64, 60), Side(8, 5)), group=2)),
}


@pytest.mark.parametrize("name", OVER_DEVICES)
def test_a_prefix_split_over_devices(name):
    devices, case = OVER_DEVICES[name]
    given, whole, over = made(case), PartitionSpec(), PartitionSpec
    scales = (over(None, None, "context"),) * 2 if case.sides[0].int8 else (None, None)
    keys = over(None, None, "context")
    values = over(None, None, None, "context") if case.sides[0].int8 else keys
    far = Slots(keys, values, over(None, "context"), None, *scales)
    used = given.sides[0].pos_BS.shape[1] // devices if devices > 1 else given.used[0]
    call = jax.shard_map(
        lambda *args: by_kernel(*args, case.scale, "context", block=BLOCK, interpret=True),
        mesh=jax.sharding.Mesh(jax.devices()[:devices], ("context",)),
        in_specs=(whole, (far, whole), whole),
        out_specs=whole,
        check_vma=False,
    )
    got = jax.jit(call)(given.rows, given.sides, (jnp.int32(used), given.used[1]))
    np.testing.assert_allclose(got, truth(given), atol=FLOAT16 if case.sides[0].int8 else 1e-5, rtol=0)


@pytest.mark.parametrize("axes", [None, MeshConfig(context=2), MeshConfig(data=2, context=4)], ids=str)
def test_new_tokens_over_prefix_and_tail(axes, monkeypatch):
    """Through the verb, which says how many slots are used, over devices how many of each: rows whose tails differ in
    length, and devices that have some, all or none of the prefix.
    """
    rng, (B, G, N, K, H) = np.random.default_rng(1), (2, 3, 4, 2, 16)
    given = made(Case((Side(400, 290),), batch=B, kv_heads=K, head_dim=H))
    mesh = None if axes is None else make_mesh(axes, jax.devices()[: axes.devices])
    far, tail_kv = given.sides[0], KV(*(jnp.asarray(np.float32(rng.normal(size=(B, K, 80, H)))) for _ in range(2)))
    prefix = Prefix((KV(far.k_BKSH, far.v_BKSH),), far.pos_BS, given.used[0])
    tail = Tail((tail_kv,), jnp.asarray([290, 1290]), jnp.asarray([62, 2]))  # 64 slots are a block
    qkv = [jnp.asarray(np.float32(rng.normal(size=(B, G, heads, H)))) for heads in (N, K, K)]
    pos_BG = (tail.start_B + tail.length_B)[:, None] + jnp.arange(G)

    monkeypatch.setattr(Strategy, "chosen_decode", lambda self: partial(by_kernel, block=self.block, interpret=True))
    verb = attend_prefix_tail(prefix, tail, pos_BG, Strategy(block=BLOCK, mesh=mesh, batch=("data",)))
    got_BGNH, got_kv = jax.jit(verb)(*qkv, (prefix.layers[0], tail_kv))
    near = [np.array(x) for x in (tail_kv.k_BKSH, tail_kv.v_BKSH)]
    for row, slot in enumerate(tail.length_B.tolist()):
        for old, new in zip(near, qkv[1:], strict=True):
            old[row, :, slot : slot + G] = np.asarray(new)[row].swapaxes(0, 1)
    both = zip((far.k_BKSH, far.v_BKSH), near, strict=True)
    k, v = (np.concatenate(parts, axis=2, dtype=np.float64).swapaxes(1, 2) for parts in both)
    seen = visible(pos_BG, np.concatenate([far.pos_BS, tail.slot_positions(extra=G)], axis=1))
    np.testing.assert_allclose(got_BGNH, dense_attention(np.asarray(qkv[0], np.float64), k, v, seen), atol=1e-5)
    chex.assert_trees_all_equal(got_kv, KV(*near))
