# SPDX-License-Identifier: Apache-2.0
"""What all requests share: the engine, its defaults, who may ask, and whether the server is ready."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, ParamSpec, TypeVar

from rapid_jax.config import RapidConfig
from rapid_jax.serve.errors import ApiError, draining
from rapid_jax.serve.interface import Engine
from rapid_jax.serve.keys import Keys
from rapid_jax.serve.metrics import Metrics
from rapid_jax.serve.settings import ServeSettings
from rapid_jax.serve.tokens import TokenTexts

P = ParamSpec("P")
R = TypeVar("R")
Phase = Literal["starting", "ready", "draining", "failed"]
_THREADS = 4


class Service:
    """One server. `phase` is set by whoever starts and ends it; what a request says is checked against it."""

    def __init__(
        self,
        engine: Engine,
        defaults: RapidConfig,
        settings: ServeSettings | None = None,
        keys: Keys | None = None,
    ):
        self.engine, self.defaults = engine, defaults
        self.settings, self.keys = settings or ServeSettings(), keys or Keys()
        self.metrics = Metrics(engine)
        self.texts = TokenTexts(engine.models.target.tokenizer)
        self._phase: Phase = "starting"
        self.uploads = asyncio.Semaphore(self.settings.upload_files)
        # Not the event loop's own threads: what waits there must not keep a short task waiting.
        self._threads = ThreadPoolExecutor(_THREADS, "rapid-serve")

    @property
    def phase(self) -> Phase:
        """How far the server is."""
        return "failed" if self.engine.has_failed else self._phase

    @phase.setter
    def phase(self, phase: Phase) -> None:
        self._phase = phase

    async def aside(self, work: Callable[P, R], *args: P.args, **named: P.kwargs) -> R:
        """The result of work that takes more than a moment, done in another thread."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, lambda: work(*args, **named))

    def owner(self, authorization: str | None) -> str:
        """Whose a request is. Raises ApiError 401."""
        owner = self.keys.owner_of(authorization)
        if owner is None:
            given = "another one" if authorization else "none"
            raise ApiError(401, f"expected Authorization: Bearer with an API key, got {given}", code="invalid_api_key")
        return owner

    def check_taking(self) -> None:
        """Raises ApiError 503 while nothing new is taken."""
        if self.phase == "draining":
            raise draining()
        if self.phase == "starting":
            raise ApiError(503, "the server is not ready yet: see /ready", code="not_ready", retry_after=5)
        if self.phase == "failed":
            raise ApiError(503, "the engine has failed; the server's log says why", code="failed")

    def check_model(self, name: str) -> None:
        """Raises ApiError 404 for a model that is not here."""
        if name != (known := self.engine.models.name):
            message = f"there is no model {name[:100]!r}, expected {known!r}"
            raise ApiError(404, message, code="model_not_found", param="model")

    def close(self) -> None:
        """Ends the threads."""
        self._threads.shutdown(wait=False, cancel_futures=True)
