# SPDX-License-Identifier: Apache-2.0
"""The programs of a run, with shapes in place of arrays: what `generate` and `prefill` would compile, and no more."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from rapid_jax.attention.cache import KV, Prefix, Tail, each_layer
from rapid_jax.attention.kernels import kernel_of
from rapid_jax.attention.quantized_kv import quantize_array
from rapid_jax.config import ATTENDED, RapidConfig
from rapid_jax.model.decoder import Block
from rapid_jax.model.matrix import quantize_matrix
from rapid_jax.model.quantized import BITS
from rapid_jax.plan.architectures import Architecture
from rapid_jax.plan.cost import Pass, Work
from rapid_jax.plan.models import PlannedModel, layout_of, own_bytes, planned
from rapid_jax.plan.working import of_prefill, of_quantized_keys, of_quantized_matrix, of_round
from rapid_jax.retrieval.config import retrieved_tokens
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.mesh import make_mesh, make_meshes
from rapid_jax.speculative import prefill, split_mesh
from rapid_jax.speculative.draft import Draft
from rapid_jax.speculative.generate import allowed_rows
from rapid_jax.speculative.initial_state import Sizes, gamma_bucket, gammas_of, plan_of, start_state, text_slots
from rapid_jax.speculative.loop import run_rounds_on_tpu
from rapid_jax.speculative.own_sampling import resolve
from rapid_jax.speculative.sampling import SamplingParams, SamplingRule
from rapid_jax.speculative.state import Plan, State

QUESTION = 256  # tokens assumed for the question and the template's end, behind the document


@dataclass(frozen=True)
class Program:
    """One compiled program of a run, and what surrounds it. `resident` are trees of `jax.ShapeDtypeStruct` by kind."""

    name: str
    lower: Callable[[], Any]  # the jax.stages.Lowered
    resident: Mapping[str, Any]  # in memory while it runs, its arguments among them; each array once
    work: Work  # of one device, one call: the costliest
    total: Work  # of all calls
    calls: int = 1
    loops: tuple[int, ...] = ()  # how often a loop of unknown length runs, by nesting, outermost first
    working: int = 0  # bytes beside `resident` by the rules of `working.py`, for a GPU: its compiler is not here


def programs_of(
    config: RapidConfig, devices: tuple[Any, ...], target: Architecture, drafter: Architecture | None, context: int
) -> list[Program]:
    """The programs of one question on a document that fills `context` positions, the answer included.

    `drafter` None: the target's own weights, or no drafter. The prompts are as long as they can be: the target's all
    but the answer, the drafter's what retrieval gives it. Raises InputError for what a run would refuse.
    """
    ours, theirs = models_of(config, devices, target, drafter, context)
    own = theirs is not None and theirs.held is not ours.held  # weights of its own, or a copy
    together = theirs is not None and theirs.mesh == ours.mesh
    beside = [theirs.held] if own and together and theirs is not None else []
    found = [_prefill(config, ours, "prefill", beside)]
    if ours.quantizes_prefix:
        found.append(_quantized_prefix(ours, beside))
    if theirs is not None and own and theirs.bits is not None:
        others = [ours.held] if together and ours.held is not theirs.full else []
        found.insert(0, _quantized_weights(theirs, "drafter quantisation", others))
    if ours.bits is not None:
        found.insert(0, _quantized_weights(ours, "quantisation", []))
    if own and theirs is not None:
        others = [ours.held, ours.read_prefix()] if together else []
        found.append(_prefill(config, theirs, "drafter prefill", others))
    if theirs is not None and not together:
        return found + _halves(config, ours, theirs)
    return [*found, _round(config, ours, theirs)]


def models_of(
    config: RapidConfig, devices: tuple[Any, ...], target: Architecture, drafter: Architecture | None, context: int
) -> tuple[PlannedModel, PlannedModel | None]:
    """(The target, the drafter or None where none drafts), each with the longest prompt that it may get."""
    if config.models.drafter == ATTENDED:
        raise InputError("rapid plan: models.drafter attended cannot be planned, expected same or a model")
    mode, bits = config.speculation.mode, BITS.get(config.models.drafter_weights)
    first, second = make_meshes(config.mesh, config.drafter_mesh, devices)
    if devices[0].platform == "gpu":
        kernel_of(config.compute.kernel, "gpu", 1)  # what a run refuses
    else:
        first = first or make_mesh(config.mesh, devices[:1])
    short = retrieved_tokens(context, config.retrieval) + QUESTION
    long = short if mode == "retrieval" else max(context - config.sampling.max_new_tokens - QUESTION, 1)
    ours = planned(config, target, first, config.mesh, long, retrieved=mode == "retrieval")
    if config.models.target_weights == "int8":
        rounds = ours.quantizes_prefix
        ours = replace(ours.quantize_to(8, shared=False), quantizes_prefix=rounds)
    if mode in ("target", "retrieval"):
        return ours, None
    if drafter is None:
        layout = layout_of(config, config.mesh, short - 2, coarse=True)
        theirs = replace(ours, prompt=short - 2, layout=layout, quantizes_prefix=False)
        bits = None if ours.bits is not None else bits  # the target's own copy
    else:
        sizes = config.drafter_mesh or config.mesh
        theirs = planned(config, drafter, second or first, sizes, short - 2, retrieved=True)
    return ours, theirs if bits is None else theirs.quantize_to(bits, shared=drafter is None)


def _prefill(config: RapidConfig, model: PlannedModel, name: str, others: list[Any]) -> Program:
    """One chunk of a prompt: the last, which sees all before it. `others` is what else its devices hold."""
    layout, compute = model.layout, config.compute
    block = min(layout.chunk, prefill.LARGEST_BLOCK)
    strategy = prefill.serving(model.decoder, block, compute.kernel, compute.context)
    prefix, kept = model.prefix(filling=True), model.kept_beside()
    tokens_BT, used = model.int32(1, layout.chunk, name="tokens_BT"), model.int32()
    passes = [Pass(layout.chunk, index * layout.chunk, 0) for index in range(layout.chunks)]
    works = [model.work(run, split_tokens=True) for run in passes]
    stacked = isinstance(model.decoder.blocks, Block)
    parts = 1 if stacked else model.decoder.config.num_layers

    def lower():
        if stacked:
            groups = prefix.groups
            stacks, fars = (group.layers for group in groups), ((group.pos_BS, used) for group in groups)
            window, at = prefill.windows_of(model.decoder.config)
            how = {"at": at, "window": window if len(groups) > 1 else None}
            arguments = (model.decoder, tokens_BT, tuple(stacks), tuple(fars), tokens_BT)
            return prefill._chunk_stacked.lower(*arguments, strategy=strategy, **how)
        config = model.decoder.config
        assert model.mesh is not None, "nothing is compiled for a GPU"
        spec = NamedSharding(model.mesh, strategy.spec("x_BTD"))
        x_BTD = jax.ShapeDtypeStruct((1, layout.chunk, config.hidden_size), model.dtype, sharding=spec)
        angle = jax.ShapeDtypeStruct((1, layout.chunk, config.rotary_dim // 2), jnp.float32, sharding=spec)
        windows = config.window_of
        at = windows.index(None) if None in windows else 0  # of two programs the one that needs more
        group = prefix.groups[0]  # without a window, where there are such layers
        arguments = (x_BTD, (angle, angle), each_layer(prefix)[at], group.pos_BS, used, tokens_BT)
        layer: Any = model.decoder.blocks[at]  # type: ignore[index]
        return prefill._chunk_layer.lower(layer, *arguments, strategy=strategy, window=windows[at])

    resident = _by_kind(
        model.held, prefix, *([] if kept is None else [kept]), *others, other=(tokens_BT, tokens_BT, used)
    )
    one = Work(works[-1].flops / parts, works[-1].hbm_bytes / parts)
    total = Work(math.fsum(work.flops for work in works), math.fsum(work.hbm_bytes for work in works))
    return Program(name, lower, resident, one, total, layout.chunks * parts, working=of_prefill(model))


def _quantized_weights(model: PlannedModel, name: str, others: list[Any]) -> Program:
    """A model's copy being made, its largest matrix last; the weights in full are still there."""
    bits, full = model.bits, model.full
    assert bits is not None
    work = Work(0.0, own_bytes(full))
    resident = _by_kind(model.decoder.matrices, full, *others, other=())  # the rest of the copy is in `full`

    def lower():
        head = model.decoder.lm_head
        assert head is not None
        if full.lm_head is None:
            return quantize_matrix.lower(full.embed_VD.get_value(), "JD", bits, head.place)
        return quantize_matrix.lower(full.lm_head.values.get_value(), "DJ", bits, head.place)

    return Program(name, lower, resident, work, work, working=of_quantized_matrix(model))


