# SPDX-License-Identifier: Apache-2.0
"""Architecture numbers of a decoder, read from a checkpoint's config.json and written back to one."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from rapid_jax.model.config_checks import check_token_ids, family_of, refuse_unsupported, sees_both_ways, text_part
from rapid_jax.model.experts_config import KEYS as EXPERT_KEYS
from rapid_jax.model.experts_config import Experts
from rapid_jax.model.families import TRAITS, Activation, Family, Traits
from rapid_jax.model.layer_kinds import LayerKind, layer_keys, read_pattern
from rapid_jax.model.rope_config import MOST_POSITIONS, Rope, read_rope, rope_scaling
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.json_input import Fields

# A key that one of our fields or `to_hf` states; every other key of config.json is carried through as it is.
_STATED = frozenset(
    (
        *("architectures", "model_type", "vocab_size", "hidden_size", "intermediate_size"),
        *("hidden_act", "hidden_activation", "query_pre_attn_scalar", "rope_local_base_freq"),
        *("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps"),
        *("max_position_embeddings", "original_max_position_embeddings", "tie_word_embeddings"),
        *("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "attention_bias", "mlp_bias"),
        *("sliding_window", "use_sliding_window", "max_window_layers", "layer_types", "no_rope_layers"),
        *("sliding_window_pattern", "_sliding_window_pattern"),
        *("torch_dtype", "dtype", "transformers_version", "_name_or_path"),
        *EXPERT_KEYS,
    )
)
# Of each size, several times that of the largest model there is: what is larger is damage, and is said before anything
# as long as it is made.
_MOST: Final = {
    "vocab_size": 2**24,
    "hidden_size": 2**18,
    "intermediate_size": 2**20,
    "num_hidden_layers": 2**12,
    "num_attention_heads": 2**12,
    "num_key_value_heads": 2**12,
    "head_dim": 2**14,
    "max_position_embeddings": MOST_POSITIONS,
}
_MOST_EPS: Final = 0.1  # of a norm; nothing is left of a hidden state whose square is far below it


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
    qk_norm: bool = False  # each head of q and k is normalised before it is rotated
    joined: bool = False  # of a checkpoint, q, k and v are one array, gate and up are another
    activation: Activation = "silu"  # of the MLP's gate
    post_norms: bool = False  # what attention and the MLP give is normalised, too, before it is added
    norm_offset: float = 0.0  # not 0: norms multiply by their weight and this, in float32
    embedding_scale: float = 1.0  # of the first layer's input, rounded to its dtype
    bidirectional: bool = False  # of an encoder: tokens see those behind them, and windows both sides
    query_pre_attn_scalar: int | None = None  # scores are divided by its root; None: by that of head_dim
    experts: Experts | None = None  # of the layers whose kind says so
    pattern: tuple[LayerKind, ...] = (LayerKind(),)  # of the first layers; the others repeat it
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

    @property
    def rotary_dim(self) -> int:
        """How much of a head is rotated, from its beginning."""
        return int(self.head_dim * self.rope.fraction)

    @property
    def query_scale(self) -> float:
        """What queries are multiplied by, so that scores need no other divisor than the root of head_dim."""
        scalar = self.query_pre_attn_scalar
        return 1.0 if scalar is None else (self.head_dim / scalar) ** 0.5

    @property
    def kinds(self) -> tuple[LayerKind, ...]:
        """The kinds that layers are of, each once, in the order of its first layer."""
        return tuple(dict.fromkeys(self.pattern[: self.num_layers]))

    @property
    def kind_of(self) -> tuple[int, ...]:
        """Which of `kinds` each layer is of."""
        return tuple(self.kinds.index(self.pattern[at % len(self.pattern)]) for at in range(self.num_layers))

    @property
    def window_of(self) -> tuple[int | None, ...]:
        """The window of each layer, or None."""
        return tuple(self.kinds[kind].window for kind in self.kind_of)

    def carried_keys(self) -> dict[str, Any]:
        """The keys of config.json that no field here stands for, such as `eos_token_id`."""
        return json.loads(self.carried)


def from_hf(config: Mapping[str, Any], *, encodes: bool = False) -> ModelConfig:
    """The architecture that a Hugging Face config.json describes, as transformers reads it.

    Both spellings of rope are read: `rope_theta` with `rope_scaling`, and transformers 5's `rope_parameters`. Raises
    InputError naming the file and the key when a value is of another type or size than a model can have, and when the
    config asks for something that would change a number and is not implemented. `Fields` bring the name of their file.
    A model that `encodes` has no head, so its embedding counts as tied, and its tokens may see those behind them.
    """
    fields = text_part(config if isinstance(config, Fields) else Fields(config, "config.json"))
    family = family_of(fields, encodes=encodes)
    traits = TRAITS[family]
    fields = fields.over(traits.defaults)
    refuse_unsupported(traits, fields)
    bidirectional = sees_both_ways(traits, fields, encodes=encodes)
    check_token_ids(fields)
    heads, hidden, layers = (_size(fields, key) for key in ("num_attention_heads", "hidden_size", "num_hidden_layers"))
    stated = fields.get("head_dim") is not None
    if hidden % heads and (traits.whole_heads or not (stated or traits.head_dim)):
        raise fields.error("hidden_size", f"a multiple of num_attention_heads, {heads}")
    head_dim = _size(fields, "head_dim") if stated else traits.head_dim or hidden // heads
    if head_dim % 2:
        raise InputError(f"{fields.source}: head_dim {head_dim} is odd; rotary embedding turns pairs")
    # Llama's first checkpoints leave the number of kv heads out, and any family may write null: one a query head.
    implied = traits.implied_kv or "num_key_value_heads" in fields
    kv_heads = heads if implied and fields.get("num_key_value_heads") is None else _size(fields, "num_key_value_heads")
    if heads % kv_heads:
        raise fields.error("num_key_value_heads", f"a divisor of num_attention_heads, {heads}")
    max_positions = _size(fields, "max_position_embeddings")
    read = ModelConfig(
        family=family,
        vocab_size=_size(fields, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=_size(fields, "intermediate_size"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        norm_eps=fields.number("rms_norm_eps", above=0.0, most=_MOST_EPS),
        rope=read_rope(fields, max_positions, head_dim, traits),
        max_positions=max_positions,
        tie_embeddings=fields.truth("tie_word_embeddings", traits.tied) or encodes,
        qkv_bias=traits.qkv_bias,
        qk_norm=traits.qk_norm,
        joined=traits.joined,
        activation=traits.activation[1],
        post_norms=traits.post_norms,
        norm_offset=traits.norm_offset,
        embedding_scale=hidden**0.5 if traits.scaled_embedding else 1.0,
        bidirectional=bidirectional,
        query_pre_attn_scalar=_query_scalar(fields, traits),
        experts=None if traits.mixture is None else traits.mixture.experts(fields),
        carried=json.dumps({key: fields[key] for key in sorted(fields) if key not in _STATED}, sort_keys=True),
    )
    return replace(read, pattern=read_pattern(fields, traits, layers, read.context_size, bidirectional))


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """The config.json that transformers (4 and 5) and `from_hf` read back as this architecture.

    Rope is written in the older spelling, which both generations of transformers and the serving engines read.
    """
    traits = TRAITS[config.family]
    stated: dict[str, Any] = {
        "architectures": [traits.architecture],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.norm_eps,
        traits.activation[0]: config.activation,
        "max_position_embeddings": config.max_positions,
        "tie_word_embeddings": config.tie_embeddings,
        "rope_theta": config.rope.theta,
        "rope_scaling": rope_scaling(config.rope),
    }
    kinds = [config.kinds[kind] for kind in config.kind_of]
    stated |= dict.fromkeys(traits.biases, False) | layer_keys(kinds, traits, config.context_size)
    if config.query_pre_attn_scalar is not None:
        stated["query_pre_attn_scalar"] = config.query_pre_attn_scalar
    if traits.partial:
        stated["partial_rotary_factor"] = config.rope.fraction
    if traits.original is not None:
        stated["original_max_position_embeddings"] = config.rope.original_max_positions or traits.original
    if traits.mixture is not None and config.experts is not None:
        stated |= traits.mixture.to_hf(config.experts, [config.kinds[kind].experts for kind in config.kind_of])
    return config.carried_keys() | stated


def _query_scalar(config: Fields, traits: Traits) -> int | None:
    key = "query_pre_attn_scalar"
    return config.whole(key, least=1, most=2**20) if key in traits.defaults else None


def _size(config: Fields, key: str) -> int:
    return config.whole(key, least=1, most=_MOST[key])
