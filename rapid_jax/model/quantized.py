# SPDX-License-Identifier: Apache-2.0
"""Matrices in 8 or 4 bits: a half or a quarter of the bytes to read for every token.

8 bits: one scale a column, the largest weight is 127 steps. 4 bits: one scale for every `GROUP` weights of a column,
the largest weight is -8 steps. Rows meet 8 bits as fixed-point numbers of 15 bits on a TPU; so do the few rows of a
decoding step on a GPU, and 4 bits (`skinny.py`). Elsewhere the weights are restored.
"""

from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from rapid_jax.model import skinny
from rapid_jax.model.einsum32 import einsum32
from rapid_jax.model.skinny import GROUP, MOST_ROWS, STEPS, fixed_point, skinny_matmul

WeightBits: TypeAlias = Literal[8, 4]
BITS: Mapping[str, WeightBits] = MappingProxyType({"int8": 8, "int4": 4})  # by the names of settings
FEW = 4 * MOST_ROWS  # rows: reading the quantised weights once for every `MOST_ROWS` still beats restoring them


@partial(jax.jit, static_argnames=("bits", "over"))
def quantize_weights(weight_DN: jax.Array, bits: WeightBits, over: str | None = None) -> tuple[jax.Array, jax.Array]:
    """(int8 values, float32 scales) as `skinny_matmul` takes them, the depth D padded with zeros to whole groups.

    `over`: a mesh axis that the depth is split over, inside shard_map. A column's scale is that of all its parts.
    """
    w_ND = jnp.pad(weight_DN.astype(jnp.float32).T, ((0, 0), (0, -weight_DN.shape[0] % GROUP)))
    if bits == 8:
        largest_N = jnp.max(jnp.abs(w_ND), axis=1)
        scale_N = (largest_N if over is None else lax.pmax(largest_N, over)) / 127
        return jnp.round(w_ND / jnp.where(scale_N == 0, 1.0, scale_N)[:, None]).astype(jnp.int8), scale_N
    N, D = w_ND.shape
    w = w_ND.reshape(N, D // GROUP, GROUP)
    lowest, highest = jnp.min(w, axis=2), jnp.max(w, axis=2)
    scale_NG = jnp.where(-lowest > highest, lowest, highest) / -8
    steps = jnp.round(w / jnp.where(scale_NG == 0, 1.0, scale_NG)[..., None])
    halves = jnp.clip(steps, -8, 7).astype(jnp.int8).reshape(N, D // GROUP, 2, GROUP // 2)
    return ((halves[:, :, 0] & 15) | (halves[:, :, 1] << 4)).reshape(N, D // 2), scale_NG.T


def dequantize(values: jax.Array, scale: jax.Array, bits: WeightBits) -> jax.Array:
    """The float32 [N, D] that `quantize_weights` stored."""
    if bits == 8:
        return values.astype(jnp.float32) * scale[:, None]
    (groups, N), four = scale.shape, jnp.int8(4)
    pairs = values.reshape(N, groups, 1, GROUP // 2)
    low, high = ((pairs << four) >> four, pairs >> four)  # arithmetic shifts: the sign goes along
    steps = jnp.concatenate([low, high], axis=2).reshape(N, groups, GROUP)
    return (steps.astype(jnp.float32) * scale.T[..., None]).reshape(N, groups * GROUP)


def kernels_fit(rows: int, depth: int, values: jax.Array) -> bool:
    """Whether the GPU's kernels take so many rows of that depth times these values."""
    return depth % GROUP == 0 and skinny.fits(rows, depth, values.shape[0])


def product(x: jax.Array, values: jax.Array, scale: jax.Array, bits: WeightBits) -> jax.Array:
    """x [..., D] times the matrix [D, N] that `quantize_weights` stored, float32 [..., N]."""
    rows = x.size // x.shape[-1]
    if jax.default_backend() == "gpu" and rows <= FEW and kernels_fit(1, x.shape[-1], values):
        x_TD = x.reshape(rows, x.shape[-1])
        some = (x_TD[start : start + MOST_ROWS] for start in range(0, rows, MOST_ROWS))
        times = partial(skinny_matmul, bits=bits)
        out_TN = jnp.concatenate([jnp.sum(times(fixed_point(few)[0], values, scale), axis=0) for few in some])
        return out_TN.reshape(*x.shape[:-1], -1)
    if bits == 8:
        return lax.platform_dependent(x, values, scale, tpu=in_digits, default=partial(_restoring, bits=8))
    return _restoring(x, values, scale, bits=bits)


def _restoring(x: jax.Array, values: jax.Array, scale: jax.Array, *, bits: WeightBits) -> jax.Array:
    weight_ND = dequantize(values, scale, bits).astype(x.dtype)[:, : x.shape[-1]]
    return einsum32("...D,ND->...N", x, weight_ND)


def in_digits(x: jax.Array, values_ND: jax.Array, scale_N: jax.Array) -> jax.Array:
    """x times 8-bit weights by one product of integers: each row of x is two rows of int8, digits of base 128.

    A row is rounded to 16,256 steps of its largest element. NaN and infinity stay what they are.
    """
    lacking = values_ND.shape[1] - x.shape[-1]
    x = jnp.pad(x.astype(jnp.float32), [(0, 0)] * (x.ndim - 1) + [(0, lacking)])
    step = jnp.max(jnp.abs(x), axis=-1, keepdims=True) / STEPS
    fixed = jnp.round(x / jnp.where(step == 0, 1.0, step)).astype(jnp.int32)
    high = (fixed + 64) >> 7
    digits = jnp.stack([high, fixed - (high << 7)]).astype(jnp.int8)  # an axis of their own: rows may lie over devices
    contracted = (((digits.ndim - 1,), (1,)), ((), ()))
    out = lax.dot_general(digits, values_ND, contracted, preferred_element_type=jnp.int32).astype(jnp.float32)
    return (out[0] * 128 + out[1]) * step * scale_N
