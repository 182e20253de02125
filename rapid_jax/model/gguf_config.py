# SPDX-License-Identifier: Apache-2.0
"""The architecture that a GGUF file's metadata describes, as llama.cpp reads it (llama-model.cpp: load_hparams)."""

import math
from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from rapid_jax.model import gguf_file
from rapid_jax.model.config import ModelConfig, Rope, from_hf
from rapid_jax.model.families import TRAITS, Family
from rapid_jax.model.gguf_names import LONG_FACTORS, ROPE_FACTORS, SHORT_FACTORS, gguf_name
from rapid_jax.model.gguf_tokenizer import token_ids
from rapid_jax.model.hf_names import EMBEDDING, HEAD
from rapid_jax.model.rope import inverse_frequencies
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.json_input import Fields, shown

# llama.cpp's names, most of which are model_type's -> whether its files hold rotary pairs (2i, 2i + 1) of q and k.
ARCHITECTURES: Final[Mapping[str, bool]] = {
    "llama": True,
    "qwen2": False,
    "qwen3": False,
    "qwen3moe": False,
    "smollm3": True,
    "phi3": False,
    "gemma3": False,
}
_RENAMED: Final[Mapping[str, Family]] = {"gemma3": "gemma3_text"}  # whose model_type is another name
_LARGEST: Final = 62  # layers of Gemma 3 27B
# Metadata that changes a number where it has another value than these, and that the decoder has no part for.
_WITHOUT_EFFECT: Final[Mapping[str, tuple[Any, ...]]] = {
    "expert_shared_count": (0,),
    "expert_group_count": (0, 1),
    "expert_weights_scale": (0, 1),
    "expert_weights_norm": (True,),
    "expert_gating_func": (0, 1),  # softmax
    "leading_dense_block_count": (0,),
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.scale": (0,),
    "attention.output_scale": (0, 1),
    "attention.temperature_scale": (0,),
    "attn_logit_softcapping": (0,),
    "final_logit_softcapping": (0,),
    "logit_scale": (0, 1),
    "residual_scale": (0, 1),
    "embedding_scale": (0, 1),
    "use_parallel_residual": (False,),
    "rope.scaling.attn_factor": (1,),
    "rope.scaling.alpha": (0,),
    "rope.scaling.yarn_log_multiplier": (0,),
}
_ROPE_KEYS: Final = (
    *("dimension_count", "freq_base", "scale_linear", "scaling.type", "scaling.factor", "scaling.finetuned"),
    *("scaling.original_context_length", "scaling.yarn_ext_factor", "scaling.yarn_attn_factor"),
    *("scaling.yarn_beta_fast", "scaling.yarn_beta_slow"),
)