def _quantized_prefix(model: PlannedModel, others: list[Any]) -> Program:
    """The prompt's keys being quantised, then its values: a layer's at a time, or all where they are one array.

    The first call, when all else is in full. On one device; a mesh's each round their own part.
    """
    prefix = model.prefix()
    groups = [group.layers for group in prefix.groups]
    layers = [kv for each in groups for kv in ([each] if isinstance(each, KV) else each)]
    arrays, keys = jax.tree.leaves(layers), layers[0].k_BKSH
    every = Work(0.0, own_bytes(arrays))
    one = Work(0.0, every.hbm_bytes / len(arrays))
    resident = _by_kind(model.held, prefix, *others, other=())

    def lower():
        return quantize_array.lower(keys, turned=False, mesh=model.mesh)

    return Program("prefix quantisation", lower, resident, one, every, len(arrays), working=of_quantized_keys(keys))


def _by_kind(*parts: Any, other: Any) -> dict[str, Any]:
    """Prefixes and tails are cache, other parts are weights."""
    return {
        "weights": [part for part in parts if not isinstance(part, Prefix | Tail)],
        "cache": [part for part in parts if isinstance(part, Prefix | Tail)],
        "other": other,
    }


@dataclass(frozen=True)
class _Rounds:
    """What the rounds of a run share."""

    rule: SamplingRule
    params: SamplingParams
    plan: Plan
    sizes: Sizes
    state: dict[str, Any]
    text: int


