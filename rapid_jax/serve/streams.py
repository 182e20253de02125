# SPDX-License-Identifier: Apache-2.0
"""Answers as server-sent events, the way OpenAI sends them."""

import json
from collections.abc import AsyncIterator
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from rapid_jax.serve.errors import api_error_of, own_fault
from rapid_jax.serve.guard import log_fault
from rapid_jax.serve.runs import Runs

PAUSE = 15.0  # seconds of silence after which a comment is sent: whatever stands between keeps the connection open


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
