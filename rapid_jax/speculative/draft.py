# SPDX-License-Identifier: Apache-2.0
"""Draft tokens from the drafter's distribution q, one at a time or several where prompt lookup guessed them."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from rapid_jax.attention.attend import attend_prefix_tail, layers_of, with_kept
from rapid_jax.attention.cache import KV, Tail
from rapid_jax.speculative.accept import leading_agreement
from rapid_jax.speculative.lookup import framed, propose
from rapid_jax.speculative.prefill import serving
from rapid_jax.speculative.sampling import (
    Draw,
    SamplingParams,
    SamplingRule,
    along,
    draw,
    limited,
    position_keys,
    seen_after,
    seen_before_each,
    warp,
)
from rapid_jax.speculative.state import Origin, Plan, Side, State, known_tokens, put, window
from rapid_jax.speculative.vocabulary import at

CATCH_UP = 32  # tokens read at once by a drafter that missed rounds


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Draft:
    """Up to G drafted tokens a row, each drawn from the row of q that stands beside it."""

    tokens_BG: jax.Array  # int32
    log_q_BGV: jax.Array  # float32; V is 1 and the values mean nothing under a rule without q
    origin_BG: jax.Array  # int8
    length_B: jax.Array  # int32
    copied_B: jax.Array  # int32, tokens that prompt lookup proposed
    copied_accepted_B: jax.Array  # int32
    steps: jax.Array  # int32 scalar, forward passes
    faults_B: jax.Array  # int32, passes whose logits were not all numbers

    @classmethod
    def empty(cls, batch: int, slots: int, rule: SamplingRule, vocabulary: int) -> "Draft":
        """Nothing drafted, room for `slots` tokens."""
        row = jnp.zeros(batch, jnp.int32)
        return cls(
            jnp.zeros((batch, slots), jnp.int32),
            jnp.zeros((batch, slots, vocabulary if rule.has_q else 1), jnp.float32),
            jnp.full((batch, slots), Origin.DRAFT, jnp.int8),
            row,
            row,
            row,
            jnp.int32(0),
            row,
        )


def read(side: Side, tail: Tail, tokens_BT: jax.Array, plan: Plan, *, rows: int) -> tuple[jax.Array, Tail]:
    """(float32 logits after each of the last `rows` tokens [B, rows, V], the tail with all tokens written).

    V are the rows of the model's own vocabulary: `limited` makes them those of the plan.
    """
    return _read(side, tail, tokens_BT, plan, rows, keeps_queries=False)[:2]


def read_with_queries(
    side: Side, tail: Tail, tokens_BT: jax.Array, plan: Plan, *, rows: int
) -> tuple[jax.Array, Tail, jax.Array]:
    """As `read`, and the tokens' rotated queries of every layer, [B, T, L, N, H]."""
    logits, tail, queries = _read(side, tail, tokens_BT, plan, rows, keeps_queries=True)
    return logits, tail, jnp.stack(queries, axis=2) if isinstance(queries, tuple) else jnp.moveaxis(queries, 0, 2)


def _read(
    side: Side, tail: Tail, tokens_BT: jax.Array, plan: Plan, rows: int, *, keeps_queries: bool
) -> tuple[jax.Array, Tail, Any]:
    """(logits, tail, where they are kept the queries of each layer, in the layout of the layers)."""
    T = tokens_BT.shape[1]
    pos_BT = (tail.start_B + tail.length_B)[:, None] + jnp.arange(T, dtype=jnp.int32)
    strategy = serving(side.decoder, plan.block)
    attend = attend_prefix_tail(side.prefix, tail, pos_BT, strategy)

    def attend_and_keep(q_BTNH, k_BTKH, v_BTKH, layer, **window):
        out_BTNH, kept = attend(q_BTNH, k_BTKH, v_BTKH, layer, **window)
        return out_BTNH, (kept, q_BTNH)

    layers, queries = layers_of(side.prefix, tail, strategy), None
    hidden_BTD, kept = side.decoder.hidden(tokens_BT, pos_BT, attend_and_keep if keeps_queries else attend, layers)
    if keeps_queries:
        stacked = isinstance(tail.layers, KV)
        kept, queries = kept if stacked else tuple(zip(*kept, strict=True))
    logits = side.decoder.logits(hidden_BTD[:, T - rows :])
    tail = Tail(with_kept(tail, kept, strategy), tail.start_B, tail.length_B + T)
    return logits, tail, queries


