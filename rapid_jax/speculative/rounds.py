# SPDX-License-Identifier: Apache-2.0
"""Calls of the device until every row is done, and what the host learns between them."""

import math
import time
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import jax
import numpy as np
from jax.sharding import Mesh

from rapid_jax.attention.cache import capacity
from rapid_jax.attention.kernels import platform_of
from rapid_jax.model.finite import why_not_finite
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.mesh import agreed, on_host, replicate
from rapid_jax.speculative.attended import Choices, choose
from rapid_jax.speculative.loop import run_rounds, run_rounds_on_tpu
from rapid_jax.speculative.rows import fitted, outline, params_of_rows, params_with_row, taken, with_room, written
from rapid_jax.speculative.sampling import SamplingParams, SamplingRule
from rapid_jax.speculative.schedule import AutoGamma, FixedGamma, Observation
from rapid_jax.speculative.split_mesh import run_rounds_apart
from rapid_jax.speculative.state import Counts, Logprobs, Plan, Side, State

_LOOKS = 3  # at how long a call takes without rounds: one alone may meet a hiccup
Schedule: TypeAlias = FixedGamma | AutoGamma
Slots: TypeAlias = tuple[int, ...]


@dataclass(frozen=True)
class Progress:
    """What the host knows of each row."""

    emitted_BO: np.ndarray
    origin_BO: np.ndarray
    count_B: np.ndarray
    done_B: np.ndarray
    counts: Counts
    logprobs: Logprobs | None


