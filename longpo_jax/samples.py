# SPDX-License-Identifier: Apache-2.0
"""What of a record goes into a row: all turns of a document, one turn of it, or one turn behind its excerpt."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

from longpo_jax.config import LongPOConfig
from longpo_jax.dialogue import Branch, Dialogue
from longpo_jax.objectives import Name, objective_of
from longpo_jax.records import Line, Record, Turn, records_with_places
from longpo_jax.rows import Row, needed, packed
from rapid_jax.model.tokenizer import Tokenizer
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.storage import AnyPlace
from rapid_jax.speculative.chunk_layout import bucket


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


def taught_turn(tokenizer: Tokenizer, turn: Turn, context: str) -> Parts:
    """The rejected answer of one turn alone behind `context`, all of it in the tail."""
    dialogue = Dialogue(tokenizer, [turn.instruction])
    return Parts(dialogue.shared(context), Branch([], []), dialogue.branch([turn.rejected]))


def policy_parts(tokenizer: Tokenizer, record: Record, objective: Name, turn: int) -> Parts:
    """The long row that the policy is trained on: of one turn or of all, as the objective has it."""
    wanted = objective_of(objective)
    if wanted.row == "turn":
        return one_turn(tokenizer, record.turns[turn], record.context, rejected=wanted.forked)
    return all_turns(tokenizer, record, record.context, rejected=wanted.forked)


def rows_of(record: Record, objective: Name) -> Iterator[int]:
    """The turns that rows of a record are about: each has one, or the record is one row (turn 0)."""
    yield from range(len(record.turns) if objective_of(objective).row == "turn" else 1)


def places_of(tokenizer: Tokenizer, record: Record, objective: Name, turn: int) -> tuple[int, int]:
    """(places of the trunk, places of the tail) of `policy_parts`, with the tail of the short row if there is one.

    A document that is whole is not tokenised again.
    """
    if record.cut is not None:
        trunk, tail = policy_parts(tokenizer, record, objective, turn).size
    else:
        empty = replace(record, document="")
        trunk, tail = policy_parts(tokenizer, empty, objective, turn).size
        trunk += record.tokens
    if objective_of(objective).short:
        tail = one_turn(tokenizer, record.turns[turn], "", rejected=True).size[1]
    return trunk, tail


@dataclass(frozen=True)
class Place(Line):
    """Where a row comes from: the line of a record, and the turn that it is about."""

    turn: int


class Rows:
    """The rows that the records of a folder give: those that fit, by domain, in the order of the records.

    Raises InputError for records that are not as they were written, and if no row is left.
    """

    def __init__(self, config: LongPOConfig, pairs: AnyPlace, tokenizer: Tokenizer):
        self.config, self._tokenizer = config, tokenizer
        self.places: dict[str, list[Place]] = {}
        self.turns: dict[str, int] = {}  # how many each record has, by its id
        self.too_long: Counter[str] = Counter()  # rows left out, by domain
        objective, train = config.objective.name, config.train
        for line, record in records_with_places(pairs):
            self.turns[record.id] = len(record.turns)
            for turn in rows_of(record, objective):
                trunk, tail = places_of(tokenizer, record, objective, turn)
                if trunk > train.lengths[-1] or tail > train.tail:
                    self.too_long[record.domain] += 1
                else:
                    self.places.setdefault(record.domain, []).append(Place(**vars(line), turn=turn))
        if not self.places:
            raise InputError(
                f"{pairs}: expected rows of at most {train.lengths[-1]} + {train.tail} places (train.lengths, "
                f"train.tail), got none: {sum(self.too_long.values())} are longer"
            )

    def __len__(self) -> int:
        return sum(map(len, self.places.values()))

    @property
    def tail(self) -> int:
        """Places of a row's tail: none where a row has no rejected branch."""
        return self.config.train.tail if objective_of(self.config.objective.name).forked else 0

    def row(self, place: Place) -> tuple[Record, Row, Row | None]:
        """(record, its long row, its short row) at a place.

        Raises InputError if it has become longer than `places_of` said: the tokens are of another tokenizer.
        """
        record, objective, lengths = place.record(), self.config.objective.name, self.config.train.lengths
        parts = policy_parts(self._tokenizer, record, objective, place.turn)
        if parts.size[0] > lengths[-1]:
            raise InputError(
                f"{place.file}: expected a document of {record.tokens} tokens by this model's tokenizer, got a row of "
                f"{parts.size[0]} from {record.id}: another model's tokenizer counted them"
            )
        row = parts.packed(next(length for length in lengths if length >= parts.size[0]), self.tail)
        if not objective_of(objective).short:
            return record, row, None
        turn = record.turns[place.turn]
        return record, row, self._short(one_turn(self._tokenizer, turn, record.excerpt_of(turn), rejected=True))

    def _short(self, parts: Parts) -> Row:
        devices = self.config.mesh.context
        trunk = bucket(parts.size[0], 64 * (2 * devices if devices > 1 else 1))
        return parts.packed(trunk, self.config.train.tail)
