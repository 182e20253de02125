# SPDX-License-Identifier: Apache-2.0
"""Decoding over a long prefix, a layer: the kernel reads its keys where they lie, and nothing of their size is made."""

from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from rapid_jax.attention.attend import attend_prefix_tail, layers_of, with_kept
from rapid_jax.attention.cache import KV, Prefix, Tail
from rapid_jax.attention.decoding import attend_stack
from rapid_jax.attention.online_softmax import Rows, Slots, finish
from rapid_jax.attention.strategy import Strategy
from rapid_jax.attention.tpu_decode import Stack
from rapid_jax.model.matrix import Place, in_bits
from rapid_jax.plan.hlo import arrays_of, bytes_of, collectives, made, parse
from rapid_jax.plan.topologies import topology_of
from rapid_jax.runtime.mesh import make_mesh
from rapid_jax.runtime.mesh_config import MeshConfig
from rapid_jax.speculative.loop import TPU_OPTIONS
from tests.tpu.bundles import measured
from tests.tpu.layers import is_kernel, loops_over_layers

NEW, GROUP, TAIL = 11, 4, 1536


@dataclass(frozen=True)
class Case:
    """A layer of the unrolled layout, or a scan over the stacked one's; the prefix split over so many devices."""

    topology: str
    slots: int
    layers: int | None = 3
    context: int = 1
    kv_heads: int = 8
    head_dim: int = 128
    int8: bool = False
    rows: int = 1  # of one prefix
    window: int | None = None


@cache
def compiled_text(case: Case) -> str:
    """Of attention to prefix and tail, and of writing the tail."""
    mesh = make_mesh(MeshConfig(context=case.context), topology_of(case.topology).devices[: case.context])
    strategy = Strategy(block=case.slots, mesh=mesh)
    B, K, H, lead = case.rows, case.kv_heads, case.head_dim, () if case.layers is None else (case.layers,)

    def given(letters: str, *shape: int, dtype: Any = jnp.bfloat16) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, strategy.spec(letters)))

    def kv(letters: str, *shape: int, dtype: Any = jnp.bfloat16) -> Any:
        return given("k_" + "L" * len(lead) + letters, *lead, *shape, dtype=dtype)

    def in_layout(kv: KV) -> Any:
        return kv if lead else (kv,)

    int32, S = jnp.int32, case.slots
    far = KV(*[kv("BKSH", 1, K, S, H)] * 2)
    if case.int8:
        scale = kv("BKS", 1, K, S, dtype=jnp.float32)
        whole = kv("BKSH", 1, K, S, H, dtype=jnp.int8), kv("BKHS", 1, K, H, S, dtype=jnp.int8)
        far = KV(*whole, scale, scale)
    prefix = Prefix(in_layout(far), given("pos_BS", 1, S, dtype=int32), given("", dtype=int32))
    tail = Tail(in_layout(KV(*[kv("BKGH", B, K, TAIL, H)] * 2)), *[given("slot_B", B, dtype=int32)] * 2)

    @partial(jax.jit, donate_argnums=4)
    def attend(q_BGNH, k_BGKH, pos_BG, prefix, tail):
        verb, every = attend_prefix_tail(prefix, tail, pos_BG, strategy), layers_of(prefix, tail, strategy)
        if not lead:
            out, kept = verb(q_BGNH, k_BGKH, k_BGKH, every[0], case.window)
            return out, Tail((kept,), tail.start_B, tail.length_B + NEW)
        windowed = partial(verb, window=case.window)
        q_BGNH, kept = jax.lax.scan(lambda q_BGNH, layer: windowed(q_BGNH, k_BGKH, k_BGKH, layer), q_BGNH, every)
        return q_BGNH, Tail(with_kept(tail, kept, strategy), tail.start_B, tail.length_B + NEW)

    q_BGNH, k_BGKH = (given("q_BGNH", B, NEW, heads, H) for heads in (K * GROUP, K))
    lowered = attend.lower(q_BGNH, k_BGKH, given("pos_BG", B, NEW, dtype=int32), prefix, tail)
    return lowered.compile(compiler_options=dict(TPU_OPTIONS)).as_text()


def written(text: str, without: tuple[str, ...] = ()) -> list[int]:
    """Bytes of what each of the program's instructions makes, but for those; a fusion is one."""
    computations, _ = parse(text)
    items = [item for name, found in computations.items() for item in found]
    inside = {name for item in items if item.opcode == "fusion" for name in item.called()}
    return [
        bytes_of(arrays_of(item.shape))
        for name, found in computations.items()
        if name not in inside
        for item in found
        if item.opcode not in ("parameter", "tuple", "get-tuple-element", "bitcast", "constant", "while", *without)
    ]


CASES = {
    "a stack, v5p": Case("v5p:2x2x1", 131072),
    "a stack in 8 bits, v5p": Case("v5p:2x2x1", 131072, int8=True),
    "a stack in 8 bits, v6e": Case("v6e:2x2", 131072, int8=True),
    "a stack, v5e": Case("v5e:2x2", 32768),
    "a stack over 4 devices, v6e": Case("v6e:2x2", 524288, context=4),
    "a layer over 4 devices, v6e": Case("v6e:2x2", 524288, layers=None, context=4),
    "one kv head, v5p": Case("v5p:2x2x1", 131072, kv_heads=1),
    "heads of 64, v5p": Case("v5p:2x2x1", 131072, head_dim=64),
    "heads of 256 and a window, v6e": Case("v6e:2x2", 65536, head_dim=256, window=1024),
    "4 rows of one prefix and a window over 4 devices, v5p": Case("v5p:2x2x1", 131072, context=4, rows=4, window=1024),
    "heads of 256, v6e": Case("v6e:2x2", 65536, head_dim=256),
    "4 rows of one prefix, v5p": Case("v5p:2x2x1", 131072, rows=4),
    "16 rows of one prefix in 8 bits, v5e": Case("v5e:2x2", 131072, int8=True, rows=16),
}


