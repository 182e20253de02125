# SPDX-License-Identifier: Apache-2.0
"""Which programs are compiled while a test does something."""

from collections.abc import Iterator
from contextlib import contextmanager

import jax

_EVENT = "/jax/core/compile/backend_compile_duration"


@contextmanager
def compiled() -> Iterator[list[str]]:
    """The names of the programs that are compiled inside, or read from the folder of compiled ones."""
    found: list[str] = []

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == _EVENT:
            found.append(str(kwargs.get("fun_name", event)))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
