# SPDX-License-Identifier: Apache-2.0
"""Which array of a Hugging Face checkpoint, or which rows of one, is which parameter of the Decoder, and how it lies.

A checkpoint stores a linear layer as [out, in] with heads flattened into one axis. Each weight below names the axes of
the stored array by their letters with heads unflattened; ours are the letters in the parameter's own name. Going from
one to the other is: reshape to the stored letters, transpose to ours. All families use these names.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from rapid_jax.model.config import ModelConfig
from rapid_jax.model.families import TRAITS

Path = tuple[str | int, ...]


@dataclass(frozen=True)
class Stored:
    """One array of a checkpoint: a weight, or several one behind the other along its first axis."""

    key: str
    weights: tuple["Weight", ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """As it lies in the file."""
        rows, *rest = zip(*(weight.stored_shape for weight in self.weights), strict=True)
        return (sum(rows), *(sizes[0] for sizes in rest))

    def split(self, tensor: Any) -> Iterator[tuple["Weight", Any]]:
        """Each weight with the part of a file's tensor that it is: its rows, a tensor of its own."""
        start, row = tensor.start, tensor.size // tensor.shape[0]
        for weight in self.weights:
            size = weight.stored_shape[0] * row
            yield weight, replace(tensor, shape=weight.stored_shape, start=start, size=size)
            start += size


@dataclass(frozen=True)
class Weight:
    """One array of a checkpoint and the parameter that holds it.

    In the stacked layout the parameter at `path` holds every layer, this one as row `layer`.
    """

    key: str  # in the checkpoint: model.layers.3.self_attn.q_proj.weight
    name: str  # in its module: q_DNH
    stored_axes: str  # of the checkpoint's array with heads unflattened: NHD
    layer: int | None  # None outside the layers
    sizes: tuple[tuple[str, int], ...]  # letter -> size
    part_of: str | None = None  # the key of the array that holds it behind others, where it has none of its own
    expert: int | None = None  # of a mixture; the parameter holds every expert's, this one as row `expert`

    @property
    def axes(self) -> str:
        """The letters of our parameter, without the axes of layers and experts."""
        letters = self.name.rsplit("_", 1)[1]
        return letters if self.expert is None else letters.removeprefix("X")

    @property
    def shape(self) -> tuple[int, ...]:
        """Of our parameter, without the axes of layers and experts."""
        return tuple(dict(self.sizes)[letter] for letter in self.axes)

    def place(self, layout: str) -> tuple[int, ...]:
        """Which row of the parameter it is, by layer and expert as far as the parameter holds several."""
        layer = () if layout != "stacked" or self.layer is None else (self.layer,)
        return layer if self.expert is None else (*layer, self.expert)

    @property
    def unflattened_shape(self) -> tuple[int, ...]:
        """Of the checkpoint's array seen with `stored_axes`."""
        return tuple(dict(self.sizes)[letter] for letter in self.stored_axes)

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Of the checkpoint's array as it lies in the file: a bias is flat, a weight has two axes."""
        shape = self.unflattened_shape
        if "_bias_" in self.name:
            return (math.prod(shape),)
        # Heads are the first two letters of q, k and v, and the last two of o.
        if len(shape) == 3:
            return (shape[0], shape[1] * shape[2]) if self.name.startswith("o_") else (shape[0] * shape[1], shape[2])
        return shape

    @property
    def to_ours(self) -> tuple[int, ...]:
        """The transposition from `stored_axes` to `axes`."""
        return tuple(self.stored_axes.index(letter) for letter in self.axes)

    @property
    def to_stored(self) -> tuple[int, ...]:
        """The transposition from `axes` to `stored_axes`."""
        return tuple(self.axes.index(letter) for letter in self.stored_axes)

    def path(self, layout: str) -> Path:
        """Where the parameter is in the Decoder's state."""
        if self.layer is None:
            return (self.name,)
        return ("blocks", self.name) if layout == "stacked" else ("blocks", self.layer, self.name)


