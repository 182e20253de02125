# SPDX-License-Identifier: Apache-2.0
"""GGUF checkpoints: the architecture, weights and tokenizer that llama.cpp's files hold, under Hugging Face's names."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rapid_jax.model import gguf_file
from rapid_jax.model.config import ModelConfig, Rope, from_hf
from rapid_jax.model.decoder import Decoder, Layout
from rapid_jax.model.gguf_tokenizer import token_ids, tokenizer_files
from rapid_jax.model.hf_names import EMBEDDING, HEAD, weights
from rapid_jax.model.placement import build
from rapid_jax.model.rope import inverse_frequencies
from rapid_jax.runtime.axes import PARAM, Table
from rapid_jax.runtime.errors import InputError

_PARTS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_OUTSIDE = {EMBEDDING: "token_embd.weight", "model.norm.weight": "output_norm.weight", HEAD: "output.weight"}
_ROPE_FACTORS = "rope_freqs.weight"
# Metadata that would change a number and that no architecture read here should carry.
_REFUSED = ("expert_count", "rope.scaling.attn_factor", "rope.scaling.yarn_log_multiplier", "attention.clamp_kqv")


def gguf_name(key: str) -> str:
    """The GGUF name of a Hugging Face key: model.layers.3.mlp.up_proj.weight -> blk.3.ffn_up.weight."""
    if key in _OUTSIDE:
        return _OUTSIDE[key]
    layer, part = key.removeprefix("model.layers.").split(".", 1)
    stem, _, kind = part.rpartition(".")
    return f"blk.{layer}.{_PARTS[stem]}.{kind}"


class GgufCheckpoint:
    """A GGUF file whose tensors were found to be all there, of the right shapes and not cut short."""

    def __init__(self, path: Path):
        self.path = path
        self._metadata, self._tensors = gguf_file.open_gguf(path)
        self.config = _config(path, self._metadata, self._tensors)
        self._check_complete()

    @property
    def weight_files(self) -> list[Path]:
        """The file."""
        return [self.path]

    def tokenizer_files(self) -> dict[str, bytes]:
        """The tokenizer as Hugging Face files, by name."""
        return tokenizer_files(self._metadata)

    def read(self, key: str) -> np.ndarray:
        """One weight by its Hugging Face key, dense float32 in the Hugging Face order of rows."""
        array = gguf_file.read(self._tensors[gguf_name(key)])
        turned = ("self_attn.q_proj", "self_attn.k_proj")
        if self._metadata["general.architecture"] == "llama" and any(part in key for part in turned):
            return _half_split(array, self.config.head_dim)
        return array

    def _check_complete(self) -> None:
        expected = {gguf_name(weight.key): weight.stored_shape for weight in weights(self.config)}
        for name, shape in expected.items():
            if name not in self._tensors:
                raise InputError(f"{self.path}: tensor {name} is missing")
            found = self._tensors[name].shape
            if found != shape:
                raise InputError(f"{self.path}: {name} has shape {list(found)}, expected {list(shape)}")
        for name in self._tensors:
            if name not in expected and name != _ROPE_FACTORS:
                raise InputError(f"{self.path}: tensor {name} is not part of a {self.config.family} decoder")


def load_gguf(
    path: Path,
    *,
    layout: Layout,
    dtype: jnp.dtype,
    mesh: Mesh | None = None,
    table: Table = PARAM,
    quiet: bool = False,
) -> Decoder:
    """The Decoder of a GGUF file of architecture llama or qwen2, its weights made dense in `dtype` one at a time."""
    checkpoint = GgufCheckpoint(path)
    return build(checkpoint.config, checkpoint.read, layout=layout, dtype=dtype, mesh=mesh, table=table, quiet=quiet)


def _half_split(array: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows of q or k with rotary pairs (2i, 2i + 1), llama.cpp's order, as pairs (i, i + head_dim / 2)."""
    rows = array.reshape(-1, head_dim // 2, 2, *array.shape[1:])
    return rows.swapaxes(1, 2).reshape(array.shape)


def _config(path: Path, metadata: dict[str, Any], tensors: dict[str, gguf_file.Tensor]) -> ModelConfig:
    architecture = metadata.get("general.architecture")
    if architecture not in ("llama", "qwen2"):
        raise InputError(f"{path}: architecture {architecture!r} is not supported; supported: llama, qwen2")
    if metadata.get("split.count", 1) > 1:
        raise InputError(
            f"{path}: one of {metadata['split.count']} parts; join them with llama.cpp's gguf-split --merge"
        )
    for key in _REFUSED:
        if metadata.get(f"{architecture}.{key}"):
            raise InputError(f"{path}: {architecture}.{key} is not supported")

    def value(key: str, default: Any = None) -> Any:
        found = metadata.get(f"{architecture}.{key}", default)
        if found is None:
            raise InputError(f"{path}: metadata key {architecture}.{key} is missing")
        return found

    if gguf_name(EMBEDDING) not in tensors:
        raise InputError(f"{path}: tensor {gguf_name(EMBEDDING)} is missing")
    heads, hidden, context = value("attention.head_count"), value("embedding_length"), value("context_length")
    head_dim = value("attention.key_length", hidden // heads)
    if value("rope.dimension_count", head_dim) != head_dim or value("attention.value_length", head_dim) != head_dim:
        raise InputError(
            f"{path}: rotary embedding of a part of the head, or v heads of another size, is not supported"
        )
    if value("attention.sliding_window", context) < context:
        raise InputError(f"{path}: {architecture}.attention.sliding_window is not supported")
    theta = _shortest(value("rope.freq_base", 10000.0))
    keys = {
        "model_type": architecture,
        "vocab_size": tensors[gguf_name(EMBEDDING)].shape[0],
        "hidden_size": hidden,
        "intermediate_size": value("feed_forward_length"),
        "num_hidden_layers": value("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": value("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rms_norm_eps": _shortest(value("attention.layer_norm_rms_epsilon")),
        "max_position_embeddings": context,
        "tie_word_embeddings": _OUTSIDE[HEAD] not in tensors,
        "rope_theta": theta,
        "rope_scaling": _rope_scaling(path, metadata, architecture, context),
        **token_ids(metadata),
    }
    if _ROPE_FACTORS in tensors:
        keys["rope_scaling"] = _llama3_scaling(path, gguf_file.read(tensors[_ROPE_FACTORS]), theta, head_dim)
    return from_hf(keys)


def _rope_scaling(path: Path, metadata: dict[str, Any], architecture: str, context: int) -> dict[str, Any] | None:
    def value(key: str) -> Any:
        found = metadata.get(f"{architecture}.rope.scaling.{key}")
        return _shortest(found) if isinstance(found, float) else found

    kind = value("type")
    if kind in (None, "none"):
        return None
    if kind not in ("linear", "yarn"):
        raise InputError(f"{path}: rope scaling {kind!r} is not supported; supported: linear, yarn, llama3")
    found = {"rope_type": kind, "factor": value("factor")}
    if kind == "yarn":
        found |= {
            "original_max_position_embeddings": value("original_context_length") or context,
            "beta_fast": value("yarn_beta_fast"),
            "beta_slow": value("yarn_beta_slow"),
        }
        if value("yarn_ext_factor") not in (None, -1.0, 1.0) or value("yarn_attn_factor") not in (None, 1.0):
            raise InputError(f"{path}: yarn with its own extrapolation or attention factor is not supported")
    return found


def _llama3_scaling(path: Path, factors: np.ndarray, theta: float, head_dim: int) -> dict[str, Any]:
    """Llama 3's rope scaling from the table of divisors that llama.cpp makes of it.

    The table does not determine the rule's numbers; those of every released Llama 3.1 to 3.3 are tried, and the table
    must follow from them.
    """
    rule = Rope(theta, "llama3", float(round(float(factors.max()), 3)), 1.0, 4.0, 8192)
    plain, _ = inverse_frequencies(Rope(theta), head_dim)
    scaled, _ = inverse_frequencies(rule, head_dim)
    if factors.shape != plain.shape or not np.allclose(plain / scaled, factors, rtol=1e-4, atol=0):
        raise InputError(
            f"{path}: {_ROPE_FACTORS} does not follow Llama 3's rule with frequency factors 1 and 4 of 8192"
        )
    return {
        "rope_type": "llama3",
        "factor": rule.factor,
        "low_freq_factor": rule.low_freq_factor,
        "high_freq_factor": rule.high_freq_factor,
        "original_max_position_embeddings": rule.original_max_positions,
    }


def _shortest(value: float) -> float:
    """The shortest decimal that is this float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))
