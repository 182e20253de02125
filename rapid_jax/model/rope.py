# SPDX-License-Identifier: Apache-2.0
"""Rotary position embedding (RoFormer, arXiv 2104.09864), half-split as Llama's checkpoints store it.

A rounding step of a frequency is a visible angle at position 100,000, so the frequencies are computed on the host, in
float32 and in transformers' order of operations, from a correctly rounded power. transformers' own power differs from
the correctly rounded one in the last bit for about one frequency in a hundred (and between processors).
"""

import math
from collections.abc import Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from rapid_jax.model.rope_config import Rope

Rotation: TypeAlias = tuple[jax.Array, jax.Array]  # (cos, sin) of the angles, float32 [B, T, rotary_dim / 2] each


def inverse_frequencies(rope: Rope, rotary_dim: int, context: int = 0) -> tuple[np.ndarray, float]:
    """float32 [rotary_dim / 2] inverse frequencies, and the factor that multiplies cos and sin (1 but for some rules).

    default: theta^(-2i / rotary_dim). linear: that, divided by `factor` (positions interpolated, arXiv 2306.15595).
    llama3, yarn and longrope: below. `context`: positions that the model is to serve, which longrope goes by.
    """
    exponent = np.arange(0, rotary_dim, 2).astype(np.float32) / np.float32(rotary_dim)
    wavelength_over_2pi = np.power(np.float64(np.float32(rope.theta)), exponent.astype(np.float64)).astype(np.float32)
    if rope.scaling == "yarn":
        return _yarn(rope, wavelength_over_2pi, rotary_dim)
    if rope.scaling == "longrope":
        return _longrope(rope, wavelength_over_2pi, context)
    inv_freq = np.float32(1) / wavelength_over_2pi
    if rope.scaling == "linear":
        inv_freq = inv_freq / np.float32(_require(rope, "factor"))
    if rope.scaling == "llama3":
        inv_freq = _llama3(rope, inv_freq)
    return inv_freq, 1.0


def _llama3(rope: Rope, inv_freq: np.ndarray) -> np.ndarray:
    """Llama 3.1's rule: wavelengths beyond original / low_freq_factor are stretched by `factor`, those below
    original / high_freq_factor are kept, and between the two the frequencies are interpolated.
    """
    factor = np.float32(_require(rope, "factor"))
    low, high = _require(rope, "low_freq_factor"), _require(rope, "high_freq_factor")
    original = _require(rope, "original_max_positions")
    wavelength = np.float32(1) / inv_freq * np.float32(2 * math.pi)
    kept = np.float32(1) / wavelength * np.float32(original)
    kept = (kept - np.float32(low)) / np.float32(high - low)
    between = (np.float32(1) - kept) * inv_freq / factor + kept * inv_freq
    stretched = np.where(wavelength > np.float32(original / low), inv_freq / factor, between)
    return np.where(wavelength < np.float32(original / high), inv_freq, stretched)


def _yarn(rope: Rope, wavelength_over_2pi: np.ndarray, head_dim: int) -> tuple[np.ndarray, float]:
    """YaRN (arXiv 2309.00071): a dimension that turns more than beta_fast times in the original context is kept, one
    that turns less than beta_slow times is stretched by `factor`, with a ramp between; cos and sin are multiplied by
    0.1 ln(factor) + 1.
    """
    factor, original = _require(rope, "factor"), _require(rope, "original_max_positions")

    def dimension(turns: float) -> float:
        return head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    first, last = dimension(_require(rope, "beta_fast")), dimension(_require(rope, "beta_slow"))
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    if first == last:
        last += 0.001
    index = np.arange(head_dim // 2, dtype=np.float32)
    ramp = np.clip((index - np.float32(first)) / np.float32(last - first), np.float32(0), np.float32(1))
    kept = np.float32(1) - ramp
    stretched = np.float32(1) / (np.float32(factor) * wavelength_over_2pi)
    inv_freq = stretched * (np.float32(1) - kept) + np.float32(1) / wavelength_over_2pi * kept
    return inv_freq, _attention_factor(rope, factor)


def _longrope(rope: Rope, wavelength_over_2pi: np.ndarray, context: int) -> tuple[np.ndarray, float]:
    """LongRoPE (arXiv 2402.13753): each wavelength is stretched by a factor of its own; there are two sets of them.

    The short one is for contexts as before scaling. transformers goes by the longest position so far, so that keys of
    one text differ by the set that they were made with, or are made anew. Here it is the whole context of a model,
    and keys stay as they are. cos and sin are multiplied by sqrt(1 + ln(factor) / ln(original context)).
    """
    original, factor = _require(rope, "original_max_positions"), _require(rope, "factor")
    factors = rope.long_factor if context > original else rope.short_factor
    attention_factor = rope.attention_factor
    if attention_factor is None:
        attention_factor = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return np.float32(1) / (np.asarray(factors, np.float32) * wavelength_over_2pi), attention_factor


def _attention_factor(rope: Rope, factor: float) -> float:
    def temperature(mscale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return temperature(rope.mscale) / temperature(rope.mscale_all_dim)
    return temperature(1.0)


def _require(rope: Rope, name: str) -> float:
    value = getattr(rope, name)
    if value is None:
        raise ValueError(f"Rope.{name} is needed for {rope.scaling} scaling")
    return value


def rotation(pos_BT: jax.Array, inv_freq: np.ndarray, factor: float) -> Rotation:
    """By the angles of these positions."""
    angle = pos_BT[..., None].astype(jnp.float32) * inv_freq
    return jnp.cos(angle) * factor, jnp.sin(angle) * factor


def standstill(like: Rotation) -> Rotation:
    """By no angle: `rotate` gives what it is given, to the bit. One program serves layers with rope and without."""
    return jnp.ones_like(like[0]), jnp.zeros_like(like[1])


def chosen(rotations: Sequence[Rotation], which: jax.Array | None) -> Rotation:
    """The rotation with this number, an int32 that need not be known before the program runs; None: the only one."""
    if which is None:
        return rotations[0]
    cos, sin = (jax.lax.select_n(which, *cases) for cases in zip(*rotations, strict=True))
    return cos, sin


def rotate(x_BTNH: jax.Array, cos: jax.Array, sin: jax.Array, scale: float = 1.0) -> jax.Array:
    """`x` times `scale` with each pair (x_i, x_{i + R/2}) turned by its angle; in float32, returned in x's dtype.

    R is twice the number of angles: a head may be longer, and its rest is not turned.
    """
    turned, rest = x_BTNH[..., : 2 * cos.shape[-1]], x_BTNH[..., 2 * cos.shape[-1] :]
    first, second = jnp.split(turned.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    if scale != 1:
        cos, sin = cos * scale, sin * scale
        rest = (rest.astype(jnp.float32) * scale).astype(x_BTNH.dtype)
    both = [(first * cos - second * sin).astype(x_BTNH.dtype), (second * cos + first * sin).astype(x_BTNH.dtype)]
    return jnp.concatenate([*both, rest] if rest.shape[-1] else both, axis=-1)
