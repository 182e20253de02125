# SPDX-License-Identifier: Apache-2.0
"""Rows that are sorted by expert, each times the matrix of its expert; experts without rows are not read.

On a TPU by JAX's own megablox kernel, on a GPU by `grouped_kernel.py`, elsewhere by a loop over tiles of rows.
`jax.lax.ragged_dot` says the same; by jax 0.10's rules it is lowered to products with every expert elsewhere.
"""

import math
from dataclasses import dataclass
from functools import partial

import chex
import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas.ops.tpu.megablox import gmm

from rapid_jax.model import grouped_kernel
from rapid_jax.model.einsum32 import einsum32
from rapid_jax.model.grouped_kernel import Tiles
from rapid_jax.model.quantized import WeightBits, dequantize
from rapid_jax.runtime.contract import contract

FEW_ROWS, MANY_ROWS = 16, 128  # of a tile
_MEGABLOX = 128  # rows come in multiples of it


@dataclass(frozen=True)
class Grouping:
    """How rows are cut, and for which platform."""

    platform: str  # cpu, gpu or tpu
    tile: int  # rows of one expert at a time

    @staticmethod
    def of(platform: str, rows: int, experts: int) -> "Grouping":
        """Of so many rows in all."""
        return Grouping(platform, FEW_ROWS if rows <= FEW_ROWS * experts else MANY_ROWS)

    def padded(self, rows: int) -> int:
        """Rows that `grouped_product` is given for so many: those behind are junk, in and out."""
        return math.ceil((rows + self.tile) / _MEGABLOX) * _MEGABLOX if self.platform == "tpu" else rows + self.tile


def grouped_product(
    x_PD: jax.Array,
    sizes_X: jax.Array,
    values: jax.Array,
    scale: jax.Array | None = None,
    *,
    how: Grouping,
    bits: WeightBits | None = None,
    dtype: jnp.dtype,
) -> jax.Array:
    """[P, F]: the first sizes_X[0] rows times the first expert's matrix, and so on; those behind the last are junk.

    Summed in float32, returned in `dtype`. In full `values` are [X, D, F]; in few bits what `quantize_weights` gives of
    each, with its `scale`. Gradients are those of x and, in full, of the values. `how` says how many rows there are
    behind the last (`Grouping.padded`). Raises ValueError, while tracing, for other shapes.
    """
    with contract("grouped_product"):
        chex.assert_rank([x_PD, sizes_X, values], [2, 1, 3])
        chex.assert_type(sizes_X, jnp.int32)
        chex.assert_equal_shape_prefix([sizes_X, values], 1)
        assert x_PD.shape[0] >= how.padded(1), f"expected at least {how.padded(1)} rows, got {x_PD.shape[0]}"
        if bits is None:
            assert values.shape[1] == x_PD.shape[1], f"expected depths alike, got {x_PD.shape[1]} and {values.shape[1]}"
    if bits is not None:
        assert scale is not None
        return _in_bits(x_PD, sizes_X, values, scale, how, bits, jnp.dtype(dtype))
    return _full(x_PD, sizes_X, values, how, jnp.dtype(dtype))


