# SPDX-License-Identifier: Apache-2.0
"""From a request's fields to what the engine is asked."""

import re
import secrets
from dataclasses import dataclass, replace
from typing import Any

from rapid_jax.config import PromptsConfig, RapidConfig
from rapid_jax.engine.request import Chat, Request
from rapid_jax.retrieval.config import RetrievalConfig
from rapid_jax.retrieval.select import Selection
from rapid_jax.serve.errors import bad
from rapid_jax.serve.fields import Asked, ChatRequest, Message, Retrieval
from rapid_jax.serve.interface import Documents
from rapid_jax.speculative.config import Mode, SamplingSettings, SpeculationConfig

_ID = re.compile(r"doc-\S{0,60}")  # a text that is one such word is taken for an id
_JOIN = "\n\n"
_DRAFTING: tuple[Mode, ...] = ("rapid", "lossless", "phat")
COMPLETION_TOKENS = 16  # OpenAI's default


@dataclass(frozen=True)
class Read:
    """The document of a request: its parts, each with its id (None: a text of the request's own)."""

    parts: tuple[tuple[str | None, str], ...]
    public: bool

    @property
    def text(self) -> str:
        """All parts as one document."""
        return _JOIN.join(text for _, text in self.parts)

    def citations(self, selection: Selection) -> list[dict[str, Any]]:
        """The retrieved chunks with their places in the parts that they are from; one that spans two is cited twice."""
        found, begin = [], 0
        for part, text in self.parts:
            for chunk, score in zip(selection.chunks, selection.scores, strict=True):
                start, end = max(chunk.start - begin, 0), min(chunk.end - begin, len(text))
                if start < end:
                    place = {"document": part, "start": start, "end": end}
                    found.append(place | {"tokens": chunk.tokens, "score": score, "text": text[start:end]})
            begin += len(text) + len(_JOIN)
        return found


def read_documents(given: str | list[str] | None, documents: Documents, owner: str) -> Read | None:
    """What the field `document` stands for. Raises UnknownDocument, and ApiError for an empty text."""
    if given is None:
        return None
    if isinstance(given, str) and not _ID.fullmatch(given):
        if not given.strip():
            raise bad("document", "expected a document's id or its text, got an empty text")
        return Read(((None, given),), public=False)
    ids = [given] if isinstance(given, str) else given
    if wrong := [one for one in ids if not _ID.fullmatch(one)]:
        raise bad("document", f"expected ids of documents in a list, got {wrong[0][:40]!a}")
    parts = tuple((one, documents.get(one, owner=owner)) for one in ids)
    return Read(parts, public=all(documents.info(one, owner=owner).public for one in ids))


def citations_of(selection: Selection, read: Read | None) -> list[dict[str, Any]]:
    """The citations of an answer; without a document of the request's, places are in the long message."""
    if read is not None:
        return read.citations(selection)
    return [
        {
            "document": None,
            "start": chunk.start,
            "end": chunk.end,
            "tokens": chunk.tokens,
            "score": score,
            "text": chunk.text,
        }
        for chunk, score in zip(selection.chunks, selection.scores, strict=True)
    ]


def chat_requests(body: ChatRequest, read: Read | None, defaults: RapidConfig, owner: str) -> list[Request]:
    """One request a choice, with seeds that follow each other."""
    if body.max_tokens is not None and body.max_completion_tokens not in (None, body.max_tokens):
        raise bad("max_tokens", "expected max_tokens or max_completion_tokens, got both")
    if body.top_logprobs is not None and not body.logprobs:
        raise bad("top_logprobs", "needs logprobs true")
    check_streaming(body)
    last = body.messages[-1]
    if read is not None and last.role != "user":
        raise bad("messages", f"expected a user's question about the document last, got a message of {last.role}")
    if last.role == "user" and not last.text.strip():
        raise bad("messages", "expected a question, got an empty last message")
    most = body.max_completion_tokens or body.max_tokens or defaults.sampling.max_new_tokens
    prompt = Chat([_plain(message) for message in body.messages], None if read is None else read.text)
    asked = Request(
        prompt=prompt,
        speculation=speculation_of(body, defaults.speculation),
        sampling=sampling_of(body, defaults.sampling, most),
        stop=stops_of(body, defaults),
        retrieval=retrieval_of(body, defaults.retrieval),
        prompts=prompts_of(body, defaults.prompts),
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        owner=owner,
        public=read is not None and read.public,
    )
    return choices(asked, body.n or 1)


def prompts_of(body: ChatRequest, defaults: PromptsConfig) -> PromptsConfig:
    """The server's words, and whether the model thinks first."""
    thinking = body.chat_template_kwargs and body.chat_template_kwargs.enable_thinking
    return defaults if thinking is None else replace(defaults, enable_thinking=thinking)


def choices(asked: Request, count: int) -> list[Request]:
    """One request for each answer: only their seeds differ, which follow each other."""
    seeds = [(asked.sampling.seed + number) % 2**32 for number in range(count)]
    return [replace(asked, sampling=replace(asked.sampling, seed=seed)) for seed in seeds]


def stops_of(body: Asked, defaults: RapidConfig) -> tuple[str, ...]:
    """The texts that end an answer."""
    return (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or defaults.stop)


def check_streaming(body: Asked) -> None:
    """Raises ApiError for options of a stream without one."""
    if body.stream_options is not None and not body.stream:
        raise bad("stream_options", "needs stream true")


def sampling_of(body: Asked, defaults: SamplingSettings, most: int) -> SamplingSettings:
    """The defaults under what the request says; without a seed every request draws anew."""
    top_k = 0 if body.top_k == -1 else body.top_k
    given = {
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": top_k,
        "min_p": body.min_p,
        "repetition_penalty": body.repetition_penalty,
    }
    seed = secrets.randbits(32) if body.seed is None else body.seed % 2**32
    named = {name: value for name, value in given.items() if value is not None}
    return replace(defaults, **named, max_new_tokens=most, seed=seed)


def speculation_of(body: ChatRequest, defaults: SpeculationConfig) -> SpeculationConfig:
    """The defaults under what the request says. Raises ApiError where `mode` and `retrieval` contradict each other."""
    mode = body.mode or defaults.mode
    use = body.retrieval.use if isinstance(body.retrieval, Retrieval) else body.retrieval
    wanted: dict[str, tuple[Mode, ...]] = {"only": ("retrieval",), "off": ("target",), "draft": _DRAFTING}
    if use is not None and mode not in (fitting := wanted[use]):
        if body.mode is not None:
            raise bad("retrieval", f"{use} goes with mode {' or '.join(fitting)}, got mode {body.mode}")
        mode = fitting[0]
    given = {"eta": body.eta, "gamma": body.gamma, "guard": body.guard}
    return replace(defaults, mode=mode, **{name: value for name, value in given.items() if value is not None})


def retrieval_of(body: ChatRequest, defaults: RetrievalConfig) -> RetrievalConfig | None:
    """The defaults under what the request says of retrieval; None where it says nothing."""
    if not isinstance(body.retrieval, Retrieval):
        return None
    given = body.retrieval.model_dump(exclude={"use"}, exclude_none=True)
    return replace(defaults, **given) if given else None


def _plain(message: Message) -> dict[str, str]:
    role = "system" if message.role == "developer" else message.role
    return {"role": role, "content": message.text}
