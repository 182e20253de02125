# SPDX-License-Identifier: Apache-2.0
"""Decoding on TPUs with its kernel interpreted, races looked for, against dense attention in float64."""

from dataclasses import replace
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
from jax.experimental.pallas.tpu import InterpretParams
from jax.sharding import PartitionSpec

from rapid_jax.attention import decoding
from rapid_jax.attention.attend import attend_prefix_tail, layers_of, with_kept
from rapid_jax.attention.cache import KV, Prefix, Tail
from rapid_jax.attention.decoding import by_blocks, by_tpu_kernel, decode_of, takes_stack
from rapid_jax.attention.online_softmax import Rows, Slots, SoftmaxState, attend_blockwise, finish
from rapid_jax.attention.quantized_kv import quantize_kv
from rapid_jax.attention.strategy import Strategy
from rapid_jax.attention.tpu_decode import (
    BLOCKS,
    MOST_BYTES,
    MOST_ROWS,
    SHORT,
    Stack,
    block_for,
    cut_of,
    fits,
    tpu_decode,
)
from rapid_jax.speculative.config import SamplingConfig, SpeculationConfig
from rapid_jax.speculative.initial_state import Sizes
from tests.attention.decode_cases import Case, Made, Side, made, tagged, truth

BLOCK = 300  # of the plain path
INTERPRETED = InterpretParams(
    detect_races=True, dma_execution_mode="on_wait", out_of_bounds_reads="raise", uninitialized_memory="nan"
)
ONE = Case((Side(256, 256), Side(8, 3), Side(1, 1)), head_dim=64)
CASES = {  # sides: prefix, tail, and the new tokens unless they are in the tail
    "one row": ONE,
    "one row, its token in the tail": replace(ONE, sides=ONE.sides[:2]),
    "most of the prefix empty": replace(ONE, sides=(Side(640, 128), *ONE.sides[1:])),
    "nothing in the tail": replace(ONE, sides=(Side(256, 128), Side(32, 0), Side(1, 1))),
    "nothing in the prefix, a full tail": replace(ONE, sides=(Side(256, 0), Side(32, 32), Side(1, 1))),
    "one kv head, the prefix shared out": Case(
        (Side(640, 600), Side(20, 5), Side(3, 3)), 1, 1, group=7, time=3, head_dim=128
    ),
    "8 kv heads, 11 tokens": Case(
        (Side(384, 300), Side(96, 60), Side(11, 11)), kv_heads=8, group=4, time=11, head_dim=128
    ),
    "11 tokens, 2 see nothing": Case((Side(384, 384), Side(1536, 1100), Side(11, 11)), 1, 2, 4, 11, 64, blind=8),
    "heads of 256": Case((Side(128, 100), Side(32, 20), Side(2, 2)), kv_heads=3, group=2, time=2, head_dim=256),
    "rows of 4 sequences": Case((Side(384, 200), Side(96, 50), Side(3, 3)), 4, 2, 4, 3, 64),
    "one prefix under 4 rows": Case((Side(384, 300, shared=1), Side(96, 50), Side(3, 3)), 4, 2, 4, 3, 64),
    "2 prefixes under 4 rows": Case((Side(384, 300, shared=2), Side(1536, 1100), Side(2, 2)), 4, 2, 4, 2, 64),
    "one prefix under 3 rows, tokens in tails": Case((Side(256, 256, shared=1), Side(96, 50)), 3, 2, 2, 2, 64),
    "one prefix under 5 rows of 60, read 5 times": Case(
        (Side(128, 128, shared=1), Side(40, 25), Side(15, 15)), 5, 1, 4, 15, 64, blind=8
    ),
    "window of 1": replace(ONE, window=1),
    "window of 200, the prefix shared out": Case(
        (Side(640, 600), Side(20, 5), Side(3, 3)), 1, 1, group=7, time=3, head_dim=128, window=200
    ),
    "window of a block, rows of 2 sequences": Case(
        (Side(384, 300, (280, 290)), Side(96, 50), Side(2, 2)), 2, 2, 4, 2, 64, blind=4, window=128
    ),
    "window of 90, 2 prefixes under 4 rows": Case((Side(384, 300, shared=2), Side(96, 50)), 4, 2, 4, 2, 64, window=90),
}
INT8 = {
    name: replace(CASES[name], sides=(replace(CASES[name].sides[0], int8=True), *CASES[name].sides[1:]))
    for name in ("one row", "8 kv heads, 11 tokens", "one kv head, the prefix shared out", "2 prefixes under 4 rows")
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """So that short prefixes have several."""
    monkeypatch.setattr("rapid_jax.attention.tpu_decode.BLOCKS", (128,))
    monkeypatch.setattr("rapid_jax.attention.tpu_decode.SHORT", 512)


def tokens_of(given: Made) -> Made:
    """With new tokens that are where the rows are: at -1 those that see nothing."""
    if len(given.sides) < 3:
        return given
    pos_BT = given.rows.pos_BR[:, :: given.rows.group]
    return replace(given, sides=(*given.sides[:2], replace(given.sides[2], pos_BS=pos_BT)))


def stacked(side: Slots, layer: int, layers: int) -> Stack:
    """The side as one layer of so many; no number of the others may be looked at."""

    def placed(x: jax.Array) -> jax.Array:
        if x.dtype == jnp.int8:
            return jnp.full((layers, *x.shape), 127, x.dtype).at[layer].set(x)
        return jnp.full((layers, *x.shape), jnp.nan, x.dtype).at[layer].set(x)

    every = replace(jax.tree.map(placed, replace(side, pos_BS=None)), pos_BS=side.pos_BS)  # type: ignore[arg-type]
    return Stack(every, jnp.int32(layer))


def attended(case: Case, given: Made, layer: int | None = None) -> np.ndarray:
    """By the kernel, from the arrays of a layer or of 3 layers."""
    sides = given.sides
    if layer is not None:
        sides = (*(stacked(side, layer, 3) for side in sides[:2]), *sides[2:])
    assert all(fits(given.rows, sides[0], side) for side in sides[1:])
    call = partial(by_tpu_kernel, scale=case.scale, axis=None, block=BLOCK, interpret=INTERPRETED)
    got = jax.jit(lambda rows, sides, used: call(rows, sides, used))(given.rows, sides, given.used)
    got = np.asarray(got.astype(jnp.float32), np.float64)
    assert not interpreter.races.races_found
    return got


@pytest.mark.parametrize(("name", "layer"), [(name, (0, 2, None)[at % 3]) for at, name in enumerate(CASES)])
def test_it_is_dense_attention(name, layer):
    given = tokens_of(made(CASES[name]))
    got = attended(CASES[name], given, layer)
    np.testing.assert_allclose(got, truth(given), atol=1e-5, rtol=0)
    np.testing.assert_array_equal(np.any(got, axis=(1, 3)), np.asarray(given.rows.pos_BR >= 0))


@pytest.mark.parametrize(("name", "layer"), [(name, (0, 2, None)[at % 3]) for at, name in enumerate(INT8)])
def test_8_bits_are_the_numbers_that_they_stand_for(name, layer):
    given = tokens_of(made(INT8[name]))
    np.testing.assert_allclose(attended(INT8[name], given, layer), truth(given), atol=1e-5, rtol=0)


@pytest.mark.parametrize("case", [CASES["8 kv heads, 11 tokens"], INT8["8 kv heads, 11 tokens"]], ids=["full", "int8"])
def test_bfloat16_is_about_as_near_as_plain(case):
    given = tokens_of(made(case, jnp.bfloat16))
    want = by_blocks(given.rows, given.sides, given.used, case.scale, None, block=BLOCK)
    far, plain_far = (
        np.sqrt(np.mean((x - truth(given)) ** 2)) for x in (attended(case, given), np.asarray(want, np.float64))
    )
    assert 0 < far <= 1.1 * plain_far, far / plain_far


@pytest.mark.parametrize("int8", [False, True])
def test_what_is_empty_for_a_whole_block_is_not_read(int8):
    """Nor the slots of a sequence's prefix that are behind its own count, though another's is longer."""
    case = Case((Side(640, 256, int8=int8), Side(1536, 500), Side(2, 2)), 2, 1, 2, 2, 64)
    given = made(case)
    want = attended(case, given, 0)
    far, near, new = given.sides
    if int8:
        assert far.k_scale_BKS is not None and far.v_scale_BKS is not None
        scales = [x.at[:, :, 256:].set(jnp.nan) for x in (far.k_scale_BKS, far.v_scale_BKS)]
        far = replace(far, k_scale_BKS=scales[0], v_scale_BKS=scales[1])
    else:
        kv = [x.at[:, :, 256:].set(jnp.nan).at[1, :, 128:].set(jnp.nan) for x in (far.k_BKSH, far.v_BKSH)]
        far = replace(far, k_BKSH=kv[0], v_BKSH=kv[1])
        want = attended(case, replace(given, used=(jnp.asarray([256, 128], jnp.int32), *given.used[1:])), 0)
    kv = [x.at[:, :, 512:].set(jnp.nan) for x in (near.k_BKSH, near.v_BKSH)]
    near = replace(near, k_BKSH=kv[0], v_BKSH=kv[1])
    used = (given.used[0] if int8 else jnp.asarray([256, 128], jnp.int32), *given.used[1:])
    np.testing.assert_array_equal(attended(case, replace(given, sides=(far, near, new), used=used), 0), want)


def test_a_partial_is_plain_attention_s():
    case = CASES["one kv head, the prefix shared out"]
    given = made(case)
    everything = Slots(
        *(jnp.concatenate([getattr(side, name) for side in given.sides], axis=2) for name in ("k_BKSH", "v_BKSH")),
        jnp.concatenate([side.pos_BS for side in given.sides], axis=1),
    )
    want = attend_blockwise(given.rows, everything, scale=case.scale, block=1000)
    got = tpu_decode(given.rows, given.sides, given.used, scale=case.scale, interpret=INTERPRETED)
    assert isinstance(got, SoftmaxState)
    np.testing.assert_allclose(got.max_BKR, want.max_BKR, atol=1e-5, rtol=0)
    np.testing.assert_allclose(got.sum_BKR, want.sum_BKR, rtol=1e-5)
    np.testing.assert_allclose(finish(got, jnp.float32), finish(want, jnp.float32), atol=1e-5, rtol=0)


def test_two_cores_share_the_work():
    """Interpreted by two threads, as the two cores of a v5p chip divide the grid."""
    two = replace(INTERPRETED, num_cores_or_threads=2)
    for name in ("8 kv heads, 11 tokens", "one kv head, the prefix shared out"):
        case = CASES[name]
        given = made(case)
        call = partial(by_tpu_kernel, scale=case.scale, axis=None, block=BLOCK, interpret=two)
        got = jax.jit(lambda rows, sides, used, call=call: call(rows, sides, used))(given.rows, given.sides, given.used)
        np.testing.assert_allclose(got, truth(given), atol=1e-5, rtol=0)
        assert not interpreter.races.races_found


def test_a_block_divides_the_slots_and_fits(monkeypatch):
    monkeypatch.setattr("rapid_jax.attention.tpu_decode.BLOCKS", BLOCKS)

    def blocks(slots: int, R: int, dtype=jnp.bfloat16, K: int = 8, each: int = 1, H: int = 128) -> Any:
        def of(*shape: int, dtype=dtype) -> Any:
            return jax.ShapeDtypeStruct(shape, dtype)

        rows = Rows(of(each, K, R, H, dtype=jnp.bfloat16), of(each, R))
        near = Slots(*[of(each, K, 1536, H, dtype=jnp.bfloat16)] * 2, of(each, 1536))
        scales = [of(1, K, slots)] * 2 if dtype == jnp.int8 else []
        cut = cut_of(rows, Slots(*[of(1, K, slots, H)] * 2, of(1, slots), None, *scales), near)
        return None if cut is None else (*cut.blocks, cut.shares)

    assert blocks(131072, 4) == (8192, 512, 1)
    assert [blocks(slots, 44) for slots in (131072, 6144, 1536, 60)] == [(x, 512, 1) for x in (4096, 2048, 512, 60)]
    assert blocks(1100, 44) is None
    assert blocks(131072, 44, jnp.int8) == (8192, 512, 1)
    assert blocks(131072, 44, K=1) == (4096, 512, 2)
    assert blocks(131072, 16, each=16) == (2048, 512, 1)
    assert blocks(131072, 256, K=64) is None  # the rows alone are too many


def test_what_the_kernel_takes():
    given = made(ONE)
    far, near = given.sides[:2]
    for head_dim, taken in ((32, False), (64, True), (96, False), (128, True), (256, True)):
        assert fits(replace(given.rows, q_BKRH=np.zeros((1, 2, 1, head_dim))), far, near) == taken, head_dim
    for count in (1, MOST_ROWS, MOST_ROWS + 1):
        rows = Rows(np.zeros((1, 2, count, 64)), np.zeros((1, count), np.int32))
        assert fits(rows, far, near) == (count <= MOST_ROWS), count
    assert not fits(given.rows, made(replace(ONE, sides=(Side(200, 200), *ONE.sides[1:]))).sides[0], near)
    rounded = made(replace(ONE, sides=(Side(256, 256, int8=True), *ONE.sides[1:]))).sides[0]
    assert fits(given.rows, rounded, near) and not fits(given.rows, far, rounded)
    both = tagged(given)
    assert not fits(both.rows, both.sides[0], near) and not fits(both.rows, far, both.sides[1])
    assert fits(given.rows, both.sides[0], near) and fits(both.rows, far, near)
    assert not fits(replace(given.rows, reach_BR=given.rows.pos_BR), far, near)


@pytest.mark.parametrize("layer", [None, 1])
def test_what_it_does_not_take_is_by_blocks(layer):
    """Not interpreted: on a CPU the kernel could not run."""
    case = replace(ONE, sides=(Side(1100, 900), *ONE.sides[1:]))
    given = made(case)
    sides = given.sides if layer is None else (*(stacked(x, layer, 3) for x in given.sides[:2]), given.sides[2])
    got = by_tpu_kernel(given.rows, sides, given.used, case.scale, None, block=BLOCK)
    np.testing.assert_allclose(got, truth(given), atol=1e-5, rtol=0)


def test_tpus_decode_by_it_unless_told_not_to():
    chosen = {name: decode_of(name, "tpu", 7) for name in ("auto", "splash", "xla")}
    assert {name: decode.func is by_tpu_kernel for name, decode in chosen.items()} == {
        "auto": True,
        "splash": True,
        "xla": False,
    }
    assert all(decode.keywords == {"block": 7} for decode in chosen.values())
    assert takes_stack("auto", "tpu") and not takes_stack("xla", "tpu") and not takes_stack("auto", "gpu")


@pytest.mark.parametrize("devices", [1, 2])
def test_a_prefix_split_over_devices(devices):
    """Each has a part: positions ascend on each, and the second's is not full. The tail counts once."""
    parts = (Side(384, 384), Side(384, 200))[:devices]
    case = Case((*parts, Side(80, 67), Side(3, 3)), group=4, time=3, head_dim=64, blind=4)
    given = made(case)
    far = jax.tree.map(lambda *x: jnp.concatenate(x, axis=min(2, x[0].ndim - 1)), *given.sides[:devices])
    near, new = tokens_of(replace(given, sides=(far, *given.sides[devices:]))).sides[1:]
    whole, keys = PartitionSpec(), PartitionSpec(None, None, "context")
    spec = replace(far, k_BKSH=keys, v_BKSH=keys, pos_BS=PartitionSpec(None, "context"))
    used = jnp.stack(given.used[:devices])[None]
    call = jax.shard_map(
        lambda *args: by_tpu_kernel(*args, case.scale, "context", block=BLOCK, interpret=True),
        mesh=jax.sharding.Mesh(jax.devices()[:devices], ("context",)),
        in_specs=(whole, (spec, whole, whole), (PartitionSpec(None, "context"), whole, whole)),
        out_specs=whole,
        check_vma=False,
    )
    got = jax.jit(call)(given.rows, (far, near, new), (used, *given.used[devices:]))
    want = truth(replace(given, sides=(far, near, new)))
    np.testing.assert_allclose(got, want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("why", ["kernel", "no block", "2 rows", "8 bits"])
def test_new_tokens_over_prefix_and_tail(monkeypatch, why):
    """Through the verb, in the stacked layout: each layer of a scan finds its own keys and values in the stacks."""
    rng, (G, N, K, H, L) = np.random.default_rng(1), (3, 4, 2, 64, 3)
    slots, used, B = (384, 300, 2 if why == "2 rows" else 1) if why != "no block" else (200, 190, 1)
    given = made(Case((Side(slots, used, shared=1),), batch=B))

    def random(batch: int, slots: int) -> KV:
        return KV(*(jnp.asarray(rng.normal(size=(L, batch, K, slots, H)), jnp.float32) for _ in "kv"))

    qkv = [jnp.asarray(np.float32(rng.normal(size=(B, G, heads, H)))) for heads in (N, K, K)]
    prefix = Prefix(random(1, slots), given.sides[0].pos_BS, given.used[0])
    prefix = quantize_kv(prefix) if why == "8 bits" else prefix
    tail = Tail(random(B, 80), jnp.full(B, used, jnp.int32), jnp.asarray([62, 40][:B], jnp.int32))
    pos_BG = (tail.start_B + tail.length_B)[:, None] + jnp.arange(G)

    def attended() -> tuple[jax.Array, KV]:
        strategy = Strategy(block=BLOCK)
        verb = attend_prefix_tail(prefix, tail, pos_BG, strategy)
        layers = layers_of(prefix, tail, strategy)
        assert isinstance(layers, tuple) != strategy.decodes_from_stack

        def all_layers() -> tuple[jax.Array, KV]:
            out, kept = jax.lax.scan(lambda _, layer: (None, verb(*qkv, layer)), None, layers)[1]
            return out, with_kept(tail, kept, strategy)

        return jax.jit(all_layers)()

    want_LBGNH, want_kv = attended()
    monkeypatch.setattr(Strategy, "decodes_from_stack", True)
    call = partial(decoding.by_tpu_kernel, interpret=True)
    monkeypatch.setattr(Strategy, "chosen_decode", lambda self: partial(call, block=self.block))
    got_LBGNH, got_kv = attended()
    np.testing.assert_allclose(got_LBGNH, want_LBGNH, atol=1e-5, rtol=0)
    chex.assert_trees_all_equal(got_kv, want_kv)


@pytest.mark.parametrize("new", [1, 20, 32, 50, 64, 128, 256, 1536])
def test_every_size_of_a_tail_has_a_block(new):
    """Of whatever length the prompt behind the document is; else all of decoding would be left to plain XLA."""
    sizes = Sizes.of(SpeculationConfig(gamma=3), SamplingConfig(max_new_tokens=new))
    found = {sizes.tail(longest) for longest in range(2000)}
    assert [size for size in found if block_for(size, SHORT, 4 * 128 * 2, MOST_BYTES) is None] == []
