# SPDX-License-Identifier: Apache-2.0
"""Mixtures as they are published: their config.json, names and numbers of arrays; read in small widths."""

import json
import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from rapid_jax.model.config import ModelConfig, from_hf, to_hf
from rapid_jax.model.hf_io import load_hf
from rapid_jax.model.hf_names import stored
from rapid_jax.plan.cost import matrices

QWEN3_30B_A3B: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 151643,
    "decoder_sparse_step": 1,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}
MIXTRAL_8X7B: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mixtral",
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 32000,
}
NARROW = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
NARROW |= {"vocab_size": 40, "head_dim": 8}


def active(config: ModelConfig) -> int:
    """Weights that a token meets: its experts', those of attention, the embedding and the head."""
    return matrices(config) + 2 * config.vocab_size * config.hidden_size


@pytest.mark.parametrize(
    ("given", "arrays", "billions", "of_a_token"),
    [(QWEN3_30B_A3B, 18867, 30.5, 3.3), (MIXTRAL_8X7B, 995, 46.7, 12.9)],
    ids=["qwen3-30b-a3b", "mixtral-8x7b"],
)
def test_published_sizes(given, arrays, billions, of_a_token):
    """As their cards have them."""
    config = from_hf(given)
    assert from_hf(to_hf(config)) == config and config.carried_keys()["router_aux_loss_coef"] > 0
    every = stored(config)
    assert len(every) == arrays
    assert round(sum(math.prod(array.shape) for array in every) / 1e9, 1) == billions
    assert active(config) / 1e9 == pytest.approx(of_a_token, abs=0.06)


@pytest.mark.parametrize(
    ("given", "widths", "key", "name"),
    [
        (QWEN3_30B_A3B, {"moe_intermediate_size": 8}, "mlp.experts.{}.up_proj", "up_XDF"),
        (MIXTRAL_8X7B, {"intermediate_size": 24}, "block_sparse_moe.experts.{}.w3", "up_XDF"),
        (MIXTRAL_8X7B, {"intermediate_size": 24}, "block_sparse_moe.experts.{}.w2", "down_XFD"),
    ],
)
def test_a_folder_with_the_published_names_is_read(given, widths, key, name, tmp_path: Path):
    """In two files, with their index; every expert where it belongs."""
    given = given | NARROW | widths
    rng, arrays = np.random.default_rng(0), {}
    for layer in range(2):
        place = f"model.layers.{layer}."
        arrays |= {place + rest: array for rest, array in published(given, rng).items()}
    for outer in ("model.embed_tokens.weight", "lm_head.weight"):
        arrays[outer] = np.float32(rng.normal(size=(40, 16)))
    arrays["model.norm.weight"] = np.ones(16, np.float32)
    (tmp_path / "config.json").write_text(json.dumps(given))
    names, files = sorted(arrays), {}
    for at, half in enumerate((names[::2], names[1::2]), start=1):
        save_file({one: arrays[one] for one in half}, tmp_path / f"model-{at:05d}-of-00002.safetensors")
        files |= dict.fromkeys(half, f"model-{at:05d}-of-00002.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    decoder = load_hf(tmp_path, layout="stacked", dtype=jnp.dtype("float32"), quiet=True)
    every = np.asarray(getattr(decoder.blocks, name)[...])
    for layer, expert in ((0, 0), (1, 5), (1, every.shape[1] - 1)):
        want = arrays[f"model.layers.{layer}.{key.format(expert)}.weight"]
        np.testing.assert_array_equal(every[layer, expert], want.T)


def published(given: dict[str, Any], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """A layer's arrays by the names that follow its number."""
    q, kv, hidden = 4 * 8, 2 * 8, 16
    shapes = {"input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}
    rows = {"q_proj": (q, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden), "o_proj": (hidden, q)}
    qwen = given["model_type"] == "qwen3_moe"
    rows |= {"q_norm": (8,), "k_norm": (8,)} if qwen else {}
    shapes |= {f"self_attn.{part}": shape for part, shape in rows.items()}
    module, parts = ("mlp", ("gate_proj", "up_proj", "down_proj")) if qwen else ("block_sparse_moe", ("w1", "w3", "w2"))
    count = given["num_experts" if qwen else "num_local_experts"]
    ffn = given["moe_intermediate_size" if qwen else "intermediate_size"]
    shapes[f"{module}.gate"] = (count, hidden)
    for expert in range(count):
        for part, shape in zip(parts, ((ffn, hidden), (ffn, hidden), (hidden, ffn)), strict=True):
            shapes[f"{module}.experts.{expert}.{part}"] = shape
    return {f"{name}.weight": np.float32(rng.normal(size=shape)) for name, shape in shapes.items()}
