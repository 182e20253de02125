# SPDX-License-Identifier: Apache-2.0
"""RAPID end to end: Rapid(config).answer(document, question).

A drafter reads the retrieved chunks, a target reads the whole document; the drafter drafts, the target verifies, and
the target's distribution is moved towards the drafter's (arXiv 2502.20330).
"""

import asyncio
import sys
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Generator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import cached_property

from rapid_jax.answer import Answer, OnText
from rapid_jax.config import RapidConfig
from rapid_jax.engine.engine import Engine
from rapid_jax.engine.job import Ticket
from rapid_jax.engine.models import Models
from rapid_jax.engine.reader import read
from rapid_jax.engine.request import Done, Event, Failed, Piece, Prompt, Question, Request, Retrieved
from rapid_jax.model.load import LoadedModel
from rapid_jax.prompts import Reading
from rapid_jax.retrieval.select import Selection
from rapid_jax.runtime.errors import InputError
from rapid_jax.speculative.own_sampling import ResolvedSampling, resolve


class Rapid:
    """Loaded models and an engine over them; answers any number of questions, one thread at a time.

    Models are loaded when first needed: retrieval's encoder not at all in mode target, a second drafter only where one
    is configured. Prefilled documents stay in memory as far as `cache` says.

    Every method takes `settings` in the place of the object's own: of the same models, and with the same places for
    them; what is loaded and what is prefilled serves all.
    """

    def __init__(self, config: RapidConfig, *, quiet: bool = False):
        self.config = config
        self.models = Models(config, quiet=quiet)
        self._quiet = quiet

    @cached_property
    def engine(self) -> Engine:
        """What runs the requests."""
        # Whoever asks also does the work, and waits for all of it: no question is one too many.
        return Engine(self.config, self.models, queue=sys.maxsize, quiet=self._quiet)

    @property
    def target(self) -> LoadedModel:
        """The long-context model."""
        return self.models.target

    @property
    def drafter(self) -> LoadedModel:
        """The model that reads the retrieved text."""
        return self.models.drafter

    @property
    def sampling(self) -> ResolvedSampling:
        """How answers are drawn: as the settings say, else as the target's checkpoint does."""
        return resolve(self.config.sampling, self.target.generation)

    def load(self, settings: RapidConfig | None = None) -> None:
        """Loads what answers need and is not loaded yet."""
        self.models.load(self._check(settings).speculation)

    def answer(
        self,
        document: str,
        question: str,
        *,
        settings: RapidConfig | None = None,
        on_text: OnText | None = None,
        on_retrieved: Callable[[Selection], None] | None = None,
    ) -> Answer:
        """The answer to one question; `on_text` gets it piece by piece, `on_retrieved` the chunks before that."""
        config, start = self._check(settings), time.perf_counter()
        self.load(config)
        loaded = time.perf_counter()
        if on_text is not None:  # every round is told at once
            config = replace(config, speculation=replace(config.speculation, rounds_per_read=1))
        answer = None
        # Closed at once where a listener raises, not once nobody holds the error any more.
        with closing(self.stream(Question(document, question), settings=config, streams=on_text is not None)) as events:
            for event in events:
                if isinstance(event, Retrieved) and on_retrieved is not None:
                    on_retrieved(event.selection)
                elif isinstance(event, Piece) and on_text is not None and event.text:
                    on_text(event.text)
                elif isinstance(event, Done):
                    answer = event.answer
        assert answer is not None
        return replace(answer, seconds={"load": loaded - start} | answer.seconds)

    def prefill(self, document: str, *, settings: RapidConfig | None = None) -> Reading:
        """Reads a document, so that an answer about it starts at once; the prompts of a question mark about it.

        Its keys and values are kept, and where anything is retrieved its chunks and their index; in mode retrieval,
        whose target reads no document, the chunks alone. Raises InputError for a document that the models cannot read.
        """
        config = self._check(settings)
        self.load(config)
        reading = self.engine.prefill(Request.of(Question(document, "?"), config))
        self.engine.prefixes.save()
        return reading

    def stream(
        self,
        prompt: Prompt,
        *,
        settings: RapidConfig | None = None,
        logprobs: int | None = None,
        streams: bool = True,
        until: Callable[[], bool] | None = None,
    ) -> Generator[Event, None, None]:
        """What comes of a prompt: what was retrieved, the answer's pieces (unless it does not stream), Done.

        Raises InputError for what cannot be answered. Whoever leaves the iterator takes the request back. `until` is
        asked between pieces of the work: once it holds the iterator ends, without Done. What was prefilled is kept.
        """
        config = self._check(settings)
        self.load(config)
        events: deque[Event] = deque()
        ticket = self.engine.submit(Request.of(prompt, config, logprobs=logprobs), events.append, streams=streams)
        try:
            while not ticket.job.ended or events:
                while events:
                    event = events.popleft()
                    if isinstance(event, Failed):
                        raise event.error
                    yield event
                if until is not None and until():
                    return
                if not ticket.job.ended:
                    self.engine.step()
        finally:
            ticket.cancel()
            self.engine.run([ticket])
            self.engine.prefixes.save()

    async def astream(
        self, prompt: Prompt, *, settings: RapidConfig | None = None, logprobs: int | None = None
    ) -> AsyncIterator[Event]:
        """As `stream`, with the work in a thread of its own."""
        loop, queue = asyncio.get_running_loop(), asyncio.Queue()
        gone = threading.Event()

        def work() -> None:
            try:
                for event in self.stream(prompt, settings=settings, logprobs=logprobs, until=gone.is_set):
                    loop.call_soon_threadsafe(queue.put_nowait, event)
            except Exception as error:
                loop.call_soon_threadsafe(queue.put_nowait, Failed(error))

        thread = asyncio.create_task(asyncio.to_thread(work))
        try:
            while True:
                event = await queue.get()
                if isinstance(event, Failed):
                    raise event.error
                yield event
                if isinstance(event, Done):
                    return
        finally:
            gone.set()
            await thread

    def answers(
        self,
        prompts: Sequence[Prompt | tuple[str, str]],
        *,
        settings: RapidConfig | None = None,
        seeds: Sequence[int] | None = None,
        logprobs: int | None = None,
        on_answer: Callable[[int, Answer], None] | None = None,
        on_error: Callable[[int, InputError], None] | None = None,
    ) -> list[Answer]:
        """Of each prompt, or (document, question), what `answer` would say; all are worked on side by side.

        `seeds`: one a prompt, else the settings' for each. `on_answer` gets each with its place as it comes, between
        pieces of the work. Raises InputError for the first that cannot be answered; the others are then taken back.
        With `on_error` it is told of each such prompt instead, the others go on, and the list has their answers alone.
        """
        config = self._check(settings)
        if seeds is not None and len(seeds) != len(prompts):
            raise ValueError(f"expected a seed for each of {len(prompts)} prompts, got {len(seeds)}")
        self.load(config)
        found: dict[int, Answer] = {}
        events: deque[tuple[int, Event]] = deque()
        tickets: list[Ticket] = []
        try:
            for place, prompt in enumerate(prompts):
                own = config
                if seeds is not None:
                    own = replace(config, sampling=replace(config.sampling, seed=seeds[place]))
                prompt = Question(*prompt) if isinstance(prompt, tuple) else prompt
                request = Request.of(prompt, own, logprobs=logprobs)
                on_event = lambda event, place=place: events.append((place, event))  # noqa: E731
                tickets.append(self.engine.submit(request, on_event, streams=False))
            while tickets or events:
                # Told here and not by the engine: what is raised then leaves no row half done.
                while events:
                    place, event = events.popleft()
                    if isinstance(event, Failed):
                        if on_error is None or not isinstance(event.error, InputError):
                            raise event.error
                        on_error(place, event.error)
                    elif isinstance(event, Done):
                        found[place] = event.answer
                        if on_answer is not None:
                            on_answer(place, event.answer)
                tickets = [ticket for ticket in tickets if not ticket.job.ended]
                if tickets:
                    self.engine.step()
        finally:
            for ticket in tickets:
                ticket.cancel()
            self.engine.run(tickets)
            self.engine.prefixes.save()
        return [found[place] for place in sorted(found)]

    def read(self, prompt: Prompt | tuple[str, str], *, settings: RapidConfig | None = None) -> Reading:
        """The prompts that the models get."""
        config = self._check(settings)
        self.load(config)
        prompt = Question(*prompt) if isinstance(prompt, tuple) else prompt
        return read(self.models, config, Request.of(prompt, config))

    def _check(self, settings: RapidConfig | None) -> RapidConfig:
        if settings is None:
            return self.config
        own = self.config
        if not settings.models.loads_as(own.models):
            raise ValueError("settings have the same models: models.* must be equal, but max_context and too_long")
        if (settings.mesh, settings.drafter_mesh, settings.compute) != (own.mesh, own.drafter_mesh, own.compute):
            raise ValueError("settings leave the models where they are: mesh, drafter_mesh and compute must be equal")
        if settings.cache != own.cache:
            raise ValueError("settings have the same cache: what is kept of documents serves all")
        return settings
