# SPDX-License-Identifier: Apache-2.0
"""From logits to a distribution, and from a distribution to tokens. Float32 throughout."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from rapid_jax.speculative.config import MOST_DRAFTS, Guard, SamplingConfig, SpeculationConfig
from rapid_jax.speculative.vocabulary import best, kth_largest, nucleus


@dataclass(frozen=True)
class SamplingRule:
    """The parts of the sampling rule that shape the program; a change of any compiles anew.

    A rule holds for rows that ask for less: what a row leaves out is neutral in its `SamplingParams`.
    """

    greedy: bool  # every row is
    transfer: bool  # greedy rows may have eta > 0: the argmax of p-hat
    guard: Guard | Literal["mixed"]
    exact_phat: bool  # some rows have the residual max(p_hat - q, 0): they sample p-hat exactly
    top_k: bool
    nucleus: bool
    min_p: bool
    penalty: bool
    confidence_stop: bool
    stops: tuple[int, ...]  # token ids that end an answer
    logprobs: bool = False  # what was emitted comes with its log-probability, and the most probable tokens

    @classmethod
    def of(
        cls, sampling: SamplingConfig, speculation: SpeculationConfig, stops: Sequence[int], *, logprobs: bool = False
    ) -> "SamplingRule":
        """The rule that these settings ask for. What a greedy rule ignores is the same in every one."""
        sampled = sampling.temperature > 0
        transfer = not sampled and speculation.transfers_greedily
        return cls(
            greedy=not sampled,
            transfer=transfer,
            guard=speculation.guard if sampled or transfer else "none",
            exact_phat=sampled and speculation.mode == "phat",
            top_k=sampled and sampling.top_k > 0,
            nucleus=sampled and sampling.top_p < 1,
            min_p=sampled and sampling.min_p > 0,
            penalty=sampling.repetition_penalty != 1,
            confidence_stop=speculation.confidence_stop > 0,
            stops=tuple(sorted(set(stops))),
            logprobs=logprobs,
        )

    def and_also(self, other: "SamplingRule") -> "SamplingRule":
        """A rule for the rows of both; their stop tokens must be the same."""
        if self.stops != other.stops:
            raise ValueError(f"expected rules with the same stop tokens, got {self.stops} and {other.stops}")
        enriched = [rule for rule in (self, other) if rule.has_q] or [self]
        guard = enriched[0].guard if enriched[0].guard == enriched[-1].guard else "mixed"
        return SamplingRule(
            greedy=self.greedy and other.greedy,
            transfer=self.transfer or other.transfer,
            guard=guard,
            exact_phat=self.exact_phat or other.exact_phat,
            top_k=self.top_k or other.top_k,
            nucleus=self.nucleus or other.nucleus,
            min_p=self.min_p or other.min_p,
            penalty=self.penalty or other.penalty,
            confidence_stop=self.confidence_stop or other.confidence_stop,
            stops=self.stops,
            logprobs=self.logprobs or other.logprobs,
        )

    @property
    def has_q(self) -> bool:
        """Whether some row's tokens depend on the drafter's distribution, not on what it drafted alone."""
        return not self.greedy or self.transfer

    def widened(self, *, transfers: bool) -> "SamplingRule":
        """One of a few: greedy and no more, or all kinds of sampling at once, without log-probabilities or with.

        Of greedy rules there is one alone, with transfer or without, as `transfers` says: rows without eta are right
        under either, and rows that the one without is too little for have all kinds.
        """
        is_plain = self.greedy and not (self.penalty or self.confidence_stop or self.logprobs)
        if is_plain and (transfers or not self.transfer):
            return replace(self, transfer=transfers, guard="mixed" if transfers else "none")
        return SamplingRule(False, True, "mixed", True, True, True, True, True, True, self.stops, self.logprobs)

    def is_stop(self, tokens: jax.Array) -> jax.Array:
        """bool, of the tokens' shape."""
        return jnp.isin(tokens, jnp.asarray(self.stops, jnp.int32)) if self.stops else jnp.zeros(tokens.shape, bool)