def _rounds(config: RapidConfig, target: PlannedModel, drafter: PlannedModel | None) -> _Rounds:
    speculation, sampling = config.speculation, resolve(config.sampling, None).config
    models = [target] if drafter is None else [target, drafter]
    tokens, vocabulary = target.decoder.config.vocab_size, target.decoder.vocabulary
    gamma = 0 if drafter is None else gamma_bucket(max(gammas_of(speculation)))
    rule = SamplingRule.of(sampling, speculation, (tokens - 1,))
    plan = plan_of(speculation, block=config.compute.attention_block, vocabulary=vocabulary)
    copying = speculation.lookup != "off" and (gamma > 0 or not rule.has_q or speculation.effective_eta == 0)
    plan = replace(plan, gamma=gamma, copies=plan.copies * copying)
    sizes = Sizes.of(speculation, sampling)
    seen = jax.ShapeDtypeStruct((1, vocabulary), bool) if rule.penalty else None
    state = start_state([0], sizes, sampling.max_new_tokens, (seen, seen if drafter is not None else None))  # type: ignore[arg-type]
    text = text_slots(sum(model.prompt for model in models) + 2, speculation.lookup_match)
    params = SamplingParams.of(sampling, speculation, allowed_rows(range(tokens), vocabulary))
    return _Rounds(rule, params, plan, sizes, state, text)


