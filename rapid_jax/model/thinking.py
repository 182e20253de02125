# SPDX-License-Identifier: Apache-2.0
"""A model's thinking apart from its answer: what it writes between <think> and </think> before it answers.

Qwen3, SmolLM3 and others are trained to; their chat templates ask for it by `enable_thinking`. Some templates write the
first marker themselves, at the end of the prompt.
"""

from typing import Final

START: Final = "<think>"
END: Final = "</think>"


class Thinking:
    """Parts a text that comes in pieces into thinking, `text`, and answer. `opened`: the prompt ended in <think>."""

    def __init__(self, *, opened: bool = False):
        self.text = ""  # what was thought, without the markers and the space at the edges
        self._state = "inside" if opened else "before"
        self._held = ""  # what may yet be a marker, or space in front of one

    def push(self, piece: str) -> str:
        """Takes in more; returns what of it belongs to the answer."""
        self._held += piece
        if self._state == "before":
            begun = self._held.lstrip()
            if len(begun) < len(START) and START.startswith(begun):
                return ""
            self._state = "inside" if begun.startswith(START) else "answer"
            self._held = begun.removeprefix(START) if self._state == "inside" else self._held
        if self._state == "inside":
            thought, end, rest = self._held.partition(END)
            size = 0 if end else _undecided(thought)
            self._think(thought[: len(thought) - size])
            self._held = rest if end else thought[len(thought) - size :]
            if not end:
                return ""
            self._state, self.text = "behind", self.text.rstrip()
        if self._state == "behind":
            self._held = self._held.lstrip()
            self._state = "answer" if self._held else "behind"
        answer, self._held = self._held, ""
        return answer

    def finish(self) -> str:
        """Nothing more comes; returns what was held back of the answer."""
        held, self._held = self._held, ""
        if self._state == "inside":
            self._think(held)
            return ""
        return held

    def _think(self, more: str) -> None:
        self.text = self.text + more if self.text else more.lstrip()


def _undecided(text: str) -> int:
    """How many last characters may yet turn out to begin the end of thinking."""
    return max((size for size in range(1, len(END)) if text.endswith(END[:size])), default=0)
