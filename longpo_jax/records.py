# SPDX-License-Identifier: Apache-2.0
"""Preference pairs on disk: what a stage of generation leaves and training reads."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from rapid_jax.runtime.errors import InputError

SCHEMA = 1


@dataclass(frozen=True)
class Answer:
    """What the model said, without its end token."""

    text: str
    tokens: int
    finished: bool  # it ended by itself, not at the limit: its end token is learnt, too


@dataclass(frozen=True)
class Turn:
    """One question about one excerpt, with the answer from the excerpt and the answer from the whole document."""

    excerpt: tuple[int, int]  # characters of the document
    excerpt_tokens: tuple[int, int]  # the same in tokens of the document
    opener: str
    question: str
    chosen: Answer
    rejected: Answer

    @property
    def instruction(self) -> str:
        """What the user asks."""
        return f"{self.opener} {self.question}"


@dataclass(frozen=True)
class Record:
    """One document with its turns; its text is as it was read."""

    id: str  # unique in a run
    domain: str
    document: str
    tokens: int  # of the document
    cut: tuple[int, int] | None  # characters left out of the middle of the document for the model, if it was too long
    turns: tuple[Turn, ...]
    seed: int  # everything drawn for this document follows from it
    settings: str  # digest of the settings, the model and the tokenizer that made it
    schema: int = SCHEMA

    @property
    def context(self) -> str:
        """What the model reads of the document."""
        return self.document if self.cut is None else self.document[: self.cut[0]] + self.document[self.cut[1] :]

    def excerpt_of(self, turn: Turn) -> str:
        """The short context of a turn."""
        return self.document[turn.excerpt[0] : turn.excerpt[1]]

    def to_json(self) -> dict[str, Any]:
        """Plain values, which `from_json` reads back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any], source: str) -> "Record":
        """InputError, naming `source`, for another schema and for whatever is not a record."""
        if not isinstance(value, dict) or value.get("schema") != SCHEMA:
            got = value.get("schema") if isinstance(value, dict) else type(value).__name__
            raise InputError(f"{source}: expected a record of schema {SCHEMA}, got {got}")
        try:
            turns = tuple(_turn(turn) for turn in value["turns"])
            cut = None if value["cut"] is None else tuple(value["cut"])
            return cls(**{**value, "turns": turns, "cut": cut})
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{source}: expected a record of schema {SCHEMA}, got one with {error}") from error


def _turn(value: dict[str, Any]) -> Turn:
    answers = {name: Answer(**value[name]) for name in ("chosen", "rejected")}
    spans = {name: tuple(value[name]) for name in ("excerpt", "excerpt_tokens")}
    return Turn(**{**value, **answers, **spans})
