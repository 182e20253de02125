# SPDX-License-Identifier: Apache-2.0
"""A small engine that makes its answers out of the request: what HTTP does can be tested without a model.

The answer repeats the question word by word, then says its seed. A question with the word "forever" has an answer that
goes on until its limit; one with "broken" fails within the answer, one with "refused" is refused in the engine's
thread, one with "fault" meets a fault of the engine's own.
"""

import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import cache

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from rapid_jax.answer import Answer, Transcript
from rapid_jax.conversation import Prompt
from rapid_jax.engine.errors import Draining, QueueFull, TooLarge, UnknownDocument
from rapid_jax.engine.request import (
    Cancelled,
    Chat,
    Done,
    Failed,
    OnEvent,
    Piece,
    Request,
    Retrieved,
    TokenLogprobs,
    Tokens,
)
from rapid_jax.model.thinking import Thinking
from rapid_jax.model.tokenizer import Tokenizer
from rapid_jax.prompts import Reading
from rapid_jax.retrieval.chunk import Chunk
from rapid_jax.retrieval.select import Selection
from rapid_jax.runtime.errors import InputError
from rapid_jax.speculative.generate import Generation
from rapid_jax.speculative.state import Origin

NAME = "tiny"
CONTEXT = 4096
CORPUS = "the answer to a question about the document is in the document and the seed is forever and ever again"
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PIECE = 3  # tokens a round
ROWS, QUEUE = 4, 8


@cache
def tokenizer() -> Tokenizer:
    """Byte-level BPE: rare characters are several tokens."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([CORPUS], trainer)
    settings = {"eos_token": "<|im_end|>", "chat_template": CHATML}
    files = {"tokenizer.json": backend.to_str().encode(), "tokenizer_config.json": json.dumps(settings).encode()}
    return Tokenizer(files)


@dataclass(frozen=True)
class Shape:
    context_size: int = CONTEXT
    vocab_size: int = 320


@dataclass(frozen=True)
class Target:
    tokenizer: Tokenizer = field(default_factory=tokenizer)
    config: Shape = Shape()


@dataclass(frozen=True)
class Models:
    target: Target = field(default_factory=Target)
    name: str = NAME


@dataclass(frozen=True)
class Info:
    id: str
    name: str
    bytes: int
    characters: int
    tokens: int | None
    state: str
    pinned: bool
    public: bool
    created: float
    expires: float | None


@dataclass(frozen=True)
class Stats:
    waiting: int
    running: int
    kv_bytes: dict[str, int]
    drafted: int
    accepted: int
    rounds: int
    tokens: int


class Documents:
    """In memory, by owner."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[str, str, Info]] = {}

    def add(self, text, *, owner="", name="", public=False, pinned=False, expires_in=None) -> Info:
        id = "doc-" + hashlib.sha256(f"{'' if public else owner}\0{text}".encode()).hexdigest()[:24]
        if len(text) > 2 << 20:
            raise TooLarge(f"expected a text of at most {2 << 20} characters, got {len(text)}")
        tokens, now = len(tokenizer().encode_quoted(text)), time.time()
        size = len(text.encode())
        expires = None if expires_in is None else now + expires_in
        info = Info(id, name, size, len(text), tokens, "uploaded", pinned, public, now, expires)
        self._kept[id] = owner, text, info
        return info

    def _of(self, id: str, owner: str, *, own: bool = False) -> tuple[str, str, Info]:
        found = self._kept.get(id)
        if found is None or (found[0] != owner and (own or not found[2].public)):
            raise UnknownDocument(f"there is no document {id[:40]!a}")
        return found

    def get(self, id, *, owner="") -> str:
        return self._of(id, owner)[1]

    def info(self, id, *, owner="") -> Info:
        return self._of(id, owner)[2]

    def all(self, *, owner="") -> list[Info]:
        return [info for whose, _, info in self._kept.values() if whose == owner]

    def remove(self, id, *, owner="") -> None:
        self._of(id, owner, own=True)
        del self._kept[id]

    def pin(self, id, pinned, *, owner="") -> Info:
        whose, text, info = self._of(id, owner, own=True)
        info = replace(info, pinned=pinned)
        self._kept[id] = whose, text, info
        return info


