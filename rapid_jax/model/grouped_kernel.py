# SPDX-License-Identifier: Apache-2.0
"""Rows sorted by expert times their experts' matrices on NVIDIA GPUs, in Pallas (Triton).

A program takes one tile of rows and some columns of its expert's matrix, so that an expert is read once for each tile
of its rows, and one without rows never. For the few rows of a decoding round that is once for each expert they touch.
"""

import math
from dataclasses import dataclass
from functools import partial

import chex
import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from rapid_jax.model.skinny import GROUP
from rapid_jax.runtime.contract import contract

_DEEP, _WIDE, _WARPS, _STAGES = 64, 64, 4, 3  # of a tile of the matrix: depth, columns; not tuned on a device yet


@partial(jax.tree_util.register_dataclass, data_fields=["expert_N", "start_N", "end_N", "used"], meta_fields=["tile"])
@dataclass(frozen=True)
class Tiles:
    """The rows of one expert at a time: tile n is of `expert_N[n]`, from row `start_N[n]` to before `end_N[n]`.

    In order; those from `used` on are empty.
    """

    expert_N: jax.Array  # int32, as all of these
    start_N: jax.Array
    end_N: jax.Array
    used: jax.Array
    tile: int  # the most rows of one


def fits(depth: int, columns: int, bits: int | None = None) -> bool:
    """Whether the kernels take matrices of this size."""
    least = 32 if bits is None else GROUP
    return depth % least == 0 and columns % 32 == 0


