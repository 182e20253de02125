# SPDX-License-Identifier: Apache-2.0
"""What requests will need, compiled before the first of them comes."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from rapid_jax.engine.engine import Engine
from rapid_jax.engine.request import Event, Failed, Piece, Question, Request
from rapid_jax.runtime.errors import InputError

_WORDS = "The harbour of the old town lies open to the north, and its boats leave before the light comes. "


@dataclass(frozen=True)
class WarmUp:
    """Sizes of requests that compile nothing once the engine is ready."""

    lengths: tuple[int, ...] = (1024,)  # tokens of documents; one stands for all of its bucket
    rows: int = 1  # questions about a document at once
    temperatures: tuple[float, ...] = (0.0, 1.0)

    def __post_init__(self):
        if not all(length >= 16 for length in self.lengths):
            raise InputError(f"lengths to warm up for: expected at least 16 tokens, got {min(self.lengths)}")
        if not 1 <= self.rows <= 16:
            raise InputError(f"rows to warm up for: expected 1 to 16, got {self.rows}")


def warm_up(engine: Engine, what: WarmUp, report: Callable[[str], None]) -> None:
    """Loads the models and runs requests of these sizes, under the engine's own settings, a few rounds each.

    Raises InputError for models or sizes that cannot be.
    """
    engine.models.load(engine.config.speculation)
    for length in what.lengths:
        document = _document(engine, length)
        for temperature in what.temperatures:
            start = time.perf_counter()
            for rows in {1, what.rows}:
                _ask(engine, document, temperature, rows)
            took = time.perf_counter() - start
            report(
                f"documents of {length} tokens, up to {what.rows} questions, temperature {temperature:g}: {took:.1f} s"
            )


def _document(engine: Engine, length: int) -> str:
    """About so many tokens."""
    each = engine.models.target.tokenizer.counts([_WORDS])[0]
    return _WORDS * max(length // each, 1)


def _ask(engine: Engine, document: str, temperature: float, rows: int) -> None:
    """So many questions, told of until each has begun; then they are taken back one by one."""
    sampling = replace(engine.config.sampling, temperature=temperature)
    begun: set[int] = set()
    failed: list[Exception] = []

    def hear(row: int, event: Event) -> None:
        if isinstance(event, Piece):
            begun.add(row)
        elif isinstance(event, Failed) and isinstance(event.error, InputError):
            failed.append(event.error)

    request = Request.of(Question(document, "When do the boats leave?"), replace(engine.config, sampling=sampling))
    tickets = [engine.submit(request, lambda event, row=row: hear(row, event)) for row in range(rows)]
    while not all(ticket.job.ended for ticket in tickets) and len(begun) < rows:
        engine.step()
    for ticket in tickets:
        ticket.cancel()
        engine.run([ticket])
    if failed:
        raise failed[0]
