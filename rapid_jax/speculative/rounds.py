# SPDX-License-Identifier: Apache-2.0
"""Calls of the device until every row is done, and what the host learns between them."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import jax
import numpy as np

from rapid_jax.attention.kernels import platform_of
from rapid_jax.model.finite import why_not_finite
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.mesh import agreed, replicated
from rapid_jax.speculative.apart import run_rounds_apart
from rapid_jax.speculative.config import SpeculationConfig
from rapid_jax.speculative.loop import run_rounds, run_rounds_on_tpu
from rapid_jax.speculative.sampling import Knobs, Law
from rapid_jax.speculative.schedule import AutoGamma, CopyGate, FixedGamma, Observation
from rapid_jax.speculative.state import Plan, Side, State

Schedule: TypeAlias = FixedGamma | AutoGamma
# (row, new tokens, their origins) -> whether the row should stop
OnTokens: TypeAlias = Callable[[int, list[int], list[int]], bool]


class Rounds:
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
        self.interrupted = [False] * text_BM.shape[0]  # rows that the caller has stopped
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

    def run(self, schedule: Schedule, speculation: SpeculationConfig, on_tokens: OnTokens | None) -> None:
        """Calls of the device until every row is done."""
        gate = CopyGate(gain=1.0 if speculation.lookup == "auto" else float("inf"))
        # Copies that no drafter reads are verified against p itself: right where the law is p's own.
        target_may_copy = self.law.greedy or speculation.effective_eta == 0
        while not all(self._ended()):
            gamma, rounds = schedule.choose()
            rounds = rounds if self.gammas else 1  # the first tokens are not to wait for more
            copying = speculation.lookup != "off" and gate.is_open() and (gamma > 0 or target_may_copy)
            plan = replace(self.plan, gamma=gamma, copies=self.plan.copies * copying)
            calls = []
            for part in [1] * rounds if speculation.rounds_per_read == 1 else [rounds]:
                calls.append(self._advance(plan, part))
                if on_tokens is not None:
                    self._tell(on_tokens)
                if all(self._ended()):
                    break
            seen = Observation.total(calls)
            schedule.observe(gamma, seen)
            gate.observe(seen, copying)

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
        self._check_finite(delta.target_faults, delta.draft_faults)
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

    def _check_finite(self, *faults: int) -> None:
        for side, name, count in zip(self.sides, ("target", "drafter"), faults, strict=True):
            if count and side is not None:
                why = why_not_finite(side.decoder)
                raise InputError(f"the {name}'s logits are NaN or infinite, which gives no answer: {why}")

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
