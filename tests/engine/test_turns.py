# SPDX-License-Identifier: Apache-2.0
"""Requests that are prepared side by side, of which one alone reads a prompt."""

from types import SimpleNamespace
from typing import Any

import pytest

from rapid_jax.engine import turns
from rapid_jax.engine.request import Cancelled
from rapid_jax.engine.turns import Turns

READS, SHORT = True, False


class Prepared:
    """A queue of requests that do as they are told, and what became of them."""

    def __init__(self):
        self.log: list[str] = []
        self.queue = Turns(
            lambda job, prepared: self.log.append(f"{job.name} {prepared}"),
            lambda job, error: self.log.append(f"{job.name} {type(error).__name__}"),
        )

    def add(self, name: str, *pieces: bool | Exception) -> Any:
        """One that yields these, and then is ready."""
        job: Any = SimpleNamespace(name=name, cancelled=SimpleNamespace(is_set=lambda: False))

        def steps():
            for piece in pieces:
                if isinstance(piece, Exception):
                    raise piece
                yield piece
                if piece is READS:
                    self.log.append(f"{name} reads")
            return "ready"

        self.queue.add(job, steps())  # type: ignore[arg-type]
        return job

    def advance(self, times: int = 1) -> list[str]:
        for _ in range(times):
            self.queue.advance()
        found, self.log[:] = list(self.log), []
        return found


@pytest.fixture
def prepared(monkeypatch) -> Prepared:
    monkeypatch.setattr(turns, "_TURN_S", 60.0)
    return Prepared()


def test_one_that_has_nothing_to_read_passes_those_that_read(prepared):
    prepared.add("long", READS, READS, READS)
    assert prepared.advance() == ["long reads"]
    prepared.add("short")
    assert prepared.advance() == ["short ready", "long reads"]
    assert prepared.advance(2) == ["long reads", "long ready"] and not prepared.queue


def test_whoever_reads_does_so_to_the_end(prepared):
    prepared.add("first", SHORT, SHORT, READS, READS)
    prepared.add("second", READS, READS, READS)
    # The first one comes to its prompt while the second reads.
    expected = ["second reads"] * 3 + ["second ready"] + ["first reads"] * 2 + ["first ready"]
    assert prepared.advance(20) == expected


def test_one_that_waits_for_room_lets_others_read(prepared):
    prepared.add("waits", READS, SHORT, SHORT, SHORT, READS)
    prepared.add("reads", READS, READS)
    assert prepared.advance(20) == [
        "waits reads",
        "reads reads",
        "reads reads",
        "reads ready",
        "waits reads",
        "waits ready",
    ]


def test_an_error_is_one_request_s_alone(prepared):
    prepared.add("wrong", SHORT, ValueError("no"))
    prepared.add("right", SHORT, SHORT)
    assert prepared.advance(3) == ["wrong ValueError", "right ready"] and not prepared.queue


def test_one_that_is_taken_back_goes_though_another_reads(prepared):
    prepared.add("reads", READS, READS)
    gone = prepared.add("gone", READS, READS)
    assert prepared.advance() == ["reads reads"]
    gone.cancelled = SimpleNamespace(is_set=lambda: True)
    assert sorted(prepared.advance()) == [f"gone {Cancelled.__name__}", "reads reads", "reads ready"]


def test_rounds_do_not_wait_for_all_of_them(prepared, monkeypatch):
    monkeypatch.setattr(turns, "_TURN_S", 0.0)
    for name in "abc":
        prepared.add(name)
    assert [prepared.advance() for _ in range(3)] == [["a ready"], ["b ready"], ["c ready"]]
