# SPDX-License-Identifier: Apache-2.0
"""Tiny random checkpoints of each family, made and saved by transformers, and how to run both sides of a comparison."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

from rapid_jax.attention.attend import attend_self
from rapid_jax.attention.strategy import Strategy
from rapid_jax.model.decoder import Decoder

SIZES: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    # Large enough that attention is far from uniform and that a wrong rotation shows.
    "initializer_range": 0.25,
    "rms_norm_eps": 1e-5,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0, 1.1, 1.5], "long_factor": [1.5, 3.0, 24.0]}
# name -> (transformers configuration class, what is special about it)
FAMILIES = {
    "llama": ("LlamaConfig", {"rope_theta": 10000.0, "max_position_embeddings": 32768}),
    "llama3": (
        "LlamaConfig",
        {
            "rope_theta": 500000.0,
            "rope_scaling": LLAMA3,
            "max_position_embeddings": 131072,
            "tie_word_embeddings": True,
        },
    ),
    "llama-linear": (
        "LlamaConfig",
        {
            "rope_theta": 10000.0,
            "rope_scaling": {"rope_type": "linear", "factor": 4.0},
            "max_position_embeddings": 32768,
            "num_key_value_heads": 4,
        },
    ),
    "llama-yarn": ("LlamaConfig", {"rope_theta": 10000.0, "rope_scaling": YARN, "max_position_embeddings": 131072}),
    "mistral": (
        "MistralConfig",
        {"rope_theta": 1e6, "sliding_window": None, "head_dim": 16, "max_position_embeddings": 32768},
    ),
    "qwen2": (
        "Qwen2Config",
        {"rope_theta": 1e6, "rope_scaling": YARN, "max_position_embeddings": 131072, "num_key_value_heads": 1},
    ),
    "qwen3": ("Qwen3Config", {"rope_theta": 1e6, "head_dim": 16, "max_position_embeddings": 32768}),
    "smollm3": (
        "SmolLM3Config",
        {"rope_theta": 5e6, "max_position_embeddings": 32768, "num_hidden_layers": 5, "pad_token_id": None},
    ),
    "phi3": (
        "Phi3Config",
        {
            "rope_theta": 10000.0,
            "rope_scaling": LONGROPE,
            "max_position_embeddings": 131072,
            "original_max_position_embeddings": 4096,
            "partial_rotary_factor": 0.75,
            "pad_token_id": None,
        },
    ),
    "gemma3": (
        "Gemma3TextConfig",
        {
            "num_hidden_layers": 3,
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "sliding_window": 100,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "rope_scaling": {"rope_type": "linear", "factor": 4.0},
            "max_position_embeddings": 32768,
        },
    ),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {
            "rope_theta": 1e6,
            "head_dim": 16,
            "max_position_embeddings": 32768,
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "norm_topk_prob": True,
        },
    ),
    "mixtral": (
        "MixtralConfig",
        {"rope_theta": 1e6, "head_dim": 16, "max_position_embeddings": 32768, "num_local_experts": 4},
    ),
    "qwen2-tied": ("Qwen2Config", {"rope_theta": 1e6, "max_position_embeddings": 32768, "tie_word_embeddings": True}),
}


def random_model(name: str) -> transformers.PreTrainedModel:
    kind, special = FAMILIES[name]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**SIZES | special)).eval()
    with torch.no_grad():
        for key, value in model.named_parameters():
            if value.ndim == 1:  # norms and biases start at one and zero, which would hide a mistake
                value.add_(torch.randn_like(value) * 0.2)
            if "embed" in key:
                value.mul_(2)
    return model


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Callable[[str], tuple[transformers.PreTrainedModel, Path]]:
    """`checkpoint(name)`: the torch model and the folder it was saved to."""
    made: dict[str, tuple[transformers.PreTrainedModel, Path]] = {}

    def make(name: str) -> tuple[transformers.PreTrainedModel, Path]:
        if name not in made:
            model, folder = random_model(name), tmp_path_factory.mktemp(name)
            model.save_pretrained(folder)
            made[name] = model, folder
        return made[name]

    return make


def torch_logits(model: transformers.PreTrainedModel, tokens_BT: np.ndarray, pos_BT: np.ndarray) -> np.ndarray:
    # Without a mask transformers takes a jump of the positions for the start of another text.
    tokens = torch.from_numpy(tokens_BT)
    with torch.no_grad():
        out = model(
            tokens, position_ids=torch.from_numpy(pos_BT), attention_mask=torch.ones_like(tokens), use_cache=False
        )
    return out.logits.float().numpy()


def forward_of(decoder: Decoder) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """(tokens, positions) -> float32 logits of the whole sequence."""
    graph, state = nnx.split(decoder)

    @jax.jit
    def forward(state, tokens_BT, pos_BT):
        decoder = nnx.merge(graph, state)
        hidden_BTD, _ = decoder.hidden(tokens_BT, pos_BT, attend_self(pos_BT, Strategy(block=256)))
        return decoder.logits(hidden_BTD)

    return lambda tokens_BT, pos_BT: np.asarray(forward(state, jnp.asarray(tokens_BT), jnp.asarray(pos_BT)))


def our_logits(decoder: Decoder, tokens_BT: np.ndarray, pos_BT: np.ndarray) -> np.ndarray:
    return forward_of(decoder)(tokens_BT, pos_BT)


def tokens_at(start: int, length: int, *, windows: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, positions): one first token at position 0, the others from `start` on.

    `windows`: the first is right before the others, since transformers' windows count tokens, not positions.
    """
    tokens_BT = np.random.default_rng(0).integers(0, SIZES["vocab_size"], (1, length))
    return tokens_BT, np.concatenate([[start - 1 if windows else 0], np.arange(start, start + length - 1)])[None]
