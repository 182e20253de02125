# SPDX-License-Identifier: Apache-2.0
"""The process: uvicorn around the app, getting ready while it listens, and an end that loses nothing it can keep."""

import contextlib
import signal
import socket
import threading
import time
from collections.abc import Callable
from types import FrameType

import uvicorn

from rapid_jax.runtime.errors import InputError
from rapid_jax.serve.app import create_app
from rapid_jax.serve.guard import log_fault
from rapid_jax.serve.service import Service

WARM_UP = "warm-up"  # the thread that compiles before the first request
_GRACE_S = 3  # for answers to be sent and connections to close once the engine has ended
Say = Callable[[str], None]


class Server(uvicorn.Server):
    """Ends on SIGTERM and SIGINT by draining: what runs goes on, new requests get 503. A second signal ends at once."""

    def __init__(self, service: Service, say: Say):
        settings = service.settings
        super().__init__(
            uvicorn.Config(
                create_app(service),
                host=settings.host,
                port=settings.port,
                workers=1,
                http="h11",
                access_log=False,  # addresses and ids of documents are nobody else's business
                log_config=None,
                log_level="warning",
                server_header=False,
                lifespan="off",
                ws="none",
                timeout_graceful_shutdown=_GRACE_S,
                h11_max_incomplete_event_size=1 << 16,
            )
        )
        self._service, self._say = service, say
        self._draining: threading.Thread | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begins to drain, or, when it was told before, ends."""
        del frame
        if self._draining is not None or self._service.phase == "failed":
            self.should_exit = self.force_exit = True
            return
        self._service.phase = "draining"
        # A signal may come at any place of the main thread, which may hold a lock there.
        self._draining = threading.Thread(target=self._drain, args=(signal.Signals(sig).name,), daemon=True)
        self._draining.start()

    def get_ready(self) -> None:
        """`get_ready`, and the end where that fails."""
        get_ready(self._service, self._say)
        if self._service.phase == "failed":
            self.should_exit = True

    def _drain(self, why: str) -> None:
        seconds = self._service.settings.drain_seconds
        self._say(f"{why}: no new requests")
        try:
            ended = self._service.engine.drain(seconds, self._say)
            self._say("all requests have ended" if ended else "out of time: requests that still ran are lost")
        except Exception as error:
            log_fault(error)
        self.should_exit = True


def serve(service: Service, say: Say) -> int:
    """Serves until a signal ends it; the exit status. Raises InputError where the address cannot be listened on."""
    server = Server(service, say)
    listening = listen(service)
    try:
        host, port = listening.getsockname()[:2]
        say(f"listening on http://{f'[{host}]' if ':' in host else host}:{port}")
        threading.Thread(target=server.get_ready, name=WARM_UP, daemon=True).start()
        server.run(sockets=[listening])
    finally:
        listening.close()
        service.engine.stop()
        service.close()
    return 1 if service.phase == "failed" else 0


def get_ready(service: Service, say: Say) -> None:
    """Compiles what requests need and starts the engine; says what, and when it is done, or why it is not."""
    start = time.monotonic()
    try:
        service.engine.warm_up(say)
        service.engine.start()
    except Exception as error:
        if service.phase == "draining":  # the process ends beneath it
            return
        service.phase = "failed"
        say(f"not ready: {error}" if isinstance(error, InputError) else "not ready: an error of its own")
        if not isinstance(error, InputError):
            log_fault(error)
        return
    if service.phase == "starting":
        service.phase = "ready"
        say(f"ready after {time.monotonic() - start:.1f} s")


def listen(service: Service) -> socket.socket:
    """A socket that listens at the address. Raises InputError where that is not possible."""
    host, port = service.settings.host, service.settings.port
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise InputError(f"host {host}: cannot be listened on: {error}") from error
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        found.listen(2048)
    except OSError as error:
        with contextlib.suppress(OSError):
            found.close()
        raise InputError(f"{host}:{port}: cannot be listened on: {error.strerror}") from error
    return found
