# SPDX-License-Identifier: Apache-2.0
"""What requests will need, compiled before the first of them comes."""

import time
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from rapid_jax.attention.kernels import platform_of
from rapid_jax.config import RapidConfig
from rapid_jax.engine.engine import Engine
from rapid_jax.engine.job import Job
from rapid_jax.engine.lane import ROW_BUCKETS, Lane, LaneKey, Prepared
from rapid_jax.engine.request import Event, Failed, Piece, Prompt, Question, Request, Tokens
from rapid_jax.engine.scoring import compile_scores
from rapid_jax.engine.sharing import Size, fits
from rapid_jax.engine.tiers import Handle
from rapid_jax.runtime.compiling import keep_programs
from rapid_jax.runtime.errors import InputError
from rapid_jax.speculative.round_times import RoundTimes

_WORDS = "The harbour of the old town lies open to the north, and its boats leave before the light comes. "
_PIECES = 2  # an encoder's tokens for one of the target's, at most
Prompts: TypeAlias = tuple[Prompt, Prompt]
Outlines: TypeAlias = dict[str, dict[LaneKey, list[Any]]]  # by kind of request, of the lanes that there are so far


@dataclass(frozen=True)
class WarmUp:
    """Sizes of requests that compile nothing once the engine is ready.

    That holds for questions about documents under the engine's own mode, gamma and lookup (with a fixed gamma: under
    any mode that drafts, if its own does), and for chats and texts without one, with answers of at most the engine's
    own limit (or of the same bucket) and questions of at most `rooms.QUESTION_TOKENS`, whatever else they ask for, of
    one of the sizes or of several at once; and for the log-probabilities of prompts of these lengths. A document
    shorter than one of the lengths, down to about a quarter of it, gets as much room where the devices have it.
    Requests that name others bring programs of their own, and so do more at once. (In mode target questions about a
    document may share a lane with chats that need as many slots; then each of those counts as a document.)

    Requests of several sizes run side by side in the lane of the largest (engine/sharing.py): that takes one program
    for each pair of sizes, where lanes that grew would take one for each pair and number of rows.
    """

    lengths: tuple[int, ...] = (1024,)  # tokens of documents
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
    if config.models.retrieves(config.speculation):
        start = time.perf_counter()
        engine.models.embedder.warm_up(_PIECES * config.retrieval.chunk_tokens)
        report(f"chunks and questions: {time.perf_counter() - start:.1f} s")
    sizes: set[int] = set()  # slots of the documents, which those of other lengths have from then on
    documents: Outlines = {}  # apart from chats: they come in other numbers
    chats: Outlines = {}
    for length, is_document in sorted({*((n, True) for n in what.lengths), *((n, False) for n in what.chats)})[::-1]:
        ids = engine.models.target.tokenizer.encode(texts[length])[:length]
        if is_document:
            asked = "When do the boats leave?"
            # Of another one that begins so what they have in common is copied.
            prompts: Prompts = Question(texts[length], asked), Question(texts[length][:-1], asked)
            about = f"documents of {length} tokens, up to {what.documents} at once with {what.rows} questions each"
            sizes.add(_warm_up(engine, prompts, what.sizes(), documents, about, report))
        else:
            alone = _alone(what.rows)
            about = f"chats of {length} tokens, up to {what.rows} at once"
            _warm_up(engine, (Tokens(ids), Tokens(ids[:-1])), alone, chats, about, report)
        start = time.perf_counter()
        compile_scores(engine.models.target, config, ids)
        report(f"log-probabilities of prompts of {length} tokens: {time.perf_counter() - start:.1f} s")
    engine.prefixes.sizes |= sizes
    keep_programs()


def _warm_up(
    engine: Engine, prompts: Prompts, sizes: list[Size], larger: Outlines, about: str, report: Callable[[str], None]
) -> int:
    """For requests like the first prompt in lanes of these sizes and in those of larger ones, which have been before;
    the second begins as the first does. Returns the slots of what is kept of the first; 0 if nothing is.
    """
    slots = 0
    unwanted: list[Handle] = []
    for number, (kind, request) in enumerate(_kinds(prompts[0], engine.config)):
        start = time.perf_counter()
        if not number:  # how prompts are read, and events told, is the same for all kinds
            _ask(engine, request)
            with engine.read(replace(request, prompt=prompts[1])) as (_, other):
                unwanted += [] if other.handle is None else [other.handle]
        with engine.read(request) as (job, prepared):
            if prepared.handle is None:  # nothing of the document is shared: each question has one of its own
                sizes = _alone(max(count * each for count, each in sizes))
            _compile_joins(engine, prepared, larger.setdefault(kind, {}), sizes)
            _compile(job, prepared, sizes)
            if not number and prepared.handle is not None:
                unwanted.append(prepared.handle)
                slots = engine.prefixes.slots(prepared.handle)
        report(f"{about}, {kind}: {time.perf_counter() - start:.1f} s")
    for handle in unwanted:
        engine.prefixes.remove(handle.key)
    return slots


def _alone(most: int) -> list[Size]:
    """Of lanes whose rows have nothing in common, up to so many at once."""
    return [(count, 1) for count in ROW_BUCKETS if count == 1 or count < 2 * most]


def _compile_joins(engine: Engine, prepared: Prepared, larger: dict[LaneKey, list[Any]], sizes: list[Size]) -> None:
    """What makes such a row fit into larger ones' lanes; then it is one of them, in lanes of these sizes."""
    key, rounds = prepared.key, prepared.rounds
    for other, outline in larger.items():
        if other != key and fits(key, other):
            rounds.compile_fit(outline)
            engine.sharing.joined(key, other)
    if key.slots is not None:
        engine.sharing.declared.setdefault(key.slots, set()).update(sizes)
        larger[key] = rounds.outline()


def _document(engine: Engine, length: int) -> str:
    """So many tokens."""
    tokenizer, most = engine.models.target.tokenizer, engine.models.target.config.context_size
    if length > most:
        raise InputError(f"lengths to warm up for: expected at most the model's context of {most} tokens, got {length}")
    # Put together the words may have fewer tokens than alone.
    text = _WORDS * (2 * length // tokenizer.counts([_WORDS])[0] + 2)
    return text[: tokenizer.spans(text)[length - 1][1]]


def _kinds(prompt: Prompt, config: RapidConfig) -> Iterator[tuple[str, Request]]:
    """A request for each kind of rule that rows may have (`SamplingRule.widened`)."""
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
            if platform_of(lane.rounds.meshes[0]) == "cpu":
                lane.rounds.compile(plan)
                continue
            # A real round: the first that an accelerator runs of a program may take long.
            lane = _lane(job, prepared, size)
            lane.arrange(range(size[0]), size[1])  # copies: a round uses its arrays up, and may end the answer
            lane.rounds.advance(plan, 1)


def _lane(job: Job, prepared: Prepared, size: Size) -> Lane:
    """A lane of this size."""
    lane = Lane.of(prepared.key, job, copy(prepared.rounds), 1, RoundTimes())
    if size != (1, 1):
        _join(lane, job, prepared, size)
    return lane


def _join(lane: Lane, job: Job, prepared: Prepared, size: Size) -> None:
    """The request once more, about the last of so many documents: another one where the lane has fewer."""
    lane.join(job, prepared.rounds, size[0], size)
