# SPDX-License-Identifier: Apache-2.0
"""Decoding on TPUs with its kernel interpreted, against dense attention in float64."""

from dataclasses import replace
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.tpu import InterpretParams
from jax.sharding import PartitionSpec

from rapid_jax.attention.cache import KV, Prefix, Tail
from rapid_jax.attention.decoding import by_blocks, by_splash, decode_of, takes_stack
from rapid_jax.attention.partial import Rows
from rapid_jax.attention.splash_decode import MOST_ROWS, Stack, block_for, fits
from rapid_jax.attention.strategy import Strategy
from rapid_jax.attention.verbs import attend_prefix_tail, layers_of
from tests.attention.decode_cases import Case, Made, Side, made, tagged, truth

BLOCK = 300  # of the plain path
INTERPRETED = InterpretParams(out_of_bounds_reads="raise", uninitialized_memory="nan")
ONE = Case((Side(1024, 1024), Side(8, 3)), head_dim=64)
CASES = {
    "one row": ONE,
    "one row, most of the prefix empty": replace(ONE, sides=(Side(1536, 512), Side(8, 3))),
    "one row, nothing in the tail": replace(ONE, sides=(Side(1024, 512), Side(8, 0))),
    "one row, nothing in the prefix": replace(ONE, sides=(Side(1024, 0), Side(8, 1))),
    "rows of 4, a block and a part": Case((Side(1536, 1090), Side(20, 5)), group=4, head_dim=128),
    "11 tokens of 4 rows, some see nothing": Case(
        (Side(2560, 2100), Side(40, 37)), kv_heads=3, group=4, time=11, head_dim=64, blind=8
    ),
    "one prefix under 3 rows": Case((Side(1024, 700, shared=1), Side(8, 3)), batch=3, group=2, head_dim=64),
    "one prefix under 5 rows of 60, read twice": Case(
        (Side(1024, 1024, shared=1), Side(40, 37)), 5, 1, 4, 15, head_dim=64, blind=9
    ),
}

STACKED = {
    "8 bits": Case((Side(1000, 700, int8=True), Side(8, 3)), group=4, time=2, head_dim=64),
    "8 bits, one prefix under 3 rows": Case((Side(700, 650, shared=1, int8=True), Side(8, 3)), batch=3, head_dim=64),
    "in full, of several sequences": Case((Side(500, 430), Side(8, 3)), batch=2, head_dim=64),
}


@partial(jax.jit, static_argnames=("scale", "interpret"))
def both_ways(given: Made, scale: float, interpret: bool = True) -> tuple[jax.Array, jax.Array]:
    args = given.rows, given.sides, given.used, scale, None
    by_kernel = by_splash(*args, block=BLOCK, interpret=INTERPRETED if interpret else False)
    return by_kernel, by_blocks(*args, block=BLOCK)


@pytest.mark.parametrize("name", CASES)
def test_it_is_dense_attention(name):
    case, given = CASES[name], made(CASES[name])
    assert fits(given.rows, given.sides[0])
    got = np.asarray(both_ways(given, case.scale)[0])
    np.testing.assert_allclose(got, truth(given), atol=1e-5, rtol=0)
    some_BR = np.asarray(given.rows.pos_BR >= 0)
    np.testing.assert_array_equal(np.any(got, axis=(1, 3)), some_BR)


@pytest.mark.parametrize("name", STACKED)
def test_what_the_kernel_does_not_take_is_read_out_of_the_stack(name):
    """Block by block, the last of which is short: the same as over the layer alone."""
    case, given = STACKED[name], made(STACKED[name])
    far, near = given.sides
    fields = {field: x for field, x in vars(far).items() if x is not None and field != "pos_BS"}
    every = replace(far, **{field: jnp.stack([x * 0, x, x + 1]) for field, x in fields.items()})
    assert not fits(given.rows, far)

    def attended(given: Made, layer: jax.Array):
        return by_splash(given.rows, (Stack(every, layer), near), given.used, case.scale, None, block=BLOCK)

    got = np.asarray(jax.jit(attended)(given, jnp.int32(1)))
    np.testing.assert_allclose(got, truth(given), atol=1e-5, rtol=0)


def test_bfloat16_is_about_as_near_as_plain():
    """The prefix's part is rounded once more, before the tail's is added."""
    case = CASES["11 tokens of 4 rows, some see nothing"]
    given = made(case, jnp.bfloat16)
    got, want = both_ways(given, case.scale)
    assert got.dtype == jnp.bfloat16
    far, plain_far = (np.sqrt(np.mean((np.asarray(x, np.float64) - truth(given)) ** 2)) for x in (got, want))
    assert 0 < far <= 1.5 * plain_far, far / plain_far


def test_blocks_that_are_empty_are_not_read():
    case = CASES["one row, most of the prefix empty"]
    given = made(case)
    far, block = given.sides[0], 2 * block_for(1536)  # of what follows the full ones, plain XLA looks at one
    assert block == 1024
    junk = replace(
        far, k_BKSH=far.k_BKSH.at[:, :, block:].set(jnp.nan), v_BKSH=far.v_BKSH.at[:, :, block:].set(jnp.nan)
    )
    got, _ = both_ways(replace(given, sides=(junk, given.sides[1])), case.scale)
    np.testing.assert_array_equal(got, both_ways(given, case.scale)[0])


