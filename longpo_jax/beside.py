# SPDX-License-Identifier: Apache-2.0
"""Work in a thread beside other work."""

import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager


@contextmanager
def beside(steps: Iterable[object]) -> Iterator[None]:
    """Takes the steps in a thread while the body runs. The one under way at the body's end is waited for; those behind
    it are not begun. Raises what the body raises, else what a step raised.
    """
    ended = threading.Event()

    def take() -> None:
        for _ in steps:
            if ended.is_set():
                return

    with ThreadPoolExecutor(1, "beside") as thread:
        taken = thread.submit(take)
        try:
            yield
        finally:
            ended.set()
    taken.result()
