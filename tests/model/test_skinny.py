# SPDX-License-Identifier: Apache-2.0
"""Rows as fixed-point numbers and their products with matrices of few bits, interpreted, against numpy in float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rapid_jax.model import skinny
from rapid_jax.model.skinny import MOST_ROWS, FixedPoint, Tile, fits
from tests.model.skinny_cases import (
    EPS,
    check_product,
    check_rows,
    fixed_rows,
    gate_and_up,
    matrix,
    normal,
    normed,
    rows_of,
)

pytestmark = pytest.mark.usefixtures("reads_inside")

fixed_point = partial(skinny.fixed_point, interpret=True)
skinny_matmul = partial(skinny.skinny_matmul, interpret=True)


@pytest.mark.parametrize("rows, depth, dtype", [(1, 128, jnp.float32), (3, 384, jnp.bfloat16), (8, 640, jnp.float32)])
def test_rows_are_off_by_half_a_step_at_most(rows, depth, dtype):
    x_TD = normal(rows, rows, depth, dtype=dtype) * 10.0 ** jnp.arange(-2, rows - 2).astype(dtype)[:, None]
    fixed, same_TD = fixed_point(x_TD)
    check_rows(fixed, np.asarray(x_TD, np.float64))
    assert same_TD is x_TD


def test_rows_of_zeros_and_of_one_huge_element():
    x_TD = np.asarray(normal(0, 4, 384)).copy()
    x_TD[1] = 0
    x_TD[2, 7] = -3e37
    x_TD[3] = np.linspace(-1, 1, 384)
    fixed, _ = fixed_point(jnp.asarray(x_TD))
    check_rows(fixed, x_TD.astype(np.float64))
    assert np.all(rows_of(fixed)[1] == 0) and np.count_nonzero(rows_of(fixed)[2]) == 1
    high_D = np.asarray(fixed.halves_PD[3], int)
    assert high_D.min() == -127 and high_D.max() == 127
    weight = jnp.ones((32, 384), jnp.int8)
    out_TN = np.sum(skinny_matmul(fixed, weight, jnp.ones(32), bits=8), axis=0)
    assert np.all(out_TN[1] == 0)
    np.testing.assert_allclose(out_TN[2], -3e37, rtol=1e-6)


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_norm(offset):
    x_TD, norm_D = normal(0, 3, 384, dtype=jnp.bfloat16) * 7, normal(1, 384, dtype=jnp.bfloat16)
    fixed, same_TD = fixed_point(x_TD, norm_D=norm_D, eps=EPS, offset=offset)
    check_rows(fixed, normed(np.asarray(x_TD, np.float64), norm_D, offset))
    assert same_TD is x_TD


def test_norm_of_a_small_row_is_bounded_by_eps():
    x_TD, norm_D = normal(0, 2, 128) * 1e-4, jnp.ones(128)
    fixed, _ = fixed_point(x_TD, norm_D=norm_D, eps=EPS)
    check_rows(fixed, normed(np.asarray(x_TD, np.float64), norm_D))
    assert np.max(np.abs(rows_of(fixed))) < 0.2


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_addends_and_norm(dtype):
    """x plus its parts is rounded to x's dtype before the norm, and comes back."""
    x_TD, parts_STD, norm_D = normal(0, 2, 384, dtype=dtype), normal(1, 3, 2, 384), normal(2, 384, dtype=dtype)
    fixed, sum_TD = fixed_point(x_TD, parts_STD=parts_STD, norm_D=norm_D, eps=EPS)
    want_TD = np.asarray(x_TD, np.float64) + np.sum(np.asarray(parts_STD, np.float64), axis=0)
    assert sum_TD.dtype == dtype
    step = 2.0**-8 if dtype == jnp.bfloat16 else 1e-6
    np.testing.assert_allclose(np.asarray(sum_TD, np.float64), want_TD, rtol=step, atol=1e-6)
    check_rows(fixed, normed(np.asarray(sum_TD, np.float64), norm_D))


@pytest.mark.parametrize("rows, bits", [*((rows, 8) for rows in range(1, MOST_ROWS + 1)), (1, 4), (8, 4)])
def test_a_product_of_so_many_rows(rows, bits):
    x, (values, scale, weight_ND) = fixed_rows(rows, 384), matrix(bits, 384, 96)
    check_product(skinny_matmul(x, values, scale, bits=bits), x, weight_ND)


TILES = {  # tile -> shares of the depth, of 640 x 160
    Tile(256, 64, 4, 4, 1): 1,  # as wide and deep as divides both: 128 x 32
    Tile(256, 64, 4, 4, 11): 5,  # 5 programs are too few, and 5 is the next share that divides 5 tiles
    Tile(640, 160, 4, 4, 256): 1,  # one tile
    Tile(128, 32, 4, 1, 10**6): 5,
}


@pytest.mark.parametrize("tile, bits", list(zip(TILES, (8, 8, 4, 8), strict=True)))
def test_how_it_is_cut_changes_nothing(tile, bits):
    x, (values, scale, weight_ND) = fixed_rows(3, 640), matrix(bits, 640, 160)
    got_STN = skinny_matmul(x, values, scale, bits=bits, tile=tile)
    assert got_STN.shape == (TILES[tile], 3, 160)
    check_product(got_STN, x, weight_ND)


@pytest.mark.parametrize("bits", [8, 4])
def test_shares_of_several_tiles(bits):
    x, (values, scale, weight_ND) = fixed_rows(2, 768), matrix(bits, 768, 64)
    got_STN = skinny_matmul(x, values, scale, bits=bits, tile=Tile(256 if bits == 4 else 128, 64, 4, 2, 3))
    assert got_STN.shape == (3, 2, 64)
    check_product(got_STN, x, weight_ND)


