# SPDX-License-Identifier: Apache-2.0
"""The Pallas kernel of `tpu_decode.py`: what a step of its grid reads, and what it adds.

The grid is (rows that share a sequence, half of the kv heads, share of the prefix, step, kv head of the half): what is
of all heads, positions and scales, is fetched once a step.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from rapid_jax.attention.online_softmax import Slots
from rapid_jax.attention.tpu_decode_state import LANES, Cut, How, Seen


@dataclass(frozen=True)
class Given:
    """What the kernel reads. Keys and values are of all layers, [L, B, K, S, H]."""

    q: jax.Array  # [programs, K, rows, H]
    # [B, T]: the position of each of a sequence's rows, or of each token, which has equally many; perhaps also the
    # first that they see
    marks: tuple[jax.Array, ...]
    far: Slots
    near: Slots
    new: Slots | None  # the tokens that the rows are of, [B, K, T, H]
    layers: tuple[jax.Array, jax.Array]  # [1], of the prefix and of the tail
    used: tuple[jax.Array, ...]  # [1]; of the prefix perhaps one a sequence
    skipped: jax.Array | None  # [sequences of the prefix]: slots that none of the rows sees; with first positions


def attended(given: Given, cut: Cut, scale: float, interpret: Any, *, finished: bool) -> list[jax.Array]:
    """[programs, K, shares, rows, H], finished or not; if not, also what rows saw, [..., rows, 128]: maximum, sum."""
    programs, K, R, H = given.q.shape
    far, near = given.far, given.near
    scaled, several = far.k_scale_BKS is not None, given.used[0].size > 1
    windowed = given.skipped is not None
    how = How(cut, scale, scaled, H < LANES, given.new is not None, several, windowed, finished)
    read = _read(given, how)
    scalars = [*given.layers, *given.used] + ([given.skipped] if given.skipped is not None else [])
    out = [jax.ShapeDtypeStruct((programs, K, cut.shares, R, H), given.q.dtype if finished else jnp.float32)]
    out += [] if finished else [jax.ShapeDtypeStruct((programs, K, cut.shares, R, LANES), jnp.float32)]
    slots = programs * K * (far.pos_BS.shape[1] + cut.each * near.pos_BS.shape[1])
    return pl.pallas_call(
        partial(_kernel, how=how),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(programs, K // cut.heads, cut.shares, cut.steps[0] + cut.each * cut.steps[1], cut.heads),
            in_specs=[spec for _, spec in read],
            out_specs=[pl.BlockSpec((None, cut.heads, None, *x.shape[3:]), _Maps(how).out) for x in out],
            scratch_shapes=[
                *[pltpu.VMEM((cut.heads, R, width), jnp.float32) for width in (LANES, LANES, H)],
                *[pltpu.VMEM((R, 1), jnp.int32) for _ in given.marks],
            ],
        ),
        out_shape=out,
        interpret=interpret,
        name="tpu_decode",
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",) * 3 + ("arbitrary",) * 2),
        cost_estimate=pl.CostEstimate(
            flops=4 * slots * R * H,
            transcendentals=slots * R,
            bytes_accessed=2 * slots * H * far.k_BKSH.dtype.itemsize,
        ),
    )(*scalars, *(x for x, _ in read))


def _read(given: Given, how: How) -> list[tuple[jax.Array, pl.BlockSpec]]:
    """The arrays in the order in which the kernel takes them, and the block of each that a step sees."""
    maps, cut, one = _Maps(how), how.cut, (None, None, None)
    K, R, H = given.q.shape[1:]
    block, short = cut.blocks
    far, near, new = given.far, given.near, given.new

    def whole(x: jax.Array) -> pl.BlockSpec:
        return pl.BlockSpec(x.shape, lambda *_: (0,) * x.ndim)

    def kv(x: jax.Array, size: int, where: tuple[Any, Any], *, turn: bool, lies: bool = False):
        """One block, as it is or with slots last: turned here, unless it lies so."""
        if not turn:
            return x, pl.BlockSpec((*one, size, H), where[0])
        return x if lies else x.swapaxes(-1, -2), pl.BlockSpec((*one, H, size), where[1])

    read = [(given.q, pl.BlockSpec((None, cut.heads, R, H), maps.rows))]
    read += [(marks, whole(marks)) for marks in given.marks]
    read += [(far.pos_BS, pl.BlockSpec((far.pos_BS.shape[0], block), maps.far_pos))]
    there, here = (maps.far, maps.far_turned), (maps.near, maps.near_turned)
    read += [kv(far.k_BKSH, block, there, turn=how.turned)]
    read += [kv(far.v_BKSH, block, there, turn=how.turned or how.scaled, lies=how.scaled)]
    if far.k_scale_BKS is not None and far.v_scale_BKS is not None:
        spec = pl.BlockSpec((None, None, K, block), maps.far_scales)
        read += [(far.k_scale_BKS, spec), (far.v_scale_BKS, spec)]
    read += [(near.pos_BS, pl.BlockSpec((near.pos_BS.shape[0], short), maps.near_pos))]
    read += [kv(x, short, here, turn=how.turned) for x in (near.k_BKSH, near.v_BKSH)]
    if new is not None:
        spec = pl.BlockSpec((cut.each, cut.heads, *new.k_BKSH.shape[2:]), maps.rows)
        read += [(new.pos_BS, whole(new.pos_BS)), (new.k_BKSH, spec), (new.v_BKSH, spec)]
    return read


def _share(how: How, sequence, used, skipped, p):
    """(the first block of a share of a sequence's prefix, the one behind its last)."""
    cut = how.cut
    blocks = lax.div(used[sequence if how.several else 0] + (cut.blocks[0] - 1), jnp.int32(cut.blocks[0]))
    start = lax.div(skipped[0][sequence], jnp.int32(cut.blocks[0])) if how.windowed else jnp.int32(0)
    blocks = jnp.maximum(blocks - start, 0)
    shares = jnp.int32(cut.shares)
    return start + lax.div(blocks * p, shares), start + lax.div(blocks * (p + 1), shares)


@dataclass(frozen=True)
class _Maps:
    """Which block of each array a step of the grid wants; after the grid's indices come the scalars."""

    how: How

    def _far(self, i, p, s, used, scalars):
        sequence = lax.div(i, jnp.int32(self.how.cut.calls))
        first, last = _share(self.how, sequence, used, scalars[-1:], p)
        return sequence, jnp.maximum(jnp.minimum(first + s, last - 1), 0)

    def _near(self, i, s, used):
        cut = self.how.cut
        step = jnp.maximum(s - cut.steps[0], 0)
        own = lax.div(step, jnp.int32(cut.steps[1]))
        last = jnp.maximum(lax.div(used[0] - 1, jnp.int32(cut.blocks[1])), 0)
        return i * cut.each + own, jnp.minimum(step - own * cut.steps[1], last)

    def rows(self, i, g, p, s, h, *scalars):
        return i, g, 0, 0

    def out(self, i, g, p, s, h, *scalars):
        return i, g, p, 0, 0

    def far(self, i, g, p, s, h, layer, _, used, *scalars):
        sequence, block = self._far(i, p, s, used, scalars)
        return layer[0], sequence, g * self.how.cut.heads + h, block, 0

    def far_turned(self, i, g, p, s, h, layer, _, used, *scalars):
        sequence, block = self._far(i, p, s, used, scalars)
        return layer[0], sequence, g * self.how.cut.heads + h, 0, block

    def far_scales(self, i, g, p, s, h, layer, _, used, *scalars):
        sequence, block = self._far(i, p, s, used, scalars)
        return layer[0], sequence, 0, block

    def far_pos(self, i, g, p, s, h, layer, _, used, *scalars):
        return 0, self._far(i, p, s, used, scalars)[1]

    def near(self, i, g, p, s, h, _, layer, far_used, used, *scalars):
        sequence, block = self._near(i, s, used)
        return layer[0], sequence, g * self.how.cut.heads + h, block, 0

    def near_turned(self, i, g, p, s, h, _, layer, far_used, used, *scalars):
        sequence, block = self._near(i, s, used)
        return layer[0], sequence, g * self.how.cut.heads + h, 0, block

    def near_pos(self, i, g, p, s, h, _, layer, far_used, used, *scalars):
        return 0, self._near(i, s, used)[1]


def _kernel(far_layer, near_layer, far_used, near_used, *refs, how: How):
    cut, turned, refs = how.cut, how.turned, list(refs)
    i, g, p, s, h = (pl.program_id(axis) for axis in range(5))

    def taken(count: int) -> list[Any]:
        found, refs[:] = refs[:count], refs[count:]
        return found

    new_used = taken(1) if how.new else []
    skipped = taken(1) if how.windowed else []
    (q_ref,), marks_refs = taken(1), taken(1 + how.windowed)
    far_pos_ref, k_ref, v_ref, *scale_refs = taken(5 if how.scaled else 3)
    near_pos_ref, near_k_ref, near_v_ref = taken(3)
    new_refs = taken(3) if how.new else []
    out_refs = [ref.at[h] for ref in taken(1 if how.finished else 2)]
    max_ref, sum_ref, out_ref, pos_ref, *first_ref = refs
    first_ref = first_ref[0] if how.windowed else None
    seen = Seen(q_ref.at[h], pos_ref, first_ref, max_ref.at[h], sum_ref.at[h], out_ref.at[h])
    pl.when(s == 0)(lambda: seen.start(how, marks_refs, i))
    has_tail = p == cut.shares - 1

    if how.new:

        @pl.when((s == 0) & has_tail & (new_used[0][0] > 0))
        def _():
            pos_ref, k_ref, v_ref = new_refs
            for own in range(cut.each):
                pos_1T = pos_ref[pl.ds(i * cut.each + own, 1), :]
                seen.add(how, pos_1T, k_ref[own, h], v_ref[own, h], turned=(False, False), own=own)

    sequence = lax.div(i, jnp.int32(cut.calls))
    first, last = _share(how, sequence, far_used, skipped, p)

    @pl.when((s < cut.steps[0]) & (first + s < last))
    def _():
        scales = [ref[pl.ds(g * cut.heads + h, 1), :] for ref in scale_refs]
        lies = (turned, turned or how.scaled)
        seen.add(how, far_pos_ref[pl.ds(sequence, 1), :], k_ref[...], v_ref[...], turned=lies, scales=scales)

    step = s - cut.steps[0]
    own = lax.div(jnp.maximum(step, 0), jnp.int32(cut.steps[1]))

    @pl.when((step >= 0) & has_tail & ((step - own * cut.steps[1]) * cut.blocks[1] < near_used[0]))
    def _():
        pos_1S = near_pos_ref[pl.ds(i * cut.each + own, 1), :]
        seen.add(how, pos_1S, near_k_ref[...], near_v_ref[...], turned=(turned, turned), own=own)

    pl.when(s == pl.num_programs(3) - 1)(lambda: seen.finish(how, out_refs))
