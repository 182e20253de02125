# SPDX-License-Identifier: Apache-2.0
"""Rotary frequencies and angles against transformers' own."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from rapid_jax.model.config import from_hf
from rapid_jax.model.rope import inverse_frequencies, rotate, rotation
from rapid_jax.model.rope_config import Rope


def llama3(factor, original, low=1.0, high=4.0):
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def yarn(factor, original, **more):
    return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original, **more}


# (head_dim, theta, scaling); the first of each rule is a released model's
CASES = {
    "llama-2": (128, 1e4, None),
    "llama-3": (128, 5e5, None),
    "smollm2": (64, 1e5, None),
    "longpo-mistral": (128, 2.5e7, None),
    "linear-4": (64, 1e4, {"rope_type": "linear", "factor": 4.0}),
    "linear-legacy-key": (128, 1e6, {"type": "linear", "factor": 2.5}),
    "llama-3.1-8b": (128, 5e5, llama3(8.0, 8192)),
    "llama-3.2-1b": (64, 5e5, llama3(32.0, 8192)),
    "llama3-other-bounds": (80, 1e4, llama3(3.0, 2048, 1.5, 6.0)),
    "qwen2.5-yarn": (128, 1e6, yarn(4.0, 32768)),
    "yarn-betas": (64, 1e4, yarn(16.0, 4096, beta_fast=16.0, beta_slow=2.0)),
    "yarn-not-truncated": (64, 1.5e5, yarn(32.0, 4096, truncate=False)),
    "yarn-mscale": (64, 1e4, yarn(40.0, 4096, mscale=0.707, mscale_all_dim=1.0)),
    "yarn-attention-factor": (128, 1e4, yarn(8.0, 2048, attention_factor=1.25)),
    "yarn-factor-null": (64, 1e4, yarn(None, 16384)),
}


def both(case):
    """((our frequencies, factor), (transformers' frequencies, factor), their configuration)."""
    head_dim, theta, scaling = CASES[case]
    settings: dict[str, Any] = {
        "hidden_size": 2 * head_dim,
        "num_attention_heads": 2,
        "max_position_embeddings": 131072,
        "rope_theta": theta,
        "rope_scaling": None if scaling is None else dict(scaling),
    }
    theirs = LlamaConfig(**settings)
    kind = theirs.to_dict()["rope_parameters"]["rope_type"]
    init = LlamaRotaryEmbedding.compute_default_rope_parameters if kind == "default" else ROPE_INIT_FUNCTIONS[kind]
    inv_freq, factor = init(theirs)
    ours = from_hf(theirs.to_dict() | {"architectures": ["LlamaForCausalLM"]})
    return inverse_frequencies(ours.rope, ours.head_dim), (inv_freq.numpy(), factor), theirs


@pytest.mark.parametrize("case", CASES)
def test_frequencies_equal_transformers_but_for_the_rounding_of_its_power(case):
    (ours, our_factor), (theirs, their_factor), _ = both(case)
    assert ours.dtype == np.float32
    assert our_factor == their_factor
    # One rounding step of the power becomes at most two of its reciprocal.
    np.testing.assert_allclose(ours, theirs, rtol=2.5e-7, atol=0)
    assert np.mean(ours == theirs) >= 0.9


@pytest.mark.parametrize("case", ["llama-2", "llama-3", "smollm2", "linear-4", "llama-3.1-8b", "llama-3.2-1b"])
def test_frequencies_of_released_llamas_are_bit_equal(case):
    (ours, _), (theirs, _), _ = both(case)
    np.testing.assert_array_equal(ours, theirs)


def test_power_is_correctly_rounded():
    inv_freq, _ = inverse_frequencies(Rope(1e6), 128)
    exponent = (np.arange(0, 128, 2).astype(np.float32) / np.float32(128)).astype(np.longdouble)
    expected = np.float32(1) / np.power(np.longdouble(1e6), exponent).astype(np.float32)
    np.testing.assert_array_equal(inv_freq, expected)


@pytest.mark.parametrize("case", ["llama-2", "llama-3.1-8b", "qwen2.5-yarn"])
def test_cos_and_sin_equal_transformers_up_to_position_131072(case):
    (inv_freq, factor), (their_freq, _), theirs = both(case)
    pos_BT = np.concatenate([np.arange(64), np.arange(8150, 8250), np.arange(130_000, 131_073, 7)])[None]
    cos, sin = rotation(jnp.asarray(pos_BT), inv_freq, factor)
    their_cos, their_sin = LlamaRotaryEmbedding(theirs)(torch.zeros(1), torch.from_numpy(pos_BT))
    half = len(inv_freq)
    same = inv_freq == their_freq  # elsewhere the angle differs by a rounding step times its position
    np.testing.assert_allclose(np.asarray(cos)[..., same], their_cos.numpy()[..., :half][..., same], atol=3e-7)
    np.testing.assert_allclose(np.asarray(sin)[..., same], their_sin.numpy()[..., :half][..., same], atol=3e-7)
    np.testing.assert_allclose(cos, their_cos.numpy()[..., :half], atol=2e-3)


def test_rotate_turns_pairs_half_a_head_apart():
    x_BTNH = np.random.default_rng(0).normal(size=(1, 3, 2, 8)).astype(np.float32)
    pos = np.array([[0, 1, 5]])
    inv_freq, factor = inverse_frequencies(Rope(100.0), 8)
    turned = np.asarray(rotate(jnp.asarray(x_BTNH), *rotation(jnp.asarray(pos), inv_freq, factor)))
    as_complex = x_BTNH[..., :4] + 1j * x_BTNH[..., 4:]
    expected = as_complex * np.exp(1j * pos[..., None, None] * 100.0 ** (-np.arange(0, 8, 2) / 8))
    np.testing.assert_allclose(turned, np.concatenate([expected.real, expected.imag], -1), atol=1e-6)


def test_rotate_keeps_the_dtype():
    cos, sin = rotation(jnp.zeros((1, 2), jnp.int32), *inverse_frequencies(Rope(1e4), 4))
    assert rotate(jnp.ones((1, 2, 1, 4), jnp.bfloat16), cos, sin).dtype == jnp.bfloat16
