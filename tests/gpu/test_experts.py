# SPDX-License-Identifier: Apache-2.0
"""Products of rows with their experts, compiled for a GPU, against float64; and a mixture by them."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rapid_jax.model import grouped_kernel
from rapid_jax.model.experts import Grouped, routed
from rapid_jax.model.experts_config import Experts
from rapid_jax.model.grouped import Grouping, grouped_product, tiles_of
from rapid_jax.model.quantized import dequantize, quantize_weights

SIZES = {"few": (3, 0, 40, 1, 0), "many": (300, 0, 129, 1, 700), "one": (0, 0, 0, 1, 0)}  # rows of each expert
SHAPES = ((128, 64), (384, 96), (2048, 768), (768, 2048))  # depths and widths: Qwen3-30B-A3B's last
EPS = {"float32": 2e-6, "bfloat16": 6e-3}


def normal(seed: int, *shape: int, dtype: str = "float32") -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32).astype(dtype)


def close(got, want, eps: float) -> None:
    gap = np.linalg.norm(np.asarray(got.astype(jnp.float32), np.float64) - want)
    assert gap <= eps * np.linalg.norm(want), gap / np.linalg.norm(want)


def by_expert(sizes: tuple[int, ...], x_PD, w_XDF) -> np.ndarray:
    """float64 [P, F]."""
    of_P = np.repeat(np.arange(len(sizes)), sizes)
    x_PD, w_XDF = (np.asarray(x.astype(jnp.float32), np.float64) for x in (x_PD, w_XDF))
    return np.concatenate([x_PD[: len(of_P)][of_P == x] @ w_XDF[x] for x in range(len(sizes))])


@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("depth, width", SHAPES)
def test_products_and_their_gradients(depth, width, sizes, dtype):
    rows, sizes_X = sum(sizes), jnp.asarray(sizes, jnp.int32)
    how = Grouping.of("gpu", rows, len(sizes))
    x_PD, w_XDF = normal(0, how.padded(rows), depth, dtype=dtype), normal(1, len(sizes), depth, width, dtype=dtype)
    weigh_PF = normal(2, rows, width, dtype=dtype)

    @jax.jit
    def both(x_PD, w_XDF):
        out_PF, back = jax.vjp(lambda x, w: grouped_product(x, sizes_X, w, how=how, dtype=dtype)[:rows], x_PD, w_XDF)
        return out_PF, *back(weigh_PF)

    out_PF, dx_PD, dw_XDF = both(x_PD, w_XDF)
    close(out_PF, by_expert(sizes, x_PD, w_XDF), EPS[dtype])
    close(dx_PD[:rows], by_expert(sizes, weigh_PF, w_XDF.swapaxes(1, 2)), EPS[dtype])
    of_P, want_XDF = np.repeat(np.arange(len(sizes)), sizes), np.zeros(w_XDF.shape)
    x, weigh = (np.asarray(one.astype(jnp.float32), np.float64) for one in (x_PD[:rows], weigh_PF))
    for expert in range(len(sizes)):
        want_XDF[expert] = x[of_P == expert].T @ weigh[of_P == expert]
    close(dw_XDF, want_XDF, EPS[dtype])


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("depth, width", SHAPES)
def test_products_of_few_bits(depth, width, sizes, dtype, bits):
    rows, sizes_X = sum(sizes), jnp.asarray(sizes, jnp.int32)
    how = Grouping.of("gpu", rows, len(sizes))
    values, scale = jax.lax.map(partial(quantize_weights, bits=bits), normal(1, len(sizes), depth, width))
    x_PD = normal(0, how.padded(rows), depth, dtype=dtype)
    got_PF = jax.jit(partial(grouped_product, how=how, bits=bits, dtype=jnp.float32))(x_PD, sizes_X, values, scale)
    whole_XFD = jnp.stack([dequantize(values[x], scale[x], bits) for x in range(len(sizes))])
    close(got_PF[:rows], by_expert(sizes, x_PD, whole_XFD.swapaxes(1, 2)), EPS["float32"])


def test_what_the_kernels_take():
    assert grouped_kernel.fits(2048, 768) and grouped_kernel.fits(768, 2048, 4) and not grouped_kernel.fits(40, 64)
    tiles = tiles_of(jnp.asarray((3, 0, 40), jnp.int32), 64, 16)
    assert int(tiles.used) == 4 and tiles.expert_N[:4].tolist() == [0, 2, 2, 2]


@pytest.mark.parametrize("rows", [1, 6, 700])
def test_a_mixture(rows):
    """Of a decoding round's rows and of a chunk's, as the loop of other platforms has it."""
    D, F, experts = 256, 128, Experts(count=16, per_token=4, ffn=128, normalized=True)
    shapes = ((rows, D), (D, 16), (16, D, F), (16, D, F), (16, F, D))
    h_TD, router_DX, *three = (normal(seed, *shape) * 0.1 for seed, shape in enumerate(shapes))
    matrices = [Grouped(one) for one in three]
    run = partial(routed, experts=experts, bits=None)
    got, want = (run(10 * h_TD, router_DX, *matrices, platform=platform) for platform in ("gpu", "cpu"))
    close(got, np.asarray(want, np.float64), 1e-5)
