# SPDX-License-Identifier: Apache-2.0
"""Requests that are being prepared, a piece of the work at a time."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from rapid_jax.engine.job import Job
from rapid_jax.engine.prepare import Prepared, Steps
from rapid_jax.engine.request import Cancelled

_TURN_S = 0.02  # after which rounds go on although more could be prepared: about what some rounds take


@dataclass(eq=False)
class _Begun:
    job: Job
    steps: Steps[Prepared]
    reads: bool = False  # the next piece has a device read a chunk of a prompt


class Turns:
    """Requests whose prompts are made and read. Many are prepared side by side, but one alone reads a prompt, until
    all of it is read: the others may be about the same document.
    """

    def __init__(self, ready: Callable[[Job, Prepared], None], fail: Callable[[Job, Exception], None]):
        """`ready` and `fail` are told how each request's work ends."""
        self._ready, self._fail = ready, fail
        self._begun: list[_Begun] = []
        self._reader: _Begun | None = None

    def __len__(self) -> int:
        return len(self._begun)

    @property
    def jobs(self) -> list[Job]:
        """The requests."""
        return [each.job for each in self._begun]

    def add(self, job: Job, steps: Steps[Prepared]) -> None:
        """One more, behind the others."""
        self._begun.append(_Begun(job, steps))

    def advance(self) -> None:
        """A piece of the work for each while a short time lasts, then a chunk of the prompt that is being read."""
        until = time.perf_counter() + _TURN_S
        for each in [each for each in self._begun if not each.reads]:
            self._turn(each)
            if time.perf_counter() > until:
                break
        if self._reader not in self._begun or not self._reader.reads:  # one that waits for room does not keep others
            self._reader = next((each for each in self._begun if each.reads), None)
        for each in [each for each in self._begun if each is self._reader or each.job.cancelled.is_set()]:
            self._turn(each)

    def _turn(self, each: _Begun) -> None:
        try:
            if each.job.cancelled.is_set():
                each.steps.close()
                raise Cancelled
            each.reads = next(each.steps)
            return
        except StopIteration as done:
            self._ready(each.job, done.value)
        except Exception as error:  # of this request alone: the engine goes on
            self._fail(each.job, error)
        self._begun.remove(each)
