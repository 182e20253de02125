# SPDX-License-Identifier: Apache-2.0
"""An interruption ends a command wherever it comes; an error is one line that does nothing to a terminal."""

import gc
import signal
import sys
import time

from rapid_jax.runtime.command_line import status_of
from rapid_jax.runtime.distributed import INTERRUPTED
from rapid_jax.runtime.errors import InputError, printable


class Ring:
    """It is the garbage collector that takes it away."""

    def __init__(self):
        self.itself = self

    def __del__(self):
        signal.raise_signal(signal.SIGINT)


def test_an_interruption_in_the_midst_of_the_garbage_collector_is_not_lost(capsys):
    """Nothing that is raised leaves what it calls: Python says that it ignores it."""
    hook = sys.unraisablehook

    def work():
        Ring()
        gc.collect()
        time.sleep(20)

    begun, before = time.monotonic(), signal.signal(signal.SIGINT, signal.default_int_handler)  # else ignored by xdist
    try:
        assert status_of(work, "name", out_of_memory="") == INTERRUPTED
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - begun < 15
    assert capsys.readouterr().err == "name: interrupted\n"
    assert sys.unraisablehook is hook


def test_what_else_cannot_be_raised_is_told_as_before(monkeypatch):
    class Broken:
        def __del__(self):
            raise ValueError("broken")

    told = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: told.append(str(unraisable.exc_value)))
    assert status_of(lambda: Broken() and None, "name", out_of_memory="") == 0
    assert told == ["broken"]


def test_a_hook_that_is_put_over_it_stays(monkeypatch):
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)

    def other(unraisable):
        raise AssertionError

    assert status_of(lambda: setattr(sys, "unraisablehook", other), "name", out_of_memory="") == 0
    assert sys.unraisablehook is other


def test_errors_and_texts_of_others_do_nothing_to_a_terminal(capsys):
    assert printable("a\x1b[2J\u202e\ud800é答\n") == r"a\x1b[2J\u202e\ud800é答\n"

    def work() -> None:
        raise InputError("a\x1b]0;owned\x07.json: no such\nfile")

    assert status_of(work, "rapid", out_of_memory="") == 2
    assert capsys.readouterr().err == "rapid: a\\x1b]0;owned\\x07.json: no such file\n"
