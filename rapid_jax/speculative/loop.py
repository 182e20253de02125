# SPDX-License-Identifier: Apache-2.0
"""The draft-verify round as one program, and rounds in a loop on the device.

Round: gamma drafts from the drafter, one forward of gamma + 1 tokens through the target, accept, resample, roll both
caches back by moving their lengths. The host starts several rounds at a time and reads tokens between. `split_mesh.py`
runs the two halves of a round on devices of their own.
"""

from dataclasses import replace
from functools import partial
from types import MappingProxyType

import jax
import jax.numpy as jnp
from jax import lax

from rapid_jax.attention.cache import Tail
from rapid_jax.runtime.mesh import whole
from rapid_jax.speculative.accept import leading_agreement, verify
from rapid_jax.speculative.attended import latest
from rapid_jax.speculative.draft import (
    Draft,
    catch_up,
    copies_for,
    draft_stepwise,
    draft_with_copies,
    read,
    read_with_queries,
)
from rapid_jax.speculative.lookup import framed
from rapid_jax.speculative.sampling import (
    Draw,
    SamplingParams,
    SamplingRule,
    draw,
    limited,
    position_keys,
    seen_after,
    seen_before_each,
    warp,
)
from rapid_jax.speculative.state import Logprobs, Origin, Plan, Side, State, known_tokens, put, window
from rapid_jax.speculative.vocabulary import at, largest

# Without this option the TPU compiler comes to no end on some rounds (libtpu 0.0.42.1; plain temperature with copies).
TPU_OPTIONS = MappingProxyType({"xla_disable_hlo_passes": "while-loop-invariant-code-motion"})


def _run_rounds(
    target: Side,
    drafter: Side | None,
    text_BM: jax.Array,
    state: State,
    params: SamplingParams,
    rounds: jax.Array,
    *,
    rule: SamplingRule,
    plan: Plan,
) -> State:
    """The state after `rounds` rounds, or fewer when every row is done. The given state is used up.

    The drafter comes as `Side.beside` makes it.
    """
    drafter = None if drafter is None else drafter.with_decoder_of(target)
    framed_BM = framed(text_BM, target.recent_BR.shape[1], plan.copies)  # once a call

    def one(item):
        index, state = item
        return index + 1, one_round(target, drafter, framed_BM, state, params, rule, plan)

    def more(item):
        index, state = item
        return (index < rounds) & ~jnp.all(state.done_B)

    return lax.while_loop(more, one, (jnp.int32(0), state))[1]


_jit = partial(jax.jit, static_argnames=("rule", "plan"), donate_argnames="state")
run_rounds, run_rounds_on_tpu = _jit(_run_rounds), _jit(_run_rounds, compiler_options=dict(TPU_OPTIONS))


def one_round(
    target: Side,
    drafter: Side | None,
    framed_BM: jax.Array,
    state: State,
    params: SamplingParams,
    rule: SamplingRule,
    plan: Plan,
) -> State:
    """The state after one round; each row that is not done has 1 to (drafts + 1) tokens more."""
    if plan.gamma == 0:
        draft, draft_tail = copies_alone(target, state, framed_BM, rule, plan), state.draft_tail
    elif drafter is None:
        raise ValueError(f"gamma {plan.gamma} needs a drafter")
    elif state.draft_tail is None:  # what it writes beside the target's keys and values is dropped
        (draft, _), draft_tail = draft_tokens(drafter, state, state.target_tail, framed_BM, params, rule, plan), None
    else:
        draft, draft_tail = draft_tokens(drafter, state, state.draft_tail, framed_BM, params, rule, plan)
    return replace(verify_draft(target, state, draft, params, rule, plan), draft_tail=draft_tail)


def draft_tokens(
    drafter: Side,
    state: State,
    tail: Tail,
    framed_BM: jax.Array,
    params: SamplingParams,
    rule: SamplingRule,
    plan: Plan,
) -> tuple[Draft, Tail]:
    """The drafter's half of a round: (drafts, its tail)."""
    if state.queries_BGLNH is None:
        tail = catch_up(drafter, state, tail, plan)
    if plan.copies:
        return draft_with_copies(drafter, state, tail, framed_BM, rule, params, plan)
    return draft_stepwise(drafter, state, tail, rule, params, plan)


def verify_draft(
    target: Side, state: State, draft: Draft, params: SamplingParams, rule: SamplingRule, plan: Plan
) -> State:
    """The target's half of a round: the state, less the drafter's tail, with the accepted drafts and a token more."""
    last_B1 = window(known_tokens(target, state), target.recent_BR.shape[1] + state.count_B - 1, 1)
    fed_BT = jnp.concatenate([last_B1, draft.tokens_BG], axis=1)
    T = fed_BT.shape[1]
    fed_queries = None
    if state.queries_BGLNH is None:
        logits, target_tail = read(target, state.target_tail, fed_BT, plan, rows=T)
    else:
        logits, target_tail, fed_queries = read_with_queries(target, state.target_tail, fed_BT, plan, rows=T)
    logits, finite_B = limited(logits, params, plan.vocabulary, target.decoder.config.vocab_size)
    z_BGV = warp(logits, rule, params, seen_before_each(state.target_seen_BV, draft.tokens_BG))
    token_keys_BG = position_keys(state.key_B, Draw.TOKEN, state.count_B, T)
    if plan.gamma:
        accept_keys_BG = position_keys(state.key_B, Draw.ACCEPT, state.count_B, T - 1)
        keys = (accept_keys_BG, token_keys_BG)
        n_B, token_B = verify(keys, draft.tokens_BG, draft.log_q_BGV, draft.length_B, z_BGV, rule, params)
    else:
        drawn_BG = draw(token_keys_BG, z_BGV, rule, params)
        n_B = leading_agreement(draft.tokens_BG, drawn_BG, draft.length_B)
        token_B = jnp.take_along_axis(drawn_BG, n_B[:, None], axis=1)[:, 0]
    outline = replace(state, target_tail=replace(state.target_tail, layers=()), draft_tail=None)
    # Whole on every device: the host reads it, and of several hosts each reads its own copy.
    before_B = state.count_B
    state = _commit(outline, draft, n_B, token_B, ~finite_B, logits, rule, plan)
    if fed_queries is not None and state.queries_BGLNH is not None:
        state = replace(state, queries_BGLNH=latest(state.queries_BGLNH, fed_queries, state.count_B - before_B))
    state = whole(target.decoder.mesh, state)
    return replace(state, target_tail=replace(state.target_tail, layers=target_tail.layers))


