# SPDX-License-Identifier: Apache-2.0
"""Rows and matrices for the products of quantised weights, and what is right of them, in float64.

The kernels meet them interpreted on a CPU (tests/model) and compiled on a GPU (tests/gpu).
"""

import jax
import jax.numpy as jnp
import numpy as np

from rapid_jax.model.skinny import GROUP, MOST_ROWS, FixedPoint

STEPS = 127 * 128  # of a row's largest element
EPS = 1e-5


def rows_of(fixed: FixedPoint) -> np.ndarray:
    """The float64 [T, D] that fixed-point rows stand for."""
    halves, scale_T = np.asarray(fixed.halves_PD, np.float64), np.asarray(fixed.scale_T, np.float64)
    T = len(scale_T)
    return (128 * halves[:T] + halves[MOST_ROWS : MOST_ROWS + T]) * scale_T[:, None]


def check_rows(fixed: FixedPoint, want_TD: np.ndarray, slack: float = 0.01) -> None:
    """Off by half a step at most and `slack` of one, float32's own rounding."""
    assert fixed.halves_PD.shape == (2 * MOST_ROWS, want_TD.shape[1]) and fixed.halves_PD.dtype == jnp.int8
    largest_T1 = np.max(np.abs(want_TD), axis=1, keepdims=True)
    np.testing.assert_allclose(fixed.scale_T, largest_T1[:, 0] / STEPS, rtol=1e-5)
    off = np.abs(rows_of(fixed) - want_TD)
    assert np.all(off <= (0.5 + slack) * largest_T1 / STEPS), np.max(off / np.maximum(largest_T1, 1e-30)) * STEPS


def normal(seed: int, *shape: int, dtype=jnp.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(dtype))


def normed(x_TD: np.ndarray, norm_D: jax.Array, offset: float = 0.0) -> np.ndarray:
    mean_T1 = np.mean(np.square(x_TD), axis=1, keepdims=True)
    return x_TD / np.sqrt(mean_T1 + EPS) * (np.asarray(norm_D, np.float64) + offset)


def fixed_rows(rows: int, depth: int, seed: int = 0) -> FixedPoint:
    """Any halves, junk where no row is, and scales."""
    rng = np.random.default_rng(seed)
    halves_PD = rng.integers(-128, 128, (2 * MOST_ROWS, depth))
    for first in (0, MOST_ROWS):
        halves_PD[first + rows : first + MOST_ROWS] = 127
    return FixedPoint(jnp.asarray(np.int8(halves_PD)), jnp.asarray(np.float32(rng.uniform(0.1, 10, rows))))


def matrix(bits: int, depth: int, width: int, seed: int = 1) -> tuple[jax.Array, jax.Array, np.ndarray]:
    """(values, scales, the float64 [N, D] that they stand for), every step there is among them."""
    rng = np.random.default_rng(seed)
    most = 2 ** (bits - 1)
    steps_ND = rng.integers(-most, most, (width, depth))
    if bits == 8:
        scale = rng.uniform(0.5, 2, width)
        scale_N = jnp.asarray(np.float32(scale))
        return jnp.asarray(np.int8(steps_ND)), scale_N, steps_ND * np.asarray(scale_N, np.float64)[:, None]
    scale_GN = jnp.asarray(np.float32(rng.uniform(-2, 2, (depth // GROUP, width))))
    values = np.zeros((width, depth // 2), np.uint8)
    for at in range(
        depth
    ):  # weight `at` of a column is in byte `place` of its group, in the low half of it or the high
        group, place = divmod(at, GROUP)
        half, place = divmod(place, GROUP // 2)
        values[:, group * GROUP // 2 + place] |= ((steps_ND[:, at] & 15) << 4 * half).astype(np.uint8)
    scales_ND = np.repeat(np.asarray(scale_GN, np.float64), GROUP, axis=0).T
    return jnp.asarray(values.view(np.int8)), scale_GN, steps_ND * scales_ND


def check_product(got_STN: jax.Array, x: FixedPoint, weight_ND: np.ndarray) -> None:
    """Sums of integers are exact: what is off is the float32 of one product and of the sums over groups and shares."""
    assert got_STN.dtype == jnp.float32
    x_TD = rows_of(x)
    got_TN, want_TN = np.sum(np.asarray(got_STN, np.float64), axis=0), x_TD @ weight_ND.T
    size_TN = np.abs(x_TD) @ np.abs(weight_ND).T
    assert np.all(np.abs(got_TN - want_TN) <= 3e-7 * size_TN), np.max(np.abs(got_TN - want_TN) / size_TN)


def gate_and_up(bits: int, rows: int, depth: int, width: int) -> tuple[tuple, np.ndarray, np.ndarray]:
    """(arguments of the product, its two halves in float64, of a size where silu bends)."""
    x, (values, scale, weight_ND) = fixed_rows(rows, depth), matrix(bits, depth, width)
    out_TN = rows_of(x) @ weight_ND.T
    shrink = np.float32(2 / np.std(out_TN))
    return (x, values, scale * shrink), *np.split(out_TN * float(shrink), 2, axis=1)
