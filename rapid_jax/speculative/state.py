# SPDX-License-Identifier: Apache-2.0
"""What a round reads and what it changes."""

from dataclasses import dataclass, fields, replace
from enum import IntEnum
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np

from rapid_jax.attention.cache import Prefix, Tail
from rapid_jax.model.decoder import Decoder

MOST_LOGPROBS = 20  # most probable tokens that an emitted one comes with


class Origin(IntEnum):
    """Where an emitted token came from."""

    LOOKUP = 0  # copied from text already read, then verified
    DRAFT = 1  # drawn by the drafter and accepted by the target
    CORRECTION = 2  # drawn in place of a rejected draft
    BONUS = 3  # drawn from the target after a full accept, or with nothing drafted


@dataclass(frozen=True)
class Plan:
    """The shape of a round; each is compiled once.

    gamma > 0, copies = 0   the drafter draws gamma tokens, the target verifies them: RAPID
    gamma > 0, copies > 0   the same, and prompt lookup saves the drafter steps
    gamma = 0, copies > 0   the target verifies copied tokens itself (greedy or lossless rules only)
    gamma = 0, copies = 0   plain decoding
    """

    gamma: int
    copies: int  # tokens that prompt lookup proposes at once
    match: int  # tokens that must agree before it proposes any
    block: int  # cache slots attended at once
    vocabulary: int  # size of a distribution: the target's rows
    catch_up: bool = False  # the drafter may have missed rounds


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Side:
    """One model with its prompt: what a round reads of it and never changes."""

    decoder: Decoder
    prefix: Prefix
    recent_BR: jax.Array  # int32, the last R tokens of its prompt
    prompt_B: jax.Array  # int32, tokens of its prompt

    def beside(self, other: "Side") -> "Side":
        """Without a decoder if it is the other's: what a program is given twice it also copies twice."""
        return replace(self, decoder=cast(Decoder, None)) if self.decoder is other.decoder else self

    def with_decoder_of(self, other: "Side") -> "Side":
        """The inverse of `beside`."""
        return replace(self, decoder=other.decoder) if self.decoder is None else self


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Counts:
    """What happened so far to each row; int32."""

    drafted_B: jax.Array  # drafts that the target verified
    accepted_B: jax.Array  # of those accepted
    rejected_B: jax.Array  # rounds that ended in a rejection
    copied_B: jax.Array  # tokens that prompt lookup proposed
    copied_accepted_B: jax.Array  # of those accepted by the model that read them first
    draft_steps_B: jax.Array  # the drafter's forward passes while the row was answered
    round_B: jax.Array  # the target's
    target_faults_B: jax.Array  # passes of the target whose logits for the row were not all numbers
    draft_faults_B: jax.Array  # those of the drafter

    @classmethod
    def zero(cls, batch: int) -> "Counts":
        """Nothing has happened."""
        # A buffer of its own for each: the state is donated.
        return cls(**{item.name: jnp.zeros(batch, jnp.int32) for item in fields(cls)})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Logprobs:
    """Natural logarithms of the target's probabilities, before temperature and filters, of what was emitted."""

    token_BO: jax.Array  # float32, of the token itself
    top_BON: jax.Array  # float32, of the most probable tokens, falling
    top_ids_BON: jax.Array  # int32

    @classmethod
    def none(cls, rows: int, slots: int) -> "Logprobs":
        """Room for so many tokens; arrays of the host."""
        several = (rows, slots, MOST_LOGPROBS)
        return cls(np.zeros(several[:2], np.float32), np.zeros(several, np.float32), np.zeros(several, np.int32))  # type: ignore[arg-type]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """Everything that a round changes. Rows that are done stay as they are."""

    target_tail: Tail  # its length: every token of the sequence but the last
    # At least every token but the last two, unless rounds went by without the drafter. None: there is no drafter, or it
    # goes on from the target's.
    draft_tail: Tail | None
    emitted_BO: jax.Array  # int32, tokens so far, then junk
    origin_BO: jax.Array  # int8, an Origin for each
    count_B: jax.Array  # int32, how many are emitted
    limit_B: jax.Array  # int32, how many may be
    done_B: jax.Array  # bool, a stop token was emitted or the limit reached
    key_B: jax.Array  # typed PRNG keys, never changed
    target_seen_BV: jax.Array | None  # bool, tokens under the repetition penalty
    draft_seen_BV: jax.Array | None
    counts: Counts
    logprobs: Logprobs | None = None
    # The target's latest queries, of every layer, where what they attend to is drafted from.
    queries_BGLNH: jax.Array | None = None


def known_tokens(side: Side, state: State) -> jax.Array:
    """int32 [B, R + O]: the last R prompt tokens, then the emitted ones; emitted token i stands at R + i."""
    return jnp.concatenate([side.recent_BR, state.emitted_BO], axis=1)


def window(rows_BM: jax.Array, start_B: jax.Array, width: int) -> jax.Array:
    """[B, width]: `width` items of each row from its own start on."""
    return jax.vmap(lambda row, at: jax.lax.dynamic_slice_in_dim(row, at, width))(rows_BM, start_B)


def put(rows_BM: jax.Array, new_BW: jax.Array, start_B: jax.Array) -> jax.Array:
    """The rows with each row's new items written from its own start on; they must fit."""
    return jax.vmap(lambda row, new, at: jax.lax.dynamic_update_slice_in_dim(row, new, at, axis=0))(
        rows_BM, new_BW, start_B
    )
