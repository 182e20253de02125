# SPDX-License-Identifier: Apache-2.0
"""Architecture numbers of a decoder, read from a checkpoint's config.json and written back to one."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from rapid_jax.model.experts_config import KEYS as EXPERT_KEYS
from rapid_jax.model.experts_config import Experts
from rapid_jax.model.families import TRAITS, Family, Traits, lacking
from rapid_jax.model.rope_config import MOST_POSITIONS, Rope, read_rope, rope_scaling
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.json_input import Fields

# A key that one of our fields or `to_hf` states; every other key of config.json is carried through as it is.
_STATED = frozenset(
    (
        *("architectures", "model_type", "vocab_size", "hidden_size", "intermediate_size", "hidden_act"),
        *("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps"),
        *("max_position_embeddings", "original_max_position_embeddings", "tie_word_embeddings"),
        *("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "attention_bias", "mlp_bias"),
        *("sliding_window", "use_sliding_window", "max_window_layers", "layer_types", "no_rope_layers"),
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
_MOST_ID: Final = 2**31 - 1  # of a token: an int32
# Keys that change what the weights mean, or which files they are in.
_WHOLLY_REFUSED: Final = {
    "quantization_config": "a checkpoint of quantised weights",
    "per_layer_config": "a layer with a configuration of its own",
    "transformers_weights": "a file of weights by another name",
}
# Keys that are refused where they are true; a bias where the family may have one.
_SWITCHED: Final = {
    "use_mrope": "multimodal rotary embedding",
    "attention_bias": "biases on all four attention projections",
    "mlp_bias": "biases in the MLP",
}


@dataclass(frozen=True)
class LayerKind:
    """What a layer may have otherwise than its neighbours."""

    rotated: bool = True  # q and k are turned by their positions; else attention sees their order alone
    experts: bool = False  # in the place of its MLP


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
    def kinds(self) -> tuple[LayerKind, ...]:
        """The kinds that layers are of, each once, in the order of its first layer."""
        return tuple(dict.fromkeys(self.pattern[: self.num_layers]))

    @property
    def kind_of(self) -> tuple[int, ...]:
        """Which of `kinds` each layer is of."""
        return tuple(self.kinds.index(self.pattern[at % len(self.pattern)]) for at in range(self.num_layers))

    def carried_keys(self) -> dict[str, Any]:
        """The keys of config.json that no field here stands for, such as `eos_token_id`."""
        return json.loads(self.carried)


def from_hf(config: Mapping[str, Any]) -> ModelConfig:
    """The architecture that a Hugging Face config.json describes, as transformers reads it.

    Both spellings of rope are read: `rope_theta` with `rope_scaling`, and transformers 5's `rope_parameters`. Raises
    InputError naming the file and the key when a value is of another type or size than a model can have, and when the
    config asks for something that would change a number and is not implemented. `Fields` bring the name of their file.
    """
    fields = config if isinstance(config, Fields) else Fields(config, "config.json")
    family = _family(fields)
    traits = TRAITS[family]
    _refuse_unsupported(traits, fields)
    _check_token_ids(fields)
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
        tie_embeddings=fields.truth("tie_word_embeddings", traits.tied),
        qkv_bias=traits.qkv_bias,
        qk_norm=traits.qk_norm,
        joined=traits.joined,
        experts=None if traits.mixture is None else traits.mixture.experts(fields),
        pattern=_pattern(fields, traits, layers),
        carried=json.dumps({key: fields[key] for key in sorted(fields) if key not in _STATED}, sort_keys=True),
    )
    _refuse_sliding_window(fields, read, traits)
    return read


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
        "hidden_act": "silu",
        "max_position_embeddings": config.max_positions,
        "tie_word_embeddings": config.tie_embeddings,
        "rope_theta": config.rope.theta,
        "rope_scaling": rope_scaling(config.rope),
    }
    # What the decoder does, whatever the original file said about a window that never closed.
    stated |= dict.fromkeys(traits.biases, False)
    if traits.windows != "none":
        stated["sliding_window"] = None
    if traits.windows == "last":
        stated |= {"use_sliding_window": False, "max_window_layers": config.num_layers}
    if traits.unrotated:
        rotated = [int(config.kinds[kind].rotated) for kind in config.kind_of]
        stated |= {"use_sliding_window": False, "no_rope_layers": rotated}
    if traits.partial:
        stated["partial_rotary_factor"] = config.rope.fraction
    if traits.original is not None:
        stated["original_max_position_embeddings"] = config.rope.original_max_positions or traits.original
    if traits.mixture is not None and config.experts is not None:
        stated |= traits.mixture.to_hf(config.experts, [config.kinds[kind].experts for kind in config.kind_of])
    return config.carried_keys() | stated


def _family(config: Fields) -> Family:
    family: Any = config.text("model_type")
    if family not in TRAITS:
        expected = f"one of {', '.join(TRAITS)}: "
        reason = lacking(family)
        raise config.error("model_type", expected + (f"{reason} is not supported" if reason else "others are not"))
    if any(name != TRAITS[family].architecture for name in config.texts("architectures", [])):
        raise config.error("architectures", f"[{TRAITS[family].architecture!r}]: others are not supported")
    return family


def _refuse_unsupported(traits: Traits, config: Fields) -> None:
    if "hidden_act" in config and config.text("hidden_act") != "silu":
        raise config.error("hidden_act", "'silu': others are not supported")
    for key, meaning in _WHOLLY_REFUSED.items():
        if config.get(key) is not None:
            raise config.error(key, f"null: {meaning} is not supported")
    for key, meaning in _SWITCHED.items():
        if (key in traits.biases or key == "use_mrope") and config.truth(key, False):
            raise config.error(key, f"false: {meaning} is not supported")


def _pattern(config: Fields, traits: Traits, layers: int) -> tuple[LayerKind, ...]:
    """The shortest pattern that the layers repeat."""
    sparse = (False,) * layers if traits.mixture is None else traits.mixture.layers(config, layers)
    rotated = _rotated(config, layers) if traits.unrotated else [1] * layers
    kinds = [LayerKind(bool(turned), experts) for turned, experts in zip(rotated, sparse, strict=True)]
    size = next(size for size in range(1, layers + 1) if all(a == b for a, b in zip(kinds, kinds[size:], strict=False)))
    return tuple(kinds[:size])


def _rotated(config: Fields, layers: int) -> list[int]:
    """1 for each layer with rotary embedding, 0 for one without."""
    rotated = config.wholes("no_rope_layers", None, most=1)
    if rotated is None:
        every = config.whole("no_rope_layer_interval", 4, least=1)
        rotated = [int((layer + 1) % every != 0) for layer in range(layers)]
    if len(rotated) < layers:
        raise config.error("no_rope_layers", f"a list of as many as num_hidden_layers, {layers}")
    return rotated[:layers]


def _check_token_ids(config: Fields) -> None:
    """Refuses ids that are no ids. They are carried, not used here; -1 is what old checkpoints write for no padding."""
    for key in ("bos_token_id", "pad_token_id"):
        config.whole(key, None, least=-1)
    if isinstance(config.get("eos_token_id"), list):
        config.wholes("eos_token_id", most=_MOST_ID)
    else:
        config.whole("eos_token_id", None, most=_MOST_ID)


def _refuse_sliding_window(config: Fields, read: ModelConfig, traits: Traits) -> None:
    """A window narrower than the longest sequence is refused: every layer here sees the whole sequence."""
    kinds = config.texts("layer_types", None)
    if kinds is not None and set(kinds) - {"full_attention", "sliding_attention"}:
        raise config.error("layer_types", "a list of full_attention and sliding_attention: others are not supported")
    if kinds is not None and len(kinds) != read.num_layers:
        raise config.error("layer_types", f"a list of as many as num_hidden_layers, {read.num_layers}")
    # transformers' values where the keys are absent; where sliding_window is null no window closes.
    window = traits.window if "sliding_window" not in config else config.whole("sliding_window", None)
    full_layers = config.whole("max_window_layers", 28)
    sliding = traits.windows == "all"
    if traits.windows == "last":
        last = full_layers < read.num_layers if kinds is None else "sliding_attention" in kinds
        sliding = config.truth("use_sliding_window", False) and last
    if traits.windows == "unrotated":
        some = not all(kind.rotated for kind in read.kinds) if kinds is None else "sliding_attention" in kinds
        sliding = config.truth("use_sliding_window", False) and some
    if sliding and window is not None and window < read.context_size:
        raise InputError(
            f"{config.source}: sliding_window {window} is narrower than the context of {read.context_size}; "
            "sliding-window attention is not supported"
        )


def _size(config: Fields, key: str) -> int:
    return config.whole(key, least=1, most=_MOST[key])
