# SPDX-License-Identifier: Apache-2.0
"""Progress says how much is done, how fast and how long is left; a log gets lines and no control characters."""

import io
import re
import sys

import pytest

from rapid_jax.runtime import progress as module
from rapid_jax.runtime.progress import progress


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now = 100.0
        monkeypatch.setattr(module.time, "monotonic", lambda: self.now)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_gets_a_line_at_most_every_interval(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    clock = Clock(monkeypatch)
    with progress("prefill", 100, "tokens", interval_s=10.0) as report:
        for _ in range(5):
            clock.now += 5.0
            report.advance(10)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "prefill: 20/100 tokens, 2.0 tokens/s, 40 s left",
        "prefill: 40/100 tokens, 2.0 tokens/s, 30 s left",
    ]


def test_no_units_done_and_no_time_passed_say_nothing_false(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    clock = Clock(monkeypatch)
    with progress("load", 10, "files", interval_s=0.0) as report:
        clock.now += 60.0
        report.advance(0)
        assert capsys.readouterr().err == ""
        report.advance(6)
        assert capsys.readouterr().err == "load: 6/10 files, 0.1 files/s, 40 s left\n"
        report.advance(6)
        assert capsys.readouterr().err == "load: 12/10 files, 0.2 files/s, 0 s left\n"
    with progress("load", 10, "files", interval_s=0.0) as report:
        report.advance(10)
    assert capsys.readouterr().err.startswith("load: 10/10 files, ")


def test_a_terminal_gets_a_bar_that_is_gone_at_the_end(monkeypatch: pytest.MonkeyPatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress("prefill", 4, "chunks") as report:
        report.advance(1)
        report.advance(3)
    text = terminal.getvalue()
    assert "prefill" in text and "/4" in text
    assert re.search(r"\r *\r$", text)


def test_quiet_says_nothing(monkeypatch: pytest.MonkeyPatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress("prefill", 4, "chunks", quiet=True) as report:
        report.advance(4)
    assert terminal.getvalue() == ""


def test_work_of_unknown_length_says_no_time_left(capsys):
    with progress("making", None, "samples", interval_s=0) as report:
        report.advance(2)
    assert capsys.readouterr().err.startswith("making: 2 samples, ")
