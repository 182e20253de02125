# SPDX-License-Identifier: Apache-2.0
"""Attention of a few query rows over a long cache on NVIDIA GPUs: one Pallas (Triton) kernel reads every key once.

The keys are split over programs, for a few rows keep no more than one multiprocessor busy each (Flash-Decoding, Dao et
al. 2023). Program (j, k, b) attends to share j of row b's prefix for kv head k; one program more has the tail. Each
leaves an un-normalised `SoftmaxState`, and a sum over the shares ends it (`flash_finish.py`). Scores, softmax and sums
are float32; softmax weights meet the values in the queries' dtype, or float16 where those are quantised.

A prefix of one sequence under many is read once for all of them: their query rows are rows of one (`over_shared`).
"""

from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from rapid_jax.attention.contract import check_contract
from rapid_jax.attention.flash_finish import Shares, finish_over, finished, summed
from rapid_jax.attention.online_softmax import Rows, Slots, SoftmaxState, finish, merge
from rapid_jax.attention.shared_prefix import is_shared, over_shared
from rapid_jax.runtime.contract import contract

LOW = -1e30  # stands for -inf where a difference of two must not be NaN
MOST_ROWS = 256  # more are not a few
MOST_BYTES = 512  # of a query's head: more, and a block of keys and values does not fit a multiprocessor's memory
MOST_FLOAT16 = 65504.0
NEVER = 2**31 - 1  # a position that no row sees


@dataclass(frozen=True)
class Shape:
    """How the kernel is cut; by measurement (tests/benchmarks/NOTES.md)."""

    rows: int  # of a program: more are several programs', which run side by side and read the same slots
    block: int  # slots at a time
    warps: int
    stages: int  # blocks under way
    programs: int  # of all kv heads and rows together: as many as run at once


def shape_of(rows: int, quantized: bool) -> Shape:
    """For so many rows of a kv head, a power of two, over a prefix that is quantised or not."""
    return Shape(16, 128, 4, 2, 396) if quantized and rows <= 16 else Shape(64, 64, 4, 3, 264)


def fits(rows: Rows, slots: Slots) -> bool:
    """Whether the kernel takes these shapes: heads of a power of two and `MOST_BYTES`, no branch tags, few rows."""
    R, H = rows.q_BKRH.shape[2:]
    tags = rows.branch_BR is not None and slots.branch_BS is not None
    heads = H >= 16 and H & (H - 1) == 0 and H * rows.q_BKRH.dtype.itemsize <= MOST_BYTES
    return heads and R <= MOST_ROWS and not tags and rows.reach_BR is None


def flash_decode(
    rows: Rows,
    sides: tuple[Slots, ...],
    used: tuple[jax.Array, ...],
    *,
    scale: float,
    shape: Shape | None = None,
    interpret: bool = False,
) -> SoftmaxState:
    """Attention of the rows over one or two sets of slots, un-normalised; slots of each from its `used` on are empty.

    The same as `attend_block` over them in one, but for rounding. The first set is shared out, the second is short. A
    set of one sequence is that of all rows. Raises ValueError, while tracing, for shapes that do not go together.
    """
    _check(rows, sides, used)
    how = {"scale": scale, "shape": shape, "interpret": interpret}
    if not any(is_shared(rows, side) for side in sides):
        return summed(_shares(rows, sides, used, **how))

    def over(side: Slots, count: jax.Array) -> SoftmaxState:
        def attend(rows: Rows) -> SoftmaxState:
            return summed(_shares(rows, (side,), (count,), **how))

        return over_shared(rows, side, attend, most=MOST_ROWS) if is_shared(rows, side) else attend(rows)

    return reduce(merge, [over(side, count) for side, count in zip(sides, used, strict=True)])