_BLOCK = (
    ("input_layernorm.weight", "attention_norm_D", "D"),
    ("self_attn.q_proj.weight", "q_DNH", "NHD"),
    ("self_attn.k_proj.weight", "k_DKH", "KHD"),
    ("self_attn.v_proj.weight", "v_DKH", "KHD"),
    ("self_attn.o_proj.weight", "o_NHD", "DNH"),
    ("post_attention_layernorm.weight", "mlp_norm_D", "D"),
)
_MLP = (
    ("mlp.gate_proj.weight", "gate_DF", "FD"),
    ("mlp.up_proj.weight", "up_DF", "FD"),
    ("mlp.down_proj.weight", "down_FD", "DF"),
)
# Of models that normalise before and after: there the second norm's name is the Llama family's third.
_POST_NORMS = (
    *_BLOCK[:5],
    ("post_attention_layernorm.weight", "attention_post_norm_D", "D"),
    ("pre_feedforward_layernorm.weight", "mlp_norm_D", "D"),
    *_BLOCK[6:],
    ("post_feedforward_layernorm.weight", "mlp_post_norm_D", "D"),
)
_BIASES = (
    ("self_attn.q_proj.bias", "q_bias_NH", "NH"),
    ("self_attn.k_proj.bias", "k_bias_KH", "KH"),
    ("self_attn.v_proj.bias", "v_bias_KH", "KH"),
)
_QK_NORMS = (
    ("self_attn.q_norm.weight", "q_norm_H", "H"),
    ("self_attn.k_norm.weight", "k_norm_H", "H"),
)
_JOINED = {
    **dict.fromkeys(("q_DNH", "k_DKH", "v_DKH"), "self_attn.qkv_proj.weight"),
    **dict.fromkeys(("gate_DF", "up_DF"), "mlp.gate_up_proj.weight"),
}
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


def weights(config: ModelConfig) -> tuple[Weight, ...]:
    """Every weight of this architecture, in the order of the forward pass."""
    sizes = tuple(
        {
            "V": config.vocab_size,
            "D": config.hidden_size,
            "N": config.num_heads,
            "K": config.num_kv_heads,
            "H": config.head_dim,
            "F": config.intermediate_size,
        }.items()
    )
    found = [Weight(EMBEDDING, "embed_VD", "VD", None, sizes)]
    block = _POST_NORMS if config.post_norms else _BLOCK
    block += (_BIASES if config.qkv_bias else ()) + (_QK_NORMS if config.qk_norm else ())
    joined = _JOINED if config.joined else {}
    for layer in range(config.num_layers):
        place = f"model.layers.{layer}."
        sparse = config.kinds[config.kind_of[layer]].experts
        for key, name, axes in block if sparse else block + _MLP:
            part_of = place + joined[name] if name in joined else None
            found.append(Weight(place + key, name, axes, layer, sizes, part_of))
        if sparse:
            found += _experts(config, layer, sizes)
    found.append(Weight("model.norm.weight", "norm_D", "D", None, sizes))
    if not config.tie_embeddings:
        found.append(Weight(HEAD, "head_DV", "VD", None, sizes))
    return tuple(found)


def _experts(config: ModelConfig, layer: int, sizes: tuple[tuple[str, int], ...]) -> Iterator[Weight]:
    """The router and every expert's matrices, one kind of them behind the other."""
    mixture, experts = TRAITS[config.family].mixture, config.experts
    assert mixture is not None and experts is not None
    place = f"model.layers.{layer}.{mixture.module}."
    sizes = tuple((dict(sizes) | {"X": experts.count, "F": experts.ffn}).items())
    yield Weight(f"{place}gate.weight", "router_DX", "XD", layer, sizes)
    for part, name, axes in (
        (mixture.gate, "gate_XDF", "FD"),
        (mixture.up, "up_XDF", "FD"),
        (mixture.down, "down_XFD", "DF"),
    ):
        for expert in range(experts.count):
            yield Weight(f"{place}experts.{expert}.{part}.weight", name, axes, layer, sizes, expert=expert)


def stored(config: ModelConfig) -> tuple[Stored, ...]:
    """Every array of this architecture's checkpoint, in the order of the forward pass."""
    groups = groupby(weights(config), key=lambda weight: weight.part_of or weight.key)
    return tuple(Stored(key, tuple(group)) for key, group in groups)
