# SPDX-License-Identifier: Apache-2.0
"""The engine: requests take rows of rounds and leave them, between rounds of the others."""

import itertools
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import TypeVar

from rapid_jax.answer import answer_of
from rapid_jax.config import RapidConfig
from rapid_jax.engine.errors import Draining, QueueFull
from rapid_jax.engine.job import Job, Ticket
from rapid_jax.engine.lane import ROW_BUCKETS, Lane, LaneKey, Prepared
from rapid_jax.engine.models import Models
from rapid_jax.engine.prefilling import Prefilling, Steps
from rapid_jax.engine.prefixes import PrefixCache
from rapid_jax.engine.prepare import Preparing
from rapid_jax.engine.request import Cancelled, Done, Failed, OnEvent, Request
from rapid_jax.engine.sharing import Sharing
from rapid_jax.engine.stats import EngineCounts, bytes_of_rows
from rapid_jax.engine.tiers import Handle
from rapid_jax.engine.turns import Turns
from rapid_jax.prompts import Reading
from rapid_jax.runtime.compiling import forget_programs, timed
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.files import cache_place
from rapid_jax.speculative.own_sampling import resolve
from rapid_jax.speculative.round_times import RoundTimes

Result = TypeVar("Result")
MOST_ROWS = 64  # requests that run at once, of all documents together
_SHORT_S = 0.02  # of preparing requests between rounds of others: about what those take


