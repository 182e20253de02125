# SPDX-License-Identifier: Apache-2.0
"""A store that did not answer is left alone for a while: whoever can do without it does not wait for it.

A circuit breaker. It opens with the first failure, and is then open until a probe, in a thread of its own and behind
waits that double, has had an answer.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Final

from rapid_jax.runtime.errors import InputError, Unavailable

_FIRST_S: Final = 15.0  # before the first probe
_LONGEST_S: Final = 240.0
_log = logging.getLogger(__name__)


class Breaker:
    """Of what is asked of the store by the name of `place`; of any thread."""

    def __init__(self, place: str, probe: Callable[[], object], without: str):
        """`probe` asks the store for little, and raises Unavailable as all do; `without` says what is not done then."""
        self._place, self._probe, self._without = place, probe, without
        self._lock = threading.Lock()  # of what is below
        self._wait_s = 0.0  # 0: the store answers
        self._probe_at, self._is_probing = 0.0, False

    @property
    def is_open(self) -> bool:
        """Whether the store did not answer when it was last asked. Begins a probe if it is time for one."""
        with self._lock:
            if self._wait_s and not self._is_probing and time.monotonic() >= self._probe_at:
                self._is_probing = True
                threading.Thread(target=self._probe_aside, name="probe", daemon=True).start()
            return self._wait_s > 0

    @contextlib.contextmanager
    def asking(self) -> Iterator[None]:
        """While the store is asked for something: Unavailable, raised here or at once, opens the breaker."""
        if self.is_open:
            raise Unavailable(f"{self._place}: the store did not answer a moment ago")
        try:
            yield
        except Unavailable as error:
            self._failed(error)
            raise

    def _failed(self, error: Unavailable) -> None:
        with self._lock:
            if self._wait_s:  # another thread was first
                return
            self._wait_later(_FIRST_S)
        _log.warning("%s until the store answers again: %s", self._without, error)

    def _wait_later(self, seconds: float) -> None:
        self._wait_s, self._probe_at = seconds, time.monotonic() + seconds

    def _probe_aside(self) -> None:
        answers = True
        try:
            self._probe()
        except Unavailable:
            answers = False
        except (InputError, OSError):  # it answers, if not well: who asks next is told why
            pass
        with self._lock:
            self._is_probing = False
            self._wait_later(0.0 if answers else min(2 * self._wait_s, _LONGEST_S))
        if answers:
            _log.warning("%s: the store answers again", self._place)
