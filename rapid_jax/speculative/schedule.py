# SPDX-License-Identifier: Apache-2.0
"""How many tokens to draft next, and whether to copy: decided by the host between reads of the device."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields

from rapid_jax.speculative.config import SpeculationConfig
from rapid_jax.speculative.round_times import BELIEF, FIRST_WAIT, LONGEST_WAIT, Chance, Costs

GAMMAS = (0, 1, 2, 3, 5, 10)  # what gamma = auto chooses from
LOOK_WAIT = 96  # rounds from one look at a gamma that nothing speaks for to the next
TRIAL = 2  # rounds that a first look takes; after one alone, a single unlucky draft would decide
HOPELESS = 16  # times FIRST_WAIT until the next trial where none could pay even if all drafts were accepted
_GOOD, _ALL = 0.9, 1 - 1e-6  # chances that a draft of a good drafter, and of the best there is, is accepted
_LEAST_STEP = 0.02  # of a plain round's time, that a draft more takes
_TRIED = 1.5  # drafts that the belief counts as where drafts are tried again


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
    """Prompt lookup stays on while a pass that reads copies yields enough of them, and is tried again now and then."""

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
class AutoGamma:
    """The gamma with the most expected tokens a second, from measured round times and the acceptance seen lately.

    With a the chance that a draft is accepted, gamma drafts give (1 - a^(gamma + 1)) / (1 - a) tokens a round. A gamma
    not yet run is costed from those that were, and chosen only beside one of them. Times jump, so every LOOK_WAIT
    rounds one is run once that would be the best if its rounds took the least they can. While gamma is 0 nothing is
    learnt of a, so a draft is tried again where one can pay: after `draft_wait` rounds (half of them at the start of
    an answer, where the drafter has missed nothing), twice as many after every trial that fails, up to LONGEST_WAIT;
    HOPELESS times FIRST_WAIT where none could pay. A plain round is timed again after `plain_wait` rounds of drafting,
    likewise.

    Times and waits are in `costs`, which outlive the answer: those that follow know what the first one paid for.
    """

    rounds_per_read: int
    gammas: tuple[int, ...] = GAMMAS
    costs: Costs = field(default_factory=Costs)
    draft_share: float | None = None  # bytes that a drafter's pass reads, over those of the target's
    chance: Chance = field(default_factory=lambda: Chance.believed(BELIEF))
    plain: float = 1.0  # tokens of a plain round lately; more than one where prompt lookup copies
    missed: int = 0  # rounds of this answer since its last draft
    begun: bool = False  # something was drafted for this answer

    def believe(self, acceptance: float) -> None:
        """Starts from what others met, or where that was little from the middle between it and what drafters do."""
        self.chance = Chance.believed(max(acceptance, (acceptance + BELIEF) / 2))

    @property
    def acceptance(self) -> float:
        """The current estimate of a."""
        return self.chance.mean

    def round_seconds(self, gamma: int) -> float | None:
        """Measured, else extrapolated from the measured ones; None if that cannot be.

        Of a gamma that was timed once the smaller of both: it is worth a second look before it is given up.
        """
        measured = self.costs.seconds(gamma)
        if measured is not None and (gamma == 0 or self.costs.is_sure(gamma)):
            return measured
        found = self._extrapolate(gamma)
        return found if measured is None else min(measured, found or measured)

    def _extrapolate(self, gamma: int) -> float | None:
        """On the line through the two drafting gammas nearest to it; of one alone with half its price a draft, since
        the first draft costs more than the next ones."""
        plain, costs = self.costs.seconds(0), self.costs
        timed = {other: seconds for other in self._drafting if other != gamma and (seconds := costs.seconds(other))}
        timed = {other: timed[other] for other in timed if costs.is_sure(other)} or timed
        if plain is None or not timed:
            return None
        near, *others = sorted(timed, key=lambda other: abs(other - gamma))
        second = next((other for other in others if (other < gamma) != (near < gamma)), others[0] if others else 0)
        step = (timed[near] - timed.get(second, plain)) / (near - second)
        if not others and gamma > near:
            step /= 2
        return max(timed[near] + (gamma - near) * max(step, _LEAST_STEP * plain), plain)

    def tokens_per_second(self, gamma: int, acceptance: float | None = None) -> float:
        """Expected, at that acceptance or the current one; 0 if the cost is not known."""
        cost = self.round_seconds(gamma)
        return self._tokens(gamma, acceptance or self.acceptance) / cost if cost else 0.0

    def _tokens(self, gamma: int, acceptance: float) -> float:
        """Of a round."""
        return (1 - acceptance ** (gamma + 1)) / (1 - acceptance) if gamma else self.plain

    def choose(self) -> tuple[int, int]:
        """(gamma, rounds) of the next call."""
        costs = self.costs
        if not any(map(costs.seconds, self._drafting)):
            return self._first(), TRIAL
        if costs.seconds(0) is None:
            return 0, TRIAL
        if costs.since_look >= LOOK_WAIT and (unknown := self._unknown()):
            return unknown[0], 1
        best = max(self._at_hand(), key=self.tokens_per_second)
        if best == 0:
            unsure = [gamma for gamma in self._drafting if len(costs.times.get(gamma, ())) == 1]
            if unsure and len(costs.times) == 2:  # with plain rounds: all that is known hangs on that one time
                return unsure[0], TRIAL
            return (self._trial(), TRIAL) if self._is_trial else (0, 2 * self.rounds_per_read)
        if costs.drafting >= costs.plain_wait:
            return 0, TRIAL
        return best, self.rounds_per_read if costs.is_sure(best) else TRIAL

    def _unknown(self) -> list[int]:
        """Gammas never timed that would be the best if drafts cost the least they can.

        Kernels read at the memory's rate up to some width, so what a round takes jumps, and no line through the gammas
        that were timed shows whether one beside a jump pays.
        """
        costs, plain = self.costs, self.costs.seconds(0)
        if plain is None:
            return []
        known = max(map(self.tokens_per_second, (0, *self._drafting)))
        timed = [(gamma, seconds) for gamma in (0, *self._drafting) if (seconds := costs.seconds(gamma))]
        found = []
        for gamma in self._drafting:
            if costs.seconds(gamma) is None:
                below, seconds = max(pair for pair in timed if pair[0] < gamma)
                least = seconds + (gamma - below) * _LEAST_STEP * plain
                found += [gamma] if self._tokens(gamma, self.acceptance) / least > known else []
        return found

    @property
    def _drafting(self) -> list[int]:
        return sorted(gamma for gamma in self.gammas if gamma > 0)

    def _at_hand(self) -> list[int]:
        """Plain rounds, and the gammas that were timed or are next to one that was."""
        timed = [at for at, gamma in enumerate(self._drafting) if self.costs.seconds(gamma)]
        return [0, *self._drafting[max(timed[0] - 1, 0) : timed[-1] + 2]] if timed else [0]

    @property
    def _is_trial(self) -> bool:
        """Whether plain rounds have gone on for long enough to draft again, whatever is expected of it."""
        if not self._paying(_ALL):
            return self.costs.plain >= HOPELESS * FIRST_WAIT
        return self.costs.plain >= (self.costs.draft_wait if self.begun else self.costs.draft_wait // 2)

    def _paying(self, acceptance: float) -> list[int]:
        """Gammas at hand with more tokens a second than plain rounds at that acceptance."""
        plain = self.tokens_per_second(0)
        return [gamma for gamma in self._at_hand()[1:] if self.tokens_per_second(gamma, acceptance) > plain]

    def _trial(self) -> int:
        """What is tried: the shortest draft that a good drafter makes worth its time."""
        return (self._paying(_GOOD) or self._paying(_ALL) or self._drafting)[0]

    def _first(self) -> int:
        """What to draft before anything was: the best by what passes read, the shortest where that is not known."""
        share = self.draft_share
        if share is None:
            return self._drafting[0]
        return max(self._drafting, key=lambda gamma: self._tokens(gamma, self.acceptance) / (1 + gamma * share))

    def observe(self, gamma: int, seen: Observation) -> None:
        """Takes in what a call did."""
        if not seen.rounds:
            return
        costs, is_trial = self.costs, gamma > 0 and self._is_trial
        costs.since_look = 0 if costs.seconds(gamma) is None else costs.since_look + seen.rounds
        # What plain rounds gave the drafter reads before it drafts.
        costs.observe(gamma, seen.seconds / seen.rounds, is_bound=gamma > 0 and self.missed > 0)
        if gamma == 0:
            self._observe_plain(seen)
            return
        if is_trial:  # it counts for itself, not against old failures
            self.chance = Chance.believed(BELIEF, _TRIED)
        self.chance.observe(seen.accepted, seen.rejections)
        costs.plain, costs.drafting = 0, costs.drafting + seen.rounds
        self.missed, self.begun = 0, True
        if self.tokens_per_second(gamma) > self.tokens_per_second(0):
            costs.draft_wait = FIRST_WAIT
        elif is_trial:
            costs.draft_wait = min(2 * costs.draft_wait, LONGEST_WAIT)

    def _observe_plain(self, seen: Observation) -> None:
        costs = self.costs
        self.plain = 0.7 * self.plain + 0.3 * seen.emitted / max(seen.row_rounds, 1)
        self.missed += seen.rounds
        costs.plain += seen.rounds
        if costs.drafting >= costs.plain_wait:
            costs.plain_wait = min(2 * costs.plain_wait, LONGEST_WAIT)
        costs.drafting = 0


def gamma_schedule(config: SpeculationConfig, has_drafter: bool) -> FixedGamma | AutoGamma:
    """What the configuration asks for; without a drafter nothing is drafted."""
    if not has_drafter:
        return FixedGamma(0, config.rounds_per_read)
    if config.gamma == "auto":
        return AutoGamma(config.rounds_per_read)
    return FixedGamma(int(config.gamma), config.rounds_per_read)
