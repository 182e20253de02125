# SPDX-License-Identifier: Apache-2.0
"""What a run of rounds starts from: the sizes of its arrays and the state before the first token, still on the host."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rapid_jax.speculative.chunk_layout import coarse_bucket
from rapid_jax.speculative.config import MOST_DRAFTS, SamplingConfig, SpeculationConfig
from rapid_jax.speculative.draft import CATCH_UP
from rapid_jax.speculative.schedule import GAMMAS
from rapid_jax.speculative.state import Counts, Logprobs, Plan

RECENT = 8  # prompt tokens kept at hand: what a drafter re-reads, what prompt lookup matches
EXTEND_WIDTH = 32  # prompt tokens after the prefix read at once
GAMMA_BUCKETS = (0, 1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32, 48, 64)  # that rows of different gammas share


@dataclass(frozen=True)
class Room:
    """What arrays have room for: at least so many tokens, so that runs which need less share their programs."""

    new: int = 0  # of an answer
    suffix: int = 0  # of a prompt, behind its prefix
    text: int = 0  # that prompt lookup copies from
    logprobs: bool = False  # log-probabilities of what is emitted, and of the most probable tokens


@dataclass(frozen=True)
class Sizes:
    """How many slots the arrays of a run have: of few sizes, so that runs share programs and rows can join them."""

    reserve: int  # of a tail, behind the prompt tokens that it holds
    output: int  # for emitted tokens
    suffix: int = 0  # prompt tokens that a tail has room for at least

    @classmethod
    def of(cls, speculation: SpeculationConfig, sampling: SamplingConfig, room: Room = Room()) -> "Sizes":
        """What these settings may need at most."""
        widest = max(draft_room(speculation), speculation.lookup_width) + 1
        new = max(sampling.max_new_tokens, room.new)
        return cls(new + 2 * widest + CATCH_UP, coarse_bucket(new + widest, 32), room.suffix)

    def tail(self, longest: int) -> int:
        """Slots of a tail that holds up to `longest` prompt tokens of a row; above 128 a multiple of that, which the
        decoding kernel for TPUs reads."""
        longest = max(longest, self.suffix)
        slots = -(-longest // EXTEND_WIDTH) * EXTEND_WIDTH + self.reserve
        return coarse_bucket(slots, 32 if slots <= 128 else 128)


def gamma_bucket(gamma: int) -> int:
    """The least number of drafts that has a program and is no less than `gamma`."""
    return next(size for size in GAMMA_BUCKETS if size >= gamma)


def gammas_of(speculation: SpeculationConfig) -> tuple[int, ...]:
    """The gammas that rounds may have."""
    return GAMMAS if speculation.gamma == "auto" else (int(speculation.gamma),)


def draft_room(speculation: SpeculationConfig) -> int:
    """Drafts of a round that arrays have room for: of few sizes. Rows that have the same run side by side, in rounds of
    as many drafts as any of them asks for."""
    most = max(map(gamma_bucket, gammas_of(speculation)))
    return next(size for size in (speculation.lookup_width, max(GAMMAS), MOST_DRAFTS) if size >= most)


def text_slots(longest: int, match: int) -> int:
    """Slots of the text that prompt lookup copies from, whose longest row has `longest` tokens."""
    return coarse_bucket(longest + match, 512)


def plan_of(speculation: SpeculationConfig, *, block: int, vocabulary: int) -> Plan:
    """The plan of plain decoding, with the copies that rounds may have."""
    auto = speculation.gamma == "auto"
    return Plan(0, speculation.lookup_width, speculation.lookup_match, block, vocabulary, auto)


def start_state(
    seeds: Sequence[int],
    sizes: Sizes,
    limit: int,
    seen: tuple[np.ndarray | None, np.ndarray | None],
    *,
    logprobs: bool = False,
) -> dict[str, Any]:
    """The fields of `State` but the tails, one row a seed; `seen` are the target's and the drafter's."""
    batch = len(seeds)
    return {
        "emitted_BO": np.zeros((batch, sizes.output), np.int32),
        "origin_BO": np.zeros((batch, sizes.output), np.int8),
        "count_B": np.zeros(batch, np.int32),
        "limit_B": np.full(batch, limit, np.int32),
        "done_B": np.zeros(batch, bool),
        "key_B": jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32)),
        "target_seen_BV": seen[0],
        "draft_seen_BV": seen[1],
        "counts": Counts.zero(batch),
        "logprobs": Logprobs.none(batch, sizes.output) if logprobs else None,
    }
