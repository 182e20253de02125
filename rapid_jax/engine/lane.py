# SPDX-License-Identifier: Apache-2.0
"""Requests that are answered side by side by the same programs: those over one document, or each with its own text."""

import time
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace

from rapid_jax.engine.job import Job
from rapid_jax.engine.tiers import Handle
from rapid_jax.speculative.config import SpeculationConfig
from rapid_jax.speculative.generate import generation_of
from rapid_jax.speculative.initial_state import draft_room, gamma_bucket
from rapid_jax.speculative.pace import Pace
from rapid_jax.speculative.round_times import RoundTimes
from rapid_jax.speculative.rounds import Rounds, Slots

ROW_BUCKETS = (1, 2, 4, 8, 16)  # rows, of documents or of one, that programs are compiled for


@dataclass(frozen=True)
class LaneKey:
    """What requests have in common that can be rows of the same rounds."""

    document: Hashable  # the one that all rows are about, whose keys and values are not copied; None: several
    drafts: int  # of a round that each row has room for; 0: nothing is drafted
    auto: bool  # the gamma goes by the clock
    lookup: tuple[str, int, int]
    rounds_per_read: int
    attended: tuple[int, int]  # tokens that a drafter of that kind reads, and rounds between two choices of them
    has_drafter: bool  # at a gamma of 0 too, where it has read its prompt for nothing
    slots: Slots | None = None  # that each row has room for; None: what its rows ask for

    @classmethod
    def of(cls, speculation: SpeculationConfig, document: Hashable, slots: Slots | None = None) -> "LaneKey":
        """Of a request with these settings about that document, in a lane whose rows have so many slots."""
        drafts = draft_room(speculation) if speculation.drafts and speculation.gamma != 0 else 0
        auto = drafts > 0 and speculation.gamma == "auto"
        lookup = speculation.lookup, speculation.lookup_width, speculation.lookup_match
        attended = speculation.attended_tokens, speculation.attended_rounds
        return cls(document, drafts, auto, lookup, speculation.rounds_per_read, attended, speculation.drafts, slots)


@dataclass(frozen=True)
class Prepared:
    """A request whose prompts have been read."""

    key: LaneKey
    rounds: Rounds
    document: Hashable  # equal for requests about the same one
    handle: Handle | None  # of the document's keys and values, held


@dataclass
class Lane:
    """Rows, some of which answer a request each.

    Rows lie by document: of `documents` D each has as many rows, one behind the other. Their keys and values are read
    once a round for all of a document's rows. Where the key says how many slots rows have, none that needs more joins.
    """

    key: LaneKey
    rounds: Rounds
    documents: list[Hashable]  # None: the place is free
    jobs: list[Job | None]
    pace: Pace

    @classmethod
    def of(cls, key: LaneKey, job: Job, rounds: Rounds, document: Hashable, times: RoundTimes) -> "Lane":
        """A lane of one request; `times` is what lanes of the same models have learnt."""
        lane = cls(key, rounds, [document], [job], Pace(job.config.speculation, key.drafts > 0, times))
        lane._repace()
        return lane

    @property
    def running(self) -> list[Job]:
        """The requests that it answers."""
        return [job for job in self.jobs if job is not None]

    @property
    def each(self) -> int:
        """Rows of a document."""
        return len(self.jobs) // len(self.documents)

    def sizes_with(self, documents: Iterable[Hashable]) -> tuple[int, int] | None:
        """(documents, rows of each) for requests about these besides those there are; None: there is no room."""
        rows: Counter[Hashable] = Counter(documents)
        for at, name in enumerate(self.documents):
            rows[name] += sum(job is not None for job in self._of(at))
        rows = +rows
        if max(len(rows), max(rows.values())) > ROW_BUCKETS[-1]:
            return None
        count, each = max(_bucket(len(rows)), len(self.documents)), max(_bucket(max(rows.values())), self.each)
        return (count, each) if count * each <= ROW_BUCKETS[-1] else None

    def join(self, job: Job, rounds: Rounds, document: Hashable, sizes: tuple[int, int]) -> None:
        """One more request, whose prompt has been read by rounds of its own, in a lane of at least these `sizes`."""
        count, each = max(sizes[0], len(self.documents)), max(sizes[1], self.each)
        if each > self.each and len(self.documents) > 1:
            self.arrange(range(len(self.documents)), each)
        is_new = document not in self.documents
        self.documents += [None] * (count - len(self.documents))
        self.jobs += [None] * (count * each - len(self.jobs))
        at = self.documents.index(None if is_new else document)
        self.documents[at] = document
        row = at * each + self._of(at).index(None)
        self.rounds.join(rounds, row, len(self.jobs), (at, count) if is_new else None)
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
        start, compiled = time.perf_counter(), self.rounds.compile_seconds
        self.pace.advance(self.rounds, self._tell)
        compiling = self.rounds.compile_seconds - compiled
        decoding = time.perf_counter() - start - compiling
        for job in running:
            job.seconds["decode"] += decoding / len(running)
            job.seconds["compile"] += compiling / len(running)
            asked = job.config.speculation.gamma  # auto also of one that drafts nothing
            for gamma, count in self.pace.gammas.items():
                own = gamma if asked == "auto" else min(gamma, int(asked))
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
        """Half the documents, or half the rows of each, or fewer, once they suffice."""
        each = self.each
        used = [sum(job is not None for job in self._of(at)) for at in range(len(self.documents))]
        self.documents = [name if used[at] else None for at, name in enumerate(self.documents)]
        if not any(used):
            return
        wanted = _bucket(max(used))
        kept = [at for at, count in enumerate(used) if count]
        count = _bucket(len(kept))
        if 2 * wanted > each and 2 * count > len(self.documents):
            return
        free = [at for at, rows in enumerate(used) if not rows]
        every = range(len(self.documents))  # where all stay their keys and values are not copied
        self.arrange(every if count == len(every) else [*kept, *free][:count], wanted)
        self._repace()

    def _of(self, at: int) -> list[Job | None]:
        """The rows of a document."""
        return self.jobs[at * self.each : (at + 1) * self.each]

    def arrange(self, documents: Sequence[int], each: int) -> None:
        """Those documents alone, with so many rows each; those that answer something come first."""
        order = []
        for at in documents:
            own = range(at * self.each, (at + 1) * self.each)
            taken = [row for row in own if self.jobs[row] is not None]
            free = [row for row in own if self.jobs[row] is None]
            order += [*taken, *free, *[own[-1]] * each][:each]
        same = list(documents) == list(range(len(self.documents)))
        self.rounds.arrange(order, None if same else documents)
        self.jobs = [None if row in order[:at] else self.jobs[row] for at, row in enumerate(order)]
        self.documents = [self.documents[at] for at in documents]

    def _repace(self) -> None:
        """Goes on with the rows that there are now: rounds of others take another time."""
        speculation = self.pace.speculation
        gammas = [int(job.config.speculation.gamma) for job in self.running if job.config.speculation.gamma != "auto"]
        if self.key.drafts and not self.key.auto:
            speculation = replace(speculation, gamma=gamma_bucket(max(gammas)))
        self.pace = self.pace.under(speculation, self.rounds)


def _bucket(count: int) -> int:
    return next(size for size in ROW_BUCKETS if size >= count)
