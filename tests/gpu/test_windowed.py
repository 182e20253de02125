# SPDX-License-Identifier: Apache-2.0
"""Layers that keep their window, compiled for a GPU: what follows is what follows where they keep everything."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rapid_jax.attention.quantized_kv import quantize_kv
from rapid_jax.bench.models import random_decoder
from rapid_jax.model.config import from_hf
from rapid_jax.model.fused import fuse
from rapid_jax.speculative.extend import extend
from rapid_jax.speculative.prefill import new_tail, prefill
from rapid_jax.speculative.window_layout import WindowLayout

GEMMA = {
    "model_type": "gemma3_text",
    "vocab_size": 2048,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "query_pre_attn_scalar": 128,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32768,
    "rope_scaling": None,
    "sliding_window_pattern": 3,
}
LENGTHS, SUFFIX, EPS = (3000, 1700), 40, {"float32": 2e-3, "bfloat16": 2e-2}


@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize("window", [300, 700])  # shorter and longer than a chunk
@pytest.mark.parametrize("int8", [False, True], ids=["in full", "int8"])
def test_further_tokens_see_what_they_would(monkeypatch, dtype, window, int8):
    decoder = fuse(random_decoder(from_hf(GEMMA | {"sliding_window": window}), jnp.dtype(dtype)))
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 2048, length + SUFFIX).tolist() for length in LENGTHS]

    def keys_and_values() -> tuple[np.ndarray, int]:
        prefix = prefill(decoder, [prompt[:-SUFFIX] for prompt in prompts], chunk=512, dtype=jnp.dtype(dtype))
        assert prefix.near is not None
        read = quantize_kv(prefix) if int8 else prefix
        tail = new_tail(decoder, LENGTHS, 64, jnp.dtype(dtype))
        tail = extend(decoder, read, tail, [prompt[-SUFFIX:] for prompt in prompts], width=8, block_size=512)
        found = [np.asarray(x[..., :SUFFIX, :].astype(jnp.float32)) for x in jax.tree.leaves(tail.layers)]
        return np.stack(found), prefix.near.prefix.slots

    got, slots = keys_and_values()
    monkeypatch.setattr(WindowLayout, "kept", property(lambda self: self.chunks))
    want, whole = keys_and_values()
    assert slots < whole / 3
    assert np.linalg.norm(got - want) <= EPS[dtype] * np.linalg.norm(want)
