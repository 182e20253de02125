# SPDX-License-Identifier: Apache-2.0
"""POST /v1/completions: OpenAI's text completion, with the log-probabilities of prompts that evaluations need."""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fastapi import Request as HttpRequest
from fastapi.responses import Response

from rapid_jax.answer import Answer
from rapid_jax.config import RapidConfig
from rapid_jax.engine.request import Done, Piece, Request, TokenLogprobs, Tokens
from rapid_jax.serve.asked import COMPLETION_TOKENS, check_streaming, choices, sampling_of, stops_of
from rapid_jax.serve.bodies import read_body
from rapid_jax.serve.errors import bad
from rapid_jax.serve.fields import CompletionRequest
from rapid_jax.serve.runs import Runs, unless_gone
from rapid_jax.serve.service import Service
from rapid_jax.serve.streams import PAUSE, answered

_MOST = 128  # answers to one request
Entries = list[TokenLogprobs | None]


async def complete(http: HttpRequest, service: Service) -> Response:
    """The completions, whole or as a stream."""
    owner = service.owner(http.headers.get("authorization"))
    service.check_taking()
    body = await read_body(http, CompletionRequest, service)
    service.check_model(body.model)
    prompts = await service.aside(prompt_ids, body, service)
    most = COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
    check_streaming(body)
    if most == 0 and not body.echo:
        raise bad("max_tokens", "expected at least 1 without echo, got 0")
    if len(prompts) * (body.n or 1) > _MOST:
        raise bad("n", f"expected at most {_MOST} answers in all, got {len(prompts)} prompts times {body.n}")
    reply = CompletionReply(body, prompts, service)
    asked = _asked(body, service.defaults, max(most, 1), owner)
    requests = [one for ids in prompts for one in choices(replace(asked, prompt=Tokens(ids)), body.n or 1)]
    runs = Runs(service, requests if most else [])
    await unless_gone(http, reply.read_prompts())
    return await answered(http, runs, reply, streamed=bool(body.stream))


def _asked(body: CompletionRequest, defaults: RapidConfig, most: int, owner: str) -> Request:
    """What each prompt is asked with."""
    return Request(
        prompt=Tokens(()),
        speculation=replace(defaults.speculation, mode="target"),
        sampling=sampling_of(body, defaults.sampling, most),
        stop=stops_of(body, defaults),
        logprobs=body.logprobs,
        owner=owner,
    )


def prompt_ids(body: CompletionRequest, service: Service) -> list[list[int]]:
    """The ids of each prompt. Raises ApiError for a prompt without tokens and for ids that are none."""
    target = service.engine.models.target
    given: Any = body.prompt
    if isinstance(given, str) or isinstance(given[0], int):
        given = [given]
    found = []
    for prompt in given:
        if isinstance(prompt, str):
            prompt = target.tokenizer.encode(prompt, add_special_tokens=True)
        elif wrong := [one for one in prompt if not 0 <= one < target.config.vocab_size]:
            raise bad("prompt", f"expected token ids from 0 to {target.config.vocab_size - 1}, got {wrong[0]}")
        if not prompt:
            raise bad("prompt", "expected at least one token, got none")
        found.append(prompt)
    return found


@dataclass
class Completed:
    """One of the answers while it grows; what is echoed is part of its text."""

    text: list[str] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    entries: Entries = field(default_factory=list)
    offset: int = 0  # characters that the log-probabilities of a stream have told
    answer: Answer | None = None
    reason: str = "length"


class CompletionReply:
    """What the client of one request is sent."""

    def __init__(self, body: CompletionRequest, prompts: Sequence[list[int]], service: Service):
        self._body, self._prompts, self._service = body, prompts, service
        self._each = body.n or 1
        self._done = [Completed() for _ in range(len(prompts) * self._each)]
        self._scored: list[Entries] = [[] for _ in prompts]
        self._head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": service.engine.models.name,
        }

    async def read_prompts(self) -> None:
        """Has the prompts scored where their log-probabilities are asked for, and begins the answers with them."""
        if not self._body.echo:
            return
        if (top := self._body.logprobs) is not None:
            futures = [self._service.engine.score(ids, top) for ids in self._prompts]
            self._scored = list(await asyncio.gather(*map(asyncio.wrap_future, futures)))
        for number, one in enumerate(self._done):
            ids = self._prompts[number // self._each]
            one.text.append(self._service.texts.decoded(ids))
            if top is not None:
                one.ids += ids
                one.entries += self._scored[number // self._each]

    async def whole(self, runs: Runs) -> dict[str, Any]:
        """The complete answer."""
        async for found in runs.events():
            if found is None:
                continue
            number, event = found
            one = self._done[number]
            if isinstance(event, Piece):
                one.text.append(event.text)
                if event.logprobs:
                    one.ids += event.token_ids
                    one.entries += event.logprobs
            elif isinstance(event, Done):
                one.answer, one.reason = event.answer, event.answer.finish_reason
        done = [self._choice(number, "".join(one.text), one, one.reason) for number, one in enumerate(self._done)]
        return self._head | {"choices": done, "usage": self._usage()}

    async def chunks(self, runs: Runs) -> AsyncIterator[dict[str, Any] | None]:
        """The answer as it grows, echoed prompts first."""
        for number, one in enumerate(self._done):
            if one.text:
                yield self._chunk(number, one.text.pop(), None if runs.count else one.reason)
        async for found in runs.events(PAUSE):
            if found is None:
                yield None
                continue
            number, event = found
            one = self._done[number]
            if isinstance(event, Piece) and (event.text or event.logprobs):
                if event.logprobs:
                    one.ids, one.entries = list(event.token_ids), list(event.logprobs)
                yield self._chunk(number, event.text, None)
            elif isinstance(event, Done):
                one.answer = event.answer
                yield self._chunk(number, "", event.answer.finish_reason)
        if self._body.stream_options is not None and self._body.stream_options.include_usage:
            yield self._head | {"choices": [], "usage": self._usage()}

    def _chunk(self, number: int, text: str, reason: str | None) -> dict[str, Any]:
        one = self._done[number]
        chunk = self._head | {"choices": [self._choice(number, text, one, reason)]}
        one.offset += sum(len(self._service.texts.of(token_id)) for token_id in one.ids)
        one.ids, one.entries = [], []
        return chunk

    def _choice(self, number: int, text: str, one: Completed, reason: str | None) -> dict[str, Any]:
        logprobs = None
        if self._body.logprobs is not None:
            logprobs = self._service.texts.completion(one.entries, one.ids, one.offset)
        return {"index": number, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _usage(self) -> dict[str, Any]:
        prompt = sum(map(len, self._prompts))
        made = sum(len(one.answer.token_ids) for one in self._done if one.answer is not None)
        return {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}
