# SPDX-License-Identifier: Apache-2.0
"""Decoding over a long prefix, a layer: the kernel reads its keys where they lie, and nothing of their size is made."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from rapid_jax.attention.cache import KV, Prefix, Tail
from rapid_jax.attention.strategy import Strategy
from rapid_jax.attention.verbs import attend_prefix_tail, layers_of
from rapid_jax.model.matrix import Place, in_bits
from rapid_jax.plan.hlo import Instruction, arrays_of, bytes_of, collectives, made, parse, totals
from rapid_jax.plan.topologies import topology_of
from rapid_jax.runtime.mesh import make_mesh
from rapid_jax.runtime.mesh_config import MeshConfig

HEADS, KV_HEADS, HEAD_DIM, TAIL, NEW = 32, 8, 128, 2048, 11
BLOCK = 16384  # of plain XLA


def compiled_text(topology: str, slots: int, *, context: int, layers: int | None, int8: bool = False) -> str:
    """One layer of the unrolled layout, or a scan over the stacked one's; the prefix split over so many devices."""
    mesh = make_mesh(MeshConfig(context=context), topology_of(topology).devices[:context])
    strategy = Strategy(block=BLOCK if int8 else slots, mesh=mesh)

    def given(letters: str, *shape: int, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, strategy.spec(letters)))

    def cache(letters: str, slots: int):
        lead = () if layers is None else (layers,)
        kv = KV(*[given("k_" + "L" * len(lead) + letters, *lead, 1, KV_HEADS, slots, HEAD_DIM)] * 2)
        return (kv,) if layers is None else kv

    int32 = jnp.int32
    far = cache("BKSH", slots)
    if int8:
        lead, sizes = ("", ()) if layers is None else ("L", (layers,))
        k_BKSH = given(f"k_{lead}BKSH", *sizes, 1, KV_HEADS, slots, HEAD_DIM, dtype=jnp.int8)
        v_BKHS = given(f"v_{lead}BKHS", *sizes, 1, KV_HEADS, HEAD_DIM, slots, dtype=jnp.int8)
        scale_BKS = given(f"scale_{lead}BKS", *sizes, 1, KV_HEADS, slots, dtype=jnp.float32)
        kv = KV(k_BKSH, v_BKHS, scale_BKS, scale_BKS)
        far = kv if layers is not None else (kv,)
    prefix = Prefix(far, given("pos_BS", 1, slots, dtype=int32), given("", dtype=int32))
    tail = Tail(cache("BKGH", TAIL), *[given("slot_B", 1, dtype=int32)] * 2)

    def attend(q_BGNH, k_BGKH, pos_BG, prefix, tail):
        verb, every = attend_prefix_tail(prefix, tail, pos_BG, strategy), layers_of(prefix, tail, strategy)
        if layers is None:
            return verb(q_BGNH, k_BGKH, k_BGKH, every[0])
        return jax.lax.scan(lambda q_BGNH, layer: verb(q_BGNH, k_BGKH, k_BGKH, layer), q_BGNH, every)

    q_BGNH, k_BGKH = (given("q_BGNH", 1, NEW, heads, HEAD_DIM) for heads in (HEADS, KV_HEADS))
    lowered = jax.jit(attend).lower(q_BGNH, k_BGKH, given("pos_BG", 1, NEW, dtype=int32), prefix, tail)
    return lowered.compile().as_text()


def is_kernel(item: Instruction) -> bool:
    return 'custom_call_target="tpu_custom_call"' in item.rest


def written(text: str) -> list[int]:
    """Bytes of what each of the program's instructions makes; a fusion is one."""
    computations, _ = parse(text)
    items = [item for name, found in computations.items() for item in found]
    inside = {name for item in items if item.opcode == "fusion" for name in item.called()}
    return [
        bytes_of(arrays_of(item.shape))
        for name, found in computations.items()
        if name not in inside
        for item in found
        if item.opcode not in ("parameter", "tuple", "get-tuple-element", "bitcast", "constant", "while")
    ]


@pytest.mark.parametrize(
    ("topology", "slots", "context", "layers"), [("v5p:2x2x1", 131072, 1, 3), ("v6e:2x2", 524288, 4, None)]
)
def test_the_kernel_reads_keys_and_values_where_they_lie(topology, slots: int, context: int, layers: int | None):
    text = compiled_text(topology, slots, context=context, layers=layers)
    computations, entry = parse(text)
    ((name, kernel),) = [(name, item) for name, found in computations.items() for item in found if is_kernel(item)]
    assert (name == entry) == (layers is None)
    by_name = {item.name: item for item in computations[name]}
    share = KV_HEADS * (slots // context) * HEAD_DIM * 2
    read = [by_name[operand] for operand in kernel.operands]
    read = [item for item in read if bytes_of(arrays_of(item.shape)) == share * (layers or 1)]
    assert len(read) == 2
    for item in read:
        while item.opcode == "bitcast":
            item = by_name[item.operands[0]]
        assert item.opcode == ("parameter" if layers is None else "get-tuple-element"), item
    assert max(written(text)) < share / 8
    assert "all-gather" not in text


@pytest.mark.parametrize("layers", [3, None])
def test_rounded_keys_and_values_are_multiplied_as_they_lie(layers: int | None):
    """In plain XLA no block of keys or values is made, neither in 8 bits nor in more; scores are."""
    text = compiled_text("v5p:2x2x1", 131072, context=2, layers=layers, int8=True)
    assert {dims for dims in made(text) if HEAD_DIM in dims[-2:] and max(dims[-2:]) >= BLOCK} == set()
    assert any(dims[-1] == BLOCK for dims in made(text) if dims)
    assert set(totals(collectives(text))) == {"all-reduce"}  # the parts of both devices


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
