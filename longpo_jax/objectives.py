# SPDX-License-Identifier: Apache-2.0
"""The objectives, one record each: its rows, what it needs of the reference, its loss, its settings. Imports no jax.

No other file asks for an objective's name: they ask a record. loss.py has the equations that the losses are made of.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

if TYPE_CHECKING:
    import jax

Name = Literal["longpo", "dpo", "sft", "solopo", "opsd"]
LogProbs: TypeAlias = Mapping[str, "jax.Array"]
# (of the policy, of the reference, settings by name) -> (a loss [B] that the NLL is added to, metrics [B] by name)
Loss: TypeAlias = Callable[[LogProbs, LogProbs, Mapping[str, float]], tuple["jax.Array", dict[str, "jax.Array"]]]


@dataclass(frozen=True)
class Sums:
    """Log-probabilities of answers by the reference: of each turn by itself, or of all turns of a record together."""

    names: tuple[str, ...]  # chosen answers first, then, if both are read, rejected ones
    behind: Literal["excerpt", "document"]
    together: bool = False


@dataclass(frozen=True)
class Objective:
    """What is minimised, and all that follows from it."""

    card: str  # the method, on the model card
    row: Literal["record", "turn"]  # what a long row is about: all turns of a record, or one
    forked: bool  # the long row has the rejected answers in its tail; else it has no tail
    short: bool = False  # a second row: one turn's two answers behind its excerpt
    sums: tuple[Sums, ...] = ()  # of the reference
    teacher: bool = False  # of the reference distributions, at each token of the rejected answers (teacher.py)
    loss: Loss | None = None  # beside the NLL
    weights: tuple[str, ...] = ()  # settings that must be above 0 for `loss` to teach something
    own: tuple[str, ...] = ()  # settings of `objective` that decide nothing of another one

    @property
    def of_reference(self) -> tuple[str, ...]:
        """The names of the sums."""
        return tuple(name for sums in self.sums for name in sums.names)

    @property
    def needs_reference(self) -> bool:
        """Whether the reference is asked at all."""
        return bool(self.sums) or self.teacher


def objective_of(name: str) -> Objective:
    """The record of a name; a ValueError if there is none."""
    if name not in OBJECTIVES:
        raise ValueError(f"unknown objective {name!r}")
    return OBJECTIVES[name]


def _preferred(policy: LogProbs, reference: LogProbs, weights: Mapping[str, float]) -> Any:
    from longpo_jax.loss import preferred

    return preferred(policy, reference, weights)


def _aligned(policy: LogProbs, reference: LogProbs, weights: Mapping[str, float]) -> Any:
    from longpo_jax.loss import aligned

    return aligned(policy, reference, weights)


def _distilled(policy: LogProbs, reference: LogProbs, weights: Mapping[str, float]) -> Any:
    del reference  # the divergence to it is the policy's kl_B
    kl = {"kl": policy["kl_B"], "teacher_rest": policy["teacher_rest_B"]}
    return weights["distillation_weight"] * policy["kl_B"], kl


_BOTH = ("chosen", "rejected")
_PREFERENCE = ("preference_weight", "beta")
OBJECTIVES: Mapping[str, Objective] = {
    "longpo": Objective(
        card="LongPO (arXiv:2502.13922): the model's own answers from short excerpts are preferred to its own answers "
        "from whole documents",
        row="record",
        forked=True,
        sums=(Sums(_BOTH, behind="excerpt"),),
        loss=_preferred,
        weights=_PREFERENCE,
    ),
    "dpo": Objective(
        card="DPO (arXiv:2305.18290) on the pairs of LongPO (arXiv:2502.13922)",
        row="record",
        forked=True,
        sums=(Sums(_BOTH, behind="document", together=True),),
        loss=_preferred,
        weights=_PREFERENCE,
    ),
    "sft": Objective(
        card="supervised training on the chosen answers of LongPO's pairs (arXiv:2502.13922)",
        row="record",
        forked=False,
    ),
    "solopo": Objective(
        card="SoLoPO (arXiv:2505.11166) on the pairs of LongPO (arXiv:2502.13922)",
        row="turn",
        forked=False,
        short=True,
        sums=(Sums(_BOTH, behind="excerpt"), Sums(("long_chosen",), behind="document")),
        loss=_aligned,
        weights=_PREFERENCE,
    ),
    "opsd": Objective(
        card="on-policy self-distillation (arXiv:2604.17535): the model on short excerpts teaches its own answers from "
        "whole documents, token by token",
        row="record",
        forked=True,
        teacher=True,
        loss=_distilled,
        weights=("distillation_weight",),
        own=("top_k", "distillation_weight"),
    ),
}