def product(
    x_PD: jax.Array,
    tiles: Tiles,
    values: jax.Array,
    scale: jax.Array | None = None,
    *,
    bits: int | None = None,
    turned: bool = False,
    dtype: jnp.dtype,
    interpret: bool = False,
) -> jax.Array:
    """[P, F]: the rows of each tile times its expert's matrix, summed in float32; all other rows are junk.

    `values` are [X, D, F], if `turned` [X, F, D]. bits 8: int8 [X, F, D] with `scale` [X, F]. 4: int8 [X, F, D / 2]
    with `scale` [X, D / GROUP, F], as `skinny_matmul` has them. Every tile must have `tile` rows behind its first.
    Raises ValueError, while tracing, for other shapes.
    """
    with contract("grouped_product"):
        chex.assert_rank([x_PD, values], [2, 3])
        (P, D), X = x_PD.shape, values.shape[0]
        F = values.shape[1 if turned else 2]
        depth = values.shape[2 if turned else 1] * (2 if bits == 4 else 1)
        assert (turned or bits is None) and bits in (None, 8, 4), f"expected None, 8 or 4 bits, turned, got {bits}"
        assert depth == D and fits(D, F, bits), f"expected depths of 32 or {GROUP}, widths of 32, got {D}, {depth}, {F}"
        chex.assert_shape([] if scale is None else [scale], (X, F) if bits == 8 else (X, D // GROUP, F))
    deep, wide = GROUP if bits == 4 else math.gcd(_DEEP, D), math.gcd(_WIDE, F)
    given = [tiles.expert_N, tiles.start_N, tiles.end_N, x_PD, values, *([] if scale is None else [scale])]
    return pl.pallas_call(
        partial(_product_kernel, tile=tiles.tile, deep=deep, wide=wide, turned=turned, bits=bits),
        grid=(F // wide, tiles.expert_N.shape[0]),
        in_specs=[_whole(x) for x in given],
        out_specs=pl.BlockSpec((P, F), lambda j, n: (0, 0)),
        out_shape=jax.ShapeDtypeStruct((P, F), dtype),
        compiler_params=triton.CompilerParams(num_warps=_WARPS, num_stages=_STAGES),
        interpret=interpret,
        name=f"grouped_product{'_turned' if turned else ''}_{bits or 'full'}",
    )(*given)


def _whole(x: jax.Array) -> pl.BlockSpec:
    zeros = (0,) * x.ndim
    return pl.BlockSpec(x.shape, lambda *_: zeros)


def _product_kernel(expert_ref, start_ref, end_ref, x_ref, w_ref, *refs, tile, deep, wide, turned, bits):
    *scales, out_ref = refs
    column, n = pl.program_id(0) * wide, pl.program_id(1)
    expert, start, end = expert_ref[n], start_ref[n], end_ref[n]
    columns, rows = pl.ds(column, wide), pl.ds(start, tile)

    def add(index, sums):
        at = index * deep
        if bits == 4:
            half = GROUP // 2
            w = w_ref[expert, columns, pl.ds(index * half, half)].astype(jnp.int32)
            low, high = ((w << 28) >> 28), w >> 4
            x = [x_ref[rows, pl.ds(at + start, half)] for start in (0, half)]
            parts = (_times(x_TD, part.astype(x_TD.dtype), 1) for x_TD, part in zip(x, (low, high), strict=True))
            return sums + sum(parts) * scales[0][expert, index, columns][None, :]
        here = (columns, pl.ds(at, deep)) if turned else (pl.ds(at, deep), columns)
        x_TD = x_ref[rows, pl.ds(at, deep)]
        return sums + _times(x_TD, w_ref[(expert, *here)].astype(x_TD.dtype), 1 if turned else 0)

    @pl.when(start < end)
    def _():
        sums = lax.fori_loop(0, x_ref.shape[1] // deep, add, jnp.zeros((tile, wide), jnp.float32))
        if bits == 8:
            sums *= scales[0][expert, columns][None, :]
        real = (start + jnp.arange(tile) < end)[:, None]
        triton.store(out_ref.at[rows, columns], sums.astype(out_ref.dtype), mask=real)


def outer(
    x_PD: jax.Array, gradient_PF: jax.Array, sizes_X: jax.Array, *, tile: int, dtype: jnp.dtype, interpret: bool = False
) -> jax.Array:
    """[X, D, F]: of each expert's rows the sum of x times the gradient, in float32; zero of one without rows.

    There must be `tile` rows behind the last expert's. Raises ValueError, while tracing, for other shapes.
    """
    with contract("grouped_outer"):
        chex.assert_rank([x_PD, gradient_PF, sizes_X], [2, 2, 1])
        chex.assert_equal_shape_prefix([x_PD, gradient_PF], 1)
        (_, D), F, X = x_PD.shape, gradient_PF.shape[1], sizes_X.shape[0]
        assert fits(D, F), f"expected depths and widths of 32, got {D} and {F}"
    ends_X = jnp.cumsum(sizes_X).astype(jnp.int32)
    deep, wide = math.gcd(_DEEP, D), math.gcd(_WIDE, F)
    given = [ends_X - sizes_X.astype(jnp.int32), ends_X, x_PD, gradient_PF]
    return pl.pallas_call(
        partial(_outer_kernel, tile=min(tile, _DEEP)),
        grid=(X, D // deep, F // wide),
        in_specs=[_whole(x) for x in given],
        out_specs=pl.BlockSpec((None, deep, wide), lambda x, i, j: (x, i, j)),
        out_shape=jax.ShapeDtypeStruct((X, D, F), dtype),
        compiler_params=triton.CompilerParams(num_warps=_WARPS, num_stages=_STAGES),
        interpret=interpret,
        name="grouped_outer",
    )(*given)


def _outer_kernel(start_ref, end_ref, x_ref, gradient_ref, out_ref, *, tile):
    expert = pl.program_id(0)
    deep, wide = out_ref.shape
    start, end = start_ref[expert], end_ref[expert]
    depth, columns = pl.ds(pl.program_id(1) * deep, deep), pl.ds(pl.program_id(2) * wide, wide)

    def add(index, sums):
        first = start + index * tile
        real = (first + jnp.arange(tile) < end)[:, None]
        x_TD = jnp.where(real, x_ref[pl.ds(first, tile), depth], 0)
        gradient_TF = jnp.where(real, gradient_ref[pl.ds(first, tile), columns], 0)
        return sums + _times(x_TD.T, gradient_TF, 0)

    count = lax.div(end - start + (tile - 1), jnp.int32(tile))
    out_ref[...] = lax.fori_loop(0, count, add, jnp.zeros((deep, wide), jnp.float32)).astype(out_ref.dtype)


def _times(a: jax.Array, b: jax.Array, axis: int) -> jax.Array:
    """a [T, D] times b, whose axis of depth is this; float32 in full float32."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(a, b, (((1,), (axis,)), ((), ())), precision=precision, preferred_element_type=jnp.float32)