def flash_decoded(
    rows: Rows,
    sides: tuple[Slots, ...],
    used: tuple[jax.Array, ...],
    *,
    scale: float,
    axis: str | None = None,
    shape: Shape | None = None,
    interpret: bool = False,
) -> jax.Array:
    """`flash_decode`, finished: [B, K, R, H] in the queries' dtype, 0 for a row that saw nothing.

    `axis`: inside shard_map, a mesh axis that the first set is split over. The second is whole on every device.
    """
    _check(rows, sides, used)
    if axis is not None:  # what every device has whole the first adds
        first = lax.axis_index(axis) == 0
        used = used[0], *(jnp.where(first, count, 0) for count in used[1:])
    how: Any = {"scale": scale, "shape": shape, "interpret": interpret}
    dtype, shared = rows.q_BKRH.dtype, any(is_shared(rows, side) for side in sides)
    seen = flash_decode(rows, sides, used, **how) if shared else _shares(rows, sides, used, **how)
    if axis is not None:
        return finish_over(seen, axis, dtype, interpret=interpret)
    return finish(seen, dtype) if isinstance(seen, SoftmaxState) else finished(seen, dtype, interpret=interpret)


def _check(rows: Rows, sides: tuple[Slots, ...], used: tuple[jax.Array, ...]) -> None:
    with contract("flash_decode"):
        assert 1 <= len(sides) <= 2, f"expected one or two sets of slots, got {len(sides)}"
        assert len(used) == len(sides), f"expected {len(sides)} counts of used slots, got {len(used)}"
        chex.assert_shape(used, ())
        chex.assert_type(used, [jnp.int32] * len(used))
    for side in sides:
        check_contract("flash_decode", rows, side, shared=True, quantized=True)
        with contract("flash_decode"):
            assert fits(rows, side), (
                f"expected at most {MOST_ROWS} rows of a kv head, heads of a power of two from 16 on in {MOST_BYTES} "
                f"bytes and no branch tags, got rows {rows.q_BKRH.dtype} {rows.q_BKRH.shape}"
            )