def catch_up(side: Side, state: State, tail: Tail, plan: Plan) -> Tail:
    """The drafter's tail with every token but the last two, as drafting wants it.

    Longer ones are rolled back. Shorter ones, after rounds without the drafter, read what they missed.
    """
    wanted_B = side.prompt_B + state.count_B - 2 - tail.start_B

    def step(tail: Tail) -> Tail:
        start_B = side.recent_BR.shape[1] + tail.start_B + tail.length_B - side.prompt_B
        tokens_BT = window(jnp.pad(known_tokens(side, state), ((0, 0), (0, CATCH_UP))), start_B, CATCH_UP)
        _, longer = read(side, tail, tokens_BT, plan, rows=1)
        return longer.rolled_back(jnp.minimum(longer.length_B, wanted_B))

    tail = tail.rolled_back(jnp.minimum(tail.length_B, wanted_B))
    return lax.while_loop(lambda tail: jnp.any(tail.length_B < wanted_B), step, tail) if plan.catch_up else tail


def _unsure(z_BGV: jax.Array, tokens_BG: jax.Array, rule: SamplingRule, params: SamplingParams) -> jax.Array:
    """bool [B, G]: tokens that the drafter gave less than the confidence asked for."""
    if not rule.confidence_stop:
        return jnp.zeros(tokens_BG.shape, bool)
    q_BGV = jax.nn.softmax(z_BGV, axis=-1)
    q_BG = at(q_BGV, tokens_BG)
    return q_BG < along(params.confidence_stop_B, q_BG)


def lacking(state: State) -> int:
    """Tokens at the sequence's end that a drafter feeds first: after a full accept its own tail lacks two, the target's
    lacks one."""
    return 2 if state.queries_BGLNH is None else 1


def draft_stepwise(
    side: Side, state: State, tail: Tail, rule: SamplingRule, params: SamplingParams, plan: Plan
) -> tuple[Draft, Tail]:
    """Drafts and the drafter's tail: gamma steps, or fewer once every row drew a stop token or an unsure one.

    The first step feeds the last tokens of the sequence, those that the tail lacks.
    """
    batch = state.count_B.shape[0]

    def step(index, carry, tokens_BT):
        draft, tail, seen_BV, open_B = carry
        logits, tail = read(side, tail, tokens_BT, plan, rows=1)
        logits, finite_B = limited(logits, params, plan.vocabulary, side.decoder.config.vocab_size)
        z_BGV = warp(logits, rule, params, None if seen_BV is None else seen_BV[:, None])
        token_B1 = draw(position_keys(state.key_B, Draw.DRAFT, state.count_B + index, 1), z_BGV, rule, params)
        log_q_BGV = draft.log_q_BGV
        if rule.has_q:
            log_q_BGV = lax.dynamic_update_slice_in_dim(log_q_BGV, jax.nn.log_softmax(z_BGV, axis=-1), index, axis=1)
        draft = replace(
            draft,
            tokens_BG=lax.dynamic_update_slice_in_dim(draft.tokens_BG, token_B1, index, axis=1),
            log_q_BGV=log_q_BGV,
            length_B=draft.length_B + open_B,
            steps=draft.steps + 1,
            faults_B=draft.faults_B + (open_B & ~finite_B),
        )
        open_B &= index + 1 < params.drafts_B
        open_B &= ~(rule.is_stop(token_B1) | _unsure(z_BGV, token_B1, rule, params))[:, 0]
        return draft, tail, seen_after(seen_BV, token_B1, jnp.ones(batch, jnp.int32)), open_B

    draft = Draft.empty(batch, plan.gamma, rule, plan.vocabulary)
    lacks = lacking(state)
    last = window(known_tokens(side, state), side.recent_BR.shape[1] + state.count_B - lacks, lacks)
    is_open_B = ~state.done_B & (params.drafts_B > 0)
    carry = step(jnp.int32(0), (draft, tail, state.draft_seen_BV, is_open_B), last)

    def more(item):
        index, (_, _, _, open_B) = item
        return (index < plan.gamma) & jnp.any(open_B)

    def next_step(item):
        index, carry = item
        return index + 1, step(index, carry, lax.dynamic_slice_in_dim(carry[0].tokens_BG, index - 1, 1, axis=1))

    _, (draft, tail, _, _) = lax.while_loop(more, next_step, (jnp.int32(1), carry))
    return draft, tail


