# SPDX-License-Identifier: Apache-2.0
"""Architecture numbers of a decoder, read from a checkpoint's config.json and written back to one."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from rapid_jax.runtime.errors import InputError

Family = Literal["llama", "mistral", "qwen2"]
_ARCHITECTURES: dict[Family, str] = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
}
# A key that one of our fields or `to_hf` states; every other key of config.json is carried through as it is.
_STATED = frozenset(
    (
        *("architectures", "model_type", "vocab_size", "hidden_size", "intermediate_size", "hidden_act"),
        *("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps"),
        *("max_position_embeddings", "original_max_position_embeddings", "tie_word_embeddings"),
        *("rope_theta", "rope_scaling", "rope_parameters", "attention_bias", "mlp_bias"),
        *("sliding_window", "use_sliding_window", "max_window_layers", "layer_types"),
        *("torch_dtype", "dtype", "transformers_version", "_name_or_path"),
    )
)


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding: base, and how its frequencies are scaled for longer contexts.

    `scaling` names the rule; the fields below it belong to that rule and are None for the others.
    """

    theta: float
    scaling: Literal["default", "linear", "llama3", "yarn"] = "default"
    factor: float | None = None  # linear, llama3, yarn: the context is stretched by this
    low_freq_factor: float | None = None  # llama3
    high_freq_factor: float | None = None  # llama3
    original_max_positions: int | None = None  # llama3, yarn: context length before scaling
    beta_fast: float | None = None  # yarn
    beta_slow: float | None = None  # yarn
    attention_factor: float | None = None  # yarn: multiplies cos and sin; None = derived from factor
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn
    truncate: bool = True  # yarn: round the correction range to whole dimensions


@dataclass(frozen=True)
class ModelConfig:
    """What a Llama-like decoder is made of. No default for a number that a checkpoint decides."""

    family: Family
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    rope: Rope
    max_positions: int
    tie_embeddings: bool
    qkv_bias: bool = False
    # The keys of config.json that change no number here (token ids, initializer_range, ...): a JSON object with sorted
    # keys, as text, so that a config stays hashable. An export writes them back.
    carried: str = field(default="{}", repr=False)

    @property
    def context_size(self) -> int:
        """Positions that the model was made for; yarn stretches what a checkpoint states as its maximum."""
        rope = self.rope
        if rope.scaling != "yarn" or rope.factor is None or rope.original_max_positions is None:
            return self.max_positions
        return max(self.max_positions, int(rope.factor * rope.original_max_positions))

    def carried_keys(self) -> dict[str, Any]:
        """The keys of config.json that no field here stands for, such as `eos_token_id`."""
        return json.loads(self.carried)


