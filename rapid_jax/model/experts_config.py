# SPDX-License-Identifier: Apache-2.0
"""Numbers of a mixture of experts, read from a checkpoint's config.json and written back to one."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from rapid_jax.runtime.json_input import Fields

_MOST_EXPERTS: Final = 2**12
_MOST_WIDTH: Final = 2**20
KEYS: Final = (  # which a field of `Experts` or a layer's kind states
    *("num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"),
    *("decoder_sparse_step", "mlp_only_layers"),
)


@dataclass(frozen=True)
class Experts:
    """The experts that take an MLP's place in a layer: each is an MLP of its own, and every token goes to a few."""

    count: int
    per_token: int
    ffn: int  # width of an expert
    normalized: bool  # the weights of a token's experts sum to 1; else they are their part of all experts' softmax

    def touched(self, tokens: float) -> float:
        """Experts that so many tokens are expected to go to, if each goes to any of them alike, on its own:
        count (1 - (1 - per_token / count)^tokens).
        """
        return self.count * (1 - (1 - self.per_token / self.count) ** tokens)


@dataclass(frozen=True)
class Mixture:
    """How a family's checkpoints name and describe experts."""

    module: str  # of a layer, which holds the router and the experts
    gate: str
    up: str
    down: str
    count: str  # the key of their number
    ffn: str  # the key of their width
    normalized: bool | None = None  # what the family always does; None: as norm_topk_prob says
    mixed: bool = False  # some layers may have an MLP: those of mlp_only_layers, and all but every decoder_sparse_step

    def experts(self, fields: Fields) -> Experts:
        """The numbers. Raises InputError naming the file and the key for what is missing or impossible."""
        key = self.count if self.count in fields else "num_local_experts"
        count = fields.whole(key if key in fields else self.count, least=1, most=_MOST_EXPERTS)
        normalized = fields.truth("norm_topk_prob", False) if self.normalized is None else self.normalized
        return Experts(
            count=count,
            per_token=fields.whole("num_experts_per_tok", least=1, most=count),
            ffn=fields.whole(self.ffn, least=1, most=_MOST_WIDTH),
            normalized=normalized,
        )

    def layers(self, fields: Fields, count: int) -> tuple[bool, ...]:
        """Of each layer whether it has experts in the place of its MLP."""
        if not self.mixed:
            return (True,) * count
        step = fields.whole("decoder_sparse_step", 1, least=1)
        dense = fields.wholes("mlp_only_layers", None, most=2**31 - 1) or []
        return tuple(layer not in dense and (layer + 1) % step == 0 for layer in range(count))

    def to_hf(self, experts: Experts, layers: Sequence[bool]) -> dict[str, Any]:
        """The keys of a config.json that `experts` and `layers` read back."""
        found: dict[str, Any] = {
            self.count: experts.count,
            "num_experts_per_tok": experts.per_token,
            self.ffn: experts.ffn,
        }
        if self.normalized is None:
            found["norm_topk_prob"] = experts.normalized
        if self.mixed:
            dense = [layer for layer, sparse in enumerate(layers) if not sparse]
            found |= {"decoder_sparse_step": 1, "mlp_only_layers": dense}
        return found