class Ticket:
    def __init__(self, id: str):
        self.id, self.cancelled = id, False

    def cancel(self) -> None:
        self.cancelled = True


@dataclass
class Job:
    request: Request
    on_event: OnEvent
    ticket: Ticket
    steps: Iterator[None] | None = None


class Engine:
    """Runs ROWS requests in turns, a piece at a time, and lets QUEUE wait."""

    def __init__(self, *, round_seconds: float = 0.0):
        self.models, self.documents = Models(), Documents()
        self.requests: list[Request] = []  # all that were taken
        self.cancelled = 0
        self.held = threading.Event()  # while it is cleared nothing runs
        self.held.set()
        self._round_seconds = round_seconds
        self._jobs: list[Job] = []
        self._changed = threading.Condition()
        self._draining = self._stopping = False
        self._tokens = 0
        self._thread = threading.Thread(target=self._run, daemon=True)

    @property
    def has_failed(self) -> bool:
        return False

    def submit(self, request: Request, on_event: OnEvent) -> Ticket:
        if self._draining:
            raise Draining
        if len(self._ids(request)) + request.sampling.max_new_tokens > CONTEXT:
            raise TooLarge(f"expected prompt and answer of at most {CONTEXT} tokens, got more")
        with self._changed:
            if len(self._jobs) >= ROWS + QUEUE:
                raise QueueFull(1.5)
            job = Job(request, on_event, Ticket(f"request-{len(self.requests)}"))
            self.requests.append(request)
            self._jobs.append(job)
            self._changed.notify_all()
        return job.ticket

    def score(self, ids: Sequence[int], top: int) -> "Future[list[TokenLogprobs | None]]":
        found: Future[list[TokenLogprobs | None]] = Future()
        if len(ids) > CONTEXT:
            found.set_exception(TooLarge(f"expected at most {CONTEXT} tokens, got {len(ids)}"))
        else:
            found.set_result([None, *(logprobs_of(one, top) for one in ids[1:])])
        return found

    def warm_up(self, report: Callable[[str], None]) -> None:
        report("compiling nothing")

    def start(self) -> None:
        self._thread.start()

    def drain(self, seconds: float, report: Callable[[str], None]) -> bool:
        report(f"{seconds:g} s")
        self._draining = True
        with self._changed:
            return self._changed.wait_for(lambda: not self._jobs, seconds)

    def stop(self) -> None:
        with self._changed:
            self._stopping = True
            self._changed.notify_all()

    def stats(self) -> Stats:
        running = min(len(self._jobs), ROWS)
        sizes = {"device": 1024, "host": 2048, "disk": 0}
        return Stats(len(self._jobs) - running, running, sizes, 30, 20, 10, self._tokens)

    def idle(self, seconds: float = 5.0) -> bool:
        """Whether nothing runs any more, at the latest after so many seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._jobs, seconds)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs or self._stopping)
                if self._stopping:
                    return
                rows = self._jobs[:ROWS]
            while not self.held.wait(0.01):
                if any(job.ticket.cancelled for job in rows):
                    break
            time.sleep(self._round_seconds)
            for job in rows:
                if not self._step(job):
                    with self._changed:
                        self._jobs.remove(job)
                        self._changed.notify_all()

    def _step(self, job: Job) -> bool:
        """Whether the request goes on."""
        if job.ticket.cancelled:
            self.cancelled += 1
            job.on_event(Failed(Cancelled()))
            return False
        if not self.held.is_set():
            return True
        try:
            job.steps = job.steps or self._answer(job)
            next(job.steps)
            return True
        except StopIteration:
            return False
        except Exception as error:
            job.on_event(Failed(error))
            return False

    def _ids(self, request: Request) -> list[int]:
        prompt = request.prompt
        if isinstance(prompt, Tokens):
            return list(prompt.ids)
        assert isinstance(prompt, Chat)
        text = tokenizer().chat(prompt.messages)
        return tokenizer().encode_quoted(prompt.document or "x") + tokenizer().encode(text)

    def _answer(self, job: Job) -> Iterator[None]:
        request = job.request
        prompt, sampling = request.prompt, request.sampling
        question = "tokens" if isinstance(prompt, Tokens) else prompt.messages[-1]["content"]
        if "refused" in question:
            raise InputError("expected another question, got a refused one")
        if "fault" in question:
            raise RuntimeError(f"secret words: {question}")
        selection = None
        if isinstance(prompt, Chat) and prompt.document and request.speculation.mode != "target":
            selection = selected(prompt.document)
            job.on_event(Retrieved(selection))
            yield
        said, thinks = f"{question} seed {sampling.seed}", request.prompts and request.prompts.enable_thinking
        said = f"<think>\nof {question}\n</think>\n\n{said}" if thinks else said
        ids = tokenizer().encode_quoted(" again" * sampling.max_new_tokens if "forever" in question else said)
        ids = [*ids, tokenizer().stop_ids[0]]
        texts: list[str] = []
        transcript = Transcript(tokenizer(), request.stop, texts.append)
        transcript.thinking = Thinking() if thinks else None
        made: list[int] = []
        for at in range(0, min(len(ids), sampling.max_new_tokens), PIECE):
            part = ids[at : min(at + PIECE, sampling.max_new_tokens)]
            before, thought = len(transcript.token_ids), len(transcript.thoughts)
            transcript.on_tokens(0, part, [(at + n) % len(Origin) for n in range(len(part))])
            made += part
            if "broken" in question and at:
                raise InputError("expected a whole answer, got a broken one")
            job.on_event(piece(transcript, before, texts, request.logprobs, thought))
            self._tokens += len(part)
            yield
            if transcript.stopped:
                break
        before = len(transcript.token_ids)
        transcript.finish()
        if texts:
            job.on_event(piece(transcript, before, texts, request.logprobs))
        job.on_event(Done(answer(request, transcript, made, selection, self._ids(request))))


def piece(transcript: Transcript, before: int, texts: list[str], top: int | None, thought: int = 0) -> Piece:
    """What has come since `before`, and since so many characters of thought."""
    ids, text = transcript.token_ids[before:], "".join(texts)
    texts.clear()
    scores = None if top is None else [logprobs_of(one, top) for one in ids]
    return Piece(text, ids, transcript.origins[before:], scores, transcript.thoughts[thought:])


def logprobs_of(token_id: int, top: int) -> TokenLogprobs:
    """Any figures that follow from the id: of every third token another one is more probable."""
    own = -0.5 - token_id % 5
    pairs = [(token_id, own), ((token_id + 1) % 320, own + 0.25 if token_id % 3 == 0 else own - 1)]
    pairs += [((token_id + 2 + n) % 320, own - 2 - n) for n in range(20)]
    return TokenLogprobs(token_id, own, tuple(sorted(pairs, key=lambda pair: -pair[1])[:top]))


def selected(document: str) -> Selection:
    """The document's first and last hundred characters."""
    ends = sorted({(0, min(100, len(document))), (max(len(document) - 100, 0), len(document))})
    chunks = tuple(Chunk(start, end, document[start:end], 20) for start, end in ends)
    return Selection(chunks, (0.5, 0.75)[: len(chunks)], len(chunks) + 1, False)


