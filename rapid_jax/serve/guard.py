# SPDX-License-Identifier: Apache-2.0
"""Around every request: who may send it from a browser, how much it may be, and what becomes of errors."""

import asyncio
import logging
import time
import traceback
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rapid_jax.serve.errors import ApiError, api_error_of, own_fault
from rapid_jax.serve.service import Service

_log = logging.getLogger(__name__)
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
}
_TIMES = 20  # how many times as long as it may be silent a client may take for a whole body
_DISCARD_S = 5.0  # of a body that is too large, so that the client reads the answer and not a broken connection


class Guard:
    """ASGI middleware. Nothing that a request holds gets into the log, whatever goes wrong."""

    def __init__(self, app: ASGIApp, service: Service):
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False

        async def answer(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                MutableHeaders(scope=message).update(_HEADERS)
                if message["status"] >= 400:
                    self._service.metrics.refused(message["status"])
            await send(message)

        try:
            headers = Headers(scope=scope)
            _check_browser(headers, self._service)
            limited = Limited(receive, headers, *self._most(headers), self._service.settings.body_seconds)
            await self._app(scope, limited, answer)
        except ClientDisconnect:
            return
        except Exception as error:
            known = api_error_of(error)
            if known is None:
                log_fault(error)
            if not started:  # else the connection is closed within the answer: the client sees that it is not whole
                await (known or own_fault()).response()(scope, receive, answer)

    def _most(self, headers: Headers) -> tuple[int, str]:
        settings = self._service.settings
        if headers.get("content-type", "").lower().startswith("multipart/"):
            return (settings.upload_mib << 20) + (1 << 16), "upload"  # what is around the file
        return settings.body_mib << 20, "body"


class Limited:
    """What a client sends, up to so many bytes. Raises ApiError 413 beyond them and 408 when it falls silent."""

    def __init__(self, receive: Receive, headers: Headers, most: int, what: str, seconds: float):
        self._receive, self._most, self._what, self._seconds = receive, most, what, seconds
        length = headers.get("content-length", "")
        self._announced = int(length) if length.isascii() and length.isdigit() and len(length) < 20 else 0
        self._size, self._whole, self._end = 0, False, time.monotonic() + _TIMES * seconds

    async def __call__(self) -> Message:
        """The next part."""
        if self._whole:
            return await self._receive()
        if max(self._announced, self._size) > self._most:
            await self._refuse()
        message = await self._next()
        self._take(message)
        if self._size > self._most:
            await self._refuse()
        return message

    def _take(self, message: Message) -> None:
        self._size += len(message.get("body", b""))
        self._whole = message["type"] == "http.disconnect" or not message.get("more_body", False)

    async def _next(self) -> Message:
        try:
            left = min(self._seconds, self._end - time.monotonic())
            return await asyncio.wait_for(self._receive(), max(left, 0.0))
        except TimeoutError as error:
            message = f"expected the rest of the body within {self._seconds:g} s, and all of it in {_TIMES} times that"
            raise ApiError(408, message, code="timeout") from error

    async def _refuse(self) -> None:
        try:
            async with asyncio.timeout(_DISCARD_S):
                while not self._whole:
                    self._take(await self._receive())
        except TimeoutError:
            pass
        self._whole = True
        message = f"expected a {self._what} of at most {self._most >> 20} MiB, got more"
        raise ApiError(413, message, code=f"{self._what}_too_large")


def log_fault(error: BaseException) -> None:
    """Logs the kind of an error and where it arose: its words may hold what somebody asked or handed in."""
    places = "".join(traceback.format_tb(error.__traceback__))
    _log.error("%s in the server:\n%s", type(error).__name__, places.rstrip())


def _check_browser(headers: Headers, service: Service) -> None:
    """Raises ApiError 403 for what another site's page sends in a visitor's name.

    A page may send a form to any address, and a name of its own may lead to this machine.
    """
    host, origin = headers.get("host", ""), headers.get("origin")
    if origin is not None and origin.lower().partition("://")[2] != host.lower():
        raise ApiError(403, "expected a page of this server, got one of another origin", code="other_origin")
    if service.settings.local and not service.keys and _name(host) not in service.settings.names:
        message = "expected a name of this machine in Host; an API key or --allow-host NAME allows others"
        raise ApiError(403, message, code="other_host")


def _name(host: str) -> str:
    """The name in a Host header, without its port."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""
