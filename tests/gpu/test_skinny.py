# SPDX-License-Identifier: Apache-2.0
"""Products with quantised weights, compiled for a GPU, against float64; and a quantised decoder by them."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rapid_jax.bench.models import random_decoder
from rapid_jax.model.config import ModelConfig, Rope
from rapid_jax.model.fused import quantize
from rapid_jax.model.quantized import FEW, dequantize, product, quantize_weights
from rapid_jax.model.skinny import MOST_ROWS, fixed_point, skinny_matmul
from tests.model.skinny_cases import EPS, check_product, check_rows, fixed_rows, gate_and_up, matrix, normal, normed

SHAPES = ((128, 32), (384, 96), (640, 160), (4096, 6144), (14336, 512))  # depths and widths: real ones last


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("rows, depth", [(1, 128), (3, 384), (8, 640), (MOST_ROWS, 4096), (1, 14336), (2, 576)])
def test_rows_as_fixed_point(rows, depth, dtype):
    x_TD, norm_D = (normal(seed, *shape, dtype=dtype) for seed, shape in enumerate(((rows, depth), (depth,))))
    parts_STD = normal(2, 3, rows, depth)
    fixed, same_TD = jax.jit(fixed_point)(x_TD)
    check_rows(fixed, np.asarray(x_TD, np.float64))
    np.testing.assert_array_equal(same_TD, x_TD)
    fixed, sum_TD = jax.jit(partial(fixed_point, eps=EPS, offset=1.0))(x_TD, parts_STD=parts_STD, norm_D=norm_D)
    want_TD = np.asarray(x_TD, np.float64) + np.sum(np.asarray(parts_STD, np.float64), axis=0)
    step = 2.0**-8 if dtype == jnp.bfloat16 else 1e-6
    np.testing.assert_allclose(np.asarray(sum_TD, np.float64), want_TD, rtol=step, atol=1e-6)
    check_rows(fixed, normed(np.asarray(sum_TD, np.float64), norm_D, 1.0), slack=0.1)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("rows", [1, 2, 5, MOST_ROWS])
@pytest.mark.parametrize("depth, width", SHAPES)
def test_products(depth, width, rows, bits):
    x, (values, scale, weight_ND) = fixed_rows(rows, depth), matrix(bits, depth, width)
    got_STN = jax.jit(partial(skinny_matmul, bits=bits))(x, values, scale)
    check_product(got_STN, x, weight_ND)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("rows, depth, width", [(1, 384, 160), (MOST_ROWS, 640, 64), (3, 2048, 4096)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh"])
def test_gated_products(rows, depth, width, bits, dtype, activation):
    args, gate, up = gate_and_up(bits, rows, depth, width)
    got_TF = jax.jit(partial(skinny_matmul, bits=bits, gated=jnp.dtype(dtype), activation=activation))(*args)
    inside = gate if activation == "silu" else np.sqrt(8 / np.pi) * (gate + 0.044715 * gate**3)
    want_TF = gate / (1 + np.exp(-inside)) * up
    got_TF = np.asarray(got_TF.astype(jnp.float32), np.float64)
    assert np.linalg.norm(got_TF - want_TF) <= (1e-5 if dtype == jnp.float32 else 6e-3) * np.linalg.norm(want_TF)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("rows", [1, MOST_ROWS, MOST_ROWS + 1, FEW, FEW + 1])
@pytest.mark.parametrize("depth", [256, 576])
def test_a_matrix_of_few_bits(depth, rows, bits):
    """By the kernel, by several readings of it, and restored: rows beyond, and a depth that is no whole group."""
    weight_DN, x_TD = normal(0, depth, 96), normal(1, rows, depth)
    values, scale = quantize_weights(weight_DN, bits)
    got_TN = jax.jit(partial(product, bits=bits))(x_TD, values, scale)
    weight_ND = np.asarray(dequantize(values, scale, bits), np.float64)[:, :depth]
    want_TN = np.asarray(x_TD, np.float64) @ weight_ND.T
    assert np.linalg.norm(np.asarray(got_TN, np.float64) - want_TN) <= 2e-4 * np.linalg.norm(want_TN)


def config() -> ModelConfig:
    return ModelConfig(
        family="llama",
        vocab_size=512,
        hidden_size=256,
        intermediate_size=384,
        num_layers=3,
        num_heads=8,
        num_kv_heads=2,
        head_dim=32,
        norm_eps=1e-5,
        rope=Rope(10000.0),
        max_positions=512,
        tie_embeddings=False,
    )


GEMMA = {"qk_norm": True, "post_norms": True, "norm_offset": 1.0, "activation": "gelu_pytorch_tanh"}


@pytest.mark.parametrize("changed", [{}, {"qk_norm": True}, GEMMA], ids=["plain", "norms of q and k", "norms around"])
@pytest.mark.parametrize("rows, bits", [((1, 1), 8), ((4, 2), 8), ((1, 9), 8), ((2, 3), 4)])
def test_a_quantised_decoder(rows, bits, changed: dict[str, Any]):
    """The few rows of a step as kernels take them, against the same weights restored in float32."""
    full = random_decoder(replace(config(), **changed), jnp.dtype(jnp.float32), 0)
    copy = quantize(full, bits)

    def attend(q_BTNH, k_BTKH, v_BTKH, layer):  # every token by itself: the mean of the heads' values
        group = q_BTNH.shape[2] // v_BTKH.shape[2]
        return jnp.repeat(v_BTKH, group, axis=2), None

    tokens_BT = jnp.asarray(np.random.default_rng(0).integers(0, 512, rows))
    pos_BT = jnp.broadcast_to(jnp.arange(rows[1]), rows)

    def logits(decoder, tokens_BT, pos_BT):
        return decoder.logits(decoder.hidden(tokens_BT, pos_BT, attend)[0])

    got = jax.jit(logits)(copy, tokens_BT, pos_BT)
    wide = jax.jit(logits)(copy, jnp.tile(tokens_BT, (40, 1)), jnp.tile(pos_BT, (40, 1)))[: rows[0]]  # plain products
    gap = np.linalg.norm(np.asarray(got - wide)) / np.linalg.norm(np.asarray(wide))
    assert 0 < gap <= 2e-3, gap
