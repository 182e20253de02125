# SPDX-License-Identifier: Apache-2.0
"""Work beside the engine's thread that nobody waits for when the process is told to end at once."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

T = TypeVar("T")
NAME = "aside"  # of such a thread


def begun(work: Callable[[], T]) -> "Future[T]":
    """What the work comes to, in a thread of its own, which ends with it or with the process."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # whose it is asks for the result
            future.set_exception(error.with_traceback(None))  # which would keep all arrays of the work

    threading.Thread(target=run, name=NAME, daemon=True).start()
    return future


def seconds_until(until: float | None) -> float | None:
    """From now to that `time.monotonic()`, at least 0; None has no end."""
    return None if until is None else max(until - time.monotonic(), 0.0)


def done_by(until: float | None, work: Callable[[], object]) -> bool:
    """Whether the work has ended by then; else it goes on, or was not begun. Without an end it is done here."""
    if until is None:
        work()
        return True
    if time.monotonic() >= until:
        return False
    future = begun(work)
    wait([future], seconds_until(until))
    if future.done():
        future.result()
    return future.done() and time.monotonic() < until
