# SPDX-License-Identifier: Apache-2.0
"""What the server needs of an engine, as types: the server's tests put a small engine of their own behind it."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Protocol

from rapid_jax.engine.request import OnEvent, Request, TokenLogprobs
from rapid_jax.model.tokenizer import Tokenizer


class Ticket(Protocol):
    """A request that the engine has taken."""

    @property
    def id(self) -> str:
        """Names the request."""
        ...

    def cancel(self) -> None:
        """Takes the request back; nothing happens where it has ended."""


class DocumentInfo(Protocol):
    """What is known about a document, its text apart."""

    @property
    def id(self) -> str:
        """Names the document."""
        ...

    @property
    def name(self) -> str:
        """What its owner calls it."""
        ...

    @property
    def bytes(self) -> int:
        """Size of the text in UTF-8."""
        ...

    @property
    def characters(self) -> int:
        """Size of the text; offsets of citations are below it."""
        ...

    @property
    def tokens(self) -> int | None:
        """Size of the text for the target."""
        ...

    @property
    def state(self) -> str:
        """uploaded, chunked, prefilled, on host, on disk."""
        ...

    @property
    def pinned(self) -> bool:
        """Whether it stays whatever else needs the room."""
        ...

    @property
    def public(self) -> bool:
        """Whether every key may read it."""
        ...

    @property
    def created(self) -> float:
        """When it was handed in, in seconds since 1970."""
        ...

    @property
    def expires(self) -> float | None:
        """When it goes by itself, in seconds since 1970."""
        ...


class Documents(Protocol):
    """Texts by id; another owner's are unknown."""

    def add(
        self,
        text: str,
        *,
        owner: str = "",
        name: str = "",
        public: bool = False,
        pinned: bool = False,
        expires_in: float | None = None,
    ) -> DocumentInfo:
        """Keeps a text; the same text has the same id."""
        ...

    def get(self, id: str, *, owner: str = "") -> str:
        """The text. Raises UnknownDocument."""
        ...

    def info(self, id: str, *, owner: str = "") -> DocumentInfo:
        """What is known about it. Raises UnknownDocument."""
        ...

    def all(self, *, owner: str = "") -> Sequence[DocumentInfo]:
        """The owner's documents."""
        ...

    def remove(self, id: str, *, owner: str = "") -> None:
        """Forgets it. Raises UnknownDocument."""

    def pin(self, id: str, pinned: bool, *, owner: str = "") -> DocumentInfo:
        """Pins it, or lets it go again. Raises UnknownDocument."""
        ...


class ModelShape(Protocol):
    """Sizes of a model that bound a request."""

    @property
    def context_size(self) -> int:
        """Most tokens of prompt and answer."""
        ...

    @property
    def vocab_size(self) -> int:
        """Token ids are below it."""
        ...


class Target(Protocol):
    """The long-context model."""

    @property
    def tokenizer(self) -> Tokenizer:
        """Text to ids and back."""
        ...

    @property
    def config(self) -> ModelShape:
        """Its sizes."""
        ...


class Models(Protocol):
    """What is loaded."""

    @property
    def target(self) -> Target:
        """The long-context model."""
        ...

    @property
    def name(self) -> str:
        """What requests call it."""
        ...


class EngineStats(Protocol):
    """Counts since the start, and how things are now."""

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        ...

    @property
    def running(self) -> int:
        """Requests in rows."""
        ...

    @property
    def kv_bytes(self) -> Mapping[str, int]:
        """Bytes of keys and values in each tier."""
        ...

    @property
    def drafted(self) -> int:
        """Tokens proposed to the target."""
        ...

    @property
    def accepted(self) -> int:
        """Proposed tokens that the target took."""
        ...

    @property
    def rounds(self) -> int:
        """Forward passes of the target, summed over rows."""
        ...

    @property
    def tokens(self) -> int:
        """Tokens generated."""
        ...


class Engine(Protocol):
    """Runs requests side by side in a thread of its own."""

    @property
    def models(self) -> Models:
        """What is loaded."""
        ...

    @property
    def documents(self) -> Documents:
        """Texts by id."""
        ...

    def submit(self, request: Request, on_event: OnEvent) -> Ticket:
        """Takes a request. Raises InputError, TooLarge, QueueFull, Draining."""
        ...

    def score(self, ids: Sequence[int], top: int) -> "Future[list[TokenLogprobs | None]]":
        """Log-probabilities of the tokens of a prompt, None for the first."""
        ...

    def start(self) -> None:
        """Starts the thread."""

    @property
    def has_failed(self) -> bool:
        """Whether the thread has ended without being told to."""
        ...

    def drain(self, seconds: float, report: Callable[[str], None]) -> bool:
        """Takes nothing new, waits for what runs and stores what was read of documents; True if all that ran ended.
        `report` is told how the seconds are divided."""
        ...

    def stop(self) -> None:
        """Ends the thread."""

    def warm_up(self, report: Callable[[str], None]) -> None:
        """Compiles what requests will need."""

    def stats(self) -> EngineStats:
        """How things are."""
        ...
