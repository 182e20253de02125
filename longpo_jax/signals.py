# SPDX-License-Identifier: Apache-2.0
"""A run that is told to end: by preemption (SIGTERM) or by Ctrl-C (SIGINT)."""

import signal
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from rapid_jax.runtime.distributed import INTERRUPTED, LOST_PEER


class Signals:
    """Notes SIGTERM and SIGINT while it is entered. All processes of a run agree on what was noted."""

    def __init__(self):
        self._noted: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: object) -> None:
        if self._noted == number == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C does not wait
        self._noted = number

    def agreed(self) -> int | None:
        """The exit status that one of the processes was asked for; None to go on."""
        noted = self._noted or 0
        if jax.process_count() > 1:
            noted = int(np.max(multihost_utils.process_allgather(np.int32(noted))))
        return {0: None, signal.SIGINT: INTERRUPTED}.get(noted, LOST_PEER)
