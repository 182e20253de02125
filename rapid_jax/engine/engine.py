# SPDX-License-Identifier: Apache-2.0
"""The engine: requests take rows of rounds and leave them, between rounds of the others."""

import itertools
import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass, replace

from rapid_jax.answer import Transcript, answer_of
from rapid_jax.config import RapidConfig
from rapid_jax.engine.errors import Draining, QueueFull
from rapid_jax.engine.job import Job
from rapid_jax.engine.lane import Lane
from rapid_jax.engine.models import Models
from rapid_jax.engine.prepare import Prepared, Preparing
from rapid_jax.engine.prefixes import PrefixCache
from rapid_jax.engine.request import Cancelled, Done, Failed, OnEvent, Request
from rapid_jax.runtime.compiling import forget_programs
from rapid_jax.speculative.own_sampling import resolve

_log = logging.getLogger(__name__)
MOST_ROWS = 64  # requests that run at once, of all documents together


@dataclass(frozen=True)
class Ticket:
    """A request that the engine has taken."""

    id: str
    job: Job

    def cancel(self) -> None:
        """Takes the request back: its last event is Failed(Cancelled()), unless it has ended. Of any thread."""
        self.job.cancelled.set()


class Engine:
    """Answers requests side by side. Those over one document read its keys and values once a round for all of them.

    `submit` is of any thread; `step` does the work, and is called by one. Requests over several documents take turns,
    some rounds each. With `prefill_first` no round is run while a prompt waits to be read: most tokens a second; without
    it a chunk of a prompt and some rounds of every lane take turns, so that nobody waits for another's document.
    """

    def __init__(
        self,
        config: RapidConfig,
        models: Models | None = None,
        *,
        queue: int = 1024,
        prefill_first: bool = True,
        quiet: bool = False,
    ):
        self.config, self.models = config, models or Models(config, quiet=quiet)
        self._queue, self._prefill_first, self._quiet = queue, prefill_first, quiet
        self._waiting: OrderedDict[str, deque[Job]] = OrderedDict()  # by owner, in whose turn it is
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._preparing: deque[tuple[Job, Iterator[None]]] = deque()
        self._ready: deque[tuple[Job, Prepared]] = deque()  # for which no row is free
        self._lanes: dict[object, Lane] = {}
        self._draining = False

    def submit(self, request: Request, on_event: OnEvent, *, streams: bool = True) -> Ticket:
        """Takes a request; returns at once. `on_event` is called in the thread that steps, in order, and last with Done
        or Failed; where nobody `streams`, with nothing else.

        Raises InputError for settings that are none, QueueFull and Draining.
        """
        config = request.under(self.config)
        sampling = resolve(config.sampling, self.models.target.generation)
        pieces: list[str] = []
        transcript = Transcript(self.models.target.tokenizer, config.stop, pieces.append)
        job = Job(request, config, on_event, sampling, transcript, streams, pieces=pieces)
        with self._lock:
            if self._draining:
                raise Draining("the engine takes no more requests")
            if sum(map(len, self._waiting.values())) >= self._queue:
                raise QueueFull(retry_after=5.0)
            self._waiting.setdefault(request.owner, deque()).append(job)
        return Ticket(f"request-{next(self._numbers)}", job)

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do."""
        return not (self._waiting or self._preparing or self._ready or self._lanes)

    def step(self) -> None:
        """A piece of work: something of a prompt, and rounds of the lanes."""
        self._admit()
        if self._preparing:
            self._prepare()
        self._place()
        if self._preparing and self._prefill_first:
            return
        for key, lane in list(self._lanes.items()):
            self._advance(key, lane)
        if self.is_idle:
            forget_programs()

    def _admit(self) -> None:
        """Owners in turn: the next request begins to be prepared."""
        running = sum(len(lane.running) for lane in self._lanes.values())
        while self._waiting and running + len(self._preparing) + len(self._ready) < MOST_ROWS:
            with self._lock:
                owner, jobs = self._waiting.popitem(last=False)
                job = jobs.popleft()
                if jobs:
                    self._waiting[owner] = jobs
            self._preparing.append((job, self._preparer.steps(job)))

    def _prepare(self) -> None:
        """A piece of the work for the request that is in turn."""
        job, steps = self._preparing[0]
        if job.cancelled.is_set():
            self._preparing.popleft()
            steps.close()
            self._fail(job, Cancelled())
            return
        try:
            next(steps)
        except StopIteration as done:
            self._preparing.popleft()
            self._ready.append((job, done.value))
        except Exception as error:  # of this request alone: the engine goes on
            self._preparing.popleft()
            self._fail(job, error)

    def _place(self) -> None:
        """Requests whose prompts have been read take rows, where some are free."""
        for _ in range(len(self._ready)):
            job, prepared = self._ready.popleft()
            lane = self._lanes.get(prepared.key)
            if job.cancelled.is_set():
                self._release(prepared)
                self._fail(job, Cancelled())
            elif lane is None:
                self._lanes[prepared.key] = Lane.of(prepared.key, job, prepared.rounds)
                self._held[id(job)] = prepared
            elif lane.is_full:
                self._ready.append((job, prepared))
            else:
                with timed() as work:
                    lane.join(job, prepared.rounds)
                job.took("prefill", work)
                self._held[id(job)] = prepared

    def _advance(self, key: LaneKey, lane: Lane) -> None:
        try:
            gone = lane.advance()
        except Exception as error:  # of these rows: what they made of the document is of no use
            del self._lanes[key]
            for job in lane.running:
                self._release(self._held.pop(id(job)))
                self._fail(job, error)
            return
        for job in gone:
            self._release(self._held.pop(id(job)))
            self._finish(job)
        if not lane.running:
            del self._lanes[key]

    def _finish(self, job: Job) -> None:
        """The last event of a request that has been answered, or taken back."""
        if job.cancelled.is_set():
            self._fail(job, Cancelled())
            return
        job.finish()
        assert job.reading is not None and job.generation is not None
        answer = answer_of(job.reading, job.transcript, job.generation, job.config.speculation, job.sampling, job.seconds, reused=job.reused)
        job.on_event(Done(replace(answer, logprobs=job.token_logprobs)))

    def _fail(self, job: Job, error: Exception) -> None:
        job.on_event(Failed(error))

    def _release(self, prepared: Prepared) -> None:
        if prepared.handle is not None:
            self.prefixes.release(prepared.handle)
