# SPDX-License-Identifier: Apache-2.0
"""The table of one question answered three ways."""

import pytest

from rapid_jax.baselines import table
from tests.test_answer import answer

LONG = "The cat that sat on the mat was " + "very " * 30 + "happy.\n\n- a supercalifragilisticexpialidocious-long-word"


@pytest.mark.parametrize("width", [10, 60, 120])
def test_answers_are_shown_in_full_however_narrow_the_terminal_is(width):
    answers = [answer(text=f"{LONG} {mode}", mode=mode) for mode in ("rapid", "target", "retrieval")]
    lines = table(answers, width).splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["rapid", "target", "retrieval"]
    assert len({len(line) for line in lines[:4]}) == 1
    below = "\n".join(lines[4:])
    for one in answers:
        assert f"\n{one.mode}:\n  The cat" in f"\n{below}"
        assert " ".join(one.text.split()) in " ".join(below.split())
    assert max(len(line) for line in lines[4:] if "-long-word" not in line) <= max(width, 22)