def _shares(
    rows: Rows,
    sides: tuple[Slots, ...],
    used: tuple[jax.Array, ...],
    *,
    scale: float,
    shape: Shape | None,
    interpret: bool,
) -> Shares:
    """What each share, and the second set, has seen."""
    B, K, R, H = rows.q_BKRH.shape
    padded = max(16, pl.next_power_of_2(R))  # a matrix unit takes 16 rows
    shape = shape or shape_of(padded, quantized=sides[0].k_scale_BKS is not None)
    padded = min(padded, shape.rows)
    parts = -(-R // padded)
    shares = max(1, shape.programs // (B * K * parts) - (len(sides) - 1))
    limits = [_limits(rows, side, n, shape.block) for n, side in zip(used, sides, strict=True)]
    given = [(rows.q_BKRH, pl.BlockSpec((None, None, padded, H), lambda j, k, b: (b, k, j % parts, 0)))]
    marks = [marks_BR for marks_BR in (rows.pos_BR, rows.first_BR) if marks_BR is not None]
    given += [(marks_BR, pl.BlockSpec((None, padded), lambda j, k, b: (b, j % parts))) for marks_BR in marks]
    given.append((jnp.concatenate(limits, axis=1), pl.BlockSpec((None, 2 * len(sides)), lambda j, k, b: (b, 0))))
    for side in sides:
        arrays = (side.k_BKSH, side.v_BKSH, side.k_scale_BKS, side.v_scale_BKS, side.pos_BS)
        given += [(x, _spec(x)) for x in arrays if x is not None]
    programs = shares + len(sides) - 1
    kernel = partial(
        _kernel,
        rows=R,
        scale=scale,
        block=shape.block,
        shares=shares,
        slots=tuple(side.pos_BS.shape[1] for side in sides),
        scaled=tuple(side.k_scale_BKS is not None for side in sides),
        packed=not interpret,
        windowed=rows.first_BR is not None,
    )
    flat = pl.BlockSpec((None, None, None, padded), lambda j, k, b: (b, k, j // parts, j % parts))
    return pl.pallas_call(
        kernel,
        grid=(programs * parts, K, B),  # the parts of a share are neighbours: what one reads, the others find in cache
        in_specs=[spec for _, spec in given],
        out_specs=[
            pl.BlockSpec((None, None, None, padded, H), lambda j, k, b: (b, k, j // parts, j % parts, 0)),
            flat,
            flat,
        ],
        out_shape=[jax.ShapeDtypeStruct((B, K, programs, R, *more), jnp.float32) for more in ((H,), (), ())],
        compiler_params=triton.CompilerParams(num_warps=shape.warps, num_stages=shape.stages),
        interpret=interpret,
        name="flash_decode",
    )(*(x for x, _ in given))


def _limits(rows: Rows, side: Slots, used: jax.Array, block: int) -> jax.Array:
    """int32 [B, 2]: the blocks that a sequence's rows see lie from the first of these to before the second."""
    B, S = rows.pos_BR.shape[0], side.pos_BS.shape[1]
    behind = -(-jnp.minimum(used, S) // block)
    if rows.first_BR is None:
        return jnp.broadcast_to(jnp.stack([0, behind]).astype(jnp.int32), (B, 2))
    earliest_B = jnp.min(jnp.where(rows.pos_BR >= 0, rows.first_BR, NEVER), axis=1)
    slot, seen_BS = jnp.arange(S, dtype=jnp.int32), side.pos_BS >= jnp.maximum(earliest_B, 0)[:, None]
    first_B = jnp.min(jnp.where(seen_BS, slot, S), axis=1) // block
    last_B = jnp.max(jnp.where(seen_BS, slot, -1), axis=1) // block
    return jnp.stack([first_B, jnp.minimum(last_B + 1, behind)], axis=1).astype(jnp.int32)


def _spec(x: jax.Array) -> pl.BlockSpec:
    """One row's, and one kv head's where there are heads: the kernel finds its own blocks in it."""
    if x.ndim == 2:
        return pl.BlockSpec((None, x.shape[1]), lambda j, k, b: (b, 0))
    zeros = (0,) * (x.ndim - 2)
    return pl.BlockSpec((None, None, *x.shape[2:]), lambda j, k, b: (b, k, *zeros))


def _kernel(q_ref, row_pos_ref, *refs, rows, scale, block, shares, slots, scaled, packed, windowed):
    *first_ref, limits_ref = refs[: 1 + windowed]
    *refs, out_ref, max_ref, sum_ref = refs[1 + windowed :]
    R, H = q_ref.shape
    parts = -(-rows // R)
    share, part = pl.program_id(0) // parts, pl.program_id(0) % parts
    real_R = part * R + jnp.arange(R) < rows
    real_RH = jnp.broadcast_to(real_R[:, None], (R, H))
    q_RH = triton.load(q_ref.at[:, :], mask=real_RH, other=0)
    row_pos_R = triton.load(row_pos_ref.at[:], mask=real_R, other=-1)
    sees_R = row_pos_R, triton.load(first_ref[0].at[:], mask=real_R, other=0) if windowed else None
    carry = (jnp.zeros((R, H), jnp.float32), jnp.full((R,), LOW, jnp.float32), jnp.zeros((R,), jnp.float32))
    for index, size in enumerate(slots):
        count = 5 if scaled[index] else 3
        side, refs = refs[:count], refs[count:]
        start, end = limits_ref[2 * index], limits_ref[2 * index + 1]
        blocks = jnp.maximum(end - start, 0)
        first, last = start + blocks * share // shares, start + blocks * (share + 1) // shares
        if index:  # the tail has one program to itself
            first, last = start, jnp.where(share == shares, end, start)
        elif len(slots) > 1:
            last = jnp.where(share == shares, first, last)
        query_RH = jnp.clip(q_RH, -MOST_FLOAT16, MOST_FLOAT16).astype(jnp.float16) if scaled[index] else q_RH
        attend = partial(_attend, query_RH, sees_R, side, size=size, scale=scale, block=block, packed=packed)
        carry = lax.fori_loop(first, last, attend, carry)
    out_RH, max_R, sum_R = carry
    triton.store(out_ref.at[:, :], out_RH, mask=real_RH)
    triton.store(sum_ref.at[:], sum_R, mask=real_R)
    triton.store(max_ref.at[:], jnp.where(sum_R > 0, max_R, -jnp.inf), mask=real_R)


def _attend(q_RH, sees_R, side, index, carry, *, size, scale, block, packed):
    """`carry` with one block of slots added."""
    k_ref, v_ref, *scales, pos_ref = side
    out_RH, max_R, sum_R = carry
    last_R, first_R = sees_R  # positions
    here = pl.ds(index * block, block)
    inside = None if size % block == 0 else index * block + jnp.arange(block) < size
    wide = None if inside is None else inside[:, None]

    pos_S = _load(pos_ref.at[here], inside, -1)
    k_SH = _load(k_ref.at[here, :], wide, 0)
    if scales:
        score_RS = _product(q_RH, _float16(k_SH, packed), 1) * scale
        score_RS *= _load(scales[0].at[here], inside, 0)[None, :]
    else:
        score_RS = _product(q_RH, k_SH.astype(q_RH.dtype), 1) * scale
    seen_RS = (pos_S[None, :] >= 0) & (pos_S[None, :] <= last_R[:, None])
    if first_R is not None:
        seen_RS &= pos_S[None, :] >= first_R[:, None]
    new_R = jnp.maximum(max_R, jnp.max(jnp.where(seen_RS, score_RS, LOW), axis=1))
    weight_RS = jnp.where(seen_RS, jnp.exp(score_RS - new_R[:, None]), 0.0)
    keep_R = jnp.exp(max_R - new_R)
    sum_R = sum_R * keep_R + jnp.sum(weight_RS, axis=1)
    if scales:
        weight_RS *= _load(scales[1].at[here], inside, 0)[None, :] * 127  # of the size of the values
        v_HS = _float16(_load(v_ref.at[:, here], None if inside is None else inside[None, :], 0), packed)
        added_RH = _product(jnp.minimum(weight_RS, MOST_FLOAT16).astype(jnp.float16), v_HS, 1) * (1 / 127)
    else:
        added_RH = _product(weight_RS.astype(q_RH.dtype), _load(v_ref.at[here, :], wide, 0).astype(q_RH.dtype), 0)
    return out_RH * keep_R[:, None] + added_RH, new_R, sum_R


def _float16(x: jax.Array, packed: bool) -> jax.Array:
    """int8 as float16, which has all its numbers; `packed`: four by five instructions, which Pallas cannot interpret.

    With its sign bit turned a byte b is b + 128, and 0x6400 + n is the float16 of 1024 + n.
    """
    if not packed:
        return x.astype(jnp.float16)
    code = """{
    .reg .b32 t, c;
    xor.b32 t, $2, 0x80808080;
    mov.b32 c, 0x64806480;
    prmt.b32 $0, t, 0x64646464, 0x4140;
    prmt.b32 $1, t, 0x64646464, 0x4342;
    sub.f16x2 $0, $0, c;
    sub.f16x2 $1, $1, c;
    }"""
    shape = [jax.ShapeDtypeStruct(x.shape, jnp.float16)]
    return triton.elementwise_inline_asm(code, args=[x], constraints="=&r,=&r,r", pack=4, result_shape_dtypes=shape)[0]


def _product(a: jax.Array, b: jax.Array, axis: int) -> jax.Array:
    """a over its last axis with b over `axis`, in float32."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(a, b, (((1,), (axis,)), ((), ())), precision=precision, preferred_element_type=jnp.float32)


def _load(ref, mask, other):
    return ref[...] if mask is None else triton.load(ref, mask=mask, other=other)