class Rounds:
    """Rows that are answered side by side, and what the host knows of them between calls of the device.

    Rows may join, once something of theirs has been prepared in rounds of their own, and leave.
    """

    def __init__(
        self,
        sides: tuple[Side, Side | None],
        text_BM: np.ndarray,
        state: State,
        rule: SamplingRule,
        params: SamplingParams,
        plan: Plan,
        choices: Choices | None = None,
    ):
        """`params` are arrays of the host; `choices`: when the drafter chooses anew what it reads of the target's."""
        self.sides, self.state, self.rule, self.plan, self.choices = sides, state, rule, plan, choices
        self.meshes = [side.decoder.mesh for side in sides if side is not None]
        self.texts = [replicate(mesh, text_BM) for mesh in self.meshes]
        self.compile_seconds = 0.0
        self.interrupted = [False] * text_BM.shape[0]  # rows that the caller has stopped
        self._overheads: dict[Hashable, float] = {}  # by program: seconds of a call beside its rounds
        self.set_params(params)
        self.host = self._read()

    def set_params(self, params: SamplingParams) -> None:
        """From now on the rows are drawn so."""
        self.host_params = params
        self.params = [replicate(mesh, params) for mesh in self.meshes]

    def _read(self) -> Progress:
        state = self.state
        asked = (state.emitted_BO, state.origin_BO, state.count_B, state.done_B, state.counts, state.logprobs)
        return Progress(*on_host(asked))

    def _call(self, plan: Plan, rounds: int) -> None:
        target, drafter = self.sides
        if drafter is not None and self.meshes[0] != self.meshes[1]:
            sides, texts, params = (target, drafter), tuple(self.texts), tuple(self.params)
            self.state = run_rounds_apart(sides, texts, self.state, params, rounds, rule=self.rule, plan=plan)
            return
        if self.choices is None or drafter is None or not plan.gamma:
            self._run(plan, rounds)
            return
        for due_B, part in self.choices.calls(rounds) or [(np.zeros(len(self.interrupted), bool), 0)]:
            if due_B.any() or not rounds:
                due_B = replicate(self.meshes[0], due_B)
                prefix = choose(target, drafter.prefix, self.state.queries_BGLNH, due_B, block=plan.block)
                drafter = replace(drafter, prefix=prefix)
                self.sides = target, drafter
            self._run(plan, part)

    def _run(self, plan: Plan, rounds: int) -> None:
        """So many rounds on devices that both sides share."""
        target, drafter = self.sides
        count = replicate(self.meshes[0], np.int32(rounds))
        program = run_rounds_on_tpu if platform_of(self.meshes[0]) == "tpu" else run_rounds
        beside = None if drafter is None else drafter.beside(target)
        self.state = program(
            target, beside, self.texts[0], self.state, self.params[0], count, rule=self.rule, plan=plan
        )

    def compile(self, plan: Plan) -> None:
        """Runs rounds of the plan that change nothing: none of them, or one with every row done."""
        if len(set(self.meshes)) == 1:
            self._call(plan, 0)
        else:
            self._set_done([True] * len(self.interrupted))
            self._call(plan, 1)
            self._set_done(self.ended())
        jax.block_until_ready(self.state)

    def ended(self) -> list[bool]:
        """Rows whose answers are complete, or cut off."""
        return [bool(done) or cut for done, cut in zip(self.host.done_B, self.interrupted, strict=True)]

    def interrupt(self, row: int) -> None:
        """The row's answer ends here."""
        self.interrupted[row] = True
        self._set_done(self.ended())

    def _set_done(self, done: Sequence[bool]) -> None:
        self.state = replace(self.state, done_B=replicate(self.meshes[0], np.asarray(done)))

    @property
    def may_copy(self) -> bool:
        """Whether copies that no drafter reads may be verified against p itself: where that is every row's rule."""
        return bool(np.all(self.host_params.eta_B == 0))

    def advance(self, plan: Plan, rounds: int) -> Observation:
        """What `rounds` rounds of a plan did; a program new to these rows, and to as many, is first compiled, by rounds
        of it that change nothing."""
        key = self.rule, plan, len(self.interrupted), self.sides[0].prefix.pos_BS.shape
        if key not in self._overheads:
            start = time.perf_counter()
            self.compile(plan)
            # Asked for by gamma auto alone; where the halves are apart the host starts every round by itself.
            is_told = plan.catch_up and len(set(self.meshes)) == 1
            self._overheads[key] = min(self._time(plan, 0)[0] for _ in range(_LOOKS)) if is_told else 0.0
            self.compile_seconds += time.perf_counter() - start
        before = self.host
        seconds, self.host = self._time(plan, rounds)
        own = jax.tree.map(np.subtract, self.host.counts, before.counts)
        total = jax.tree.map(lambda delta: int(np.sum(delta)), own)
        self._check_finite(total.target_faults_B, total.draft_faults_B)
        run = int(np.max(own.round_B))
        passes = int(np.max(own.draft_steps_B)) if plan.gamma else run
        return Observation(
            seconds=agreed(max(seconds - self._overheads[key], 0.1 * seconds)),
            rounds=run,
            row_rounds=total.round_B,
            accepted=total.accepted_B,
            rejections=total.rejected_B,
            copied_accepted=total.copied_accepted_B,
            copy_steps=passes * len(self.interrupted) if plan.copies else 0,
            emitted=int(np.sum(self.host.count_B - before.count_B)),
        )

    def _time(self, plan: Plan, rounds: int) -> tuple[float, Progress]:
        """(seconds, what the host knows then) of a call and of reading what it did."""
        start = time.perf_counter()
        self._call(plan, rounds)
        host = self._read()
        return time.perf_counter() - start, host

    def _check_finite(self, *faults: int) -> None:
        for side, name, count in zip(self.sides, ("target", "drafter"), faults, strict=True):
            if count and side is not None:
                why = why_not_finite(side.decoder)
                raise InputError(f"the {name}'s logits are NaN or infinite, which gives no answer: {why}")

    # Rows that come and go.

    def widen(self, *, transfers: bool) -> None:
        """From now on the rows have one of few programs, whatever they ask for.

        `transfers` as in `SamplingRule.widened`.
        """
        self.rule = self.rule.widened(transfers=transfers)
        if self.rule.penalty:
            self.state = self._with_seen(self.state)

    def join(self, other: "Rounds", row: int, rows: int, document: tuple[int, int] | None = None) -> None:
        """The one row of `other` as this one's `row`, of `rows`; other rows stay as they are. `other` is used up.

        Both have the same models. `document`, the place of the target's prefix and how many there are, puts that of
        `other` there: rows share the prefixes evenly, one behind the other. Without it theirs is there already.
        """
        self.rule = other.rule = self.rule.and_also(other.rule)
        (first, second), (their_first, their_second) = self._parts(), other._parts()

        def put(mine: dict[str, Any], theirs: dict[str, Any], mesh: Mesh | None, at: int, count: int):
            mine, theirs = fitted(mine, theirs, _context(mesh))
            return written(with_room(mine, theirs, count), theirs, np.int32(at))

        first = put(first, their_first, self.meshes[0], row, rows)
        if second is not None and their_second is not None:
            second = put(second, their_second, self.meshes[1], row, rows)
        self._set_parts(first, second)
        if document is not None:
            target, drafter = self.sides
            mine, theirs = ({"prefix": rounds.sides[0].prefix} for rounds in (self, other))
            prefix = put(mine, theirs, self.meshes[0], *document)["prefix"]
            self.sides = replace(target, prefix=prefix), drafter
        self.interrupted = [*self.interrupted, *[True] * (rows - len(self.interrupted))]
        self.interrupted[row] = False
        if self.choices is not None and other.choices is not None:
            self.choices = self.choices.with_row(other.choices, row, rows)
        self.set_params(params_with_row(self.host_params, other.host_params, row, rows))
        self.host = self._read()

    @property
    def kind(self) -> Hashable:
        """What rows have in common whose rounds take about as long: how many they are, of how many documents, how many
        copies they may read, and the half octaves of what they have read."""
        target, drafter = self.sides
        read = [side.prefix.slots for side in (target, drafter) if side is not None]
        rows = len(self.interrupted), len(target.prefix.pos_BS), self.plan.copies
        return *rows, *(round(2 * math.log2(slots + 1)) for slots in read)

    @property
    def slots(self) -> Slots:
        """Of a row: in the target's prefix and tail, the text, the output, and the drafter's prefix and tail."""
        target, drafter = self.sides
        own = target.prefix.slots, capacity(self.state.target_tail.layers)
        own += self.texts[0].shape[1], self.state.emitted_BO.shape[1]
        if drafter is None:
            return own
        tail = self.state.draft_tail
        return *own, drafter.prefix.slots, 0 if tail is None else capacity(tail.layers)

    def outline(self) -> list[Any]:
        """The shapes of all that the rows have."""
        return [outline(part) for part in self._every_part()]

    def compile_fit(self, larger: list[Any]) -> None:
        """Runs what makes the one row's arrays as large as those of such an outline, as `join` does, and drops them."""
        meshes = self.meshes[0], self.meshes[0], self.meshes[-1]
        for part, other, mesh in zip(self._every_part(), larger, meshes, strict=False):
            jax.block_until_ready(fitted(other, part, _context(mesh))[1])

    def _every_part(self) -> list[dict[str, Any]]:
        first, second = self._parts()
        return [first, {"prefix": self.sides[0].prefix}, *([] if second is None else [second])]

    def arrange(self, rows: Sequence[int], documents: Sequence[int] | None = None) -> None:
        """Those rows in that order, and of the target's prefixes those; a row that is there twice is done in all but
        the first place."""
        first, second = self._parts()
        self._set_parts(taken(first, rows), None if second is None else taken(second, rows))
        if documents is not None:
            target, drafter = self.sides
            self.sides = replace(target, prefix=taken(target.prefix, documents)), drafter
        self.interrupted = [self.interrupted[row] or row in rows[:at] for at, row in enumerate(rows)]
        self.choices = None if self.choices is None else self.choices.of_rows(rows)
        self.set_params(params_of_rows(self.host_params, list(rows)))
        self.host = self._read()
        self._set_done(self.ended())

    def _parts(self) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """What the rows have on the target's devices, and on the drafter's; but for the target's prefixes."""
        target, drafter = self.sides
        state = replace(self.state, draft_tail=None)
        if self.rule.penalty:
            state = self._with_seen(state)
        if self.rule.logprobs and state.logprobs is None:
            none = Logprobs.none(*state.emitted_BO.shape)
            state = replace(state, logprobs=replicate(self.meshes[0], none))
        first = {"recent_BR": target.recent_BR, "prompt_B": target.prompt_B, "state": state, "text_BM": self.texts[0]}
        if drafter is None:
            return first, None
        second = {"recent_BR": drafter.recent_BR, "prompt_B": drafter.prompt_B, "prefix": drafter.prefix}
        second |= {"tail": self.state.draft_tail}
        if self.meshes[0] != self.meshes[1]:
            second |= {"text_BM": self.texts[1]}
        return first, second

    def _set_parts(self, first: dict[str, Any], second: dict[str, Any] | None) -> None:
        target, drafter = self.sides
        target = replace(target, recent_BR=first["recent_BR"], prompt_B=first["prompt_B"])
        if drafter is not None and second is not None:
            drafter = replace(drafter, **{name: second[name] for name in ("recent_BR", "prompt_B", "prefix")})
        self.sides = target, drafter
        self.state = replace(first["state"], draft_tail=None if second is None else second["tail"])
        self.texts = [first["text_BM"], *([] if second is None else [second.get("text_BM", first["text_BM"])])]

    def _with_seen(self, state: State) -> State:
        """With room for what a repetition penalty is of."""
        shape = state.done_B.shape[0], self.plan.vocabulary
        named = zip(("target_seen_BV", "draft_seen_BV"), self.sides, strict=True)
        missing = [name for name, side in named if side is not None and getattr(state, name) is None]
        return replace(state, **{name: replicate(self.meshes[0], np.zeros(shape, bool)) for name in missing})


def _context(mesh: Mesh | None) -> int:
    return 1 if mesh is None else mesh.shape["context"]