def copies_alone(target: Side, state: State, framed_BM: jax.Array, rule: SamplingRule, plan: Plan) -> Draft:
    """Copied tokens as drafts for the target itself, from the `framed` text."""
    draft = Draft.empty(state.count_B.shape[0], plan.copies, rule, 1)
    if not plan.copies:
        return draft
    reach = target.recent_BR.shape[1]
    copied_BW, count_B, _ = copies_for(known_tokens(target, state), reach + state.count_B, reach, framed_BM, plan)
    origin_BG = jnp.full_like(draft.origin_BG, Origin.LOOKUP)
    return replace(draft, tokens_BG=copied_BW, origin_BG=origin_BG, length_B=count_B, copied_B=count_B)


def _commit(
    state: State,
    draft: Draft,
    n_B: jax.Array,
    token_B: jax.Array,
    faulty_B: jax.Array,
    logits_BGV: jax.Array,
    rule: SamplingRule,
    plan: Plan,
) -> State:
    """The state with the accepted drafts and the token after them, cut at a stop token and at the row's limit.

    The tails' lengths are moved; what they hold is the caller's. `faulty_B`: the target's logits, from which
    log-probabilities come, were not all numbers.
    """
    index = jnp.arange(draft.tokens_BG.shape[1] + 1)
    accepted = index < n_B[:, None]
    fresh_BG = jnp.where(accepted, jnp.pad(draft.tokens_BG, ((0, 0), (0, 1))), token_B[:, None])
    last = jnp.where(n_B < draft.length_B, Origin.CORRECTION, Origin.BONUS).astype(jnp.int8)
    origin_BG = jnp.where(accepted, jnp.pad(draft.origin_BG, ((0, 0), (0, 1))), last[:, None])
    is_stop = rule.is_stop(fresh_BG) & (index <= n_B[:, None])
    stopped_B = jnp.any(is_stop, axis=1)
    taken_B = jnp.where(stopped_B, jnp.argmax(is_stop, axis=1), n_B) + 1
    room_B = state.limit_B - state.count_B
    live_B = ~state.done_B
    taken_B = jnp.where(live_B, jnp.minimum(taken_B, room_B), 0)
    count_B = state.count_B + taken_B
    verified_B = jnp.minimum(draft.length_B, room_B) * live_B
    accepted_B = jnp.minimum(jnp.minimum(n_B, verified_B), taken_B)
    copied_accepted_B = draft.copied_accepted_B if plan.gamma else accepted_B
    counts = state.counts
    return replace(
        state,
        target_tail=state.target_tail.rolled_back(state.target_tail.length_B + taken_B),
        emitted_BO=put(state.emitted_BO, fresh_BG, state.count_B),
        origin_BO=put(state.origin_BO, origin_BG, state.count_B),
        count_B=count_B,
        done_B=state.done_B | stopped_B & (taken_B > jnp.argmax(is_stop, axis=1)) | (count_B >= state.limit_B),
        target_seen_BV=seen_after(state.target_seen_BV, fresh_BG, taken_B),
        draft_seen_BV=seen_after(state.draft_seen_BV, fresh_BG, taken_B),
        counts=replace(
            counts,
            drafted_B=counts.drafted_B + verified_B,
            accepted_B=counts.accepted_B + accepted_B,
            rejected_B=counts.rejected_B + (n_B < verified_B),
            copied_B=counts.copied_B + draft.copied_B * live_B,
            copied_accepted_B=counts.copied_accepted_B + copied_accepted_B * live_B,
            draft_steps_B=counts.draft_steps_B + draft.steps * live_B,
            round_B=counts.round_B + live_B,
            target_faults_B=counts.target_faults_B + (live_B & faulty_B),
            draft_faults_B=counts.draft_faults_B + draft.faults_B * live_B,
        ),
        logprobs=None
        if state.logprobs is None
        else _with_logprobs(state.logprobs, logits_BGV, fresh_BG, state.count_B),
    )


def _with_logprobs(logprobs: Logprobs, logits_BGV: jax.Array, fresh_BG: jax.Array, count_B: jax.Array) -> Logprobs:
    """What is known of the tokens so far and of the fresh ones after them."""
    log_p_BGV = jax.nn.log_softmax(logits_BGV.astype(jnp.float32), axis=-1)
    own_BG = at(log_p_BGV, fresh_BG)
    top_BGN, ids_BGN = largest(log_p_BGV, logprobs.top_BON.shape[-1])
    return Logprobs(
        put(logprobs.token_BO, own_BG, count_B),
        put(logprobs.top_BON, top_BGN, count_B),
        put(logprobs.top_ids_BON, ids_BGN, count_B),
    )
