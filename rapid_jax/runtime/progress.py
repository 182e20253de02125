# SPDX-License-Identifier: Apache-2.0
"""Progress of long work: a bar with rate and time left on a terminal, plain lines in a log."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from tqdm import tqdm


class Progress(Protocol):
    """What long work reports to."""

    def advance(self, units: int) -> None:
        """Says that `units` more units are done."""
        ...


class _Bar:
    def __init__(self, bar: tqdm):
        self._bar = bar

    def advance(self, units: int) -> None:
        self._bar.update(units)


class _Lines:
    """One line at most every `interval_s` seconds; nothing for work that ends before the first."""

    def __init__(self, label: str, total: int | None, unit: str, interval_s: float):
        self._label, self._total, self._unit, self._interval_s = label, total, unit, interval_s
        self._done = 0
        self._start = self._last = time.monotonic()

    def advance(self, units: int) -> None:
        self._done += units
        now = time.monotonic()
        if self._done == 0 or now - self._last < self._interval_s:
            return
        self._last = now
        rate = self._done / max(now - self._start, 1e-9)
        of, left = "", ""
        if self._total is not None:
            of, left = f"/{self._total}", f", {max(self._total - self._done, 0) / rate:.0f} s left"
        text = f"{self._label}: {self._done}{of} {self._unit}, {rate:.1f} {self._unit}/s{left}"
        print(text, file=sys.stderr, flush=True)


class _Silent:
    def advance(self, units: int) -> None:
        pass


@contextmanager
def progress(
    label: str, total: int | None, unit: str, *, quiet: bool = False, interval_s: float = 10.0
) -> Iterator[Progress]:
    """Reports to stderr how much of `total` units is done, at what rate, and how long the rest will take.

    `total` None: not known beforehand, nor how long it will take.
    """
    if quiet:
        yield _Silent()
    elif sys.stderr.isatty():
        with tqdm(total=total, desc=label, unit=f" {unit}", leave=False, dynamic_ncols=True) as bar:
            yield _Bar(bar)
    else:
        yield _Lines(label, total, unit, interval_s)
