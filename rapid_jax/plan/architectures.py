# SPDX-License-Identifier: Apache-2.0
"""The architecture of a model that need not be there: from its folder's config.json, or the published one by name."""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rapid_jax.model.config import ModelConfig, from_hf
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.storage import place_of

_LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5e5,
    "max_position_embeddings": 131072,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
# As in the folders' own cards for more than 32,768 positions.
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
_QWEN: dict[str, Any] = {
    "model_type": "qwen2",
    "vocab_size": 152064,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "max_position_embeddings": 131072,
    "rope_scaling": _YARN,
}
_QWEN3: dict[str, Any] = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "max_position_embeddings": 40960,
    "rope_scaling": _YARN,
}
_QWEN3_MOE: dict[str, Any] = {
    **_QWEN3,
    "model_type": "qwen3_moe",
    "num_key_value_heads": 4,
    "norm_topk_prob": True,
    "num_experts": 128,
    "num_experts_per_tok": 8,
}
_MIXTRAL: dict[str, Any] = {
    "model_type": "mixtral",
    "vocab_size": 32000,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "max_position_embeddings": 32768,
    "sliding_window": None,
}
_MISTRAL: dict[str, Any] = {
    "model_type": "mistral",
    "vocab_size": 32000,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e7,
    "max_position_embeddings": 524288,
    "sliding_window": None,
}


def _sizes(hidden: int, ffn: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    sizes = {"hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers, "num_attention_heads": heads}
    return sizes | more


# Without yarn, which its card has for more than the 65,536 positions of config.json.
_SMOLLM3: dict[str, Any] = {
    "model_type": "smollm3",
    "vocab_size": 128256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 5e6,
    "max_position_embeddings": 65536,
    **_sizes(2048, 11008, 36, 16, num_key_value_heads=4),
}
# Its factors shape no program: ones stand for them.
_PHI4_MINI: dict[str, Any] = {
    "model_type": "phi3",
    "vocab_size": 200064,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "partial_rotary_factor": 0.75,
    "max_position_embeddings": 131072,
    "original_max_position_embeddings": 4096,
    "rope_scaling": {"rope_type": "longrope", "short_factor": [1.0] * 48, "long_factor": [1.0] * 48},
    "tie_word_embeddings": True,
    "sliding_window": 262144,
    **_sizes(3072, 8192, 32, 24, num_key_value_heads=8),
}

_GEMMA3: dict[str, Any] = {
    "model_type": "gemma3_text",
    "vocab_size": 262208,
    "sliding_window": 1024,
    "max_position_embeddings": 131072,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
}

# The published config.json of each, as far as it shapes a program.
SHAPES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "llama-3.1-8b": _LLAMA | _sizes(4096, 14336, 32, 32),
        "llama-3.1-70b": _LLAMA | _sizes(8192, 28672, 80, 64),
        "qwen2.5-7b": _QWEN | _sizes(3584, 18944, 28, 28, num_key_value_heads=4),
        "qwen2.5-72b": _QWEN | _sizes(8192, 29568, 80, 64, num_key_value_heads=8),
        "qwen3-0.6b": _QWEN3 | _sizes(1024, 3072, 28, 16, tie_word_embeddings=True),
        "qwen3-1.7b": _QWEN3 | _sizes(2048, 6144, 28, 16, tie_word_embeddings=True),
        "qwen3-8b": _QWEN3 | _sizes(4096, 12288, 36, 32),
        "qwen3-32b": _QWEN3 | _sizes(5120, 25600, 64, 64),
        "gemma-3-1b": _GEMMA3
        | {"vocab_size": 262144, "sliding_window": 512, "max_position_embeddings": 32768, "rope_scaling": None}
        | _sizes(1152, 6912, 26, 4, num_key_value_heads=1),
        "gemma-3-4b": _GEMMA3 | _sizes(2560, 10240, 34, 8, num_key_value_heads=4),
        "gemma-3-12b": _GEMMA3 | _sizes(3840, 15360, 48, 16, num_key_value_heads=8),
        "gemma-3-27b": _GEMMA3
        | {"head_dim": 128, "query_pre_attn_scalar": 168}
        | _sizes(5376, 21504, 62, 32, num_key_value_heads=16),
        "qwen3-30b-a3b": _QWEN3_MOE | _sizes(2048, 6144, 48, 32, moe_intermediate_size=768),
        "qwen3-235b-a22b": _QWEN3_MOE | _sizes(4096, 12288, 94, 64, moe_intermediate_size=1536),
        "mixtral-8x7b": _MIXTRAL | _sizes(4096, 14336, 32, 32),
        "phi-4-mini": _PHI4_MINI,
        "smollm3-3b": _SMOLLM3,
        "mistral-7b": _MISTRAL | _sizes(4096, 14336, 32, 32),
    }
)


@dataclass(frozen=True)
class Architecture:
    """A model's sizes, and where they are from."""

    config: ModelConfig
    said_by: str

    def cut_to(self, layers: int | None) -> "Architecture":
        """The same with only so many layers; None: all of them."""
        if layers is not None and layers < 1:
            raise InputError(f"--layers: expected at least 1, got {layers}")
        if layers is None or layers >= self.config.num_layers:
            return self
        kept = dataclasses.replace(self.config, num_layers=layers)
        return Architecture(kept, f"{self.said_by}, {layers} of its {self.config.num_layers} layers")


def architecture_of(source: str, shape: str | None = None) -> Architecture:
    """The architecture of a model by its `shape`'s name, else by its own file, else its folder's name.

    Weights are not looked at and need not be there. Raises InputError when nothing says what the architecture is.
    """
    if shape is not None:
        if shape not in SHAPES:
            raise InputError(f"unknown shape {shape!r}: expected one of {', '.join(SHAPES)}")
        return Architecture(from_hf(SHAPES[shape]), f"the shape {shape}")
    if source == "smollm2" or source.lower().endswith(".gguf"):
        from rapid_jax.model.load import open_checkpoint

        return Architecture(open_checkpoint(source)[0].config, "its own file")
    file = place_of(source, "model") / "config.json"
    if file.is_file():
        from rapid_jax.model.checkpoint_folder import read_folder_config

        return Architecture(from_hf(read_folder_config(file.parent)), str(file))
    plain = re.sub(r"[^a-z0-9]+", "", Path(source).name.lower())
    for name in SHAPES:
        if plain.startswith(re.sub(r"[^a-z0-9]+", "", name)):
            return Architecture(from_hf(SHAPES[name]), f"the published {name}, since there is no {file}")
    raise InputError(f"{source}: no {file}, and no known shape by that name: name one of {', '.join(SHAPES)}")
