# SPDX-License-Identifier: Apache-2.0
"""How long it takes to store what was prefilled: by what was stored before, or as assumed before anything was."""

import time
from collections.abc import Callable, Sequence
from typing import Final

_ASSUMED: Final = 2.5e8  # bytes a second: a disk on a network
_EACH_S: Final = 0.5  # of an entry besides its bytes


class SavingRate:
    """Bytes and seconds of what was stored. One thread at a time stores; any reckons."""

    def __init__(self):
        self._bytes, self._seconds = 0, 0.0

    def timed(self, size: int, work: Callable[[], None]) -> None:
        """Does the work, which stores so many bytes, and counts it."""
        start = time.perf_counter()
        work()
        self._bytes, self._seconds = self._bytes + size, self._seconds + time.perf_counter() - start

    def seconds(self, sizes: Sequence[int]) -> float:
        """That storing entries of these bytes is reckoned to take; half as much again, for disks are not even."""
        rate = self._bytes / self._seconds if self._bytes and self._seconds else _ASSUMED
        return 1.5 * (_EACH_S * len(sizes) + sum(sizes) / rate)