def gguf_config(metadata: Fields, tensors: Mapping[str, gguf_file.Tensor]) -> ModelConfig:
    """The architecture; raises InputError naming the file and the key for what is wrong or not implemented."""
    architecture: Any = metadata.text("general.architecture")
    if architecture not in ARCHITECTURES:
        raise InputError(
            f"{metadata.source}: architecture {shown(architecture)} is not supported; "
            f"supported: {', '.join(ARCHITECTURES)}"
        )
    if (parts := metadata.whole("split.count", 1)) > 1:
        raise InputError(f"{metadata.source}: one of {parts} parts; join them with llama.cpp's gguf-split --merge")
    if gguf_name(EMBEDDING) not in tensors:
        raise InputError(f"{metadata.source}: tensor {gguf_name(EMBEDDING)} is missing")
    rows, tokens = tensors[gguf_name(EMBEDDING)].shape[0], len(metadata.texts("tokenizer.ggml.tokens"))
    if rows != tokens:
        raise InputError(
            f"{metadata.source}: tokenizer.ggml.tokens must have {rows} tokens, one for each row of "
            f"{gguf_name(EMBEDDING)}, got {tokens}"
        )
    family, experts = _experts(metadata, architecture)
    local = TRAITS[family].local_theta is not None
    _refuse_unsupported(metadata, f"{architecture}.", longrope=LONG_FACTORS in tensors, local=local)

    def whole(key: str, *default: int, least: int = 1, **limits: int) -> int:
        return metadata.whole(f"{architecture}.{key}", *default, least=least, **limits)

    heads, hidden, context = whole("attention.head_count"), whole("embedding_length"), whole("context_length")
    kv_heads = whole("attention.head_count_kv", heads)
    if heads % kv_heads:
        raise metadata.error(f"{architecture}.attention.head_count_kv", f"a divisor of the {heads} of head_count")
    if f"{architecture}.attention.key_length" not in metadata and hidden % heads:
        raise metadata.error(f"{architecture}.embedding_length", f"a multiple of the {heads} of attention.head_count")
    head_dim = whole("attention.key_length", hidden // heads)
    sizes = ("attention.value_length", "attention.key_length")
    for key in sizes if TRAITS[family].partial else ("rope.dimension_count", *sizes):
        if head_dim % 2 or whole(key, head_dim) != head_dim:
            raise metadata.error(f"{architecture}.{key}", f"{head_dim}, as the size of a head, which must be even")
    if 0 < (window := whole("attention.sliding_window", context, least=0)) < context and not local:
        raise metadata.error(f"{architecture}.attention.sliding_window", f"at least context_length, {context}")
    config = {
        "model_type": family,
        "vocab_size": rows,
        "hidden_size": hidden,
        "intermediate_size": whole("feed_forward_length"),
        "num_hidden_layers": whole("block_count", most=len(tensors)),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "rms_norm_eps": _shortest(
            metadata.number(f"{architecture}.attention.layer_norm_rms_epsilon", above=1e-30, most=1)
        ),
        "max_position_embeddings": context,
        "tie_word_embeddings": gguf_name(HEAD) not in tensors,
        **_rope(metadata, tensors, architecture, head_dim, context),
        **token_ids(metadata),
        **(_local(metadata, architecture, window, head_dim) if local else {}),
        **experts,
    }
    return from_hf(Fields(config, metadata.source))


def _local(metadata: Fields, architecture: str, window: int, head_dim: int) -> dict[str, Any]:
    """What a config.json says of layers with a window and of the scores' scale: llama.cpp knows Gemma 3's by its name.

    Of 62 layers, 27B's, scores are divided by the root of what a head would have of the hidden size.
    """
    every = metadata.whole(f"{architecture}.attention.sliding_window_pattern", 6, least=1)
    found: dict[str, Any] = {
        "sliding_window": window,
        "sliding_window_pattern": every if metadata.get(f"{architecture}.attention.sliding_window") else 1,
        "query_pre_attn_scalar": head_dim,
    }
    if (theta := metadata.number(f"{architecture}.rope.freq_base_swa", None, above=1)) is not None:
        found["rope_local_base_freq"] = _shortest(theta)
    if metadata[f"{architecture}.block_count"] == _LARGEST:
        heads = metadata[f"{architecture}.attention.head_count"]
        found["query_pre_attn_scalar"] = metadata[f"{architecture}.embedding_length"] // heads
    return found


def _experts(metadata: Fields, architecture: Any) -> tuple[Family, dict[str, Any]]:
    """(model_type, what a config.json says of experts): llama with experts is Mixtral."""
    key = f"{architecture}.expert_count"
    mixture: Any = {"llama": "mixtral", "qwen3moe": "qwen3_moe"}.get(architecture)
    count = metadata.whole(key, most=4096) if key in metadata or mixture == "qwen3_moe" else 0
    if mixture is None and count > 0:
        raise metadata.error(key, f"0: experts of {architecture} are not supported")
    if mixture is None or (architecture == "llama" and count == 0):
        return _RENAMED.get(architecture, architecture), {}
    found = {
        "num_experts_per_tok": metadata.whole(f"{architecture}.expert_used_count", least=1),
        "num_local_experts": count,
        "norm_topk_prob": True,
    }
    if mixture == "qwen3_moe":
        found["moe_intermediate_size"] = metadata.whole(f"{architecture}.expert_feed_forward_length", least=1)
    return mixture, found


def _refuse_unsupported(metadata: Fields, prefix: str, *, longrope: bool, local: bool) -> None:
    for key, harmless in _WITHOUT_EFFECT.items():
        if longrope and key == "rope.scaling.attn_factor":
            continue
        if prefix + key in metadata and metadata[prefix + key] not in harmless:
            raise metadata.error(prefix + key, f"{' or '.join(map(str, harmless))}, others are not supported")
    for key in metadata:
        part = key.removeprefix(f"{prefix}rope.")
        known = part in _ROPE_KEYS or (local and part == "freq_base_swa") or f"rope.{part}" in _WITHOUT_EFFECT
        if part != key and not known:
            raise InputError(f"{metadata.source}: {key} is not supported")


def _rope(
    metadata: Fields, tensors: Mapping[str, gguf_file.Tensor], architecture: str, head_dim: int, context: int
) -> dict[str, Any]:
    """What a config.json says for rotary embedding."""
    prefix = f"{architecture}.rope."
    rotated = metadata.whole(f"{prefix}dimension_count", head_dim, least=2, most=head_dim)
    fraction = rotated / head_dim
    if int(head_dim * fraction) < rotated:  # which the rounded ratio may miss
        fraction = math.nextafter(fraction, 1.0)
    theta = _shortest(metadata.number(f"{prefix}freq_base", 10000.0, above=1))
    found = {"rope_theta": theta, "partial_rotary_factor": fraction}
    if LONG_FACTORS in tensors:
        return found | _longrope(metadata, tensors, f"{prefix}scaling.", context)
    return found | {"rope_scaling": _rope_scaling(metadata, tensors, architecture, theta, rotated, context)}


def _rope_scaling(
    metadata: Fields,
    tensors: Mapping[str, gguf_file.Tensor],
    architecture: str,
    theta: float,
    head_dim: int,
    context: int,
) -> dict[str, Any] | None:
    """What `rope_scaling` of a config.json says for it.

    Without a type the factor is linear's, under its older key, too, and a factor of 0 is 1: llama.cpp's rules.
    """
    prefix = f"{architecture}.rope."
    kind = metadata.text(f"{prefix}scaling.type", "linear")
    if kind not in ("none", "linear", "yarn"):
        raise metadata.error(f"{prefix}scaling.type", "none, linear or yarn, others are not supported")
    key = f"{prefix}scaling.factor" if f"{prefix}scaling.factor" in metadata else f"{prefix}scale_linear"
    factor = _shortest(metadata.number(key, 1.0)) or 1.0
    if factor < 1e-6:
        raise metadata.error(key, "a number of at least 0")
    for part, harmless in (("ext_factor", (-1, 1) if kind == "yarn" else (-1, 0)), ("attn_factor", (1,))):
        if (found := metadata.get(f"{prefix}scaling.yarn_{part}")) is not None and found not in harmless:
            raise metadata.error(f"{prefix}scaling.yarn_{part}", " or ".join(map(str, harmless)))
    scaled = kind != "none" and factor != 1
    if ROPE_FACTORS in tensors:
        if scaled:
            raise metadata.error(key, f"1 beside the tensor {ROPE_FACTORS}")
        return _llama3_scaling(tensors[ROPE_FACTORS], theta, head_dim)
    if not scaled:
        return None
    found = {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        fast = _shortest(metadata.number(f"{prefix}scaling.yarn_beta_fast", 32.0, above=0))
        slow = _shortest(metadata.number(f"{prefix}scaling.yarn_beta_slow", 1.0, above=0))
        if slow > fast:
            raise metadata.error(f"{prefix}scaling.yarn_beta_slow", f"at most yarn_beta_fast, {fast}")
        original = metadata.whole(f"{prefix}scaling.original_context_length", 0) or context
        found |= {"original_max_position_embeddings": original, "beta_fast": fast, "beta_slow": slow}
    return found


def _longrope(metadata: Fields, tensors: Mapping[str, gguf_file.Tensor], prefix: str, context: int) -> dict[str, Any]:
    """What a config.json says for the two tables of divisors; attn_factor is what cos and sin are multiplied by."""
    if metadata.text(f"{prefix}type", "longrope") not in ("longrope", "none"):
        raise metadata.error(f"{prefix}type", f"none or longrope beside the tensor {LONG_FACTORS}")
    found: dict[str, Any] = {"rope_type": "longrope"}
    for key, name in (("short_factor", SHORT_FACTORS), ("long_factor", LONG_FACTORS)):
        if name not in tensors:
            raise InputError(f"{metadata.source}: tensor {name} is missing")
        found[key] = [_shortest(x) for x in gguf_file.read(tensors[name]).reshape(-1)]
    original = metadata.whole(f"{prefix}original_context_length", context, least=1)
    if f"{prefix}attn_factor" in metadata:
        found["attention_factor"] = _shortest(metadata.number(f"{prefix}attn_factor"))
    return {"rope_scaling": found, "original_max_position_embeddings": original}


def _llama3_scaling(table: gguf_file.Tensor, theta: float, head_dim: int) -> dict[str, Any]:
    """Llama 3's rope scaling from the table of divisors that llama.cpp makes of it.

    The table does not determine the rule's numbers; those of every released Llama 3.1 to 3.3 are tried, and the table
    must follow from them.
    """
    plain, _ = inverse_frequencies(Rope(theta), head_dim)
    factors = gguf_file.read(table) if table.shape == plain.shape else np.zeros(1)
    if np.isfinite(factors).all() and factors.min() > 0:
        rule = Rope(theta, "llama3", float(round(float(factors.max()), 3)), 1.0, 4.0, 8192)
        scaled, _ = inverse_frequencies(rule, head_dim)
        if np.allclose(plain / scaled, factors, rtol=1e-4, atol=0):
            return {
                "rope_type": "llama3",
                "factor": rule.factor,
                "low_freq_factor": rule.low_freq_factor,
                "high_freq_factor": rule.high_freq_factor,
                "original_max_position_embeddings": rule.original_max_positions,
            }
    raise InputError(
        f"{table.file}: {ROPE_FACTORS} does not follow Llama 3's rule with frequency factors 1 and 4 of 8192"
    )


def _shortest(value: float) -> float:
    """The shortest decimal that is this float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))
