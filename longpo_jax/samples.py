# SPDX-License-Identifier: Apache-2.0
"""What of a record goes into a row: all turns of a document, one turn of it, or one turn behind its excerpt."""

from collections.abc import Iterator
from dataclasses import dataclass

from longpo_jax.config import Objective
from longpo_jax.dialogue import Branch, Dialogue
from longpo_jax.records import Record, Turn
from longpo_jax.rows import Row, needed, packed
from rapid_jax.model.tokenizer import Tokenizer


@dataclass(frozen=True)
class Parts:
    """Token ids of a row before it is packed."""

    shared: list[int]
    chosen: Branch
    rejected: Branch | None

    @property
    def size(self) -> tuple[int, int]:
        """Places of the trunk and of the tail."""
        return needed(self.shared, self.chosen, self.rejected)

    def packed(self, trunk: int, tail: int) -> Row:
        """The row."""
        return packed(self.shared, self.chosen, self.rejected, trunk=trunk, tail=tail)


def all_turns(tokenizer: Tokenizer, record: Record, context: str, *, rejected: bool) -> Parts:
    """Every turn behind `context`; without `rejected` the chosen answers alone."""
    dialogue = Dialogue(tokenizer, [turn.instruction for turn in record.turns])
    chosen = dialogue.branch([turn.chosen for turn in record.turns])
    other = dialogue.branch([turn.rejected for turn in record.turns]) if rejected else None
    return Parts(dialogue.shared(context), chosen, other)


def one_turn(tokenizer: Tokenizer, turn: Turn, context: str, *, rejected: bool) -> Parts:
    """One turn by itself behind `context`."""
    dialogue = Dialogue(tokenizer, [turn.instruction])
    other = dialogue.branch([turn.rejected]) if rejected else None
    return Parts(dialogue.shared(context), dialogue.branch([turn.chosen]), other)


def policy_parts(tokenizer: Tokenizer, record: Record, objective: Objective, turn: int) -> Parts:
    """The long row that the policy is trained on: of solopo one turn and its chosen answer, else all turns."""
    if objective == "solopo":
        return one_turn(tokenizer, record.turns[turn], record.context, rejected=False)
    return all_turns(tokenizer, record, record.context, rejected=objective != "sft")


def rows_of(record: Record, objective: Objective) -> Iterator[int]:
    """The turns that rows of a record are about: of solopo each has one, else the record is one row (turn 0)."""
    yield from range(len(record.turns) if objective == "solopo" else 1)


def places_of(tokenizer: Tokenizer, record: Record, objective: Objective, turn: int) -> tuple[int, int]:
    """The size of `policy_parts`, for which a document that is whole is not tokenised again."""
    if record.cut is not None:
        return policy_parts(tokenizer, record, objective, turn).size
    empty = Record(**{**vars(record), "document": ""})
    trunk, tail = policy_parts(tokenizer, empty, objective, turn).size
    return trunk + record.tokens, tail
