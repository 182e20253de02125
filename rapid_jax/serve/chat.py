# SPDX-License-Identifier: Apache-2.0
"""POST /v1/chat/completions: OpenAI's chat, about documents."""

import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request as HttpRequest
from fastapi.responses import Response

from rapid_jax.answer import Answer
from rapid_jax.engine.request import Done, Piece, Retrieved, TokenLogprobs
from rapid_jax.retrieval.select import Selection
from rapid_jax.serve.asked import Read, chat_requests, citations_of, read_documents
from rapid_jax.serve.bodies import read_body
from rapid_jax.serve.fields import ChatRequest
from rapid_jax.serve.runs import Runs
from rapid_jax.serve.service import Service
from rapid_jax.serve.streams import PAUSE, answered
from rapid_jax.serve.tokens import OriginSpans


async def chat(http: HttpRequest, service: Service) -> Response:
    """The answer, whole or as a stream."""
    owner = service.owner(http.headers.get("authorization"))
    service.check_taking()
    body = await read_body(http, ChatRequest, service)
    service.check_model(body.model)
    documents = service.engine.documents
    read = await service.aside(read_documents, body.document, documents, owner)
    runs = Runs(service, chat_requests(body, read, service.defaults, owner))
    return await answered(http, runs, ChatReply(body, read, service), streamed=bool(body.stream))


@dataclass
class Choice:
    """One of the answers while it grows."""

    spans: OriginSpans
    text: list[str] = field(default_factory=list)
    thoughts: list[str] = field(default_factory=list)
    origins: list[dict[str, str]] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    selection: Selection | None = None
    answer: Answer | None = None


class ChatReply:
    """What the client of one request is sent."""

    def __init__(self, body: ChatRequest, read: Read | None, service: Service):
        self._body, self._read, self._service = body, read, service
        tokenizer = service.engine.models.target.tokenizer
        self._choices = [Choice(OriginSpans(tokenizer)) for _ in range(body.n or 1)]
        self._head = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "object": "chat.completion.chunk" if body.stream else "chat.completion",
            "created": int(time.time()),
            "model": service.engine.models.name,
        }

    async def whole(self, runs: Runs) -> dict[str, Any]:
        """The complete answer."""
        async for found in runs.events():
            if found is None:
                continue
            number, event = found
            choice = self._choices[number]
            if isinstance(event, Retrieved):
                choice.selection = event.selection
            elif isinstance(event, Piece):
                choice.text.append(event.text)
                choice.thoughts.append(event.thoughts)
                choice.logprobs += event.logprobs or []
                choice.origins += choice.spans.of(event) if self._body.origins else []
            elif isinstance(event, Done):
                choice.answer = event.answer
        done = [self._choice(number, choice) for number, choice in enumerate(self._choices)]
        return self._head | {"choices": done, "usage": usage([choice.answer for choice in self._choices])}

    def _choice(self, number: int, choice: Choice) -> dict[str, Any]:
        assert choice.answer is not None
        rapid = self._rapid(choice, choice.answer) | {"citations": self._citations(choice)}
        if self._body.origins:
            rapid["origins"] = choice.origins
        thoughts = "".join(choice.thoughts).strip()
        message = {"role": "assistant", "content": "".join(choice.text), "refusal": None}
        return {
            "index": number,
            "message": message | ({"reasoning_content": thoughts} if thoughts else {}),
            "logprobs": self._logprobs(choice.logprobs),
            "finish_reason": choice.answer.finish_reason,
            "rapid": rapid,
        }

    async def chunks(self, runs: Runs) -> AsyncIterator[dict[str, Any] | None]:
        """The answer as it grows: the role, citations once they are known, pieces, the end, the usage."""
        for number in range(len(self._choices)):
            yield self._chunk(number, {"role": "assistant", "content": ""})
        async for found in runs.events(PAUSE):
            if found is None:
                yield None
                continue
            number, event = found
            choice = self._choices[number]
            if isinstance(event, Retrieved):
                choice.selection = event.selection
                yield self._chunk(number, {}, rapid={"citations": self._citations(choice)})
            elif isinstance(event, Piece):
                rapid = {"origins": choice.spans.of(event)} if self._body.origins else None
                if event.thoughts:
                    yield self._chunk(number, {"reasoning_content": event.thoughts})
                if event.text or event.logprobs:
                    delta = {"content": event.text}
                    yield self._chunk(number, delta, logprobs=self._logprobs(event.logprobs or []), rapid=rapid)
            elif isinstance(event, Done):
                choice.answer = event.answer
                how = self._rapid(choice, event.answer)
                yield self._chunk(number, {}, finish=event.answer.finish_reason, rapid=how)
        if self._with_usage:
            yield self._head | {"choices": [], "usage": usage([choice.answer for choice in self._choices])}

    @property
    def _with_usage(self) -> bool:
        options = self._body.stream_options
        return options is not None and bool(options.include_usage)

    def _chunk(
        self,
        number: int,
        delta: dict[str, Any],
        *,
        logprobs: dict[str, Any] | None = None,
        finish: str | None = None,
        rapid: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        choice = {"index": number, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        choice |= {} if rapid is None else {"rapid": rapid}
        return self._head | {"choices": [choice]} | ({"usage": None} if self._with_usage else {})

    def _logprobs(self, entries: Sequence[TokenLogprobs]) -> dict[str, Any] | None:
        return {"content": self._service.texts.chat(entries), "refusal": None} if self._body.logprobs else None

    def _citations(self, choice: Choice) -> list[dict[str, Any]]:
        selection = choice.selection or (choice.answer and choice.answer.selection)
        return citations_of(selection, self._read) if selection else []

    def _rapid(self, choice: Choice, answer: Answer) -> dict[str, Any]:
        """How the answer came about."""
        return {
            "mode": answer.mode,
            "eta": answer.eta,
            "gamma": answer.gamma,
            "acceptance": answer.acceptance_rate,
            "drafted": answer.generation.drafted[0],
            "accepted": answer.generation.accepted[0],
            "tokens_per_round": answer.tokens_per_round,
            "document_tokens": answer.document_tokens,
            "document_reused": answer.prefix_reused,
            "truncated": answer.truncated,
            "lossy": list(answer.lossy),
            "seconds": answer.seconds,
        }


def usage(answers: Sequence[Answer | None]) -> dict[str, Any]:
    """Tokens of the prompt, which several choices share, and of all choices."""
    known = [answer for answer in answers if answer is not None]
    prompt = max((answer.target_tokens for answer in known), default=0)
    made = sum(len(answer.token_ids) for answer in known)
    reused = [min(answer.document_tokens, answer.target_tokens) for answer in known if answer.prefix_reused]
    return {
        "prompt_tokens": prompt,
        "completion_tokens": made,
        "total_tokens": prompt + made,
        "prompt_tokens_details": {"cached_tokens": max(reused, default=0)},
    }