Numbers: TypeAlias = jax.Array | np.ndarray
GUARDS: tuple[Guard, ...] = ("code", "paper", "none")  # as numbers


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SamplingParams:
    """The numbers of the sampling rule, one a row or one for all: data, which compiles nothing. float32 unless said."""

    greedy_B: Numbers  # bool
    temperature_B: Numbers
    top_k_B: Numbers  # int32, 0 = off
    outside_B: Numbers  # 1 - top_p, the most that the nucleus leaves out; below 0 = off
    min_p_B: Numbers
    penalty_B: Numbers
    eta_B: Numbers
    alpha_B: Numbers
    guard_B: Numbers  # int32, an index of GUARDS
    exact_phat_B: Numbers  # bool
    confidence_stop_B: Numbers
    drafts_B: Numbers  # int32, tokens drafted a round at most
    allowed_V: Any = None  # bool, ids that may be drawn; None: every one

    @classmethod
    def of(cls, sampling: SamplingConfig, speculation: SpeculationConfig, allowed_V: Any = None) -> "SamplingParams":
        """The numbers of these settings, one for all rows; arrays of the host. A greedy row is not filtered; it is
        divided by the transfer temperature, and has an eta, where the drafter moves it."""
        sampled = sampling.temperature > 0
        moved = not sampled and speculation.transfers_greedily and speculation.effective_eta > 0
        transfer = speculation.transfer_temperature if moved else None
        gamma = MOST_DRAFTS if speculation.gamma == "auto" else int(speculation.gamma)
        values = {
            "temperature_B": sampling.temperature if sampled else transfer or 1.0,
            "outside_B": 1 - sampling.top_p if sampled and sampling.top_p < 1 else -1.0,
            "min_p_B": sampling.min_p if sampled else 0.0,
            "penalty_B": sampling.repetition_penalty,
            "eta_B": speculation.effective_eta if sampled or transfer else 0.0,
            "alpha_B": speculation.alpha,
            "confidence_stop_B": speculation.confidence_stop,
        }
        return cls(
            **{name: np.asarray([value], np.float32) for name, value in values.items()},
            greedy_B=np.asarray([not sampled]),
            top_k_B=np.asarray([sampling.top_k if sampled else 0], np.int32),
            guard_B=np.asarray([GUARDS.index(speculation.guard)], np.int32),
            exact_phat_B=np.asarray([speculation.mode == "phat"]),
            drafts_B=np.asarray([gamma], np.int32),
            allowed_V=allowed_V,
        )


def along(value_B: Numbers, rows: jax.Array) -> jax.Array:
    """The rows' numbers with as many axes as the rows, to be broadcast over them."""
    return jnp.reshape(value_B, (-1, *(1,) * (rows.ndim - 1)))


def limited(logits_BTV: jax.Array, params: SamplingParams, vocabulary: int, own: int) -> tuple[jax.Array, jax.Array]:
    """(logits [B, T, vocabulary], -inf where no token may be drawn; bool [B]: whether the others are all numbers).

    A model with fewer rows than `vocabulary` gives the ids that it lacks no chance; one with more loses them. The first
    `own` of its rows are its vocabulary: no others are looked at.
    """
    logits_BTV = logits_BTV[..., :vocabulary]
    finite_BTV = jnp.isfinite(logits_BTV)
    if logits_BTV.shape[-1] > own:
        finite_BTV |= jnp.arange(logits_BTV.shape[-1]) >= own
    if params.allowed_V is not None:
        allowed_V = params.allowed_V[: logits_BTV.shape[-1]]
        finite_BTV |= ~allowed_V
        logits_BTV = jnp.where(allowed_V, logits_BTV, -jnp.inf)
    lacking = vocabulary - logits_BTV.shape[-1]
    if lacking:
        logits_BTV = jnp.pad(logits_BTV, ((0, 0), (0, 0), (0, lacking)), constant_values=-jnp.inf)
    return logits_BTV, jnp.all(finite_BTV, axis=(1, 2))


