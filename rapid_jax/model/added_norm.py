# SPDX-License-Identifier: Apache-2.0
"""A sum and its RMS norm on NVIDIA GPUs: one Pallas (Triton) kernel where XLA runs three.

For the few rows of a decoding step a kernel is over before the next has started, so their number is what counts.
"""

from functools import partial

import chex
import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from rapid_jax.runtime.contract import contract

MOST_ROWS = 31  # more are not a few
MOST_DEPTH = 16384  # a program has a row in its registers


def fits(rows: int, depth: int) -> bool:
    """Whether the kernel takes so many rows of that depth."""
    return 1 <= rows <= MOST_ROWS and 1 <= depth <= MOST_DEPTH


def added_norm(
    x_TD: jax.Array, added_TD: jax.Array, norm_D: jax.Array, *, eps: float, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """(x + added, the RMS norm of that times `norm_D`), both in x's dtype: `decoder.rms_norm`, but for rounding.

    Raises ValueError, while tracing, for shapes that do not go together.
    """
    with contract("added_norm"):
        chex.assert_rank(x_TD, 2)
        T, D = x_TD.shape
        assert fits(T, D), f"expected 1 to {MOST_ROWS} rows of at most {MOST_DEPTH}, got {T} of {D}"
        chex.assert_equal_shape([x_TD, added_TD])
        chex.assert_shape(norm_D, (D,))
        chex.assert_type([x_TD, added_TD, norm_D], x_TD.dtype)
    lanes = pl.next_power_of_2(D)
    row = pl.BlockSpec((None, lanes), lambda t: (t, 0))
    sum_TD, normed_TD = pl.pallas_call(
        partial(_kernel, width=D, eps=eps),
        grid=(T,),
        in_specs=[row, row, pl.BlockSpec((lanes,), lambda t: (0,))],
        out_specs=[row, row],
        out_shape=[jax.ShapeDtypeStruct((T, D), x_TD.dtype)] * 2,
        compiler_params=triton.CompilerParams(num_warps=min(max(lanes // 256, 1), 32), num_stages=1),
        interpret=interpret,
        name="added_norm",
    )(x_TD, added_TD, norm_D)
    return sum_TD, normed_TD


def _kernel(x_ref, added_ref, norm_ref, sum_ref, normed_ref, *, width, eps):
    inside = None if x_ref.shape[0] == width else jnp.arange(x_ref.shape[0]) < width

    def load(ref):
        return (ref[...] if inside is None else triton.load(ref.at[:], mask=inside, other=0)).astype(jnp.float32)

    y = (load(x_ref) + load(added_ref)).astype(sum_ref.dtype)
    triton.store(sum_ref.at[:], y, mask=inside)
    y = y.astype(jnp.float32)
    mean = jnp.sum(y * y) / width + eps
    # Where the mean overflows the result is NaN: zero would pass for an answer.
    normed = (y * jnp.where(mean == jnp.inf, jnp.nan, lax.rsqrt(mean))).astype(normed_ref.dtype)
    triton.store(normed_ref.at[:], (normed.astype(jnp.float32) * load(norm_ref)).astype(normed_ref.dtype), mask=inside)
