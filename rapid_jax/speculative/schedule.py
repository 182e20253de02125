# SPDX-License-Identifier: Apache-2.0
"""How many tokens to draft next, and whether to copy: decided by the host between reads of the device."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, fields

from rapid_jax.speculative.config import SpeculationConfig

GAMMAS = (0, 1, 2, 3, 5, 10)  # what gamma = auto chooses from
TRIAL = 2  # rounds that a first look takes; after one alone, a single unlucky draft would decide
BELIEF = 2 / 3  # chance that a draft is accepted, where nothing is known of it,
BELIEVED = 1.5  # which counts as so many drafts seen
HOPELESS = 16  # times as long is waited with the next trial where none could pay even if all drafts were accepted


@dataclass(frozen=True)
class Observation:
    """What one call of the device program did, summed over rows."""

    seconds: float  # of its rounds, without what a call takes beside them
    rounds: int  # forward passes of the target
    row_rounds: int  # the same, counted once a live row
    accepted: int
    rejections: int  # rounds of a row that ended before the last draft
    copied_accepted: int
    copy_steps: int  # forward passes that read copies
    emitted: int

    @classmethod
    def total(cls, calls: Sequence["Observation"]) -> "Observation":
        """What calls one after the other did together."""
        return cls(**{each.name: sum(getattr(call, each.name) for call in calls) for each in fields(cls)})


@dataclass
class CopyGate:
    """Level 0 stays on while a pass that reads copies yields enough of them, and is tried again now and then."""

    least_gain: float = 0.5  # accepted copies a pass; what the wider pass must earn
    first_wait: int = 32  # emitted tokens before the next trial; doubled by each that fails
    gain: float = 1.0
    idle: int = 0  # tokens emitted since the gate closed
    wait: int = field(init=False)

    def __post_init__(self):
        self.wait = self.first_wait

    def is_open(self) -> bool:
        """Whether the next rounds should copy."""
        return self.gain >= self.least_gain or self.idle >= self.wait

    def observe(self, seen: Observation, copied: bool) -> None:
        """Takes in what a call did."""
        if not copied:
            self.idle += seen.emitted
        elif seen.copy_steps:
            gain = seen.copied_accepted / seen.copy_steps
            if self.gain >= self.least_gain:
                self.gain = 0.5 * self.gain + 0.5 * gain
            else:  # a trial counts for itself, not against old failures
                self.gain, self.idle = gain, 0
                self.wait = self.first_wait if gain >= self.least_gain else 2 * self.wait


@dataclass
class FixedGamma:
    """Always the same gamma."""

    gamma: int
    rounds_per_read: int

    def choose(self) -> tuple[int, int]:
        """(gamma, rounds) of the next call."""
        return self.gamma, self.rounds_per_read

    def observe(self, gamma: int, seen: Observation) -> None:
        """Nothing to learn."""


@dataclass
class Costs:
    """What rounds of one kind of rows take."""

    seconds: dict[int, float] = field(default_factory=dict)  # of one round, by gamma
    once: set[int] = field(default_factory=set)  # gammas that were timed once: a program's first rounds take longer


@dataclass
class RoundTimes:
    """What rounds have taken, and how often drafts were accepted: kept for the rows that come after."""

    acceptance: float = BELIEF  # of late
    _costs: dict[Hashable, Costs] = field(default_factory=dict)

    def of(self, kind: Hashable) -> Costs:
        """Those of rows of a kind; what is put in stays."""
        return self._costs.setdefault(kind, Costs())


@dataclass
class AutoGamma:
    """The gamma with the most expected tokens a second, from measured round times and the acceptance seen lately.

    With a the chance that a draft is accepted, gamma drafts give (1 - a^(gamma + 1)) / (1 - a) tokens a round. A gamma
    not yet run is costed from those that were: c(gamma) = c(0) + gamma d; before any was, from what passes must read.
    While gamma is 0 nothing is learnt of a, so a short draft is tried again: after `first_wait` rounds, and twice as
    many after every trial that fails. A drafter that is never worth its time so costs four rounds at first (where
    `costs` knows of none) and then a few of every hundred. A plain round is timed again after as many rounds of
    drafting.
    """

    rounds_per_read: int
    gammas: tuple[int, ...] = GAMMAS
    first_wait: int = 64
    costs: Costs = field(default_factory=Costs)
    draft_share: float | None = None  # bytes that a drafter's pass reads, over those of the target's
    accepted: float = BELIEVED * BELIEF  # discounted counts, starting from a weak belief
    rejected: float = BELIEVED * (1 - BELIEF)
    plain: float = 1.0  # tokens of a plain round lately; more than one where level 0 copies
    idle: int = 0  # rounds since the last draft
    drafting: int = 0  # rounds since the last plain one
    wait: int = field(init=False)

    def __post_init__(self):
        self.wait = self.first_wait

    @property
    def seconds(self) -> dict[int, float]:
        """Of one round, by gamma."""
        return self.costs.seconds

    def believe(self, acceptance: float) -> None:
        """Starts from that chance, weakly."""
        self.accepted, self.rejected = BELIEVED * acceptance, BELIEVED * (1 - acceptance)

    @property
    def acceptance(self) -> float:
        """The current estimate of a."""
        return min(self.accepted / (self.accepted + self.rejected), 0.999)

    def round_seconds(self, gamma: int) -> float | None:
        """Measured, else extrapolated from gamma = 0 and the measured one nearest to it; None if that cannot be.

        Of a gamma that was timed once the smaller of both: it is worth a second look before it is given up.
        """
        measured, once = self.seconds.get(gamma), gamma in self.costs.once
        if measured is not None and (gamma == 0 or not once):
            return measured
        found = self._extrapolated(gamma)
        return found if measured is None else min(measured, found or measured)

    def _extrapolated(self, gamma: int) -> float | None:
        known = [other for other in self.seconds if other > 0 and other != gamma]
        if 0 not in self.seconds or not known:
            return None
        nearest = min(known, key=lambda other: abs(other - gamma))
        step = max((self.seconds[nearest] - self.seconds[0]) / nearest, 0.05 * self.seconds[0])
        return self.seconds[0] + gamma * step

    def tokens_per_second(self, gamma: int) -> float:
        """Expected, at the current acceptance; 0 if the cost is not known."""
        cost = self.round_seconds(gamma)
        return self._tokens(gamma) / cost if cost else 0.0

    def _tokens(self, gamma: int) -> float:
        """Of a round."""
        a = self.acceptance
        return (1 - a ** (gamma + 1)) / (1 - a) if gamma else self.plain

    def choose(self) -> tuple[int, int]:
        """(gamma, rounds) of the next call."""
        if not any(self.seconds.get(gamma) for gamma in self._drafting):
            return self._first(), TRIAL
        if 0 not in self.seconds:
            return 0, TRIAL
        best = max(self.gammas, key=self.tokens_per_second)
        if best == 0:
            unsure = [gamma for gamma in self._drafting if gamma in self.costs.once and not self._extrapolated(gamma)]
            if unsure:
                return unsure[0], TRIAL
            return (self._drafting[0], TRIAL) if self._is_trial else (0, 2 * self.rounds_per_read)
        if self.drafting >= self.first_wait:
            return 0, TRIAL
        return best, self.rounds_per_read if best in self.seconds and best not in self.costs.once else TRIAL

    @property
    def _drafting(self) -> list[int]:
        return sorted(gamma for gamma in self.gammas if gamma > 0)

    @property
    def _is_trial(self) -> bool:
        """Whether plain rounds have gone on for long enough to draft again, whatever is expected of it."""
        return self.idle >= self.wait

    def _could_pay(self) -> bool:
        """Whether some gamma would have more tokens a second than plain rounds if all its drafts were accepted."""
        return any(
            (gamma + 1) / (self.round_seconds(gamma) or float("inf")) > self.tokens_per_second(0)
            for gamma in self._drafting
        )

    def _first(self) -> int:
        """What to draft before anything was: the best by what passes read, the shortest where that is not known."""
        share = self.draft_share
        if share is None:
            return self._drafting[0]
        return max(self._drafting, key=lambda gamma: self._tokens(gamma) / (1 + gamma * share))

    def observe(self, gamma: int, seen: Observation) -> None:
        """Takes in what a call did."""
        if not seen.rounds:
            return
        self._observe_time(gamma, seen.seconds / seen.rounds)
        if gamma == 0:
            self.plain = 0.7 * self.plain + 0.3 * seen.emitted / max(seen.row_rounds, 1)
            self.idle, self.drafting = self.idle + seen.rounds, 0
            return
        is_trial = self._is_trial
        if is_trial:  # it counts for itself, not against old failures
            self.believe(BELIEF)
        keep = 0.9**seen.row_rounds
        self.accepted = self.accepted * keep + seen.accepted
        self.rejected = self.rejected * keep + seen.rejections
        self.idle, self.drafting = 0, self.drafting + seen.rounds
        if self.tokens_per_second(gamma) > self.tokens_per_second(0):
            self.wait = self.first_wait
        elif is_trial:
            self.wait *= 2 if self._could_pay() else HOPELESS

    def _observe_time(self, gamma: int, now: float) -> None:
        known, once = self.seconds.get(gamma), self.costs.once
        missed = gamma > 0 and self.idle > 0  # the drafter first read what it had missed: no more than a bound
        was_hiccup = known is not None and 1.5 * now < known  # of the machine
        if known is None:
            self.seconds[gamma] = now
            once.add(gamma)
        elif gamma in once:
            self.seconds[gamma] = min(known, now)
            once.remove(gamma)
        elif missed:
            self.seconds[gamma] = min(known, now)
            if was_hiccup:
                once.add(gamma)  # to be timed again, with nothing missed
        elif was_hiccup:
            self.seconds[gamma] = now
        else:
            self.seconds[gamma] = 0.7 * known + 0.3 * min(now, 1.5 * known)


def gamma_schedule(config: SpeculationConfig, has_drafter: bool) -> FixedGamma | AutoGamma:
    """What the configuration asks for; without a drafter nothing is drafted."""
    if not has_drafter:
        return FixedGamma(0, config.rounds_per_read)
    if config.gamma == "auto":
        return AutoGamma(config.rounds_per_read)
    return FixedGamma(int(config.gamma), config.rounds_per_read)
