# SPDX-License-Identifier: Apache-2.0
"""The engine's events of one HTTP request, on the event loop; whoever goes away takes the request back."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Coroutine, Sequence
from typing import Any, TypeVar

from fastapi import Request as HttpRequest
from starlette.requests import ClientDisconnect

from rapid_jax.engine.request import Done, Event, Failed, Piece, Request
from rapid_jax.serve.interface import Ticket
from rapid_jax.serve.metrics import Watch
from rapid_jax.serve.service import Service

T = TypeVar("T")


class Runs:
    """Requests under way, numbered from 0. `leave` takes back what has not ended; it may be called at any time."""

    def __init__(self, service: Service, requests: Sequence[Request]):
        self._service, self._requests = service, requests
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._watches = [Watch(service.metrics) for _ in requests]
        self._lock = threading.Lock()
        self._tickets: list[Ticket] = []
        self._left = False
        self._pushed_back: tuple[int, Event] | None = None

    @property
    def count(self) -> int:
        """How many requests they are."""
        return len(self._requests)

    async def begin(self) -> None:
        """Hands all of them to the engine; where it refuses one, none is left with it. Raises what `submit` raises."""
        try:
            await self._service.aside(self._submit)
        except BaseException:
            self.leave()
            raise

    def leave(self) -> None:
        """Nobody waits for the answers any more."""
        with self._lock:
            self._left = True
            tickets, self._tickets = self._tickets, []
        for ticket in tickets:
            ticket.cancel()
        for watch in self._watches[: len(tickets)]:
            watch.left()

    async def ready(self) -> None:
        """Returns once there is an event, or after a while. Raises the error of a first event that is one."""
        with contextlib.suppress(TimeoutError):
            first = await asyncio.wait_for(self._events.get(), self._service.settings.first_seconds)
            if isinstance(first[1], Failed):
                self._watches[first[0]].failed()
                raise first[1].error
            self._pushed_back = first

    async def events(self, pause: float | None = None) -> AsyncIterator[tuple[int, Event] | None]:
        """(number, event) until all have ended; None whenever `pause` seconds were silent.

        Raises the error of a request that failed.
        """
        open_ = len(self._requests)
        while open_:
            try:
                pushed, self._pushed_back = self._pushed_back, None
                number, event = pushed or await asyncio.wait_for(self._events.get(), pause)
            except TimeoutError:
                yield None
                continue
            match event:
                case Failed():
                    self._watches[number].failed()
                    raise event.error
                case Piece():
                    self._watches[number].tokens(len(event.token_ids))
                case Done():
                    self._watches[number].done(event.answer)
                    open_ -= 1
            yield number, event

    def _submit(self) -> None:
        for number, request in enumerate(self._requests):
            with self._lock:
                if self._left:
                    return

            def on_event(event: Event, number: int = number) -> None:
                with contextlib.suppress(RuntimeError):  # the loop has ended: nobody waits any more
                    self._loop.call_soon_threadsafe(self._events.put_nowait, (number, event))

            ticket = self._service.engine.submit(request, on_event)
            with self._lock:
                self._tickets.append(ticket)
                late = self._left
            if late:
                ticket.cancel()
                self._watches[number].left()


async def unless_gone(http: HttpRequest, work: Coroutine[Any, Any, T]) -> T:
    """The result of the work, which is cancelled when the client goes away. Raises ClientDisconnect then."""
    working, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(http))
    try:
        await asyncio.wait((working, gone), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        gone.cancel()
        if not working.done():
            working.cancel()
            await asyncio.wait((working,))


async def _gone(http: HttpRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass
