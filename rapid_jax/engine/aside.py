# SPDX-License-Identifier: Apache-2.0
"""Work beside the engine's thread that nobody waits for when the process is told to end at once."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def begun(work: Callable[[], T]) -> "Future[T]":
    """What the work comes to, in a thread of its own, which ends with it or with the process."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # whose it is asks for the result
            future.set_exception(error.with_traceback(None))  # which would keep all arrays of the work

    threading.Thread(target=run, name="aside", daemon=True).start()
    return future
