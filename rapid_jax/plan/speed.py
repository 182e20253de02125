# SPDX-License-Identifier: Apache-2.0
"""How long a token takes with drafts and without, before anything runs: from what passes read and exchange.

A range: at the least weights and caches are read at the memory's rate and sums go around the ring; at the most every
layer's small operations come on top, which the compiler's own cost model puts at SMALL_SECONDS (the most of three
compiled rounds, on v5p and v6e: `python -m tests.tpu.layers`; nothing of it was measured). Sums are those over `model`:
what `context` merges, and `fsdp` gathers, is not counted. What comes of a number of drafts is Leviathan et al.'s (arXiv
2211.17192, Eq. 1 and Theorem 3.8).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from rapid_jax.config import RapidConfig
from rapid_jax.plan.architectures import Architecture
from rapid_jax.plan.cost import Pass
from rapid_jax.plan.models import PlannedModel
from rapid_jax.plan.programs import models_of
from rapid_jax.plan.topologies import Generation
from rapid_jax.speculative.initial_state import gammas_of
from rapid_jax.speculative.schedule import GAMMAS

SMALL_SECONDS = {"full": 35e-6, "quantised": 71e-6}  # of a layer in one pass, by its weights
ACCEPTANCES = (0.9, 0.7, 0.5)  # chances that a draft is accepted
MOST_GAMMA = 16  # of those that are tried
_TILE_ROWS = 8  # that rows are filled up to before chips sum them


@dataclass(frozen=True)
class Range:
    """Seconds at the least and at the most."""

    least: float
    most: float

    def __add__(self, other: "Range") -> "Range":
        return Range(self.least + other.least, self.most + other.most)

    def times(self, factor: float) -> "Range":
        """So many of it."""
        return Range(self.least * factor, self.most * factor)


@dataclass(frozen=True)
class Speed:
    """Of one number of drafts a round, at one acceptance."""

    acceptance: float
    gamma: int
    token: Range
    ratio: tuple[float, float]  # plain decoding's time over it, the lower first

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "acceptance": self.acceptance,
            "gamma": self.gamma,
            "token_seconds": [self.token.least, self.token.most],
            "of_plain": list(self.ratio),
        }


@dataclass(frozen=True)
class Prediction:
    """Plain decoding, and drafting at each of ACCEPTANCES: the gamma with the most tokens a second, and those set."""

    plain: Range  # a token
    best: Sequence[Speed]
    given: Sequence[Speed]  # one for each acceptance where a gamma is set; those of auto are the best

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "plain_token_seconds": [self.plain.least, self.plain.most],
            "best": [speed.to_json() for speed in self.best],
            "as_set": [speed.to_json() for speed in self.given],
        }


def predicted(
    config: RapidConfig,
    devices: tuple[Any, ...],
    target: Architecture,
    drafter: Architecture | None,
    context: int,
    chip: Generation,
) -> Prediction | None:
    """Of the run that `programs_of` plans with the same arguments; None where nothing drafts."""
    ours, theirs = models_of(config, devices, target, drafter, context)
    if theirs is None:
        return None
    plain, step = _pass(ours, 1, chip), _pass(theirs, 1, chip)

    def speed(acceptance: float, gamma: int) -> Speed:
        tokens = sum(acceptance**place for place in range(gamma + 1))
        token = (step.times(gamma) + _pass(ours, gamma + 1, chip)).times(1 / tokens)
        ratios = sorted((plain.least / token.least, plain.most / token.most))
        return Speed(acceptance, gamma, token, (ratios[0], ratios[1]))

    def best(acceptance: float) -> Speed:
        tried = GAMMAS[1:] if config.speculation.gamma == "auto" else range(1, MOST_GAMMA + 1)
        speeds = [speed(acceptance, gamma) for gamma in tried]
        return min(speeds, key=lambda speed: speed.token.least + speed.token.most)

    fixed = [] if config.speculation.gamma == "auto" else gammas_of(config.speculation)
    given = [speed(acceptance, gamma) for acceptance in ACCEPTANCES for gamma in fixed if gamma]
    return Prediction(plain, [best(acceptance) for acceptance in ACCEPTANCES], given)


def _pass(model: PlannedModel, tokens: int, chip: Generation) -> Range:
    """Of a forward pass over so many tokens behind the prompt."""
    config, mesh = model.decoder.config, model.sizes
    work = model.work(Pass(tokens, model.prompt, tokens))
    seconds = max(work.flops / chip.flops, work.hbm_bytes / chip.hbm_rate)
    if mesh.model > 1:  # attention's outputs and the ffn's are summed over the chips of a layer
        item = jnp.dtype(model.dtype).itemsize
        rows = -(-tokens // _TILE_ROWS) * _TILE_ROWS
        seconds += 2 * config.num_layers * rows * config.hidden_size * item / chip.link_rate
    return Range(seconds, seconds + config.num_layers * SMALL_SECONDS["full" if model.bits is None else "quantised"])


def said(prediction: Prediction) -> Iterator[str]:
    """Lines for people."""
    yield "predicted, not measured: from bytes and sums over chips, to the same with every layer's small operations"
    yield f"  plain          {_ms(prediction.plain)} a token"
    for speed in prediction.best:
        yield f"  {speed.acceptance:.1f} accepted   {_ms(speed.token)} with {_drafts(speed)}: {_times(speed)} plain"
    for speed in prediction.given:
        word = "slower than plain decoding" if speed.ratio[1] < 1 else f"{_times(speed)} plain"
        yield f"  gamma as set   {_ms(speed.token)} with {_drafts(speed)}, {speed.acceptance:.1f} accepted: {word}"


def _ms(range_: Range) -> str:
    return f"{1e3 * range_.least:.2f} to {1e3 * range_.most:.2f} ms"


def _drafts(speed: Speed) -> str:
    return f"{speed.gamma} draft{'s' * (speed.gamma != 1)} a round"


def _times(speed: Speed) -> str:
    return f"{speed.ratio[0]:.2f} to {speed.ratio[1]:.2f} times"
