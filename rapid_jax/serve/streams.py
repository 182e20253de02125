# SPDX-License-Identifier: Apache-2.0
"""Answers as server-sent events, the way OpenAI sends them."""

import json
from collections.abc import AsyncIterator
from typing import Any, Protocol

from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from rapid_jax.serve.errors import api_error_of, own_fault
from rapid_jax.serve.guard import log_fault
from rapid_jax.serve.runs import Runs, unless_gone

PAUSE = 15.0  # seconds of silence after which a comment is sent: whatever stands between keeps the connection open


class Reply(Protocol):
    """What a client is sent of its runs."""

    async def whole(self, runs: Runs) -> dict[str, Any]:
        """All of it, once all have ended."""
        ...

    def chunks(self, runs: Runs) -> AsyncIterator[dict[str, Any] | None]:
        """Its parts as they come; None after a while without one."""
        ...


async def answered(http: HttpRequest, runs: Runs, reply: Reply, *, streamed: bool) -> Response:
    """The reply to runs that are begun here, whole or as a stream; they end when it does, or when the client leaves.

    A stream begins with the first event, so that a request which is refused before it has its own status.
    """
    lasting = False
    try:
        await runs.begin()
        if not streamed:
            return JSONResponse(await unless_gone(http, reply.whole(runs)))
        if runs.count:
            await unless_gone(http, runs.ready())
        lasting = True
        return EventStream(reply.chunks(runs), runs)
    finally:
        if not lasting:
            runs.leave()


class EventStream(StreamingResponse):
    """A stream of JSON objects that ends in [DONE], or in an error. When it ends, however it does, the runs end."""

    def __init__(self, objects: AsyncIterator[dict[str, Any] | None], runs: Runs):
        super().__init__(_lines(objects), media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})
        self._runs = runs

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._runs.leave()


async def _lines(objects: AsyncIterator[dict[str, Any] | None]) -> AsyncIterator[str]:
    try:
        async for value in objects:
            yield ": still at work\n\n" if value is None else f"data: {json.dumps(value, ensure_ascii=False)}\n\n"
    except Exception as error:
        known = api_error_of(error)
        if known is None:
            log_fault(error)
        yield f"data: {json.dumps((known or own_fault()).to_json())}\n\n"
        return
    yield "data: [DONE]\n\n"
