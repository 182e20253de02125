# SPDX-License-Identifier: Apache-2.0
"""Requests that are prepared side by side, of which one alone has the turn."""

from types import SimpleNamespace
from typing import Any

import pytest

from rapid_jax.engine.request import Cancelled
from rapid_jax.engine.turns import Turns

TURN, SHORT = True, False


class Prepared:
    """Requests that do as they are told, and what became of them."""

    def __init__(self, seconds: float = 60.0):
        self.log: list[str] = []
        self.queue = Turns(
            lambda job, prepared: self.log.append(f"{job.name} {prepared}"),
            lambda job, error: self.log.append(f"{job.name} {type(error).__name__}"),
            seconds,
        )

    def add(self, name: str, *pieces: bool | Exception) -> Any:
        """One that yields these, and then is ready."""
        job: Any = SimpleNamespace(name=name, cancelled=SimpleNamespace(is_set=lambda: False))

        def steps():
            for piece in pieces:
                if isinstance(piece, Exception):
                    raise piece
                yield piece
                self.log.append(name)
            return "ready"

        self.queue.add(job, steps())  # type: ignore[arg-type]
        return job

    def advance(self, times: int = 1) -> list[str]:
        for _ in range(times):
            self.queue.advance()
        found, self.log[:] = list(self.log), []
        return found


@pytest.fixture
def prepared() -> Prepared:
    return Prepared()


def test_one_that_needs_no_turn_passes_the_one_that_has_it(prepared):
    prepared.add("long", TURN, SHORT, SHORT)
    assert prepared.advance() == ["long"]
    prepared.add("short", SHORT)
    assert prepared.advance() == ["long"]
    assert prepared.advance() == ["short", "short ready", "long", "long ready"] and not prepared.queue


def test_whoever_has_the_turn_keeps_it_to_the_end(prepared):
    prepared.add("first", SHORT, SHORT, TURN, SHORT)
    prepared.add("second", TURN, SHORT, SHORT, SHORT)  # as while it waits for room
    found = prepared.advance(20)
    assert found == [
        "second",
        "first",
        "second",
        "first",
        "second",
        "second",
        "second ready",
        "first",
        "first",
        "first ready",
    ]


def test_those_that_need_the_turn_get_it_as_they_came(prepared):
    for name in "abc":
        prepared.add(name, TURN, SHORT)
    assert prepared.advance(20) == ["a", "a", "a ready", "b", "b", "b ready", "c", "c", "c ready"]


def test_an_error_is_one_request_s_alone(prepared):
    prepared.add("wrong", SHORT, ValueError("no"))
    prepared.add("turned", TURN, ValueError("no"))
    prepared.add("right", TURN)
    assert prepared.advance(4) == ["turned", "turned ValueError", "wrong", "wrong ValueError", "right", "right ready"]
    assert not prepared.queue


def test_one_that_is_taken_back_goes_though_another_has_the_turn(prepared):
    prepared.add("has", TURN, SHORT)
    gone = prepared.add("gone", TURN, SHORT)
    assert prepared.advance() == ["has"]
    gone.cancelled = SimpleNamespace(is_set=lambda: True)
    assert prepared.advance() == ["has", "has ready", f"gone {Cancelled.__name__}"]


def test_rounds_do_not_wait_for_all_of_them():
    prepared = Prepared(seconds=0.0)
    for name in "abc":
        prepared.add(name)
    assert [prepared.advance() for _ in range(3)] == [["a ready"], ["b ready"], ["c ready"]]