def _passes(rounds: _Rounds, target: PlannedModel, drafter: PlannedModel | None) -> tuple[Work, Work]:
    """(the drafts of a round one by one, their verification)."""
    gamma, copies = rounds.plan.gamma, rounds.plan.copies
    fed = gamma + 1 if gamma else copies + 1
    verified = target.work(Pass(fed, target.prompt, fed))
    if drafter is None or not gamma:
        return Work(), verified
    steps = [2 + copies] * gamma if copies else [2] + [1] * (gamma - 1)
    works = (drafter.work(Pass(fed, drafter.prompt, copies + 1)) for fed in steps)
    return sum(works, Work()), verified


def _round(config: RapidConfig, target: PlannedModel, drafter: PlannedModel | None) -> Program:
    """Draft and verify in one program."""
    rounds = _rounds(config, target, drafter)
    sides = target.side(), None if drafter is None else drafter.side()
    tails = target.tail(rounds.sizes, QUESTION), None if drafter is None else drafter.tail(rounds.sizes, 0)
    state = State(target_tail=tails[0], draft_tail=tails[1], **target.whole(rounds.state))
    text, params = target.int32(1, rounds.text), target.whole(rounds.params)
    drafted, verified = _passes(rounds, target, drafter)

    def lower():
        target_side, drafter_side = sides
        beside = None if drafter_side is None else drafter_side.beside(target_side)
        arguments = (target_side, beside, text, state, params, target.int32())
        return run_rounds_on_tpu.lower(*arguments, rule=rounds.rule, plan=rounds.plan)

    decoders = [target.held]
    if drafter is not None and drafter.held is not target.held:
        decoders.append(drafter.held)
    caches = [x for x in (*(side.prefix for side in sides if side is not None), *tails) if x is not None]
    rest = replace(state, target_tail=None, draft_tail=None)  # type: ignore[arg-type]
    resident = _by_kind(*decoders, *caches, other=(text, rest, params))
    work = drafted + verified
    working = of_round(rounds.plan)
    return Program("round", lower, resident, work, work, loops=(1, _draft_loop(rounds.plan)), working=working)


def _draft_loop(plan: Plan) -> int:
    """How often the loop of the drafter's steps runs; without copies the first step is outside of it."""
    return max(plan.gamma - (plan.copies == 0), 0)


def _halves(config: RapidConfig, target: PlannedModel, drafter: PlannedModel) -> list[Program]:
    """Draft and verify on devices of their own."""
    rounds = _rounds(config, target, drafter)
    tail, near = drafter.tail(rounds.sizes, 0), target.tail(rounds.sizes, QUESTION)
    state = State(target_tail=near, draft_tail=None, **target.whole(rounds.state))
    outline = replace(state, target_tail=replace(near, layers=()), target_seen_BV=None)
    known, params = drafter.whole(outline), rounds.params
    texts = [model.int32(1, rounds.text) for model in (target, drafter)]
    side, rule, plan = drafter.side(), rounds.rule, rounds.plan
    drafted, verified = _passes(rounds, target, drafter)

    def lower_draft():
        arguments = (side, known, tail, texts[1], drafter.whole(params))
        return split_mesh._drafted_on_tpu.lower(*arguments, rule=rule, plan=plan)

    def lower_verify():
        shapes = jax.eval_shape(lambda: Draft.empty(1, plan.gamma, rule, plan.vocabulary))
        draft = target.whole(shapes) if plan.gamma else None
        arguments = (target.side(), state, draft, texts[0], target.whole(params))
        return split_mesh._verified_on_tpu.lower(*arguments, rule=rule, plan=plan)

    theirs = _by_kind(drafter.held, side.prefix, tail, other=(texts[1], known, drafter.whole(params)))
    rest = replace(state, target_tail=None)  # type: ignore[arg-type]
    ours = _by_kind(target.held, target.read_prefix(), near, other=(texts[0], rest, target.whole(params)))
    return [
        Program("draft", lower_draft, theirs, drafted, drafted, loops=(_draft_loop(plan),)),
        Program("verify", lower_verify, ours, verified, verified),
    ]
