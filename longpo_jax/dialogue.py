# SPDX-License-Identifier: Apache-2.0
"""A dialogue about a document as token ids, in which every token of an answer is known by count, not by search.

    shared      template, document, first instruction, up to where the first answer starts
    branch      answer 1, end, template, instruction 2, up to answer 2, answer 2, end, ...

A special token that is spelt out in a document, a question or an answer stays text. Tokens never span the edge between
the template and what is put into it: an answer's tokens follow its prompt's as they did when it was generated.
"""

import datetime
from collections.abc import Sequence
from dataclasses import dataclass

from longpo_jax.records import Answer
from rapid_jax.model.chat import mark_of, split_at_marks
from rapid_jax.model.tokenizer import Tokenizer
from rapid_jax.runtime.errors import InputError

_NOW = datetime.datetime(2025, 1, 1)  # for templates that write the date: a row has the same tokens on any day
_CONTEXT = mark_of("context")


@dataclass(frozen=True)
class Branch:
    """What follows the shared part, up to the end token of the last answer, where the template has one."""

    tokens: list[int]
    # Of each token the turn, from 1, whose answer it belongs to (the end token too); 0: none; -1: an end token that the
    # answer did not come to.
    turns: list[int]


class Dialogue:
    """Some turns of a user who asks and a model that answers, with the context and the answers left out."""

    def __init__(self, tokenizer: Tokenizer, instructions: Sequence[str]):
        self._tokenizer = tokenizer
        questions = [mark_of(f"question{index}") for index in range(len(instructions))]
        answers = [mark_of(f"answer{index}") for index in range(len(instructions))]
        self._marks = [_CONTEXT, *questions, *answers]
        marked = [f"{_CONTEXT}\n\n{questions[0]}", *questions[1:]]
        before, gap, end = split_at_marks(self._render(marked[:1], []), (_CONTEXT, questions[0]))
        self.before = tokenizer.encode_template(before, first=True)  # up to the context
        self.first = self._quoted_in(gap, instructions[0], end)  # up to the first answer
        self.between = []  # from behind each answer to the next one
        for index in range(1, len(instructions)):
            text = self._render(marked[: index + 1], answers[:index])
            _, head, end = split_at_marks(text, (answers[index - 1], questions[index]))
            self.between.append(self._quoted_in(head, instructions[index], end))
        _, closing = split_at_marks(self._render(marked, answers), answers[-1:])
        self.between.append(self._ended(tokenizer.encode_template(closing)))

    def shared(self, context: str) -> list[int]:
        """What both branches follow."""
        return self.around(self._tokenizer.encode_quoted(context))

    def around(self, context: list[int]) -> list[int]:
        """`shared`, of the context's tokens as `encode_quoted` gives them."""
        return self.before + context + self.first

    def branch(self, answers: Sequence[Answer]) -> Branch:
        """The turns with these answers. The end token of one that was cut short is there, but not the answer's."""
        tokens: list[int] = []
        turns: list[int] = []
        for turn, (answer, after) in enumerate(zip(answers, self.between, strict=True), start=1):
            said = self._tokenizer.encode_quoted(answer.text)
            ended = len(self._ended(after))
            tokens += said + after
            turns += [turn] * len(said) + [turn if answer.finished else -1] * ended + [0] * (len(after) - ended)
        return Branch(tokens, turns)

    def _quoted_in(self, before: str, instruction: str, after: str) -> list[int]:
        quoted = self._tokenizer.encode_quoted(instruction, follows=not before.endswith(" "))
        return self._tokenizer.encode_template(before) + quoted + self._tokenizer.encode_template(after)

    def _render(self, users: Sequence[str], answers: Sequence[str]) -> str:
        messages = []
        for index, user in enumerate(users):
            messages.append({"role": "user", "content": user})
            messages += [{"role": "assistant", "content": answer} for answer in answers[index : index + 1]]
        text = self._tokenizer.chat(messages, add_generation_prompt=len(answers) < len(users), now=_NOW)
        if any(text.count(mark) > 1 for mark in self._marks):
            raise InputError("the checkpoint's chat template wrote a message of the dialogue twice, expected once")
        return text

    def _ended(self, tokens: list[int]) -> list[int]:
        """Up to the end token, nothing if there is none."""
        stops = [index for index, token in enumerate(tokens) if token in self._tokenizer.stop_ids]
        return tokens[: stops[0] + 1] if stops else []
