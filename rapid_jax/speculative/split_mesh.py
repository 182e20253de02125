# SPDX-License-Identifier: Apache-2.0
"""Rounds whose drafter and target live on devices of their own: a large drafter beside a small target, say.

The two halves of a round are two programs. Between them only what is small moves: the drafts with their distributions
one way, the tokens so far the other. In one process everything is started without waiting for it.
"""

from dataclasses import replace
from functools import partial

import jax

from rapid_jax.attention.cache import Tail
from rapid_jax.attention.kernels import platform_of
from rapid_jax.runtime.mesh import moved, whole
from rapid_jax.speculative.draft import Draft
from rapid_jax.speculative.lookup import framed
from rapid_jax.speculative.loop import TPU_OPTIONS, copies_alone, draft_tokens, verify_draft
from rapid_jax.speculative.sampling import SamplingParams, SamplingRule
from rapid_jax.speculative.state import Plan, Side, State


def _draft(drafter: Side, state: State, tail: Tail, text_BM, params: SamplingParams, *, rule: SamplingRule, plan: Plan):
    framed_BM = framed(text_BM, drafter.recent_BR.shape[1], plan.copies)
    draft, tail = draft_tokens(drafter, state, tail, framed_BM, params, rule, plan)
    return whole(drafter.decoder.mesh, draft), tail


def _verify(
    target: Side, state: State, draft: Draft | None, text_BM, params: SamplingParams, *, rule: SamplingRule, plan: Plan
) -> State:
    if draft is None:
        draft = copies_alone(target, state, framed(text_BM, target.recent_BR.shape[1], plan.copies), rule, plan)
    return verify_draft(target, state, draft, params, rule, plan)


_draft_jit = partial(jax.jit, _draft, static_argnames=("rule", "plan"), donate_argnames="tail")
_verify_jit = partial(jax.jit, _verify, static_argnames=("rule", "plan"), donate_argnames="state")
_drafted, _drafted_on_tpu = _draft_jit(), _draft_jit(compiler_options=dict(TPU_OPTIONS))
_verified, _verified_on_tpu = _verify_jit(), _verify_jit(compiler_options=dict(TPU_OPTIONS))


def run_rounds_apart(
    sides: tuple[Side, Side],
    texts: tuple[jax.Array, jax.Array],
    state: State,
    params: tuple[SamplingParams, SamplingParams],
    rounds: int,
    *,
    rule: SamplingRule,
    plan: Plan,
) -> State:
    """`run_rounds` with the first of each pair on the target's devices and the second on the drafter's.

    A round after every row is done changes nothing. The given state is used up; its tails stay on their own devices.
    """
    target, drafter = sides
    tpu = platform_of(target.decoder.mesh) == "tpu"
    draft_half, target_half = (_drafted_on_tpu, _verified_on_tpu) if tpu else (_drafted, _verified)
    draft_tail = state.draft_tail
    state = replace(state, draft_tail=None)
    for _ in range(rounds):
        draft = None
        if plan.gamma:
            tail = replace(state.target_tail, layers=())
            outline = replace(state, target_tail=tail, target_seen_BV=None, logprobs=None)
            known = moved(outline, drafter.decoder.mesh)
            draft, draft_tail = draft_half(drafter, known, draft_tail, texts[1], params[1], rule=rule, plan=plan)
            draft = moved(draft, target.decoder.mesh)
        state = target_half(target, state, draft, texts[0], params[0], rule=rule, plan=plan)
    return replace(state, draft_tail=draft_tail)