def test_a_block_divides_the_slots():
    assert [block_for(slots) for slots in (131072, 3 * 2048, 1024, 1536, 1100)] == [4096, 2048, 1024, 512, None]


def test_what_the_kernel_takes():
    given = made(ONE)
    far = given.sides[0]
    for head_dim, taken in ((32, False), (64, True), (96, False), (128, True), (256, True)):
        assert fits(replace(given.rows, q_BKRH=np.zeros((1, 2, 1, head_dim))), far) == taken, head_dim
    for count in (1, MOST_ROWS, MOST_ROWS + 1):
        rows = Rows(np.zeros((1, 2, count, 64)), np.zeros((1, count), np.int32))
        assert fits(rows, far) == (count <= MOST_ROWS), count
    assert not fits(given.rows, given.sides[1])  # too short
    both = tagged(given)
    assert not fits(both.rows, both.sides[0])
    assert fits(given.rows, both.sides[0]) and fits(both.rows, far)
    assert not fits(replace(given.rows, reach_BR=given.rows.pos_BR), far)


@pytest.mark.parametrize("why", ["two sequences", "8 bits"])
def test_what_it_does_not_take_is_by_blocks(why):
    """Not interpreted: on a CPU the kernel could not run."""
    case = (
        replace(ONE, batch=2)
        if why == "two sequences"
        else replace(ONE, sides=(Side(1024, 900, int8=True), ONE.sides[1]))
    )
    given = made(case)
    got, want = both_ways(given, case.scale, False)
    np.testing.assert_array_equal(got, want)
    np.testing.assert_allclose(got, truth(given), atol=1e-5, rtol=0)


def test_tpus_decode_by_it_unless_told_not_to():
    chosen = {name: decode_of(name, "tpu", 7) for name in ("auto", "splash", "xla")}
    assert {name: decode.func is by_splash for name, decode in chosen.items()} == {
        "auto": True,
        "splash": True,
        "xla": False,
    }
    assert all(decode.keywords == {"block": 7} for decode in chosen.values())
    assert takes_stack("auto", "tpu") and not takes_stack("xla", "tpu") and not takes_stack("auto", "gpu")


def test_a_prefix_split_over_devices():
    """Each of two devices has a part: positions ascend on each, and the second's is not full."""
    case = Case((Side(1536, 1536), Side(1536, 700), Side(80, 70)), group=4, time=2, head_dim=64, blind=4)
    given = made(case)
    far = jax.tree.map(lambda *x: jnp.concatenate(x, axis=min(2, x[0].ndim - 1)), *given.sides[:2])
    whole, keys = PartitionSpec(), PartitionSpec(None, None, "context")
    spec = replace(far, k_BKSH=keys, v_BKSH=keys, pos_BS=PartitionSpec(None, "context"))
    call = jax.shard_map(
        lambda *args: by_splash(*args, case.scale, "context", block=BLOCK, interpret=True),
        mesh=jax.sharding.Mesh(jax.devices()[:2], ("context",)),
        in_specs=(whole, (spec, whole), whole),
        out_specs=whole,
        check_vma=False,
    )
    got = jax.jit(call)(given.rows, (far, given.sides[2]), (given.used[0], given.used[2]))
    np.testing.assert_allclose(got, truth(given), atol=1e-5, rtol=0)


@pytest.mark.parametrize("why", ["kernel", "too short"])
def test_new_tokens_over_prefix_and_tail(monkeypatch, why):
    """Through the verb, in the stacked layout: each layer of a scan finds its own keys and values in the stack."""
    rng, (G, N, K, H, L) = np.random.default_rng(1), (3, 4, 2, 64, 3)
    slots, used = (1536, 700) if why == "kernel" else (200, 190)
    given = made(Case((Side(slots, used),)))
    far, near = (KV(*(rng.normal(size=(L, 1, K, size, H)).astype(np.float32) for _ in "kv")) for size in (slots, 80))
    qkv = [jnp.asarray(np.float32(rng.normal(size=(1, G, heads, H)))) for heads in (N, K, K)]
    prefix = Prefix(jax.tree.map(jnp.asarray, far), given.sides[0].pos_BS, given.used[0])
    tail = Tail(jax.tree.map(jnp.asarray, near), jnp.asarray([used]), jnp.asarray([62]))
    pos_BG = (tail.start_B + tail.length_B)[:, None] + jnp.arange(G)

    def attended() -> tuple[jax.Array, KV]:
        strategy = Strategy(block=BLOCK)
        verb = attend_prefix_tail(prefix, tail, pos_BG, strategy)
        layers = layers_of(prefix, tail, strategy)
        assert isinstance(layers[0], KV) != strategy.decodes_from_stack
        return jax.jit(lambda: jax.lax.scan(lambda _, layer: (None, verb(*qkv, layer)), None, layers)[1])()

    want_LBGNH, want_kv = attended()
    monkeypatch.setattr(Strategy, "decodes_from_stack", True)
    monkeypatch.setattr(Strategy, "chosen_decode", lambda self: partial(by_splash, block=self.block, interpret=True))
    got_LBGNH, got_kv = attended()
    np.testing.assert_allclose(got_LBGNH, want_LBGNH, atol=1e-5, rtol=0)
    chex.assert_trees_all_equal(got_kv, want_kv)
