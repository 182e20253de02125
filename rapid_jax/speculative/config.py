# SPDX-License-Identifier: Apache-2.0
"""What decides the tokens, apart from the two models and their prompts."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from rapid_jax.runtime.errors import InputError

Mode: TypeAlias = Literal["rapid", "lossless", "phat", "target", "retrieval"]
Guard: TypeAlias = Literal["code", "paper", "none"]
Rule: TypeAlias = Literal["target", "lossless", "rapid", "phat"]
MOST_DRAFTS = 64  # tokens drafted a round


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise InputError(message)


@dataclass(frozen=True)
class SamplingSettings:
    """What is asked for of sampling; null is what the checkpoint asks for (`speculative/own_sampling.py`)."""

    temperature: float | None = None  # 0 = greedy; null, here and below = as generation_config.json has it
    top_k: int | None = None  # only the k most probable tokens; 0 = off
    top_p: float | None = None  # only the most probable tokens of this mass; 1 = off
    min_p: float | None = None  # only tokens of this share of the largest probability; 0 = off
    repetition_penalty: float | None = None  # of tokens that were seen; 1 = off
    penalize: Literal["generated", "all"] | None = None  # what is penalised; all: each model's own prompt too
    max_new_tokens: int = 256  # of an answer, at most
    seed: int = 0  # the same seed gives the same tokens, on any mesh

    def __post_init__(self):
        def check(name: str, wanted: str, holds: Callable[[float], bool]) -> None:
            value = getattr(self, name)
            _require(value is None or holds(value), f"{name} must be {wanted}, got {value}")

        # Beyond these float32 has no room for logits divided by them.
        check("temperature", "a number >= 0, 0 or 1e-4 to 1e4", lambda value: value == 0 or 1e-4 <= value <= 1e4)
        check("top_k", ">= 0 (0 = off)", lambda value: value >= 0)
        check("top_p", "in (0, 1]", lambda value: 0 < value <= 1)
        check("min_p", "in [0, 1]", lambda value: 0 <= value <= 1)
        check("repetition_penalty", "a number > 0, 1e-3 to 1e3", lambda value: 1e-3 <= value <= 1e3)
        check("max_new_tokens", ">= 1", lambda value: value >= 1)
        check("seed", "in [0, 2^32)", lambda value: 0 <= value < 2**32)


@dataclass(frozen=True)
class SamplingConfig(SamplingSettings):
    """How a distribution is made of logits, in this order: repetition penalty, temperature, top-k, top-p, min-p."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    penalize: Literal["generated", "all"] = "generated"


@dataclass(frozen=True)
class SpeculationConfig:
    """How tokens are drafted and what is accepted (RAPID, arXiv 2502.20330).

    Modes:

    - rapid: the paper's rule as its released code runs it; with eta > 0 NOT the target's distribution; at temperature 0
      a drafted position has the argmax of the enriched p-hat (ours: the paper has no rule)
    - lossless: eta = 0, exactly the target's distribution, whatever the drafter
    - phat: at drafted positions exactly the enriched p-hat (residual max(p_hat - q, 0)), p elsewhere
    - target: the target alone on the whole document
    - retrieval: the drafter's prompt alone, answered by the target
    """

    mode: Mode = "rapid"  # the distribution that tokens are sampled from, above
    eta: float = 10.0  # how far the drafter moves the target, Eq. 6; 0: not at all; the paper has 10
    # Drafted tokens a round; auto: by measured times and acceptance, and its rounds of 0 are the target's own.
    gamma: int | Literal["auto"] = 10
    guard: Guard = "code"  # which tokens the drafter may move: as the released code, as Eq. 9 (paper), all (none)
    alpha: float = 0.1  # the guard's threshold, as a share of the largest probability
    transfer_temperature: float | None = 1.0  # of p and q where rapid and phat are greedy; null: the target's greedy
    confidence_stop: float = 0.0  # stop drafting after a token the drafter gave less than this; 0 = off
    # Prompt-lookup drafting (n-grams copied from text already read). It changes no token.
    lookup: Literal["off", "auto", "on"] = "auto"
    lookup_width: int = 6  # tokens copied at once
    lookup_match: int = 3  # tokens that must agree before a copy is proposed
    rounds_per_read: int = 4  # rounds on the device between two looks of the host

    def __post_init__(self):
        _require(0 <= self.eta <= 1e6, f"eta must be a number from 0 to 1e6, got {self.eta}")
        auto = self.gamma == "auto"
        _require(
            auto or 0 <= int(self.gamma) <= MOST_DRAFTS, f"gamma must be auto or 0 to {MOST_DRAFTS}, got {self.gamma}"
        )
        _require(0 <= self.alpha <= 1, f"alpha must be in [0, 1], got {self.alpha}")
        transfer = self.transfer_temperature
        _require(
            transfer is None or 1e-4 <= transfer <= 1e4,
            f"transfer_temperature must be null or a number from 1e-4 to 1e4, got {transfer}",
        )
        _require(0 <= self.confidence_stop < 1, f"confidence_stop must be in [0, 1), got {self.confidence_stop}")
        _require(1 <= self.lookup_width <= 32, f"lookup_width must be 1 to 32, got {self.lookup_width}")
        _require(1 <= self.lookup_match <= 8, f"lookup_match must be 1 to 8, got {self.lookup_match}")
        rounds = self.rounds_per_read
        _require(1 <= rounds <= 2**20, f"rounds_per_read must be 1 to 2^20, got {rounds}")

    @property
    def reads(self) -> Literal["document", "retrieved"]:
        """What the target reads."""
        return "retrieved" if self.mode == "retrieval" else "document"

    @property
    def rule(self) -> Rule:
        """How its tokens come about."""
        return "target" if self.mode == "retrieval" else self.mode

    @property
    def drafts(self) -> bool:
        """Whether a drafter reads retrieved text."""
        return self.rule != "target"

    @property
    def retrieves(self) -> bool:
        """Whether anything is retrieved."""
        return self.drafts or self.reads == "retrieved"

    @property
    def transfers_greedily(self) -> bool:
        """Whether greedy tokens are the argmax of p-hat where a token was drafted; at eta 0 that is the target's."""
        return self.mode in ("rapid", "phat") and self.transfer_temperature is not None

    @property
    def effective_eta(self) -> float:
        """eta where the mode uses it, else 0."""
        return self.eta if self.mode in ("rapid", "phat") else 0.0