def test_sums_of_8_bits_are_exact_integers():
    """Odd sums beyond 2^24, where float32 has even numbers alone; in the end they cancel but for one weight."""
    depth = 4096
    halves_PD, values_ND = np.zeros((2 * MOST_ROWS, depth)), np.full((32, depth), 127)
    halves_PD[MOST_ROWS] = 127
    values_ND[:, 0], values_ND[:, depth // 2 :] = 126, -127
    x = FixedPoint(jnp.asarray(np.int8(halves_PD)), jnp.ones(1))
    out = skinny_matmul(x, jnp.asarray(np.int8(values_ND)), jnp.ones(32), bits=8, tile=Tile(256, 32, 4, 2, 1))
    np.testing.assert_array_equal(out, np.full((1, 1, 32), -127))


def test_rows_times_a_matrix():
    """The two together, off by what the rows are."""
    x_TD = normal(0, 4, 384)
    values, scale, weight_ND = matrix(8, 384, 96)
    fixed, _ = fixed_point(x_TD)
    got_TN = np.sum(skinny_matmul(fixed, values, scale, bits=8), axis=0)
    off = np.abs(got_TN - np.asarray(x_TD, np.float64) @ weight_ND.T)
    step_T1 = np.asarray(fixed.scale_T, np.float64)[:, None]
    assert np.all(off <= 0.6 * step_T1 * np.sum(np.abs(weight_ND), axis=1)), "beyond half a step of every element"
    assert np.sqrt(np.mean(off**2)) <= 1e-4 * np.sqrt(np.mean(np.square(got_TN)))


@pytest.mark.parametrize("bits, tile", [(8, None), (4, None), (4, Tile(128, 32, 4, 1, 10**6))])
def test_gated(bits, tile):
    """silu of the first half of the columns, times the second."""
    args, gate, up = gate_and_up(bits, 3, 384, 160)
    got_TF = skinny_matmul(*args, bits=bits, gated=jnp.dtype(jnp.float32), tile=tile)
    assert got_TF.shape == (3, 80) and got_TF.dtype == jnp.float32
    np.testing.assert_allclose(got_TF, gate / (1 + np.exp(-gate)) * up, rtol=0, atol=2e-5)


def test_gated_by_gelu():
    """Its tanh form, of Gemma's checkpoints."""
    args, gate, up = gate_and_up(8, 3, 384, 160)
    got_TF = skinny_matmul(*args, bits=8, gated=jnp.dtype(jnp.float32), activation="gelu_pytorch_tanh")
    want_TF = 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3))) * up
    np.testing.assert_allclose(got_TF, want_TF, rtol=0, atol=2e-5)


def test_gated_bfloat16():
    """Gate and up are rounded before they are multiplied, as plain matrix products of that dtype are."""
    args, *halves = gate_and_up(8, 8, 256, 128)
    got_TF = skinny_matmul(*args, bits=8, gated=jnp.dtype(jnp.bfloat16))
    gate, up = (np.float32(y.astype(jnp.bfloat16)) for y in halves)
    want_TF = (gate * jax.nn.sigmoid(gate) * up).astype(jnp.bfloat16)
    assert got_TF.dtype == jnp.bfloat16
    np.testing.assert_allclose(got_TF.astype(jnp.float32), want_TF.astype(jnp.float32), rtol=0.02)
    assert np.mean(np.asarray(got_TF == want_TF)) > 0.95


def test_what_the_kernels_take():
    assert fits(1, 128, 32) and fits(8, 640, 160)
    assert not fits(MOST_ROWS + 1, 128, 32)
    assert not fits(1, 192, 32) and not fits(1, 64, 32)
    assert not fits(1, 128, 48) and not fits(1, 128, 16)


def test_what_does_not_go_together_is_refused_while_tracing():
    x_TD, norm_D, parts_STD = normal(0, 3, 384), jnp.ones(384), normal(1, 2, 3, 384)
    for args, options in (
        ((normal(0, MOST_ROWS + 1, 384),), {}),
        ((normal(0, 2, 3, 384),), {}),
        ((jnp.ones((3, 384), jnp.int32),), {}),
        ((x_TD,), {"norm_D": norm_D[1:]}),
        ((x_TD,), {"parts_STD": parts_STD[:, 1:]}),
        ((x_TD,), {"parts_STD": parts_STD.astype(jnp.bfloat16)}),
    ):
        with pytest.raises(ValueError, match=r"^fixed_point: "):
            jax.eval_shape(partial(fixed_point, **options), *args)
    for bits in (8, 4):
        x, (values, scale, _) = fixed_rows(3, 384), matrix(bits, 384, 96)
        jax.eval_shape(partial(skinny_matmul, bits=bits), x, values, scale)
        for given in (
            (fixed_rows(3, 256), values, scale),
            (x, values[:, 1:], scale),
            (x, values[1:], scale),
            (x, values, scale[..., 1:]),
            (x, values.astype(jnp.int32), scale),
            (x, values, scale.astype(jnp.bfloat16)),
            (FixedPoint(x.halves_PD, jnp.ones(MOST_ROWS + 1)), values, scale),
            (FixedPoint(x.halves_PD[1:], x.scale_T), values, scale),
        ):
            with pytest.raises(ValueError, match=r"^skinny_matmul: "):
                jax.eval_shape(partial(skinny_matmul, bits=bits), *given)
        with pytest.raises(ValueError, match=r"^skinny_matmul: expected 4 or 8 bits, got 6"):
            skinny_matmul(x, values, scale, bits=6)
