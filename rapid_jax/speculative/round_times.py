# SPDX-License-Identifier: Apache-2.0
"""What rounds take and how often drafts are accepted: learnt as answers are made, known to those that come after."""

import math
from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field

BELIEF = 2 / 3  # chance that a draft is accepted, where nothing is known of it
FIRST_WAIT = 64  # rounds without a draft before one is tried again, and of drafting before a plain round is timed again
LONGEST_WAIT = 512
_TIMES = 5  # of the latest calls with a gamma; their middle one counts
_LATELY, _LONG = 24, 160  # drafts that the two counts of acceptance are of
_STARTING = 6  # drafts that what is believed at the start counts as, and what is left where the chance has changed
_SIGMAS = 3.0  # of the latest drafts from all of them: the chance has changed


@dataclass
class Chance:
    """That a draft is accepted: of many drafts, until the latest of them say that it has changed."""

    accepted: float
    rejected: float
    _accepted: float = 0.0  # of the latest drafts
    _rejected: float = 0.0

    @classmethod
    def believed(cls, mean: float, drafts: float = _STARTING) -> "Chance":
        """That one, as if it had been seen in so many drafts."""
        return cls(drafts * mean, drafts * (1 - mean))

    @property
    def mean(self) -> float:
        """The estimate, below 1."""
        return min(self.accepted / (self.accepted + self.rejected), 0.999)

    def observe(self, accepted: int, rejected: int) -> None:
        """Takes in so many drafts."""
        self.accepted, self.rejected = _added(self.accepted, self.rejected, accepted, rejected, most=_LONG)
        self._accepted, self._rejected = _added(self._accepted, self._rejected, accepted, rejected, most=_LATELY)
        lately, mean = self._accepted + self._rejected, self.mean
        if lately < _LATELY / 3 or self.accepted + self.rejected < 1.5 * lately:
            return
        now = self._accepted / lately
        if abs(now - mean) > _SIGMAS * math.sqrt(max(mean * (1 - mean), 0.02) / lately):
            self.accepted, self.rejected = _STARTING * now, _STARTING * (1 - now)
            self._accepted = self._rejected = 0.0


def _added(accepted: float, rejected: float, more: int, less: int, *, most: int) -> tuple[float, float]:
    kept = min(1.0, most / max(accepted + rejected, 1.0))
    return accepted * kept + more, rejected * kept + less


@dataclass
class Costs:
    """What rounds of one kind of rows take by gamma, and what there is of looks at the gammas that are not run."""

    times: dict[int, deque[float]] = field(default_factory=dict)  # seconds a round, of the latest calls
    since_look: int = 0  # rounds since a gamma was timed for the first time
    drafting: int = 0  # rounds since the last plain one
    plain: int = 0  # rounds since the last draft
    plain_wait: int = FIRST_WAIT  # rounds of drafting until a plain one is timed
    draft_wait: int = FIRST_WAIT  # plain rounds until a draft is tried

    def seconds(self, gamma: int) -> float | None:
        """Of one round: the middle one of the latest times, so that a hiccup of the machine counts for nothing, the
        lower one of two; None where it has not been timed."""
        times = sorted(self.times.get(gamma, ()))
        return times[(len(times) - 1) // 2] if times else None

    def is_sure(self, gamma: int) -> bool:
        """Whether it was timed more than once: a program's first rounds take longer."""
        return len(self.times.get(gamma, ())) > 1

    def observe(self, gamma: int, seconds: float, *, is_bound: bool) -> None:
        """Takes in the seconds of a round, or no more than a bound of them, which raises no estimate."""
        known = self.seconds(gamma)
        if not is_bound or known is None or seconds < known:
            self.times.setdefault(gamma, deque(maxlen=_TIMES)).append(seconds)


@dataclass
class RoundTimes:
    """What rounds have taken, and how often drafts were accepted: kept for the rows that come after."""

    acceptance: float = BELIEF  # of late
    _costs: dict[Hashable, Costs] = field(default_factory=dict)

    def of(self, kind: Hashable) -> Costs:
        """Those of rows of a kind; what is put in stays."""
        return self._costs.setdefault(kind, Costs())
