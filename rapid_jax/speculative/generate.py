# SPDX-License-Identifier: Apache-2.0
"""From two prefilled prompts to tokens: the host's part of speculation."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import jax
import numpy as np

from rapid_jax.attention.cache import Prefix, Tail
from rapid_jax.attention.kernels import platform_of
from rapid_jax.model.decoder import Decoder
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.mesh import agreed, replicated
from rapid_jax.speculative.apart import run_rounds_apart
from rapid_jax.speculative.config import SamplingConfig, SpeculationConfig
from rapid_jax.speculative.loop import run_rounds, run_rounds_on_tpu
from rapid_jax.speculative.prefill import extend, new_tail
from rapid_jax.speculative.sampling import Knobs, Law
from rapid_jax.speculative.schedule import CopyGate, Observation, gamma_schedule
from rapid_jax.speculative.start import EXTEND_WIDTH, RECENT, Sizes, plan_of, start_state, text_slots
from rapid_jax.speculative.state import Plan, Side, State

# (row, new tokens, their origins) -> whether the row should stop
OnTokens = Callable[[int, list[int], list[int]], bool]


@dataclass(frozen=True)
class Prompted:
    """A model and one prompt a row, of which the prefix holds the first tokens."""

    decoder: Decoder
    prompts: Sequence[Sequence[int]]
    prefix: Prefix
    cached: Sequence[int]  # tokens of each prompt that the prefix holds; at most all but the last (drafter: last two)


@dataclass(frozen=True)
class Generation:
    """What was generated; lists have one item a row."""

    tokens: list[list[int]]
    origins: list[list[int]]
    finish_reasons: list[str]  # stop: a stop token; length: the limit; interrupted: the caller said so
    drafted: list[int]
    accepted: list[int]
    rejected: list[int]  # rounds that ended before the last draft
    rounds: list[int]
    copied: list[int]
    copied_accepted: list[int]
    draft_steps: int
    target_steps: int
    gammas: dict[int, int]  # rounds run with each gamma
    prepare_seconds: float  # prompt tokens after the prefixes
    compile_seconds: float  # compiling the rounds, where they were not compiled yet
    decode_seconds: float  # the rounds

    def row(self, row: int) -> "Generation":
        """Of one row alone; steps, gammas and seconds stay those of all rows together."""
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: [value[row]] for name, value in own.items() if isinstance(value, list)})


def _side(prompted: Prompted, *, uncached: int, sizes: Sizes, block: int) -> tuple[Side, Tail]:
    """The model ready for rounds: every prompt token but the last `uncached` is in its prefix or its tail."""
    suffixes = []
    for prompt, cached in zip(prompted.prompts, prompted.cached, strict=True):
        if len(prompt) - uncached < cached:
            raise InputError(f"expected at most {len(prompt) - uncached} cached prompt tokens, got {cached}")
        suffixes.append(prompt[cached : len(prompt) - uncached])
    longest = max(len(suffix) for suffix in suffixes)
    dtype = prompted.decoder.embed_VD[...].dtype  # of what is read anew, whatever the prefix is stored in
    tail = new_tail(prompted.decoder, list(prompted.cached), sizes.tail(longest), dtype)
    if longest:
        tail = extend(prompted.decoder, prompted.prefix, tail, suffixes, width=EXTEND_WIDTH, block_size=block)
    recent = np.full((len(suffixes), RECENT), -1, np.int32)
    for row, prompt in enumerate(prompted.prompts):
        last = list(prompt[-RECENT:])
        recent[row, RECENT - len(last) :] = last
    lengths = np.asarray([len(prompt) for prompt in prompted.prompts], np.int32)
    return Side(prompted.decoder, prompted.prefix, *replicated(prompted.decoder.mesh, (recent, lengths))), tail


def _text(texts: Sequence[Sequence[int]], match: int) -> np.ndarray:
    longest = max((len(text) for text in texts), default=0)
    text_BM = np.full((len(texts), text_slots(longest, match)), -1, np.int32)
    for row, text in enumerate(texts):
        text_BM[row, : len(text)] = text
    return text_BM


def _seen(prompted: Prompted | None, vocabulary: int, sampling: SamplingConfig) -> np.ndarray | None:
    if prompted is None or sampling.repetition_penalty == 1:
        return None
    seen_BV = np.zeros((len(prompted.prompts), vocabulary), bool)
    if sampling.penalize == "all":
        for row, prompt in enumerate(prompted.prompts):
            seen_BV[row, list(prompt)] = True
    return seen_BV


class _Rounds:
    """The running state of one `generate` call, and what the host learns of it between calls of the device."""

    def __init__(
        self, sides: tuple[Side, Side | None], text_BM: np.ndarray, state: State, law: Law, knobs: Knobs, plan: Plan
    ):
        self.sides, self.state, self.law, self.plan = sides, state, law, plan
        self.meshes = [side.decoder.mesh for side in sides if side is not None]
        self.texts = [replicated(mesh, text_BM) for mesh in self.meshes]
        self.knobs = [replicated(mesh, knobs) for mesh in self.meshes]
        self.gammas: dict[int, int] = {}
        self.compile_seconds = 0.0
        self.interrupted = [False] * text_BM.shape[0]
        self._told = [0] * text_BM.shape[0]
        self._compiled: set[Plan] = set()
        self.host = self._read()

    def _read(self) -> dict[str, Any]:
        state = self.state
        return jax.device_get(
            {
                "emitted": state.emitted_BO,
                "origin": state.origin_BO,
                "count": state.count_B,
                "done": state.done_B,
                "counts": state.counts,
            }
        )

    def _call(self, plan: Plan, rounds: int) -> None:
        target, drafter = self.sides
        if drafter is not None and self.meshes[0] != self.meshes[1]:
            sides, texts, knobs = (target, drafter), tuple(self.texts), tuple(self.knobs)
            self.state = run_rounds_apart(sides, texts, self.state, knobs, rounds, law=self.law, plan=plan)
            return
        count = replicated(self.meshes[0], np.int32(rounds))
        program = run_rounds_on_tpu if platform_of(self.meshes[0]) == "tpu" else run_rounds
        beside = None if drafter is None else drafter.beside(target)
        self.state = program(target, beside, self.texts[0], self.state, self.knobs[0], count, law=self.law, plan=plan)

    def _compile(self, plan: Plan) -> None:
        """Runs rounds of the plan that change nothing: none of them, or one with every row done."""
        if len(set(self.meshes)) == 1:
            return self._call(plan, 0)
        self._set_done([True] * len(self.interrupted))
        self._call(plan, 1)
        self._set_done(self._ended())

    def _ended(self) -> list[bool]:
        return [bool(done) or cut for done, cut in zip(self.host["done"], self.interrupted, strict=True)]

    def _set_done(self, done: Sequence[bool]) -> None:
        self.state = replace(self.state, done_B=replicated(self.meshes[0], np.asarray(done)))

    def run(self, speculation: SpeculationConfig, on_tokens: OnTokens | None) -> None:
        """Calls of the device until every row is done."""
        schedule = gamma_schedule(speculation, self.sides[1] is not None)
        gate = CopyGate(gain=1.0 if speculation.lookup == "auto" else float("inf"))
        # Copies that no drafter reads are verified against p itself: right where the law is p's own.
        target_may_copy = self.law.greedy or speculation.effective_eta == 0
        while not all(self._ended()):
            gamma, rounds = schedule.choose()
            rounds = rounds if self.gammas else 1  # the first tokens are not to wait for more
            copying = speculation.lookup != "off" and gate.is_open() and (gamma > 0 or target_may_copy)
            seen = self._advance(replace(self.plan, gamma=gamma, copies=self.plan.copies * copying), rounds)
            schedule.observe(gamma, seen)
            gate.observe(seen, copying)
            if on_tokens is not None:
                self._tell(on_tokens)

    def _advance(self, plan: Plan, rounds: int) -> Observation:
        """What `rounds` rounds of a plan did; a plan new to this run is first compiled, by zero rounds of it."""
        start = time.perf_counter()
        if plan not in self._compiled:
            self._compile(plan)
            jax.block_until_ready(self.state)
            self._compiled.add(plan)
            self.compile_seconds += time.perf_counter() - start
            start = time.perf_counter()
        self._call(plan, rounds)
        before, self.host = self.host, self._read()
        delta = jax.tree.map(lambda old, new: int(np.sum(new - old)), before["counts"], self.host["counts"])
        self.gammas[plan.gamma] = self.gammas.get(plan.gamma, 0) + delta.rounds
        passes = delta.draft_steps if plan.gamma else delta.rounds
        return Observation(
            seconds=agreed(time.perf_counter() - start),
            rounds=delta.rounds,
            row_rounds=delta.round_B,
            accepted=delta.accepted_B,
            rejections=delta.rejected_B,
            copied_accepted=delta.copied_accepted_B,
            copy_steps=passes * len(self.interrupted) if plan.copies else 0,
            emitted=int(np.sum(self.host["count"] - before["count"])),
        )

    def _tell(self, on_tokens: OnTokens) -> None:
        for row, count in enumerate(self.host["count"].tolist()):
            if self.interrupted[row] or count == self._told[row]:
                continue
            span = slice(self._told[row], count)
            self._told[row] = count
            emitted, origin = self.host["emitted"][row, span].tolist(), self.host["origin"][row, span].tolist()
            if on_tokens(row, emitted, origin):
                self.interrupted[row] = True
                self._set_done(self._ended())

    def generation(self, prepare_seconds: float, decode_seconds: float) -> Generation:
        """Everything emitted, and how."""
        counts, lengths = self.host["counts"], self.host["count"].tolist()
        tokens = [row[:length].tolist() for row, length in zip(self.host["emitted"], lengths, strict=True)]
        reasons = [
            "stop" if row and row[-1] in self.law.stops else "interrupted" if cut else "length"
            for row, cut in zip(tokens, self.interrupted, strict=True)
        ]
        return Generation(
            tokens=tokens,
            origins=[row[:length].tolist() for row, length in zip(self.host["origin"], lengths, strict=True)],
            finish_reasons=reasons,
            drafted=counts.drafted_B.tolist(),
            accepted=counts.accepted_B.tolist(),
            rejected=counts.rejected_B.tolist(),
            rounds=counts.round_B.tolist(),
            copied=counts.copied_B.tolist(),
            copied_accepted=counts.copied_accepted_B.tolist(),
            draft_steps=int(counts.draft_steps),
            target_steps=int(counts.rounds),
            gammas=self.gammas,
            prepare_seconds=prepare_seconds,
            compile_seconds=self.compile_seconds,
            decode_seconds=decode_seconds - self.compile_seconds,
        )


def generate(
    target: Prompted,
    drafter: Prompted | None,
    *,
    speculation: SpeculationConfig,
    sampling: SamplingConfig,
    stops: Sequence[int],
    texts: Sequence[Sequence[int]] = (),
    seeds: Sequence[int] | None = None,
    block: int = 8192,
    on_tokens: OnTokens | None = None,
) -> Generation:
    """Tokens for every row until a stop token, the length limit or the caller's word.

    With a fixed gamma, row b's tokens depend on its own prompts and `seeds[b]` (default: the seed of the settings for
    every row), not on the rest of the batch. gamma = auto goes by the clock: the tokens need not be the same again
    except at temperature 0, and its rounds without drafts are the target's own law whatever eta is. `texts` is what
    level 0 may copy from, as token ids: document, then retrieved text. The two models may differ in padded vocabulary;
    only the ids that both have are used.
    """
    start = time.perf_counter()
    batch = len(target.prompts)
    sizes = Sizes.of(speculation, sampling)
    vocabulary = min(side.decoder.config.vocab_size for side in (target, drafter) if side is not None)
    target_side, target_tail = _side(target, uncached=1, sizes=sizes, block=block)
    drafter_side, draft_tail = None, None
    if drafter is not None:
        drafter_side, draft_tail = _side(drafter, uncached=2, sizes=sizes, block=block)
    seen = _seen(target, vocabulary, sampling), _seen(drafter, vocabulary, sampling)
    host_state = start_state(seeds or [sampling.seed] * batch, sizes, sampling.max_new_tokens, seen)
    placed_state = replicated(target.decoder.mesh, host_state)
    state = State(target_tail=target_tail, draft_tail=draft_tail, **placed_state)
    plan = plan_of(speculation, block=block, vocabulary=vocabulary)
    text_BM = _text(texts or [[]] * batch, speculation.lookup_match)
    law, knobs = Law.of(sampling, speculation, stops), Knobs.of(sampling, speculation)
    rounds = _Rounds((target_side, drafter_side), text_BM, state, law, knobs, plan)
    jax.block_until_ready((target_tail, draft_tail))
    ready = time.perf_counter()
    rounds.run(speculation, on_tokens)
    return rounds.generation(ready - start, time.perf_counter() - ready)
