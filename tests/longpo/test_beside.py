# SPDX-License-Identifier: Apache-2.0
"""Steps beside other work."""

import threading

import pytest

from longpo_jax.beside import beside


def test_steps_are_taken_while_the_body_runs_and_those_left_are_not_begun():
    first, second, taken = threading.Event(), threading.Event(), []

    def steps():
        for number in range(3):
            taken.append(number)
            if number == 1:
                first.set()
                assert second.wait(60)
            yield

    with beside(steps()):
        assert first.wait(60)
        threading.Timer(0.2, second.set).start()  # the body ends in the middle of the second step
    assert taken == [0, 1]


def test_what_a_step_raises_is_raised_at_the_end_unless_the_body_raises():
    begun = threading.Event()

    def steps():
        begun.set()
        raise ValueError("of a step")
        yield

    with pytest.raises(ValueError, match="of a step"), beside(steps()):
        assert begun.wait(60)
    with pytest.raises(KeyError, match="of the body"), beside(steps()):
        raise KeyError("of the body")
