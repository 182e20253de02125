# SPDX-License-Identifier: Apache-2.0
"""A server on a free port, in a thread, over the small engine."""

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import openai
import pytest

from rapid_jax.config import RapidConfig
from rapid_jax.serve.keys import Keys
from rapid_jax.serve.server import Server, get_ready, listen
from rapid_jax.serve.service import Service
from rapid_jax.serve.settings import ServeSettings
from tests.serve.engine import Engine

KEYS = ("first-key-0123456789", "second-key-0123456789")


@dataclass
class Running:
    """A server that answers."""

    engine: Engine
    service: Service
    server: Server
    url: str
    thread: threading.Thread
    said: list[str]

    def http(self, key: str | None = None, **more: Any) -> httpx.Client:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return httpx.Client(base_url=self.url, headers=headers, timeout=20, **more)

    def openai(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=20)


@contextlib.contextmanager
def running(
    engine: Any = None,
    keys: tuple[str, ...] = (),
    *,
    ready: bool = True,
    config: RapidConfig | None = None,
    **settings: Any,
) -> Iterator[Running]:
    """A server over the engine, on a free port."""
    engine, said = engine or Engine(), []
    service = Service(engine, config or RapidConfig(), ServeSettings(port=0, **settings), Keys(keys))
    server, listening = Server(service, said.append), listen(service)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    if ready:
        get_ready(service, said.append)
    found = Running(engine, service, server, f"http://127.0.0.1:{listening.getsockname()[1]}", thread, said)
    try:
        yield found
    finally:
        server.should_exit = True
        thread.join(10)
        listening.close()
        engine.stop()
        service.close()
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def served() -> Iterator[Running]:
    """A server without keys that a module's tests share."""
    with running() as found:
        yield found


@pytest.fixture(scope="module")
def locked() -> Iterator[Running]:
    """A server with two keys that a module's tests share."""
    with running(keys=KEYS) as found:
        yield found


@pytest.fixture
def client(served: Running) -> Iterator[openai.OpenAI]:
    with served.openai() as found:
        yield found
