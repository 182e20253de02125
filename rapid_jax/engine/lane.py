# SPDX-License-Identifier: Apache-2.0
"""Requests that are answered side by side by the same programs: those over one document, or each with its own text."""

from collections.abc import Hashable
from dataclasses import dataclass, replace

from rapid_jax.engine.job import Job
from rapid_jax.runtime.compiling import timed
from rapid_jax.speculative.config import SpeculationConfig
from rapid_jax.speculative.generate import generation_of
from rapid_jax.speculative.pace import Pace
from rapid_jax.speculative.rounds import Rounds
from rapid_jax.speculative.start import gamma_bucket

ROW_BUCKETS = (1, 2, 4, 8, 16)  # rows that programs are compiled for


@dataclass(frozen=True)
class LaneKey:
    """What requests have in common that can be rows of the same rounds."""

    prefix: Hashable  # of the target, shared by all rows; None: each row has its own
    drafts: bool
    auto: bool  # the gamma goes by the clock
    lookup: tuple[str, int, int]
    rounds_per_read: int

    @classmethod
    def of(cls, speculation: SpeculationConfig, prefix: Hashable) -> "LaneKey":
        """Of a request with these settings over that prefix."""
        drafts = speculation.drafts and speculation.gamma != 0
        auto = drafts and speculation.gamma == "auto"
        lookup = speculation.lookup, speculation.lookup_width, speculation.lookup_match
        return cls(prefix, drafts, auto, lookup, speculation.rounds_per_read)


@dataclass
class Lane:
    """Rows, some of which answer a request each."""

    key: LaneKey
    rounds: Rounds
    jobs: list[Job | None]
    pace: Pace

    @classmethod
    def of(cls, key: LaneKey, job: Job, rounds: Rounds) -> "Lane":
        """A lane of one request."""
        lane = cls(key, rounds, [job], Pace(job.config.speculation, key.drafts))
        lane._repace()
        return lane

    @property
    def running(self) -> list[Job]:
        """The requests that it answers."""
        return [job for job in self.jobs if job is not None]

    @property
    def is_full(self) -> bool:
        """Whether no row can be added."""
        return len(self.running) >= ROW_BUCKETS[-1]

    def join(self, job: Job, rounds: Rounds) -> None:
        """One more request, whose prompt has been read by rounds of its own."""
        rows = next(size for size in ROW_BUCKETS if size > len(self.running))
        rows = max(rows, len(self.jobs))
        row = next((at for at, other in enumerate(self.jobs) if other is None), len(self.jobs))
        self.rounds.join(rounds, row, rows)
        self.jobs += [None] * (rows - len(self.jobs))
        self.jobs[row] = job
        self._repace()

    def advance(self) -> list[Job]:
        """Some rounds; the requests that have ended by them, or by being taken back, have left."""
        for row, job in enumerate(self.jobs):
            if job is not None and job.cancelled.is_set():
                self.rounds.interrupt(row)
        if not all(self.rounds.ended()):
            self._advance()
        gone = [(row, job) for row, job in enumerate(self.jobs) if job is not None and self.rounds.ended()[row]]
        for row, job in gone:
            self._leave(row, job)
        if gone:
            self._shrink()
        return [job for _, job in gone]

    def _advance(self) -> None:
        before, running = dict(self.pace.gammas), self.running
        with timed() as work:
            self.pace.advance(self.rounds, self._tell)
        for job in running:
            job.seconds["decode"] += work.working / len(running)
            job.seconds["compile"] += work.compiling / len(running)
            for gamma, count in self.pace.gammas.items():
                own = gamma if self.key.auto else min(gamma, int(job.config.speculation.gamma or 0))
                run = count - before.get(gamma, 0)
                if run:
                    job.gammas[own] = job.gammas.get(own, 0) + run

    def _tell(self) -> None:
        for row, job in enumerate(self.jobs):
            if job is not None and job.receive(row, self.rounds.host) and not self.rounds.host.done_B[row]:
                self.rounds.interrupt(row)

    def _leave(self, row: int, job: Job) -> None:
        """The row is free; the request has its generation."""
        seconds = {"prepare": 0.0, "compile": 0.0, "decode": job.seconds["decode"]}
        job.generation = generation_of(self.rounds, job.gammas, seconds).row(row)
        if job.request.logprobs is not None:
            job.token_logprobs = job.logprobs(row, self.rounds.host, 0, len(job.transcript.token_ids))
        self.jobs[row] = None
        self.rounds.interrupt(row)

    def _shrink(self) -> None:
        """Half the rows, or fewer, once they suffice."""
        running = [row for row, job in enumerate(self.jobs) if job is not None]
        if not running:
            return
        rows = next(size for size in ROW_BUCKETS if size >= len(running))
        if 2 * rows > len(self.jobs):
            return
        free = [row for row, job in enumerate(self.jobs) if job is None]
        kept = [*running, *free][:rows]
        self.rounds.keep(kept)
        self.jobs = [self.jobs[row] for row in kept]
        self._repace()

    def _repace(self) -> None:
        """Goes on with the rows that there are now: of others it is not known how long their rounds take."""
        speculation = self.pace.speculation
        gammas = [int(job.config.speculation.gamma) for job in self.running if job.config.speculation.gamma != "auto"]
        if self.key.drafts and not self.key.auto:
            speculation = replace(speculation, gamma=gamma_bucket(max(gammas)))
        self.pace = self.pace.under(speculation, len(self.jobs))
