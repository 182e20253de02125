# SPDX-License-Identifier: Apache-2.0
"""What requests will need, compiled before the first of them comes."""

import time
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass, replace

from rapid_jax.config import RapidConfig
from rapid_jax.engine.engine import Engine
from rapid_jax.engine.job import Job
from rapid_jax.engine.lane import ROW_BUCKETS, Lane
from rapid_jax.engine.prepare import Prepared
from rapid_jax.engine.request import Event, Failed, Piece, Prompt, Question, Request, Tokens
from rapid_jax.engine.tiers import Handle
from rapid_jax.runtime.errors import InputError

_WORDS = "The harbour of the old town lies open to the north, and its boats leave before the light comes. "
_PIECES = 2  # an encoder's tokens for one of the target's, at most
Size = tuple[int, int]  # documents, rows of each


@dataclass(frozen=True)
class WarmUp:
    """Sizes of requests that compile nothing once the engine is ready.

    That holds for questions about documents under the engine's own mode, gamma and lookup, and for chats and texts
    without one, with answers of at most the engine's own limit (or of the same bucket) and questions of at most
    `prepare.QUESTION_TOKENS`, whatever else they ask for. Requests that name others bring programs of their own, and
    so do those of several sizes that are answered by one program side by side.
    """

    lengths: tuple[int, ...] = (1024,)  # tokens of documents; one stands for all of its bucket
    rows: int = 1  # questions about a document at once
    documents: int = 1  # that are asked about at once; with all their questions no more than a lane has rows
    # Tokens of prompts without a document, as many at once as a document has questions. Those of a prefill chunk are
    # of two sizes, up to a quarter of it and above.
    chats: tuple[int, ...] = ()

    def __post_init__(self):
        if not all(length >= 16 for length in (*self.lengths, *self.chats)):
            least = min((*self.lengths, *self.chats))
            raise InputError(f"lengths to warm up for: expected at least 16 tokens, got {least}")
        for name in ("rows", "documents"):
            if not 1 <= getattr(self, name) <= ROW_BUCKETS[-1]:
                raise InputError(f"{name} to warm up for: expected 1 to {ROW_BUCKETS[-1]}, got {getattr(self, name)}")

    def sizes(self) -> list[Size]:
        """All that a lane may have, the smallest first."""
        documents, rows = (
            [size for size in ROW_BUCKETS if size == 1 or size < 2 * most] for most in (self.documents, self.rows)
        )
        return [(count, each) for count in documents for each in rows if count * each <= ROW_BUCKETS[-1]]


def warm_up(engine: Engine, what: WarmUp, report: Callable[[str], None]) -> None:
    """Loads the models and reads and answers questions of these sizes, under the engine's own settings.

    Raises InputError for models or sizes that cannot be.
    """
    config = engine.config
    engine.models.load(config.speculation)
    texts = {length: _document(engine, length) for length in (*what.lengths, *what.chats)}  # refused before any work
    if config.speculation.retrieves:
        start = time.perf_counter()
        engine.models.embedder.warm_up(_PIECES * config.retrieval.chunk_tokens)
        report(f"chunks and questions: {time.perf_counter() - start:.1f} s")
    for length in what.lengths:
        document, asked = texts[length], "When do the boats leave?"
        # Of another one that begins so what they have in common is copied.
        prompts = Question(document, asked), Question(document[:-1], asked)
        about = f"documents of {length} tokens, up to {what.documents} at once with {what.rows} questions each"
        _warm_up(engine, prompts, what.sizes(), about, report)
    for length in what.chats:
        ids = engine.models.target.tokenizer.encode(texts[length])[:length]
        alone = [(count, 1) for count in ROW_BUCKETS if count == 1 or count < 2 * what.rows]
        about = f"chats of {length} tokens, up to {what.rows} at once"
        _warm_up(engine, (Tokens(ids), Tokens(ids[:-1])), alone, about, report)


def _warm_up(
    engine: Engine, prompts: tuple[Prompt, Prompt], sizes: list[Size], about: str, report: Callable[[str], None]
) -> None:
    """For requests like the first prompt in lanes of these sizes; the second begins as the first does."""
    unwanted: list[Handle] = []
    for kind, request in _kinds(prompts[0], engine.config):
        start = time.perf_counter()
        _ask(engine, request)
        with engine.read(request) as (job, prepared):
            _compile(job, prepared, sizes)
            with engine.read(replace(request, prompt=prompts[1])) as (_, other):
                unwanted = [one.handle for one in (prepared, other) if one.handle is not None]
        report(f"{about}, {kind}: {time.perf_counter() - start:.1f} s")
    for handle in unwanted:
        engine.prefixes.remove(handle.key)


def _document(engine: Engine, length: int) -> str:
    """So many tokens."""
    tokenizer, most = engine.models.target.tokenizer, engine.models.target.config.context_size
    if length > most:
        raise InputError(f"lengths to warm up for: expected at most the model's context of {most} tokens, got {length}")
    # Put together the words may have fewer tokens than alone.
    text = _WORDS * (2 * length // tokenizer.counts([_WORDS])[0] + 2)
    return text[: tokenizer.spans(text)[length - 1][1]]


def _kinds(prompt: Prompt, config: RapidConfig) -> Iterator[tuple[str, Request]]:
    """A request for each kind of law that rows may have (`Law.widened`)."""
    greedy = replace(config.sampling, temperature=0.0, repetition_penalty=1.0)
    asked = Request.of(prompt, replace(config, sampling=greedy))
    yield "greedy", asked
    yield "sampled", replace(asked, sampling=replace(config.sampling, temperature=1.0))
    yield "with log-probabilities", replace(asked, logprobs=0)


def _ask(engine: Engine, request: Request) -> None:
    """Answers a request until its first tokens are there, and takes it back."""
    heard: list[Event] = []
    ticket = engine.submit(request, heard.append)
    while not ticket.job.ended and not any(isinstance(event, Piece) for event in heard):
        engine.step()
    ticket.cancel()
    engine.run([ticket])
    for event in heard:
        if isinstance(event, Failed) and isinstance(event.error, InputError):
            raise event.error


def _compile(job: Job, prepared: Prepared, sizes: list[Size]) -> None:
    """Everything that lanes of these sizes run, and all ways from one size to another.

    The smallest comes last: its rounds use up the arrays that the others are made of.
    """
    if prepared.key.document is not None:
        sizes = [size for size in sizes if size[0] == 1]
    for size in reversed(sizes):
        for other in sizes:
            if other != size and other[0] >= size[0] and other[1] >= size[1]:
                _join(_lane(job, prepared, size), job, prepared, other)
            elif other[0] <= size[0] and other[1] <= size[1]:
                _lane(job, prepared, size).arrange(range(other[0]), other[1])
        lane = _lane(job, prepared, size)
        for plan in lane.pace.plans(lane.rounds):
            lane.rounds.compile(plan)


def _lane(job: Job, prepared: Prepared, size: Size) -> Lane:
    """A lane of this size."""
    lane = Lane.of(prepared.key, job, copy(prepared.rounds), 1)
    if size != (1, 1):
        _join(lane, job, prepared, size)
    return lane


def _join(lane: Lane, job: Job, prepared: Prepared, size: Size) -> None:
    """The request once more, about the last of so many documents: another one where the lane has fewer."""
    lane.join(job, prepared.rounds, size[0], size)
