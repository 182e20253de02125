# SPDX-License-Identifier: Apache-2.0
"""Reading compiled programs: literal texts, and a small real one."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from rapid_jax.plan.hlo import (
    Event,
    arrays_of,
    bytes_of,
    collectives,
    copied,
    gathered_kv,
    largest_copy,
    made,
    parse,
    schedule,
    totals,
    under_kernels,
)
from rapid_jax.runtime.mesh import make_mesh
from rapid_jax.runtime.mesh_config import MeshConfig

RING = """HloModule ring, is_scheduled=true

%cond (p.1: (s32[], bf16[1,4,64,128])) -> pred[] {
  %limit = s32[]{:T(128)} constant(7)
  %p.1 = (s32[]{:T(128)}, /*index=1*/bf16[1,4,64,128]{3,2,1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

%body (p.2: (s32[], bf16[1,4,64,128])) -> (s32[], bf16[1,4,64,128]) {
  %p.2 = (s32[]{:T(128)}, bf16[1,4,64,128]{3,2,1,0:T(8,128)(2,1)}) parameter(0)
  %k = bf16[1,4,64,128]{3,2,1,0:T(8,128)(2,1)} get-tuple-element(%p.2), index=1
  %s = (bf16[1,4,64,128]{3,2,1,0}, bf16[1,4,64,128]{3,2,1,0}, u32[], u32[]) collective-permute-start(%k), channel_id=1
  %kernel = f32[4,64,128]{2,1,0} custom-call(%k), custom_call_target="tpu_custom_call"
  %d = bf16[1,4,64,128]{3,2,1,0:T(8,128)(2,1)} collective-permute-done(%s)
  ROOT %out = (s32[], bf16[1,4,64,128]) tuple(%i.2, %d)
}

%unknown (p.3: (s32[], s32[])) -> pred[] {
  %p.3 = (s32[], s32[]) parameter(0)
  %a = s32[] get-tuple-element(%p.3), index=0
  %b = s32[] get-tuple-element(%p.3), index=1
  ROOT %lt.2 = pred[] compare(%a, %b), direction=LT
}

%round (p.4: (s32[], s32[])) -> (s32[], s32[]) {
  %p.4 = (s32[], s32[]) parameter(0)
  %zero = s32[] constant(0)
  %start = (s32[], bf16[1,4,64,128]) tuple(%zero, %k.0)
  %loop = (s32[], bf16[1,4,64,128]) while(%start), condition=%cond, body=%body
  %sum = f32[8,16]{1,0} all-reduce(%x), replica_groups={}, to_apply=%add
  ROOT %out.2 = (s32[], s32[]) tuple(%n, %n)
}

ENTRY %main (p.5: (s32[], s32[])) -> (s32[], s32[]) {
  %p.5 = (s32[], s32[]) parameter(0)
  %x.1 = f32[16,256]{1,0} fusion(%p.5), kind=kLoop, calls=%nothing
  %scattered = f32[4,256]{1,0} reduce-scatter(%x.1), dimensions={0}, to_apply=%add
  %g = (f32[2,8]{1,0}, f32[16,8]{1,0}) all-gather-start(%y), dimensions={0}
  %h = f32[16,8]{1,0} all-gather-done(%g)
  ROOT %rounds = (s32[], s32[]) while(%p.5), condition=%unknown, body=%round
}
"""


def test_a_collective_counts_as_often_as_its_loops_run():
    kv = 4 * 64 * 128 * 2
    assert totals(collectives(RING, (3,))) == {
        "collective-permute": {"count": 21, "bytes": 21 * kv},
        "all-reduce": {"count": 3, "bytes": 3 * 8 * 16 * 4},
        "reduce-scatter": {"count": 1, "bytes": 16 * 256 * 4},
        "all-gather": {"count": 1, "bytes": 16 * 8 * 4},
    }
    assert totals(collectives(RING))["all-reduce"]["count"] == 1


def test_a_loop_that_starts_later_runs_less_often():
    later = RING.replace("%zero = s32[] constant(0)", "%zero = s32[] constant(2)")
    assert totals(collectives(later))["collective-permute"]["count"] == 5


def test_what_the_compiler_says_of_a_loop_stands():
    said = RING.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"4"}}')
    assert totals(collectives(said))["collective-permute"]["count"] == 4


def test_the_schedule_says_what_runs_under_what():
    (events,) = schedule(RING).values()
    size = 4 * 64 * 128 * 2
    assert events == [Event("start", "s", size), Event("kernel", "kernel"), Event("done", "s", size)]
    assert under_kernels(events, 1)
    assert not under_kernels([events[1], events[0], events[2]], 1)
    assert not under_kernels(events)  # no permute of a MiB


@pytest.mark.parametrize(("slots", "found"), [(64, [(1, 4, 512, 128)]), (513, [])])
def test_gathered_keys_are_found_by_their_shape(slots: int, found: list):
    line = "  %kv = bf16[1,4,512,128]{3,2,1,0} all-gather(%p.5), dimensions={2}\n  %logits = f32[1,11,4096] "
    text = RING.replace("  %scattered = ", line + "all-gather(%p.5), dimensions={2}\n  %scattered = ")
    assert gathered_kv(text, slots=slots, head_dim=128) == found


def test_shapes_with_layouts_and_scalars():
    arrays = arrays_of("(bf16[32,1,4]{2,1,0:T(8,128)(2,1)S(1)}, s8[7]{0}, f32[], u32[])")
    assert arrays == [("bf16", (32, 1, 4)), ("s8", (7,)), ("f32", ()), ("u32", ())]
    assert bytes_of(arrays) == 256 + 7 + 4 + 4


def test_a_real_program():
    mesh = make_mesh(MeshConfig(context=4), jax.devices()[:4])
    spec = PartitionSpec("context")

    def five_sums(x):
        return jax.lax.fori_loop(0, 5, lambda index, x: jax.lax.psum(x, "context") * 0.25, x)

    mapped = jax.shard_map(five_sums, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    given = jax.ShapeDtypeStruct((4, 32), jnp.float32, sharding=NamedSharding(mesh, spec))
    text = jax.jit(mapped).lower(given).compile().as_text()
    assert totals(collectives(text)) == {"all-reduce": {"count": 5, "bytes": 5 * 32 * 4}}
    computations, entry = parse(text)
    assert entry in computations


def test_what_a_program_copies_as_it_begins():
    text = """
HloModule test

%turned (p: bf16[8,64]) -> bf16[64,8] {
  %p = bf16[8,64]{1,0} parameter(0)
  ROOT %transpose.1 = bf16[64,8]{1,0} transpose(%p), dimensions={1,0}
}

%same (q: s8[4096,64]) -> s8[4096,64] {
  %q = s8[4096,64]{1,0:T(32,128)(4,1)} parameter(0)
  ROOT %copy.1 = s8[4096,64]{1,0:T(8,128)(4,1)} copy(%q)
}

%body (r: f32[512,512]) -> f32[512,512] {
  %r = f32[512,512]{1,0} parameter(0)
  ROOT %copy.2 = f32[512,512]{0,1} copy(%r)
}

ENTRY %main (a: bf16[8,64], b: s8[4096,64], c: f32[16]) -> bf16[64,8] {
  %a = bf16[8,64]{1,0} parameter(0)
  %b = s8[4096,64]{1,0} parameter(1)
  %c = f32[16]{0} parameter(2)
  %copy.3 = f32[16]{0} copy(%c)
  %fusion.2 = s8[4096,64]{1,0} fusion(%b), kind=kLoop, output_to_operand_aliasing={{}: (0, {})}, calls=%same
  ROOT %fusion.1 = bf16[64,8]{1,0} fusion(%a), kind=kLoop, calls=%turned
}
"""
    assert largest_copy(text) == 2 * 64 * 8
    assert largest_copy(text.replace("calls=%turned", "calls=%other").replace("%turned (", "%other (")) == 2 * 64 * 8
    assert largest_copy(text.replace("transpose(", "negate(")) == 4 * 16
    assert copied(text) == {(64, 8), (16,), (512, 512)}
    assert made(text) == {(64, 8), (16,), (4096, 64), (512, 512)}


def test_a_move_between_memories_is_no_copy():
    text = """
ENTRY %main (a: bf16[8,64], b: f32[16]) -> bf16[8,64] {
  %a = bf16[8,64]{1,0:T(8,128)(2,1)} parameter(0)
  %b = f32[16]{0:T(128)S(1)} parameter(1)
  %start = (bf16[8,64]{1,0:T(8,128)(2,1)S(1)}, bf16[8,64]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%a)
  %done = bf16[8,64]{1,0:T(8,128)(2,1)S(1)} copy-done(%start)
  %copy.1 = f32[16]{0:T(128)S(1)} copy(%b)
  %wide = (f32[8,64]{1,0:T(8,128)}, f32[8]{0:T(128)S(1)}) fusion(%done), kind=kLoop, calls=%elsewhere
  ROOT %copy.2 = bf16[8,64]{0,1:T(8,128)(2,1)} copy(%a)
}

%elsewhere (p: bf16[8,64]) -> (f32[8,64], f32[8]) {
  %p = bf16[8,64]{1,0} parameter(0)
  ROOT %sums = (f32[8,64]{1,0}, f32[8]{0}) tuple(%p, %p)
}
"""
    assert copied(text) == {(16,), (8, 64)} and copied(text.replace("copy(%a)", "negate(%a)")) == {(16,)}
    assert made(text) == {(8, 64)}
