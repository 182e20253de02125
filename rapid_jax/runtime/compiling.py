# SPDX-License-Identifier: Apache-2.0
"""Compiled programs: how long they take to make, and how many a process may keep."""

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import jax

_EVENTS = ("/jax/core/compile/jaxpr_to_mlir_module_duration", "/jax/core/compile/backend_compile_duration")
_MAPS = Path("/proc/self/maps")
_left = [0]  # mappings that were there after programs were last forgotten: forgetting them again at once gains nothing


@dataclass
class Timed:
    """Seconds of a piece of work; the two add up to what a clock on the wall shows."""

    working: float = 0.0
    compiling: float = 0.0


@contextmanager
def timed() -> Iterator[Timed]:
    """The seconds of what is done inside, once it is done."""
    found, heard, start = Timed(), _heard(), time.perf_counter()
    before = heard[0]
    try:
        yield found
    finally:
        wall = time.perf_counter() - start
        found.compiling = min(heard[0] - before, wall)
        found.working = wall - found.compiling


@cache
def _heard() -> list[float]:
    """The seconds that this process has compiled so far, kept up to date."""
    total = [0.0]

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event in _EVENTS:
            total[0] += duration_secs

    jax.monitoring.register_event_duration_secs_listener(listen)
    return total


def most_mappings() -> int:
    """Half of the memory mappings that Linux gives a process."""
    limit = Path("/proc/sys/vm/max_map_count")
    return int(limit.read_text()) // 2 if limit.is_file() else 32_765


def forget_programs(most: int | None = None) -> bool:
    """Forgets all compiled programs if the process has more than `most` memory mappings; whether it did.

    Every program keeps about ten for good, every new size of document brings some 440, and XLA crashes where Linux
    gives no more. What is needed again is compiled again, or read from the folder of compiled programs. To be called
    while no program runs.
    """
    if most is None:
        most = max(most_mappings(), 2 * _left[0])
    if not _MAPS.is_file() or _mappings() <= most:
        return False
    jax.clear_caches()
    gc.collect()
    _left[0] = _mappings()
    return True


def _mappings() -> int:
    return _MAPS.read_bytes().count(b"\n")
