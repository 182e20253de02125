# SPDX-License-Identifier: Apache-2.0
"""Requests that are being prepared, a piece of the work at a time."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from rapid_jax.engine.job import Job
from rapid_jax.engine.lane import Prepared
from rapid_jax.engine.prefilling import Steps
from rapid_jax.engine.request import Cancelled


@dataclass(eq=False)
class _Begun:
    job: Job
    steps: Steps[Prepared]
    needs_turn: bool = False


class Turns:
    """Requests whose prompts are made and read. Many are prepared side by side, but only the first of those that need
    the turn goes on, until it is ready: the others may be about the same document, or want the same room.
    """

    def __init__(
        self,
        ready: Callable[[Job, Prepared], None],
        fail: Callable[[Job, Exception], None],
        seconds: float = float("inf"),
    ):
        """`ready` and `fail` are told how each request's work ends. After so many `seconds` of short pieces rounds go
        on; without a limit the order of all work follows from the requests alone.
        """
        self._ready, self._fail, self._seconds = ready, fail, seconds
        self._begun: list[_Begun] = []
        self._in_turn: _Begun | None = None

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
        """A piece of the work for each that needs no turn, while the time lasts, and for the one in turn."""
        until = time.perf_counter() + self._seconds
        for each in [each for each in self._begun if not each.needs_turn]:
            self._go_on(each)
            if time.perf_counter() > until:
                break
        if self._in_turn not in self._begun:
            self._in_turn = next((each for each in self._begun if each.needs_turn), None)
        for each in [each for each in self._begun if each is self._in_turn or each.job.cancelled.is_set()]:
            self._go_on(each)

    def _go_on(self, each: _Begun) -> None:
        try:
            if each.job.cancelled.is_set():
                each.steps.close()
                raise Cancelled
            each.needs_turn |= next(each.steps)
            return
        except StopIteration as done:
            self._ready(each.job, done.value)
        except Exception as error:  # of this request alone: the engine goes on
            self._fail(each.job, error)
        self._begun.remove(each)