def penalize(logits_V: jax.Array, seen_V: jax.Array, penalty: jax.Array) -> jax.Array:
    """Logits of seen tokens divided by the penalty if positive, multiplied if negative (CTRL, arXiv 1909.05858)."""
    lowered = jnp.where(logits_V > 0, logits_V / penalty, logits_V * penalty)
    return jnp.where(seen_V, lowered, logits_V)


def warp(logits: jax.Array, rule: SamplingRule, params: SamplingParams, seen: jax.Array | None) -> jax.Array:
    """z / T over the last axis with every filtered token at -inf: softmax of it is the model's distribution.

    The first axis is that of the params. Order: repetition penalty, temperature, top-k, top-p, min-p. The eta shift of
    RAPID comes after all of them. Greedy rows only have the penalty, and the temperature of their transfer.
    """
    z = logits.astype(jnp.float32)
    if rule.penalty and seen is not None:
        z = penalize(z, seen, along(params.penalty_B, z))
    if not rule.has_q:
        return z
    z = z / along(params.temperature_B, z)
    if rule.top_k:
        top_k, V = along(params.top_k_B, z), z.shape[-1]
        least = kth_largest(z, jnp.clip(top_k, 1, V))
        z = jnp.where((z < least) & (top_k > 0), -jnp.inf, z)
    if rule.nucleus:
        outside = along(params.outside_B, z)
        z = jnp.where(outside < 0, z, nucleus(z, outside))
    if rule.min_p:
        z = jnp.where(z < jnp.max(z, axis=-1, keepdims=True) + jnp.log(along(params.min_p_B, z)), -jnp.inf, z)
    return z


class Draw(IntEnum):
    """What a random number is for; each purpose has its own stream at every position."""

    DRAFT = 0
    ACCEPT = 1
    TOKEN = 2


def position_keys(key_B: jax.Array, purpose: Draw, position_B: jax.Array, width: int) -> jax.Array:
    """Keys [B, width] for `width` positions of the answer from `position_B` on.

    Keyed by position, not by round: a draft that a rejection before it threw away is drawn again from the same number,
    which no emitted token has depended on. So what is emitted does not depend on how rounds are cut, on prompt lookup
    or on the rest of the batch, except for where bonus tokens fall.
    """
    position_BW = position_B[:, None] + jnp.arange(width)
    stream_B = jax.vmap(jax.random.fold_in, in_axes=(0, None))(key_B, int(purpose))
    return jax.vmap(jax.vmap(jax.random.fold_in, in_axes=(None, 0)))(stream_B, position_BW)


def draw(keys_BG: jax.Array, z_BGV: jax.Array, rule: SamplingRule, params: SamplingParams) -> jax.Array:
    """int32 [B, G]: a token of softmax(z) at each position by its own key; the argmax in greedy rows."""
    best_BG = best(z_BGV)
    if rule.greedy:
        return best_BG
    noise_BGV = jax.vmap(jax.vmap(lambda key: jax.random.gumbel(key, z_BGV.shape[-1:], jnp.float32)))(keys_BG)
    drawn_BG = best(noise_BGV + z_BGV)
    return jnp.where(along(params.greedy_B, drawn_BG), best_BG, drawn_BG)


def seen_before_each(seen_BV: jax.Array | None, tokens_BG: jax.Array) -> jax.Array | None:
    """bool [B, G + 1, V]: what was seen before each of the tokens and after the last, they themselves included."""
    if seen_BV is None:
        return None
    said_BGV = jax.nn.one_hot(tokens_BG, seen_BV.shape[1], dtype=jnp.int32).cumsum(axis=1) > 0
    return jnp.concatenate([seen_BV[:, None], seen_BV[:, None] | said_BGV], axis=1)


def seen_after(seen_BV: jax.Array | None, tokens_BG: jax.Array, taken_B: jax.Array) -> jax.Array | None:
    """bool [B, V]: what was seen once the first `taken_B` of the tokens are."""
    if seen_BV is None:
        return None
    taken_BG = jnp.arange(tokens_BG.shape[1]) < taken_B[:, None]
    said_BGV = jax.nn.one_hot(tokens_BG, seen_BV.shape[1], dtype=jnp.bool_) & taken_BG[..., None]
    return seen_BV | jnp.any(said_BGV, axis=1)
