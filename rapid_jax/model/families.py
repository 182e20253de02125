# SPDX-License-Identifier: Apache-2.0
"""What a config.json means by its family's name: the one place where a family is more than the data of a config."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final, Literal

from rapid_jax.model.experts_config import Mixture

Family = Literal["llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "smollm3", "phi3", "gemma3_text"]
# Which layers a sliding window is of: of none, of every one, of those behind the first max_window_layers, of those
# without rotary embedding, of all but one in sliding_window_pattern, of every one where use_sliding_window says so.
Windows = Literal["none", "all", "last", "unrotated", "local", "switched"]
Activation = Literal["silu", "gelu_pytorch_tanh"]  # of the MLP's gate


@dataclass(frozen=True)
class Traits:
    """What all checkpoints of a family have, and what keys stand for that they leave out."""

    architecture: str
    qkv_bias: bool = False
    qk_norm: bool = False
    biases: tuple[str, ...] = ()  # keys of biases that are refused
    windows: Windows = "none"
    window: int | None = None  # sliding_window where it is left out
    head_dim: int | None = None  # where it is left out; None: hidden_size / num_attention_heads
    whole_heads: bool = False  # hidden_size is a multiple of num_attention_heads, whatever head_dim says
    unrotated: bool = False  # no_rope_layers or no_rope_layer_interval say which layers have no rotary embedding
    theta: float = 10000.0  # rope_theta where it is left out
    partial: bool = False  # partial_rotary_factor may say that only the first part of a head is rotated
    rope_names: Mapping[str, str] = field(default_factory=dict)  # rules of rope that stand for others
    original: int | None = None  # original_max_position_embeddings, which is then outside of rope_scaling
    joined: bool = False  # q, k and v are one array of the checkpoint, gate and up are another
    tied: bool = False  # tie_word_embeddings where it is left out
    implied_kv: bool = False  # num_key_value_heads may be left out: one a query head
    activation: tuple[str, Activation] = ("hidden_act", "silu")  # the key that states it, and the one there is
    post_norms: bool = False  # what attention and the MLP give is normalised, too, before it is added
    norm_offset: float = 0.0  # norms multiply by their weight and this, in float32
    scaled_embedding: bool = False  # by the root of hidden_size
    bidirectional: bool = False  # use_bidirectional_attention may say that tokens see those behind them: encoders alone
    local_theta: float | None = None  # rope_local_base_freq where it is left out; None: all layers have one base
    refused: tuple[str, ...] = ()  # keys that change a number wherever they are neither null nor false
    defaults: Mapping[str, int | float] = field(default_factory=dict)  # of sizes that such a config.json may leave out
    mixture: Mixture | None = None  # its layers have experts in the place of an MLP

    @property
    def without_head(self) -> tuple[str, ...]:
        """What transformers calls the architecture where it makes no logits."""
        stem = self.architecture.removesuffix("ForCausalLM")
        return f"{stem}Model", f"{stem}TextModel"


# transformers' own: the first checkpoints with a vision tower state what differs from its 4B.
_GEMMA3: Final = MappingProxyType(
    {
        "vocab_size": 262208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 131072,
    }
)
# Models of text and more -> the family of their part that is a decoder of text, which config.json has as text_config.
TEXT_PARTS: Final[Mapping[str, Family]] = MappingProxyType({"gemma3": "gemma3_text"})
TRAITS: Final[Mapping[Family, Traits]] = MappingProxyType(
    {
        "llama": Traits("LlamaForCausalLM", biases=("attention_bias", "mlp_bias"), whole_heads=True, implied_kv=True),
        "mistral": Traits("MistralForCausalLM", windows="all", window=4096),
        "mixtral": Traits(
            "MixtralForCausalLM",
            windows="all",
            implied_kv=True,
            mixture=Mixture(
                "block_sparse_moe", "w1", "w3", "w2", "num_local_experts", "intermediate_size", normalized=True
            ),
        ),
        "qwen2": Traits("Qwen2ForCausalLM", qkv_bias=True, windows="last", window=4096),
        "qwen3": Traits(
            "Qwen3ForCausalLM", qk_norm=True, biases=("attention_bias",), windows="last", window=4096, head_dim=128
        ),
        "qwen3_moe": Traits(
            "Qwen3MoeForCausalLM",
            qk_norm=True,
            biases=("attention_bias",),
            windows="switched",
            window=4096,
            mixture=Mixture(
                *("mlp", "gate_proj", "up_proj", "down_proj", "num_experts", "moe_intermediate_size"), mixed=True
            ),
        ),
        "smollm3": Traits(
            "SmolLM3ForCausalLM",
            biases=("attention_bias", "mlp_bias"),
            windows="unrotated",
            unrotated=True,
            theta=2e6,
            tied=True,
        ),
        "phi3": Traits(
            "Phi3ForCausalLM",
            windows="all",
            partial=True,
            rope_names={"su": "longrope", "yarn": "longrope"},
            original=4096,
            joined=True,
            implied_kv=True,
        ),
        "gemma3_text": Traits(
            "Gemma3ForCausalLM",
            qk_norm=True,
            biases=("attention_bias",),
            windows="local",
            window=4096,
            whole_heads=True,
            theta=1e6,
            tied=True,
            activation=("hidden_activation", "gelu_pytorch_tanh"),
            post_norms=True,
            norm_offset=1.0,
            scaled_embedding=True,
            local_theta=1e4,
            bidirectional=True,
            refused=("final_logit_softcapping", "attn_logit_softcapping"),
            defaults=_GEMMA3,
        ),
    }
)
# By the beginning of model_type, the first that fits: what such a model has that no layer here does.
_LACKING: Final = {
    "llama4": "attention in chunks and a mixture of experts",
    "gpt_oss": "attention sinks and a mixture of experts",
    "qwen3_next": "linear attention",
    "qwen3_5": "linear attention",
    "gemma3n": "embeddings of each layer and keys that layers share",
    "gemma2": "soft caps of scores and logits",
    "gemma4": "heads of several sizes and keys that layers share",
    "recurrent_gemma": "a recurrence",
    "kimi_linear": "linear attention",
    "minimax": "linear attention",
    "jamba": "a state-space layer",
    "bamba": "a state-space layer",
    "falcon_h1": "a state-space layer",
    "granitemoehybrid": "a state-space layer",
    "nemotron_h": "a state-space layer",
    "lfm2": "a convolution in the place of attention",
    "phimoe": "a mixture of experts",
    "qwen2_moe": "a mixture of experts",
}


def lacking(model_type: str) -> str | None:
    """What keeps a model of another family from being read, as far as it is known."""
    return next((what for prefix, what in _LACKING.items() if model_type.startswith(prefix)), None)
