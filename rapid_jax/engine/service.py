# SPDX-License-Identifier: Apache-2.0
"""An engine in a thread of its own, for callers that come and go: it starts, drains and stops, scores and counts."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future
from functools import cached_property, partial
from pathlib import Path

from rapid_jax.config import RapidConfig
from rapid_jax.engine.documents import DocumentLibrary, Watch, document_id
from rapid_jax.engine.engine import Engine
from rapid_jax.engine.errors import Draining, UnknownDocument
from rapid_jax.engine.job import Ticket
from rapid_jax.engine.models import Models
from rapid_jax.engine.request import Chat, Failed, OnEvent, Question, Request
from rapid_jax.engine.scoring import Scores, scores
from rapid_jax.engine.stats import EngineStats
from rapid_jax.engine.warm_up import WarmUp, warm_up

_log = logging.getLogger(__name__)
_PAUSE_S = 0.5  # between looks of an idle thread at whether it is to stop


class RunningEngine(Engine):
    """An engine whose steps are those of its own thread. Every method is of any thread."""

    def __init__(
        self,
        config: RapidConfig,
        models: Models | None = None,
        *,
        queue: int = 64,
        warm: WarmUp | None = None,
        documents: Path | None = None,
        quiet: bool = True,
    ):
        """`warm` says what is compiled before it is ready; under `documents` they survive a restart."""
        super().__init__(config, models, queue=queue, prefill_first=False, quiet=quiet)
        self._warm, self._folder = warm or WarmUp(), documents
        self._keys: dict[str, set[str]] = {}  # id of a document -> keys of its keys and values
        self._chores: deque[Callable[[], None]] = deque()  # for the engine's thread
        self._wake = threading.Condition()
        self._scoring: deque[tuple[Future[Scores], Generator[None, None, Scores]]] = deque()
        self._stopped = self._failed = False
        self._thread: threading.Thread | None = None

    @cached_property
    def documents(self) -> DocumentLibrary:
        """Texts by id, and where the keys and values of each are."""
        watch = Watch(tier=self._tier_of, chunked=self._keys.__contains__, pinned=self._pin, removed=self._remove)
        return DocumentLibrary(
            self._folder, count_tokens=lambda text: self.models.target.tokenizer.counts([text])[0], watch=watch
        )

    def on_read(self, request: Request, key: str) -> None:
        """The document of a request has these keys and values."""
        text = request.prompt.document if isinstance(request.prompt, Question | Chat) else None
        if text is None:
            return
        name = document_id(text, request.owner, request.public)
        try:
            self.documents.info(name, owner=request.owner)
        except UnknownDocument:  # not handed in: nobody asks where it is
            return
        self._keys.setdefault(name, set()).add(key)
        if self.documents.is_pinned(name):  # before it was read, or by another model's prompt
            self.prefixes.pin(key, pinned=True)

    def _tier_of(self, id: str) -> str | None:
        tiers = {self.prefixes.tier(key) for key in list(self._keys.get(id, ()))}
        return next((tier for tier in ("device", "host", "disk") if tier in tiers), None)

    def _pin(self, id: str, pinned: bool) -> None:
        for key in list(self._keys.get(id, ())):
            self._later(lambda key=key: self.prefixes.pin(key, pinned))

    def _remove(self, id: str) -> None:
        for key in self._keys.pop(id, ()):
            self._later(lambda key=key: self.prefixes.remove(key))

    def _later(self, chore: Callable[[], None]) -> None:
        with self._wake:
            self._chores.append(chore)
            self._wake.notify()

    def start(self) -> None:
        """Begins to answer."""
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request, on_event: OnEvent, *, streams: bool = True) -> Ticket:
        """As `Engine.submit`; events come in the engine's thread."""
        ticket = super().submit(request, on_event, streams=streams)
        with self._wake:
            self._wake.notify()
        return ticket

    def score(self, ids: Sequence[int], top: int) -> "Future[Scores]":
        """The log-probability of each token of a prompt behind those before it, with so many alternatives; None for
        the first. Raises Draining."""
        future: Future[Scores] = Future()
        with self._wake:
            if self.drains or self._stopped:
                raise Draining("the engine takes no more requests")
            self._scoring.append((future, scores(self.models.target, self.config, ids, top)))
            self._wake.notify()
        return future

    def drain(self, seconds: float, report: Callable[[str], None] = lambda text: None) -> bool:
        """Takes nothing more, waits for what runs, and stores what was prefilled, all in so many seconds; whether all
        requests have ended.

        Requests have that time less what storing is reckoned to take, which is no more than half of it. `report` is
        told how it is divided. What there was no time to store is lost, and a warning says of how many documents.
        """
        self.refuse()
        self.prefixes.until = until = time.monotonic() + seconds

        def saving() -> float:
            return min(self.prefixes.saving_seconds, seconds / 2)

        reserve = saving()
        report(f"requests that run have {seconds - reserve:.3g} s, of {seconds:g}; storing what was read the rest")
        while self._is_alive and not (self.is_idle and not self._scoring) and time.monotonic() < until - reserve:
            time.sleep(0.02)
            reserve = saving()
        ended = self.is_idle and not self._scoring
        self.stop()
        self._do_chores()  # what was removed is not saved
        unsaved = self.prefixes.save()
        if unsaved:
            _log.warning("out of time: keys and values of documents were not stored: %d prefixes", unsaved)
        return ended

    def stop(self) -> None:
        """Ends the thread at the next round's border; what runs is given up."""
        with self._wake:
            self._stopped = True
            self._wake.notify()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def warm_up(self, report: Callable[[str], None]) -> None:
        """Compiles what requests of the declared sizes need, before the thread starts."""
        warm_up(self, self._warm, report)

    def stats(self) -> EngineStats:
        """Now's numbers."""
        counts = self.counts
        return EngineStats(
            waiting=self.waiting,
            running=self.running,
            kv_bytes=self.prefixes.bytes(),
            drafted=counts.drafted,
            accepted=counts.accepted,
            rounds=counts.rounds,
            tokens=counts.tokens,
        )

    @property
    def _is_alive(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    @property
    def has_failed(self) -> bool:
        """Whether its thread has ended by an error."""
        return self._failed

    def _work(self) -> None:
        try:
            while not self._stopped:
                with self._wake:
                    if self.is_idle and not (self._scoring or self._chores or self._stopped):
                        self._wake.wait(_PAUSE_S)
                self._do_chores()
                self._score()
                if not self.is_idle:
                    self.step()
            self.give_up()
        except Exception as error:  # not of a request alone: nobody is left waiting
            self._failed = True
            self.refuse()
            for job in self.unfinished():
                if not job.ended:
                    job.end(Failed(error))
            raise
        finally:
            with self._wake:  # `score` adds none behind this
                while self._scoring:
                    future, _ = self._scoring.popleft()
                    if future.set_running_or_notify_cancel():
                        future.set_exception(Draining("the engine takes no more requests"))

    def _score(self) -> None:
        """A chunk of the prompt whose turn it is, of those that are scored."""
        if not self._scoring:
            return
        future, steps = self._scoring[0]
        if not future.cancelled():
            try:
                next(steps)
                return
            except StopIteration as done:
                settle = partial(future.set_result, done.value)
            except Exception as error:  # of this prompt alone
                settle = partial(future.set_exception, error)
            if future.set_running_or_notify_cancel():
                settle()
        self._scoring.popleft()

    def _do_chores(self) -> None:
        while self._chores:
            self._chores.popleft()()
        if "prefixes" in self.__dict__ and self.prefixes.moving:
            self.prefixes.make_room(0)  # takes in what has arrived, and goes on where more is to go
