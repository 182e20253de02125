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
_left = [0]  # mappings that are there for good: forgetting at once what brings them gains nothing
_looked = [-1.0]  # seconds that had been compiled when mappings were last counted, which takes milliseconds


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
    """Half of the memory mappings that Linux gives a process; up to 9 of 10 where many are there for good."""
    limit = Path("/proc/sys/vm/max_map_count")
    given = int(limit.read_text()) if limit.is_file() else 65_530
    return min(max(given // 2, 2 * _left[0]), given * 9 // 10)


def keep_programs() -> None:
    """What has been compiled by now is there for good: others are forgotten only where there are twice as many."""
    if _MAPS.is_file():
        _left[0] = _mappings()


def forget_programs(most: int | None = None) -> bool:
    """Forgets all compiled programs if the process has more than `most` memory mappings; whether it did. Without
    `most`, `most_mappings`, and nothing is looked at before another program has been compiled.

    Every program keeps about ten for good, every new size of document brings some 440, and XLA crashes where Linux
    gives no more. What is needed again is compiled again, or read from the folder of compiled programs. To be called
    while no program runs.
    """
    if most is None:
        if _heard()[0] == _looked[0]:
            return False
        most, _looked[0] = most_mappings(), _heard()[0]
    if not _MAPS.is_file() or _mappings() <= most:
        return False
    jax.clear_caches()
    gc.collect()
    _left[0] = _mappings()
    return True


def _mappings() -> int:
    return _MAPS.read_bytes().count(b"\n")
