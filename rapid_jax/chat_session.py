# SPDX-License-Identifier: Apache-2.0
"""A conversation about a document: what was asked and said before stays in the context as far as there is room."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from rapid_jax.answer import Answer
from rapid_jax.config import RapidConfig
from rapid_jax.engine.request import Done, Event, Piece, Question, Retrieved
from rapid_jax.prompts import frame, room_around
from rapid_jax.rapid import Rapid
from rapid_jax.runtime import settings
from rapid_jax.runtime.errors import InputError, TooLarge

Turn: TypeAlias = tuple[str, str]  # a question and its answer
_FIXED = ("mesh", "drafter_mesh", "compute", "cache")


@dataclass(frozen=True)
class Said:
    """An answer with what made it."""

    question: str
    answer: Answer
    config: RapidConfig


@dataclass(frozen=True)
class Note:
    """A line about the conversation itself."""

    text: str


class Session:
    """Questions about one document at a time, under settings that may change between two of them.

    What fails, by InputError or KeyboardInterrupt, leaves document, settings and turns as they were.
    """

    def __init__(self, rapid: Rapid, document: str):
        """Loads the models and reads the document: the first answer starts at once."""
        self._rapid, self.config = rapid, rapid.config
        self._document, self._reading = document, rapid.prefill(document)
        self.turns: tuple[Turn, ...] = ()
        self.last: Said | None = None  # the last answer that was not taken back

    @property
    def document_tokens(self) -> int:
        """Of the whole document, also where it is cut."""
        return self._reading.document_tokens

    @property
    def cut(self) -> bool:
        """The models read a part of the document alone."""
        return self._reading.truncated

    @property
    def tokenizer(self):
        """The target's."""
        return self._rapid.target.tokenizer

    def open(self, document: str) -> None:
        """Goes on with another document, of which nothing has been asked yet. Raises InputError as `Rapid.prefill`."""
        self._reading = self._rapid.prefill(document, settings=self.config)
        self._document, self.turns = document, ()

    def change(self, override: str) -> None:
        """Puts "section.key=value" over the settings. Raises InputError for what is none, what cannot change, and what
        the models or the document do not go with.
        """
        changed = settings.changed(self.config, [override], "settings")
        fixed = [name for name in _FIXED if getattr(changed, name) != getattr(self.config, name)]
        if not changed.models.loads_as(self.config.models):
            fixed.append("models")
        if fixed:
            name = override.partition("=")[0]
            raise InputError(f"{name}: expected a setting of answers, got one of what is loaded already")
        self._reading = self._rapid.prefill(self._document, settings=changed)
        self.config = changed

    def ask(self, question: str, until: Callable[[], bool]) -> Iterator[Event | Note]:
        """The answer's pieces and Done, with notes about the turns before. Once `until` holds it is taken back and
        there is no Done: then what was said by then is the answer that later questions follow.
        """
        turns, begun = self._fitting(question), False
        while True:
            try:
                for event in self._asked(question, turns, until):
                    if isinstance(event, Retrieved):  # told of before it is known whether the prompt fits
                        continue
                    if not begun and len(turns) < len(self.turns):
                        yield Note(_dropped(len(self.turns) - len(turns), len(turns)))
                    begun = True
                    yield event
            except TooLarge:  # of the drafter's prompt
                if not turns:
                    raise
                turns = turns[1:]
            else:
                return

    def _asked(self, question: str, turns: Sequence[Turn], until: Callable[[], bool]) -> Iterator[Event | Note]:
        config = self.config
        # Every round is told at once.
        asking = replace(config, speculation=replace(config.speculation, rounds_per_read=1))
        text = ""
        for event in self._rapid.stream(Question(self._document, question, turns), settings=asking, until=until):
            if isinstance(event, Piece):
                text += event.text
            if isinstance(event, Done):
                self.last = Said(question, event.answer, config)
            yield event
        if text.strip():
            yield from self._keep(question, text, turns)

    def _keep(self, question: str, text: str, turns: Sequence[Turn]) -> Iterator[Note]:
        """The turn is one of those that later questions follow, where the chat template leaves it as it is."""
        models = {"target": self._rapid.target}
        if self.config.speculation.drafts:
            models["drafter"] = self._rapid.drafter
        try:
            for name, model in models.items():
                words = self.config.prompts
                how = {"turns": ((question, text),), "thinking": words.enable_thinking}
                frame(model.tokenizer, getattr(words, name), "?", words.system, **how)
        except InputError as error:
            yield Note(f"this turn is not kept for later questions: {error}")
            return
        self.turns = (*turns, (question, text))

    def _fitting(self, question: str) -> tuple[Turn, ...]:
        """The last turns, as many as leave the document as much room as it has without them."""
        config, target, turns = self.config, self._rapid.target, self.turns
        room = room_around(config, target, self.document_tokens, cut=self.cut)
        prompts = config.prompts

        def size(turns: tuple[Turn, ...]) -> int:
            how = {"turns": turns, "thinking": prompts.enable_thinking}
            return frame(target.tokenizer, prompts.target, question, prompts.system, **how).size

        while turns and size(turns) > room:
            turns = turns[1:]
        return turns


def _dropped(count: int, left: int) -> str:
    turns = "the oldest turn is" if count == 1 else f"the {count} oldest turns are"
    return f"the context is full: {turns} dropped, {left} {'is' if left == 1 else 'are'} left"