def from_hf(config: Mapping[str, Any]) -> ModelConfig:
    """The architecture that a Hugging Face config.json describes, as transformers reads it.

    Both spellings of rope are read: `rope_theta` with `rope_scaling`, and transformers 5's `rope_parameters`. Raises
    InputError naming the key when the config asks for something that would change a number and is not implemented.
    """
    family = _family(config)
    _refuse_unsupported(family, config)
    heads = _whole(config, "num_attention_heads")
    hidden = _whole(config, "hidden_size")
    max_positions = _whole(config, "max_position_embeddings")
    if config.get("head_dim") is None and hidden % heads:
        raise InputError(f"config.json: hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
    head_dim = hidden // heads if config.get("head_dim") is None else _whole(config, "head_dim")
    if head_dim % 2:
        raise InputError(f"config.json: head_dim {head_dim} is odd; rotary embedding turns pairs")
    # Llama's first checkpoints leave the number of kv heads out, and any family may write null: one a query head.
    implied = family == "llama" or "num_key_value_heads" in config
    kv_heads = heads if implied and config.get("num_key_value_heads") is None else _whole(config, "num_key_value_heads")
    if heads % kv_heads:
        raise InputError(
            f"config.json: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
        )
    layers = _whole(config, "num_hidden_layers")
    _refuse_sliding_window(family, config, layers, max_positions)
    return ModelConfig(
        family=family,
        vocab_size=_whole(config, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=_whole(config, "intermediate_size"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        norm_eps=_number(config, "rms_norm_eps"),
        rope=_rope(config, max_positions),
        max_positions=max_positions,
        tie_embeddings=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=family == "qwen2",
        carried=json.dumps({key: config[key] for key in sorted(config) if key not in _STATED}, sort_keys=True),
    )


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """The config.json that transformers (4 and 5) and `from_hf` read back as this architecture.

    Rope is written in the older spelling, which both generations of transformers and the serving engines read.
    """
    stated: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[config.family]],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.norm_eps,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_positions,
        "tie_word_embeddings": config.tie_embeddings,
        "rope_theta": config.rope.theta,
        "rope_scaling": _rope_scaling(config.rope),
    }
    # What the decoder does, whatever the original file said about a window that never closed.
    stated |= {
        "llama": {"attention_bias": False, "mlp_bias": False},
        "mistral": {"sliding_window": None},
        "qwen2": {"use_sliding_window": False, "sliding_window": None, "max_window_layers": config.num_layers},
    }[config.family]
    return config.carried_keys() | stated


def _family(config: Mapping[str, Any]) -> Family:
    family = config.get("model_type")
    if family not in _ARCHITECTURES:
        raise InputError(f"config.json: model_type {family!r} is not supported; supported: {', '.join(_ARCHITECTURES)}")
    for name in config.get("architectures") or []:
        if name != _ARCHITECTURES[family]:
            raise InputError(
                f"config.json: architecture {name!r} is not supported; expected {_ARCHITECTURES[family]!r}"
            )
    return family


def _refuse_unsupported(family: Family, config: Mapping[str, Any]) -> None:
    if config.get("hidden_act", "silu") != "silu":
        raise InputError(f"config.json: hidden_act {config['hidden_act']!r} is not supported; expected 'silu'")
    refused = {"quantization_config": "quantised weights", "use_mrope": "multimodal rotary embedding"}
    if family == "llama":
        refused |= {"attention_bias": "biases on all four attention projections", "mlp_bias": "biases in the MLP"}
    for key, meaning in refused.items():
        if config.get(key):
            raise InputError(f"config.json: {key} ({meaning}) is not supported")


def _refuse_sliding_window(family: Family, config: Mapping[str, Any], layers: int, max_positions: int) -> None:
    """A window narrower than the longest sequence is refused: every layer here sees the whole sequence."""
    if family == "mistral":
        window = config.get("sliding_window", 4096)  # transformers' value where the key is absent
        sliding = True
    elif family == "qwen2":
        window = config.get("sliding_window", 4096)
        kinds = config.get("layer_types")
        full_layers = config.get("max_window_layers", 28)
        sliding = "sliding_attention" in kinds if kinds else full_layers < layers
        sliding = sliding and bool(config.get("use_sliding_window", False))
    else:
        return
    if sliding and window is not None and window < max_positions:
        raise InputError(
            f"config.json: sliding_window {window} is narrower than max_position_embeddings {max_positions}; "
            "sliding-window attention is not supported"
        )


def _rope(config: Mapping[str, Any], max_positions: int) -> Rope:
    """Precedence as in transformers: rope_scaling over rope_parameters, and a base inside either over the outer one."""
    given: dict[str, Any] = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in ("default", "linear", "llama3", "yarn"):
        raise InputError(f"config.json: rope type {kind!r} is not supported; supported: default, linear, llama3, yarn")
    partial = given.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise InputError(f"config.json: partial_rotary_factor {partial} is not supported; expected 1")
    theta = given.get("rope_theta", config.get("rope_theta"))
    theta = 10000.0 if theta is None else float(theta)
    if kind == "default":
        return Rope(theta)
    original = config.get("original_max_position_embeddings", given.get("original_max_position_embeddings"))
    original = max_positions if original is None else int(original)
    if kind == "yarn" and given.get("factor") is None:
        given["factor"] = max_positions / original
    factor = _number(given, "factor")
    if kind == "linear":
        return Rope(theta, "linear", factor)
    if kind == "llama3":
        low, high = _number(given, "low_freq_factor"), _number(given, "high_freq_factor")
        return Rope(theta, "llama3", factor, low, high, original)
    optional = {
        key: None if given.get(key) is None else _number(given, key)
        for key in ("attention_factor", "mscale", "mscale_all_dim")
    }
    return Rope(
        theta,
        "yarn",
        factor,
        original_max_positions=original,
        beta_fast=float(given.get("beta_fast") or 32),
        beta_slow=float(given.get("beta_slow") or 1),
        truncate=bool(given.get("truncate", True)),
        **optional,
    )


def _rope_scaling(rope: Rope) -> dict[str, Any] | None:
    if rope.scaling == "default":
        return None
    given: dict[str, Any] = {
        "rope_type": rope.scaling,
        "factor": rope.factor,
        "low_freq_factor": rope.low_freq_factor,
        "high_freq_factor": rope.high_freq_factor,
        "original_max_position_embeddings": rope.original_max_positions,
        "beta_fast": rope.beta_fast,
        "beta_slow": rope.beta_slow,
        "attention_factor": rope.attention_factor,
        "mscale": rope.mscale,
        "mscale_all_dim": rope.mscale_all_dim,
        "truncate": None if rope.truncate else False,
    }
    return {key: value for key, value in given.items() if value is not None}


def _whole(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"config.json: {key} must be a positive whole number, got {value!r}")
    return value


def _number(config: Mapping[str, Any], key: str) -> float:
    value = config.get(key)
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise InputError(f"config.json: {key} must be a number, got {value!r}")
    return float(value)
