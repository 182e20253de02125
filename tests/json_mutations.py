# SPDX-License-Identifier: Apache-2.0
"""JSON as damage or an attacker leaves it: every value replaced by others, keys taken away; and what may come of it."""

import copy
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rapid_jax.runtime.errors import InputError

Key = str | int
VALUES: tuple[Any, ...] = (
    *(None, True, False, "", "x", "4096", "1e6", "false", "\ud800\n\x1b[2J"),
    *([], [None], ["x"], [2], {}, {"x": {"y": 1}}),
    *(0, 1, -1, -5, 0.5, -0.5, 2.0, 1e300, -1e300, 10**30, 4_000_000_000, 2**31, 2**63, float("nan"), float("inf")),
)
SECONDS = 10  # a case takes milliseconds; this is a hang


def places(value: Any) -> Iterator[tuple[Key, ...]]:
    """The way to every value inside an object or list, outer ones first."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (key,)
        yield from ((key, *rest) for rest in places(inner))


def replaced(value: Any, place: tuple[Key, ...], new: Any) -> Any:
    """A copy with another value at the place."""
    value = copy.deepcopy(value)
    holder = value
    for key in place[:-1]:
        holder = holder[key]
    holder[place[-1]] = new
    return value


def without(value: Any, place: tuple[Key, ...]) -> Any:
    """A copy without what is at the place."""
    value = copy.deepcopy(value)
    holder = value
    for key in place[:-1]:
        holder = holder[key]
    del holder[place[-1]]
    return value


def mutations(value: Any) -> Iterator[tuple[str, Any]]:
    """(what was done, the result): every place without its value, and with each of VALUES in its place."""
    for place in places(value):
        yield f"no {place}", without(value, place)
        for new in VALUES:
            yield f"{place} = {new!r}", replaced(value, place, new)


@contextmanager
def no_hang() -> Iterator[None]:
    """Fails what takes longer than `SECONDS`."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"took longer than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def amiss(what: str, run: Callable[[], Any]) -> str:
    """Nothing where `run` is done or raises an InputError of one printable line; else what else it did."""
    try:
        with no_hang():
            run()
    except InputError as error:
        return "" if str(error).isprintable() and len(str(error)) < 1000 else f"{what}: {error!r}"
    except Exception as error:
        return f"{what}: {type(error).__name__}: {error}"
    return ""
