# SPDX-License-Identifier: Apache-2.0
"""From logits to a distribution, and from a distribution to tokens. Float32 throughout."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

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
    outside: jax.Array  # 1 - top_p, the most that the nucleus leaves out
    min_p: jax.Array
    penalty: jax.Array
    eta: jax.Array
    alpha: jax.Array
    confidence_stop: jax.Array
    allowed_V: Any = None  # bool, ids that may be drawn; None: every one

    @classmethod
    def of(cls, sampling: SamplingConfig, speculation: SpeculationConfig, allowed_V: Any = None) -> "Knobs":
        """The numbers of these settings. A greedy law never divides by its temperature, kept at 1."""
        values = (
            sampling.temperature or 1.0,
            1 - sampling.top_p,
            sampling.min_p,
            sampling.repetition_penalty,
            speculation.effective_eta,
            speculation.alpha,
            speculation.confidence_stop,
        )
        return cls(*(jnp.asarray(value, jnp.float32) for value in values), allowed_V=allowed_V)


def limited(logits_BTV: jax.Array, knobs: Knobs, vocabulary: int) -> tuple[jax.Array, jax.Array]:
    """(logits [B, T, vocabulary], -inf where no token may be drawn; bool [B]: whether the others are all numbers).

    A model with fewer rows than `vocabulary` gives the ids that it lacks no chance; one with more loses them.
    """
    logits_BTV = logits_BTV[..., :vocabulary]
    finite_BTV = jnp.isfinite(logits_BTV)
    if knobs.allowed_V is not None:
        allowed_V = knobs.allowed_V[: logits_BTV.shape[-1]]
        finite_BTV |= ~allowed_V
        logits_BTV = jnp.where(allowed_V, logits_BTV, -jnp.inf)
    lacking = vocabulary - logits_BTV.shape[-1]
    if lacking:
        logits_BTV = jnp.pad(logits_BTV, ((0, 0), (0, 0), (0, lacking)), constant_values=-jnp.inf)
    return logits_BTV, jnp.all(finite_BTV, axis=(1, 2))


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
    largest = None
    if law.top_k and law.top_k < z.shape[-1]:
        largest = jax.lax.top_k(z, law.top_k)[0]
        z = jnp.where(z < largest[..., -1:], -jnp.inf, z)
    if law.nucleus:
        z = _nucleus(z, largest, knobs.outside)
    if law.min_p:
        z = jnp.where(z < jnp.max(z, axis=-1, keepdims=True) + jnp.log(knobs.min_p), -jnp.inf, z)
    return z


def _nucleus(z: jax.Array, largest: jax.Array | None, outside: jax.Array) -> jax.Array:
    """z with -inf for the least probable tokens, as many as have a mass of at most `outside` together.

    `largest` are the k largest of z in falling order where all but them and what equals the last of them is -inf: then
    nothing is sorted. Of equal tokens those of lower ids go first, as in transformers.
    """
    ranked = jnp.sort(z, axis=-1) if largest is None else jnp.flip(largest, axis=-1)
    weight = jnp.exp(ranked - ranked[..., -1:])
    # The first one stands for all that equal it: top-k keeps more than k where some are equal at its edge.
    least = ranked[..., :1]
    equal = jnp.sum(z == least, axis=-1, keepdims=True)
    is_least = ranked == least
    of_least = jnp.where(jnp.isfinite(least), weight[..., :1], 0.0)
    above = jnp.where(is_least, 0.0, weight)
    total = equal * of_least + jnp.sum(above, axis=-1, keepdims=True)
    mass = (equal * of_least + jnp.cumsum(above, axis=-1)) / total
    is_out = (mass <= outside) & ~is_least
    is_out = is_out.at[..., -1].set(False)  # the most probable one always stays
    kept = jnp.sum(~is_out & ~is_least, axis=-1, keepdims=True)
    # Either some of the least stay, and all above them, or the edge lies above them.
    share = of_least / total
    guess = jnp.floor(outside / share)  # from below or above by rounding
    dropped = guess - (guess * share > outside) + ((guess + 1) * share <= outside)
    staying = jnp.where(of_least > 0, jnp.maximum(equal - dropped, 0), 0).astype(jnp.int32)
    staying = jnp.where(is_least[..., -1:], jnp.maximum(staying, 1), staying)
    edge = jnp.where(staying > 0, least, jnp.min(jnp.where(is_out | is_least, jnp.inf, ranked), axis=-1, keepdims=True))
    room = jnp.where(staying > 0, staying, kept - jnp.sum(ranked > edge, axis=-1, keepdims=True))
    at_edge = z == edge

    def all_stay(z):
        return jnp.where(z < edge, -jnp.inf, z)

    def some_stay(z):
        later = jnp.flip(jnp.cumsum(jnp.flip(at_edge, axis=-1), axis=-1), axis=-1)
        return jnp.where((z < edge) | (at_edge & (later > room)), -jnp.inf, z)

    is_split = jnp.any(jnp.sum(at_edge, axis=-1, keepdims=True) > room)
    return jax.lax.cond(is_split, some_stay, all_stay, z)


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
