# SPDX-License-Identifier: Apache-2.0
"""Decoding over a long prefix, a layer: the kernel reads its keys where they lie, and nothing of their size is made."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding

from rapid_jax.attention.cache import KV, Prefix, Tail
from rapid_jax.attention.strategy import Strategy
from rapid_jax.attention.verbs import attend_prefix_tail
from rapid_jax.plan.hlo import arrays_of, bytes_of, parse
from rapid_jax.plan.topologies import topology_of
from rapid_jax.runtime.mesh import make_mesh
from rapid_jax.runtime.mesh_config import MeshConfig

HEADS, KV_HEADS, HEAD_DIM, TAIL, NEW = 32, 8, 128, 2048, 11


def compiled_text(topology: str, slots: int, *, context: int) -> str:
    """One layer in the unrolled layout, its prefix split over so many devices."""
    mesh = make_mesh(MeshConfig(context=context), topology_of(topology).devices[:context])
    strategy = Strategy(block=slots, mesh=mesh)

    def given(letters: str, *shape: int, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, strategy.spec(letters)))

    def layer(letters: str, slots: int) -> KV:
        return KV(*[given(letters, 1, KV_HEADS, slots, HEAD_DIM)] * 2)

    int32 = jnp.int32
    prefix = Prefix((layer("k_BKSH", slots),), given("pos_BS", 1, slots, dtype=int32), given("", dtype=int32))
    tail = Tail((layer("k_BKGH", TAIL),), *[given("slot_B", 1, dtype=int32)] * 2)

    def attend(q_BGNH, k_BGKH, pos_BG, prefix, tail):
        verb = attend_prefix_tail(prefix, tail, pos_BG, strategy)
        return verb(q_BGNH, k_BGKH, k_BGKH, (prefix.layers[0], tail.layers[0]))[0]

    q_BGNH, k_BGKH = (given("q_BGNH", 1, NEW, heads, HEAD_DIM) for heads in (HEADS, KV_HEADS))
    lowered = jax.jit(attend).lower(q_BGNH, k_BGKH, given("pos_BG", 1, NEW, dtype=int32), prefix, tail)
    return lowered.compile().as_text()


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
        if item.opcode not in ("parameter", "tuple", "get-tuple-element", "bitcast", "constant")
    ]


@pytest.mark.parametrize(("topology", "slots", "context"), [("v5p:2x2x1", 131000, 1), ("v6e:2x2", 524288, 4)])
def test_the_kernel_reads_keys_and_values_where_they_lie(topology: str, slots: int, context: int):
    text = compiled_text(topology, slots, context=context)
    computations, entry = parse(text)
    by_name = {item.name: item for item in computations[entry]}
    (kernel,) = [item for item in by_name.values() if 'custom_call_target="tpu_custom_call"' in item.rest]
    share = KV_HEADS * (slots // context) * HEAD_DIM * 2
    read = [by_name[name] for name in kernel.operands if bytes_of(arrays_of(by_name[name].shape)) == share]
    assert len(read) == 2
    for item in read:
        while item.opcode == "bitcast":
            item = by_name[item.operands[0]]
        assert item.opcode == "parameter", item
    assert max(written(text)) < share / 8
    assert "all-gather" not in text
