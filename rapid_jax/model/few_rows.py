# SPDX-License-Identifier: Apache-2.0
"""A few rows times a large matrix in bfloat16 on NVIDIA GPUs, in Pallas (Triton), with what stands before and behind.

Decoding multiplies a row or some with every weight of a model, and the time is that of reading the weights. What else a
layer does is little work in many kernels, each of which costs a start. So the product takes it along: the RMS norm of
its rows before it, a bias, SwiGLU or the residual sum behind it.
"""

from dataclasses import dataclass
from functools import partial

import chex
import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from rapid_jax.runtime.contract import contract

MOST_ROWS = 16  # of a matrix unit
DEPTHS = 128  # a depth is a multiple of it
WIDTHS = 32


@dataclass(frozen=True)
class Tile:
    """How the matrix is cut; by measurement (WORKSPACE.md)."""

    deep: int = 256  # weights of a column at a time
    wide: int = 32  # columns of a program
    warps: int = 4
    stages: int = 4  # tiles under way


def fits(rows: int, depth: int, width: int, dtype: jnp.dtype) -> bool:
    """Whether the kernel takes so many rows times such a [depth, width] matrix."""
    return 1 <= rows <= MOST_ROWS and depth % DEPTHS == 0 and width % WIDTHS == 0 and dtype == jnp.bfloat16


def few_rows_matmul(
    x_TD: jax.Array,
    weight_DJ: jax.Array,
    *,
    norm_D: jax.Array | None = None,
    eps: float = 0.0,
    bias_J: jax.Array | None = None,
    added_TJ: jax.Array | None = None,
    gated: bool = False,
    tile: Tile | None = None,
    interpret: bool = False,
) -> jax.Array:
    """x times the matrix, summed in float32, [T, J] in x's dtype; a row's numbers do not depend on the others.

    With `norm_D` of the rows' RMS norm times it, whose scale comes behind the product: NaN where their mean square
    overflows. `bias_J` and `added_TJ` are added. `gated`: the columns are [gate, up], and silu(gate) up comes back,
    [T, J / 2]. Raises ValueError, while tracing, for other shapes and dtypes than bfloat16's.
    """
    with contract("few_rows_matmul"):
        chex.assert_rank([x_TD, weight_DJ], 2)
        (T, D), J = x_TD.shape, weight_DJ.shape[1]
        chex.assert_shape(weight_DJ, (D, J))
        ins, columns = (2, J // 2) if gated else (1, J)
        right = fits(T, D, columns, x_TD.dtype) and J == ins * columns
        assert right, (
            f"expected 1 to {MOST_ROWS} bfloat16 rows, depths of {DEPTHS} and widths of {WIDTHS}, got {T} x {D} x {J}"
        )
        chex.assert_shape([] if norm_D is None else [norm_D], (D,))
        chex.assert_shape([] if bias_J is None else [bias_J], (J,))
        chex.assert_shape([] if added_TJ is None else [added_TJ], (T, J))
        assert not gated or (bias_J is None and added_TJ is None), "expected nothing to add to what is gated"
        chex.assert_type([x for x in (weight_DJ, norm_D, bias_J, added_TJ) if x is not None], x_TD.dtype)
    tile = tile or Tile()
    deep, wide = tile.deep if D % tile.deep == 0 else DEPTHS, tile.wide if columns % tile.wide == 0 else WIDTHS
    given = [(x_TD, pl.BlockSpec((MOST_ROWS, D), lambda n: (0, 0)))]
    given += [] if norm_D is None else [(norm_D, pl.BlockSpec((D,), lambda n: (0,)))]
    for index in range(ins):
        first = index * (columns // wide)
        given.append((weight_DJ, pl.BlockSpec((D, wide), lambda n, first=first: (0, first + n))))
    given += [] if bias_J is None else [(bias_J, pl.BlockSpec((wide,), lambda n: (n,)))]
    out_spec = pl.BlockSpec((MOST_ROWS, wide), lambda n: (0, n))
    given += [] if added_TJ is None else [(added_TJ, out_spec)]
    kernel = partial(_kernel, rows=T, deep=deep, ins=ins, eps=eps, normed=norm_D is not None, biased=bias_J is not None)
    return pl.pallas_call(
        kernel,
        grid=(columns // wide,),
        in_specs=[spec for _, spec in given],
        out_specs=out_spec,
        out_shape=jax.ShapeDtypeStruct((T, columns), x_TD.dtype),
        compiler_params=triton.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=interpret,
        name=f"few_rows{'_normed' if norm_D is not None else ''}{'_gated' if gated else ''}",
    )(*(array for array, _ in given))


def _kernel(x_ref, *refs, rows, deep, ins, eps, normed, biased):
    *refs, out_ref = refs
    depth, wide, dtype = x_ref.shape[1], out_ref.shape[1], out_ref.dtype
    norm_ref = refs.pop(0) if normed else None
    weights, refs = refs[:ins], refs[ins:]
    bias_ref = refs.pop(0) if biased else None
    real = (jnp.arange(MOST_ROWS) < rows)[:, None]

    def add(index, carry):
        sums, squares = carry
        at = pl.ds(index * deep, deep)
        x = triton.load(x_ref.at[:, at], mask=real, other=0)
        if norm_ref is not None:
            x32 = x.astype(jnp.float32)
            squares += x32 * x32
            x = (x32 * norm_ref[at].astype(jnp.float32)[None]).astype(dtype)
        return tuple(acc + _product(x, ref[at, :]) for acc, ref in zip(sums, weights, strict=True)), squares

    zeros = jnp.zeros((MOST_ROWS, wide), jnp.float32)
    squares = jnp.zeros((MOST_ROWS, deep) if normed else (), jnp.float32)
    sums, squares = lax.fori_loop(0, depth // deep, add, ((zeros,) * ins, squares))
    if normed:
        mean = jnp.sum(squares, axis=1) / depth + eps
        scale = jnp.where(mean == jnp.inf, jnp.nan, lax.rsqrt(mean))[:, None]
        sums = tuple(acc * scale for acc in sums)
    out = sums[0]
    if bias_ref is not None:
        out = out.astype(dtype).astype(jnp.float32) + bias_ref[...].astype(jnp.float32)[None]
    if len(sums) == 2:
        gate, up = (acc.astype(dtype).astype(jnp.float32) for acc in sums)
        out = gate * jax.nn.sigmoid(gate) * up
    if refs:
        out = out.astype(dtype).astype(jnp.float32) + triton.load(refs[0].at[:, :], mask=real, other=0).astype(
            jnp.float32
        )
    triton.store(out_ref.at[:, :], out.astype(dtype), mask=jnp.broadcast_to(real, out.shape))


def _product(x_PD: jax.Array, w_DJ: jax.Array) -> jax.Array:
    return lax.dot_general(x_PD, w_DJ, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)