def answer(
    request: Request, transcript: Transcript, made: list[int], selection: Selection | None, prompt: list[int]
) -> Answer:
    """The finished answer."""
    ended = made[-1:] == [tokenizer().stop_ids[0]] or transcript.stopped
    generation = Generation(
        tokens=[made],
        origins=[[0] * len(made)],
        finish_reasons=["stop" if ended else "length"],
        drafted=[10],
        accepted=[8],
        rejected=[1],
        rounds=[4],
        copied=[0],
        copied_accepted=[0],
        draft_steps=10,
        target_steps=4,
        gammas={10: 4},
        prepare_seconds=0.0,
        compile_seconds=0.0,
        decode_seconds=0.1,
    )
    speculation, document = request.speculation, getattr(request.prompt, "document", None) or ""
    count = len(tokenizer().encode_quoted(document)) if document else 0
    return Answer(
        text=transcript.text,
        thoughts=transcript.thoughts,
        token_ids=transcript.token_ids,
        origins=transcript.origins,
        finish_reason=generation.finish_reasons[0],
        mode=speculation.mode,
        eta=speculation.effective_eta,
        gamma=speculation.gamma,
        generation=generation,
        reading=Reading(Prompt([], prompt), None, selection, count, truncated=False),
        prefix_reused=False,
        seconds={"load": 0.0, "decode": 0.1},
    )
