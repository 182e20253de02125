# SPDX-License-Identifier: Apache-2.0
"""An interruption ends a command wherever it comes."""

import gc
import signal
import sys
import time

from rapid_jax.runtime.command_line import status_of
from rapid_jax.runtime.distributed import INTERRUPTED


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