def copies_for(known: jax.Array, end_B: jax.Array, reach: int, framed_BM: jax.Array, plan: Plan):
    """(copied tokens [B, copies], how many count [B], the last `reach` tokens before `end_B`).

    Copied from the `framed` text or from what was said since the prompt; `known` holds prompt tokens up to slot
    `reach`.
    """
    slots = jnp.arange(known.shape[1])
    said = jnp.where((slots >= reach) & (slots < end_B[:, None]), known, -1)
    recent_BR = window(known, end_B - reach, reach)
    texts = framed_BM, framed(said, reach, plan.copies)
    copied_BW, count_B = propose(texts, recent_BR, width=plan.copies, least=plan.match)
    return copied_BW, count_B, recent_BR


def draft_with_copies(
    side: Side, state: State, tail: Tail, framed_BM: jax.Array, rule: SamplingRule, params: SamplingParams, plan: Plan
) -> tuple[Draft, Tail]:
    """Drafts and the drafter's tail: each step also reads copied tokens and keeps those that it would have drawn.

    The drafts are those of `draft_stepwise`, from the same random numbers; only the passes are fewer. Every pass feeds
    the last tokens of the sequence, those that the tail lacks, then the copies.
    """
    batch, width = state.count_B.shape[0], plan.copies
    reach = side.recent_BR.shape[1]
    room, most_B = plan.gamma + width + 1, jnp.minimum(params.drafts_B, plan.gamma)
    known = jnp.pad(known_tokens(side, state), ((0, 0), (0, room)))
    index = jnp.arange(width + 1)

    def step(item):
        draft, tail, seen_BV, open_B = item
        at_B = draft.length_B
        sequence = put(known, draft.tokens_BG, reach + state.count_B)
        copied_BW, count_B, recent_BR = copies_for(sequence, reach + state.count_B + at_B, reach, framed_BM, plan)
        fed_BT = jnp.concatenate([recent_BR[:, -lacking(state) :], copied_BW], axis=1)
        logits, longer = read(side, tail, fed_BT, plan, rows=width + 1)
        logits, finite_B = limited(logits, params, plan.vocabulary, side.decoder.config.vocab_size)
        z_BGV = warp(logits, rule, params, seen_before_each(seen_BV, copied_BW))
        keys_BG = position_keys(state.key_B, Draw.DRAFT, state.count_B + at_B, width + 1)
        drawn_BG = draw(keys_BG, z_BGV, rule, params)
        n_B = leading_agreement(copied_BW, drawn_BG, count_B)
        ends_BG = (rule.is_stop(drawn_BG) | _unsure(z_BGV, drawn_BG, rule, params)) & (index <= n_B[:, None])
        ended_B = jnp.any(ends_BG, axis=1)
        taken_B = jnp.where(ended_B, jnp.argmax(ends_BG, axis=1), n_B) + 1
        taken_B = jnp.where(open_B, jnp.minimum(taken_B, most_B - at_B), 0)
        log_q_BGV = draft.log_q_BGV
        if rule.has_q:  # a closed row writes past its own drafts, where nothing is read
            log_q_BGV = put(log_q_BGV, jax.nn.log_softmax(z_BGV, axis=-1), at_B)
        origin_BG = jnp.where(index < n_B[:, None], Origin.LOOKUP, Origin.DRAFT).astype(jnp.int8)
        draft = Draft(
            put(draft.tokens_BG, drawn_BG, at_B),
            log_q_BGV,
            put(draft.origin_BG, origin_BG, at_B),
            at_B + taken_B,
            draft.copied_B + count_B * open_B,
            draft.copied_accepted_B + n_B * open_B,
            draft.steps + 1,
            draft.faults_B + (open_B & ~finite_B),
        )
        still_B = open_B & ~ended_B & (draft.length_B < most_B)
        # A row that goes on reads its last drafts again. One that is finished keeps the last but one: after a full
        # accept it is no longer among the last two of the sequence.
        tail = longer.rolled_back(tail.length_B + taken_B + (open_B & ~still_B))
        return draft, tail, seen_after(seen_BV, drawn_BG, taken_B), still_B

    is_open_B = ~state.done_B & (most_B > 0)
    start = (Draft.empty(batch, room, rule, plan.vocabulary), tail, state.draft_seen_BV, is_open_B)
    draft, tail, _, _ = lax.while_loop(lambda item: jnp.any(item[3]), step, start)
    kept = {name: getattr(draft, name)[:, : plan.gamma] for name in ("tokens_BG", "log_q_BGV", "origin_BG")}
    return replace(draft, **kept), tail