@pytest.mark.parametrize("name", CASES)
def test_the_kernel_reads_keys_and_values_where_they_lie(name: str):
    """And writes the tail where it lies: nothing is made that is as large as one layer of either."""
    case = CASES[name]
    text = compiled_text(case)
    computations, entry = parse(text)
    ((inside, kernel),) = [(name, item) for name, found in computations.items() for item in found if is_kernel(item)]
    assert (inside == entry) == (case.layers is None)
    by_name = {item.name: item for item in computations[inside]}
    numbers = case.kv_heads * case.head_dim * (case.layers or 1) * (1 if case.int8 else 2)
    shares = [numbers * case.slots // case.context, case.rows * numbers * TAIL * (2 if case.int8 else 1)]
    for share in shares:
        read = [by_name[operand] for operand in kernel.operands]
        read = [item for item in read if bytes_of(arrays_of(item.shape)) == share]
        assert len(read) == 2
        for item in read:
            while item.opcode == "bitcast":
                item = by_name[item.operands[0]]
            if case.layers is not None:
                assert item.opcode == "get-tuple-element", item
            elif share == shares[0]:
                assert item.opcode == "parameter", item
    layer = shares[1] // (case.layers or 1)
    if case.layers is None:  # a layer's tail is written before it is read, in place
        assert [size for size in written(text) if size >= layer] == [layer] * 2
    else:
        assert max(written(text, without=("dynamic-update-slice",))) < layer / 4
        assert sum(item.opcode == "dynamic-update-slice" for item in computations[entry]) == 2 * case.rows
    assert "all-gather" not in text


def test_a_layer_s_masks_are_the_kernel_s():
    """What is left to XLA in a layer: the rows laid out for the kernel and back, and the new tokens kept."""
    text = compiled_text(CASES["a stack, v5p"])
    (ops,) = loops_over_layers(text)
    assert len(ops) <= 12, [item.name for item in ops]
    assert not any(kind in ("s32", "pred") and len(dims) > 0 and max(dims) > 1 for item in ops
                   for kind, dims in arrays_of(item.shape))  # fmt: skip


@pytest.mark.parametrize(("topology", "int8", "most"), [("v5p:2x2x1", False, 0.5), ("v6e:2x2", True, 1.0)])
def test_a_block_is_done_before_the_next_has_come(topology: str, int8: bool, most: float):
    """By the compiler's schedule, without stalls; 11 tokens of 4 query heads each."""
    block = measured(topology, kv_heads=8, tokens=NEW, int8=int8)
    assert block.slots == (8192 if int8 else 4096)
    assert 0 < block.bundles < most * block.memory


def test_rows_that_lie_over_devices_meet_8_bits_where_they_are():
    """A chunk of a prompt, split over `context`, times a matrix in 8 bits, split over `model`: nothing is moved."""
    mesh = make_mesh(MeshConfig(context=2, model=2), topology_of("v5p:2x2x1").devices)
    place = Place(mesh)

    def given(shape: tuple[int, ...], dtype, *axes):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*axes)))

    matrix = in_bits(given((1024, 4096), jnp.bfloat16, None, "model"), "DJ", 8, place)
    lowered = jax.jit(lambda matrix, x: matrix(x)).lower(matrix, given((1, 2048, 1024), jnp.bfloat16, None, "context"))
    text = lowered.compile().as_text()
    assert collectives(text) == [] and "s8[" in text


@pytest.mark.parametrize("int8", [True, False])
def test_plain_xla_reads_a_layer_s_blocks_where_they_lie(int8: bool):
    """Out of the stack: no block of keys or values is made, in 8 bits neither in those nor in more; scores are."""
    layers, K, S, H, block = 3, 8, 65536, 128, 16384
    mesh = make_mesh(MeshConfig(), topology_of("v5p:2x2x1").devices[:1])

    def given(*shape: int, dtype: Any = jnp.bfloat16) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec()))

    pos_BS, kind = given(1, S, dtype=jnp.int32), jnp.int8 if int8 else jnp.bfloat16
    values, scale_LBKS = (H, S) if int8 else (S, H), given(layers, 1, K, S, dtype=jnp.float32) if int8 else None
    every = Slots(given(layers, 1, K, S, H, dtype=kind), given(layers, 1, K, *values, dtype=kind), pos_BS)
    every = replace(every, k_scale_BKS=scale_LBKS, v_scale_BKS=scale_LBKS)

    def attend(q_BKRH, pos_BR, every):
        def step(q_BKRH, layer):
            seen = attend_stack(Rows(q_BKRH, pos_BR), stack=Stack(every, layer), scale=0.1, block=block)
            return finish(seen, q_BKRH.dtype), None

        return jax.lax.scan(step, q_BKRH, jnp.arange(layers, dtype=jnp.int32))[0]

    rows = given(1, K, GROUP * NEW, H), given(1, GROUP * NEW, dtype=jnp.int32)
    shapes = made(jax.jit(attend).lower(*rows, every).compile().as_text())
    assert {dims for dims in shapes if H in dims[-2:] and max(dims[-2:]) >= block} == set()
    assert any(dims and dims[-1] == block for dims in shapes)