class Engine:
    """Answers requests side by side. Those over one document read its keys and values once a round for all of them.

    `submit` is of any thread; `step` does the work, and is called by one. Requests over several documents take turns,
    some rounds each. With `prefill_first` no round is run while a prompt waits to be read: most tokens a second;
    without it a chunk of a document, one of a short prompt and some rounds of every lane take turns, so that no answer
    stands still meanwhile.
    """

    def __init__(
        self,
        config: RapidConfig,
        models: Models | None = None,
        *,
        queue: int = 1 << 30,
        prefill_first: bool = True,
        quiet: bool = False,
    ):
        self.config, self.models = config, models or Models(config, quiet=quiet)
        self._queue, self._prefill_first, self._quiet = queue, prefill_first, quiet
        self._waiting: OrderedDict[str, deque[Job]] = OrderedDict()  # by owner, in whose turn it is
        self._lock = threading.Lock()
        self._numbers, self._times = itertools.count(1), RoundTimes()
        seconds = float("inf") if prefill_first else _SHORT_S
        self._preparing = Turns(lambda job, row: self._ready.append((job, row)), self._fail, seconds)
        self._ready: deque[tuple[Job, Prepared]] = deque()  # for which no row is free
        self._lanes: dict[LaneKey, Lane] = {}
        self._held: dict[int, Handle | None] = {}  # of the job in a row, by its id: keys and values that it reads
        self._draining, self.counts, self.sharing = False, EngineCounts(), Sharing()

    @cached_property
    def prefixes(self) -> PrefixCache:
        """The target's keys and values of documents."""
        config, target = self.config, self.models.target
        how = {"weights_hash": lambda: target.weights_hash, "quiet": self._quiet}
        how |= {"reserve": bytes_of_rows(config, target, ROW_BUCKETS[-1]), "aside": not self._prefill_first}
        return PrefixCache(target.decoder, config.compute, config.cache, cache_place(config.cache.folder), **how)

    @cached_property
    def _preparer(self) -> Preparing:
        others = self._lanes, self._ready
        how = {"is_alone": lambda: not any(others), "few_programs": not self._prefill_first, "quiet": self._quiet}
        prefilling = Prefilling(self.config, self.models, self.prefixes, on_read=self.on_read, **how)
        return Preparing(prefilling, None if self._prefill_first else ThreadPoolExecutor(1, "retrieval"))

    def on_read(self, request: Request, key: str) -> None:
        """The keys and values of a request's document, of that key, are about to be looked for, or made."""

    def submit(self, request: Request, on_event: OnEvent, *, streams: bool = True) -> Ticket:
        """Takes a request; returns at once. `on_event` is called in the thread that steps, in order, and last with Done
        or Failed; where nobody `streams`, with nothing else.

        Raises InputError for settings that are none, QueueFull and Draining.
        """
        job = self._job(request, on_event, streams=streams)
        with self._lock:
            if self._draining:
                raise Draining("the engine takes no more requests")
            if sum(map(len, self._waiting.values())) >= self._queue:
                raise QueueFull(retry_after=5.0)
            self._waiting.setdefault(request.owner, deque()).append(job)
        return Ticket(f"request-{next(self._numbers)}", job)

    def _job(self, request: Request, on_event: OnEvent, *, streams: bool) -> Job:
        config, target = request.under(self.config), self.models.target
        sampling = resolve(config.sampling, target.generation)
        return Job.of(request, config, on_event, sampling, target.tokenizer, streams=streams)

    def prefill(self, request: Request) -> Reading:
        """Reads the document of a request, and keeps what comes of it; requests that run go on beside it.

        Works until it is done, in the thread that steps. Raises InputError for what the models cannot read.
        """
        job = self._job(request, lambda event: None, streams=False)
        return _result(self._preparer.document(job), lambda: None if self.is_idle else self.step())

    @contextmanager
    def read(self, request: Request) -> Iterator[tuple[Job, Prepared]]:
        """A request that has been read at once and has no row; what it needs is held meanwhile.

        In the thread that steps, while no request runs: nobody else gives room back meanwhile. Raises InputError for
        what cannot be read.
        """
        job = self._job(request, lambda event: None, streams=False)
        try:
            prepared = _result(self._preparer.steps(job), lambda: None)
            job.at_end.append(lambda: self._release(prepared.handle))
            yield job, prepared
        finally:
            job.give_back()

    @property
    def drains(self) -> bool:
        """Whether nothing more is taken."""
        return self._draining

    def refuse(self) -> None:
        """From now on nothing more is taken."""
        with self._lock:
            self._draining = True

    def unfinished(self) -> list[Job]:
        """All requests that have not ended."""
        with self._lock:
            waiting = [job for jobs in self._waiting.values() for job in jobs]
        running = [job for lane in self._lanes.values() for job in lane.running]
        return [*waiting, *running, *self._preparing.jobs, *(job for job, _ in self._ready)]

    def give_up(self) -> None:
        """Takes all requests back, and lets them go."""
        for job in self.unfinished():
            job.cancelled.set()
        while not self.is_idle:
            self.step()

    @property
    def waiting(self) -> int:
        """Requests that no work has been done for yet."""
        return sum(map(len, list(self._waiting.values())))

    @property
    def running(self) -> int:
        """Requests that are being prepared or answered."""
        lanes = list(self._lanes.values())
        return sum(len(lane.running) for lane in lanes) + len(self._preparing) + len(self._ready)

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do."""
        return not (self._waiting or self._preparing or self._ready or self._lanes)

    def run(self, tickets: Sequence[Ticket]) -> None:
        """Works until these requests have ended, or an error that a step raised has lost them; others go on beside."""
        while not self.is_idle and not all(ticket.job.ended for ticket in tickets):
            self.step()

    def step(self) -> None:
        """A piece of work: something of a prompt, and rounds of the lanes."""
        self._admit()
        if self._preparing:
            self._preparing.advance()
        if self._preparing and self._prefill_first and not self._preparer.waits_for_room:
            return
        self._place()
        for key, lane in list(self._lanes.items()):
            self._advance(key, lane)
        if self.is_idle and not self.prefixes.moving:
            forget_programs()

    def _admit(self) -> None:
        """Owners in turn: the next request begins to be prepared."""
        running = sum(len(lane.running) for lane in self._lanes.values())
        most = ROW_BUCKETS[-1] if self._prefill_first else MOST_ROWS
        # With a lane's rows of requests ready the rest waits here, where owners take turns.
        while (
            self._waiting
            and len(self._ready) < ROW_BUCKETS[-1]
            and running + len(self._preparing) + len(self._ready) < most
        ):
            with self._lock:
                owner, jobs = self._waiting.popitem(last=False)
                job = jobs.popleft()
                if jobs:
                    self._waiting[owner] = jobs
            self._preparing.add(job, self._preparer.steps(job))

    def _place(self) -> None:
        """Requests whose prompts have been read take rows, where some are free; those that come together at once."""
        for item in [item for item in self._ready if item[0].cancelled.is_set()]:
            self._unready(item[0])
            self._release(item[1].handle)
            self._fail(item[0], Cancelled())
        waiting = list(self._ready)
        for place, (job, prepared) in enumerate(waiting):
            others = [other.document for _, other in waiting[place + 1 :] if other.key == prepared.key]
            about = prepared.key, prepared.document, others
            found = self.sharing.place(self._lanes, *about, shared=prepared.handle is not None)
            if found is None:
                continue
            key, sizes = found
            if sizes is None:
                self._lanes[key] = Lane.of(key, job, prepared.rounds, prepared.document, self._times)
                self._held[id(job)] = prepared.handle
                self._unready(job)
                continue
            self._unready(job)
            try:
                with timed() as work:
                    self._lanes[key].join(job, prepared.rounds, prepared.document, sizes)
            except Exception as error:  # no room for another row: of those there were, arrays may be gone already
                self._release(prepared.handle)
                self._fail(job, error)
                self._break(key, self._lanes[key], error)
                continue
            self.sharing.joined(prepared.key, key)
            job.took("prefill", work)
            self._held[id(job)] = prepared.handle

    def _unready(self, job: Job) -> None:
        """Takes out this very one: two of equal fields are two."""
        del self._ready[next(at for at, item in enumerate(self._ready) if item[0] is job)]

    def _advance(self, key: LaneKey, lane: Lane) -> None:
        try:
            gone = lane.advance()
        except Exception as error:  # of these rows: other lanes go on
            self._break(key, lane, error)
            return
        for job in gone:
            self._release(self._held.pop(id(job)))
            self._finish(job)
        if not lane.running:
            del self._lanes[key]

    def _break(self, key: LaneKey, lane: Lane, error: Exception) -> None:
        """Ends a lane whose rows cannot go on."""
        del self._lanes[key]
        for job in lane.running:
            handle = self._held.pop(id(job), None)
            self._release(handle)
            # A model that gives no answer: what it made of the document is of no use.
            if isinstance(error, InputError) and handle is not None:
                self.prefixes.remove(handle.key)
            if not job.ended:
                self._fail(job, error)

    def _finish(self, job: Job) -> None:
        """The last event of a request that has been answered, or taken back."""
        if job.cancelled.is_set():
            self._fail(job, Cancelled())
            return
        job.finish()
        assert job.reading is not None and job.generation is not None
        self.counts.add(job.generation)
        how = job.config.speculation, job.sampling, job.seconds
        answer = answer_of(job.reading, job.transcript, job.generation, *how, reused=job.reused)
        job.end(Done(replace(answer, logprobs=job.token_logprobs, lossy=self.config.lossy)))

    def _fail(self, job: Job, error: Exception) -> None:
        job.end(Failed(error))

    def _release(self, handle: Handle | None) -> None:
        if handle is not None:
            self.prefixes.release(handle)


def _result(steps: Steps[Result], between: Callable[[], None]) -> Result:
    """What the steps come to; `between` is called after each."""
    while True:
        try:
            next(steps)
        except StopIteration as done:
            return done.value
        between()
