# SPDX-License-Identifier: Apache-2.0
"""From logits to a distribution, and from a distribution to tokens. Float32 throughout."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import jax
import jax.numpy as jnp

from rapid_jax.speculative.config import Guard, SamplingConfig, SpeculationConfig


@dataclass(frozen=True)
class Law:
    """The parts of the sampling law that shape the program; a change of any compiles anew."""

    greedy: bool
    guard: Guard
    exact_phat: bool  # residual max(p_hat - q, 0): samples p-hat exactly
    top_k: int
    nucleus: bool
    min_p: bool
    penalty: bool
    confidence_stop: bool
    stops: tuple[int, ...]  # token ids that end an answer

    @classmethod
    def of(cls, sampling: SamplingConfig, speculation: SpeculationConfig, stops: Sequence[int]) -> "Law":
        """The law that these settings ask for. What a greedy law ignores is the same in every one."""
        sampled = sampling.temperature > 0
        return cls(
            greedy=not sampled,
            guard=speculation.guard if sampled else "none",
            exact_phat=sampled and speculation.mode == "phat",
            top_k=sampling.top_k if sampled else 0,
            nucleus=sampled and sampling.top_p < 1,
            min_p=sampled and sampling.min_p > 0,
            penalty=sampling.repetition_penalty != 1,
            confidence_stop=speculation.confidence_stop > 0,
            stops=tuple(sorted(set(stops))),
        )

    def is_stop(self, tokens: jax.Array) -> jax.Array:
        """bool, of the tokens' shape."""
        return jnp.isin(tokens, jnp.asarray(self.stops, jnp.int32)) if self.stops else jnp.zeros(tokens.shape, bool)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Knobs:
    """The numbers of the sampling law, float32 scalars on the device: changing one compiles nothing."""

    temperature: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    penalty: jax.Array
    eta: jax.Array
    alpha: jax.Array
    confidence_stop: jax.Array

    @classmethod
    def of(cls, sampling: SamplingConfig, speculation: SpeculationConfig) -> "Knobs":
        """The numbers of these settings. A greedy law never divides by its temperature, kept at 1."""
        values = (
            sampling.temperature or 1.0,
            sampling.top_p,
            sampling.min_p,
            sampling.repetition_penalty,
            speculation.effective_eta,
            speculation.alpha,
            speculation.confidence_stop,
        )
        return cls(*(jnp.asarray(value, jnp.float32) for value in values))


def penalized(logits_V: jax.Array, seen_V: jax.Array, penalty: jax.Array) -> jax.Array:
    """Logits of seen tokens divided by the penalty if positive, multiplied if negative (CTRL, arXiv 1909.05858)."""
    lowered = jnp.where(logits_V > 0, logits_V / penalty, logits_V * penalty)
    return jnp.where(seen_V, lowered, logits_V)


def warped(logits: jax.Array, law: Law, knobs: Knobs, seen: jax.Array | None) -> jax.Array:
    """z / T over the last axis with every filtered token at -inf: softmax of it is the model's distribution.

    Order: repetition penalty, temperature, top-k, top-p, min-p. The eta shift of RAPID comes after all of them. A
    greedy law only applies the penalty.
    """
    z = logits.astype(jnp.float32)
    if law.penalty and seen is not None:
        z = penalized(z, seen, knobs.penalty)
    if law.greedy:
        return z
    z = z / knobs.temperature
    ranked = None
    if law.top_k and law.top_k < z.shape[-1]:
        ranked = jax.lax.top_k(z, law.top_k)[0]
        z = jnp.where(z < ranked[..., -1:], -jnp.inf, z)
    if law.nucleus:
        if ranked is None:
            ranked = jnp.sort(z, axis=-1, descending=True)
        p = jax.nn.softmax(ranked, axis=-1)
        kept = jnp.cumsum(p, axis=-1) - p < knobs.top_p
        z = jnp.where(z < jnp.min(jnp.where(kept, ranked, jnp.inf), axis=-1, keepdims=True), -jnp.inf, z)
    if law.min_p:
        z = jnp.where(z < jnp.max(z, axis=-1, keepdims=True) + jnp.log(knobs.min_p), -jnp.inf, z)
    return z


class Draw(IntEnum):
    """What a random number is for; each purpose has its own stream at every position."""

    DRAFT = 0
    ACCEPT = 1
    TOKEN = 2


def position_keys(key_B: jax.Array, purpose: Draw, position_B: jax.Array, width: int) -> jax.Array:
    """Keys [B, width] for `width` positions of the answer from `position_B` on.

    Keyed by position, not by round: a draft that a rejection before it threw away is drawn again from the same number,
    which no emitted token has depended on. So what is emitted does not depend on how rounds are cut, on level 0 or on
    the rest of the batch, except for where bonus tokens fall.
    """
    position_BW = position_B[:, None] + jnp.arange(width)
    stream_B = jax.vmap(jax.random.fold_in, in_axes=(0, None))(key_B, int(purpose))
    return jax.vmap(jax.vmap(jax.random.fold_in, in_axes=(None, 0)))(stream_B, position_BW)


def draw(keys_BG: jax.Array, z_BGV: jax.Array, law: Law) -> jax.Array:
    """int32 [B, G]: a token of softmax(z) at each position by its own key; the argmax under a greedy law."""
    if law.greedy:
        return jnp.argmax(z_BGV, axis=-1).astype(jnp.int32)
    return jax.vmap(jax.vmap(jax.random.categorical))(keys_BG, z_BGV).astype(jnp.int32)


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