def tiles_of(sizes_X: jax.Array, rows: int, tile: int) -> Tiles:
    """Tiles of at most `tile` rows, in order, for `sizes_X[x]` rows of each expert and at most `rows` in all."""
    experts = sizes_X.shape[0]
    ends_X, tiles_X = jnp.cumsum(sizes_X), -(-sizes_X // tile)
    last_X = jnp.cumsum(tiles_X)
    index_N = jnp.arange(rows // tile + min(experts, rows), dtype=jnp.int32)
    expert_N = jnp.minimum(jnp.searchsorted(last_X, index_N, side="right"), experts - 1)
    start_N = (ends_X - sizes_X)[expert_N] + (index_N - (last_X - tiles_X)[expert_N]) * tile
    real_N = index_N < last_X[-1]
    start_N = jnp.where(real_N, start_N, 0)
    end_N = jnp.where(real_N, jnp.minimum(start_N + tile, ends_X[expert_N]), 0)
    expert_N, start_N, end_N, used = (x.astype(jnp.int32) for x in (expert_N, start_N, end_N, last_X[-1]))
    return Tiles(expert_N, start_N, end_N, used, tile)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _full(x_PD: jax.Array, sizes_X: jax.Array, values_XDF: jax.Array, how: Grouping, dtype: jnp.dtype) -> jax.Array:
    if how.platform == "tpu":
        return gmm(x_PD, values_XDF, sizes_X, dtype, _megablox_tiling(values_XDF.shape))
    tiles = tiles_of(sizes_X, x_PD.shape[0] - how.tile, how.tile)
    if how.platform == "gpu" and grouped_kernel.fits(*values_XDF.shape[1:]):
        return grouped_kernel.product(x_PD, tiles, values_XDF, dtype=dtype)
    return _loop_over_tiles(x_PD, tiles, lambda x_TD, expert: einsum32("TD,DF->TF", x_TD, values_XDF[expert]), dtype)


def _full_forward(x_PD, sizes_X, values_XDF, how, dtype):
    return _full(x_PD, sizes_X, values_XDF, how, dtype), (x_PD, sizes_X, values_XDF)


def _full_backward(how, dtype, kept, gradient_PF):
    del dtype
    x_PD, sizes_X, values_XDF = kept
    gradient_PF = gradient_PF.astype(x_PD.dtype)  # as the products of a dense layer have it
    if how.platform == "tpu":
        product = partial(gmm, tiling=_megablox_tiling(values_XDF.shape))
        _, back = jax.vjp(lambda x, w: product(x, w, sizes_X, gradient_PF.dtype), x_PD, values_XDF)
        dx_PD, dw_XDF = back(gradient_PF)
        return dx_PD, None, dw_XDF
    tiles = tiles_of(sizes_X, x_PD.shape[0] - how.tile, how.tile)
    if how.platform == "gpu" and grouped_kernel.fits(*values_XDF.shape[1:]):
        dx_PD = grouped_kernel.product(gradient_PF, tiles, values_XDF, turned=True, dtype=x_PD.dtype)
        return dx_PD, None, grouped_kernel.outer(x_PD, gradient_PF, sizes_X, tile=how.tile, dtype=values_XDF.dtype)

    def one(gradient_TF: jax.Array, expert: jax.Array) -> jax.Array:
        return einsum32("TF,DF->TD", gradient_TF, values_XDF[expert])

    dx_PD = _loop_over_tiles(gradient_PF, tiles, one, x_PD.dtype)
    return dx_PD, None, _sum_outer(x_PD, gradient_PF, tiles, values_XDF.shape).astype(values_XDF.dtype)


_full.defvjp(_full_forward, _full_backward)


@partial(jax.jit, static_argnames=("how", "bits", "dtype"))
def _in_bits(x_PD, sizes_X, values, scale, how: Grouping, bits: WeightBits, dtype: jnp.dtype) -> jax.Array:
    tiles = tiles_of(sizes_X, x_PD.shape[0] - how.tile, how.tile)
    if how.platform == "gpu" and grouped_kernel.fits(x_PD.shape[1], values.shape[1], bits):
        return grouped_kernel.product(x_PD, tiles, values, scale, bits=bits, turned=True, dtype=dtype)

    def one(x_TD: jax.Array, expert: jax.Array) -> jax.Array:
        weight_FD = dequantize(values[expert], scale[expert], bits)[:, : x_TD.shape[1]].astype(x_TD.dtype)
        return einsum32("TD,FD->TF", x_TD, weight_FD)

    return _loop_over_tiles(x_PD, tiles, one, dtype)


def _loop_over_tiles(x_PD: jax.Array, tiles: Tiles, one, dtype: jnp.dtype) -> jax.Array:
    """Each tile's rows by `one(rows, expert)`. A tile's junk is overwritten by the next one, which begins there."""
    columns = jax.eval_shape(one, x_PD[: tiles.tile], tiles.used).shape[1]

    def body(n: jax.Array, out_PF: jax.Array) -> jax.Array:
        rows_TD = lax.dynamic_slice_in_dim(x_PD, tiles.start_N[n], tiles.tile)
        done_TF = one(rows_TD, tiles.expert_N[n]).astype(dtype)
        return lax.dynamic_update_slice_in_dim(out_PF, done_TF, tiles.start_N[n], 0)

    return lax.fori_loop(0, tiles.used, body, jnp.zeros((x_PD.shape[0], columns), dtype))


def _sum_outer(x_PD: jax.Array, gradient_PF: jax.Array, tiles: Tiles, shape: tuple[int, ...]) -> jax.Array:
    """float32 [X, D, F]: of each expert's rows the sum of x times the gradient."""

    def body(n: jax.Array, total_XDF: jax.Array) -> jax.Array:
        start, expert = tiles.start_N[n], tiles.expert_N[n]
        real_T = start + jnp.arange(tiles.tile) < tiles.end_N[n]
        x_TD, gradient_TF = (lax.dynamic_slice_in_dim(rows, start, tiles.tile) for rows in (x_PD, gradient_PF))
        x_TD, gradient_TF = (jnp.where(real_T[:, None], rows, 0) for rows in (x_TD, gradient_TF))
        return total_XDF.at[expert].add(einsum32("TD,TF->DF", x_TD, gradient_TF))

    return lax.fori_loop(0, tiles.used, body, jnp.zeros(shape, jnp.float32))


def _megablox_tiling(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Rows, depth and columns of a tile: an expert's whole depth up to 1,024, so that few tiles stream it."""
    _, depth, columns = shape
    return _MEGABLOX, min(1024, math.ceil(depth / 128) * 128), min(512, math.ceil(columns / 128) * 128)
