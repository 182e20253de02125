# SPDX-License-Identifier: Apache-2.0
"""How rows go on: how many drafts the next rounds have, whether they copy, and what is learnt of that."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import jax

from rapid_jax.speculative.config import SpeculationConfig
from rapid_jax.speculative.round_times import RoundTimes
from rapid_jax.speculative.rounds import Rounds, Schedule
from rapid_jax.speculative.schedule import AutoGamma, CopyGate, Observation, gamma_schedule
from rapid_jax.speculative.state import Plan, Side


@dataclass
class Pace:
    """The schedule of rows that are answered side by side. What it learns of rounds it leaves in `times`."""

    speculation: SpeculationConfig
    has_drafter: bool
    times: RoundTimes = field(default_factory=RoundTimes)
    gammas: dict[int, int] = field(default_factory=dict)  # rounds run with each gamma
    schedule: Schedule = field(init=False)
    gate: CopyGate = field(init=False)

    def __post_init__(self):
        self.schedule = gamma_schedule(self.speculation, self.has_drafter)
        self.gate = CopyGate(gain=1.0 if self.speculation.lookup == "auto" else float("inf"))
        if isinstance(self.schedule, AutoGamma):  # a drafter that did badly for others may do well for these rows
            self.schedule.believe(self.times.acceptance)

    def under(self, speculation: SpeculationConfig, rounds: Rounds) -> "Pace":
        """The pace of the rows that there are from now on: how often drafts are accepted is still known, and how long
        rounds of such rows took."""
        other = Pace(speculation, self.has_drafter, self.times, self.gammas)
        old, new = self.schedule, other.schedule
        if isinstance(old, AutoGamma) and isinstance(new, AutoGamma):
            costs = self.times.of(rounds.kind)
            share = None if costs.times else _draft_share(*rounds.sides)
            other.schedule = replace(old, costs=costs, draft_share=share)
        other.gate = self.gate
        return other

    def _may_copy(self, rounds: Rounds, gamma: int) -> bool:
        return self.speculation.lookup != "off" and (gamma > 0 or rounds.may_copy)

    def plans(self, rounds: Rounds) -> list[Plan]:
        """All that these rows may come to run by."""
        gammas = self.schedule.gammas if isinstance(self.schedule, AutoGamma) else (self.schedule.gamma,)
        each = [(gamma, False) for gamma in gammas]
        each += [(gamma, True) for gamma in gammas if self._may_copy(rounds, gamma)]
        return [replace(rounds.plan, gamma=gamma, copies=rounds.plan.copies * copying) for gamma, copying in each]

    def advance(self, rounds: Rounds, tell: Callable[[], None]) -> Observation:
        """A call of the device, or several where the host looks at every round; `tell` is called after each."""
        gamma, count = self.schedule.choose()
        count = count if self.gammas else 1  # the first tokens are not to wait for more
        copying = self._may_copy(rounds, gamma) and self.gate.is_open()
        plan = replace(rounds.plan, gamma=gamma, copies=rounds.plan.copies * copying)
        calls = []
        for part in [1] * count if self.speculation.rounds_per_read == 1 else [count]:
            calls.append(rounds.advance(plan, part))
            tell()
            if all(rounds.ended()):
                break
        seen = Observation.total(calls)
        self.gammas[gamma] = self.gammas.get(gamma, 0) + seen.rounds
        self.schedule.observe(gamma, seen)
        if gamma and isinstance(self.schedule, AutoGamma):
            self.times.acceptance = self.schedule.acceptance
        self.gate.observe(seen, copying)
        return seen


def _draft_share(target: Side, drafter: Side | None) -> float | None:
    """Bytes that a pass of the drafter reads, over those of the target: what speculation costs at the least."""
    if drafter is None:
        return None
    theirs, ours = (sum(array.nbytes for array in jax.tree.leaves((side.decoder, side.prefix)))
                    for side in (drafter, target))  # fmt: skip
    return theirs / ours
