# SPDX-License-Identifier: Apache-2.0
"""Preference pairs on disk: what a stage of generation leaves and training reads.

    pairs-00000.jsonl   a `Record` a line, `shard_pairs` lines a file
    journal.jsonl       how far the stage has come (journal.py)
    done.json           written last (stages.py); its summary has the number of records and a digest of all checksums

Every line has a checksum (sealed.py).
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from longpo_jax.stages import summary_of
from rapid_jax.runtime.append_log import logs_in, open_log
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.files import digest, sha256_of
from rapid_jax.runtime.json_input import Fields
from rapid_jax.runtime.sealed import place_of, stated_seal, unsealed
from rapid_jax.runtime.storage import AnyPlace, read_into, working_place

SCHEMA = 2
_AHEAD = 8 << 20  # bytes that a store is asked for at once
_TOKENS_A_CHARACTER = 64  # at most, whatever a tokenizer's normaliser makes of a character


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
    def from_json(cls, value: Fields) -> "Record":
        """Raises InputError, naming its place, for another schema and for whatever is not a record."""
        if value.get("schema") != SCHEMA or isinstance(value.get("schema"), bool):
            raise value.error("schema", f"{SCHEMA}, that of the records which this version makes")
        _check_keys(value, cls)
        document = _text(value, "document")
        size = len(document)
        turns = tuple(_turn(turn, size) for turn in value.each("turns"))
        if not turns:
            raise value.error("turns", "a list of one turn or more")
        return cls(
            id=_text(value, "id"),
            domain=_text(value, "domain"),
            document=document,
            tokens=value.whole("tokens", most=_TOKENS_A_CHARACTER * (size + 1)),
            cut=None if value["cut"] is None else _span(value, "cut", size),
            turns=turns,
            seed=value.whole("seed", most=2**32 - 1),
            settings=_text(value, "settings"),
        )


def _turn(value: Fields, characters: int) -> Turn:
    _check_keys(value, Turn)
    return Turn(
        excerpt=_span(value, "excerpt", characters),
        excerpt_tokens=_span(value, "excerpt_tokens"),
        opener=_text(value, "opener"),
        question=_text(value, "question"),
        chosen=_answer(value.fields("chosen")),
        rejected=_answer(value.fields("rejected")),
    )


def _answer(value: Fields) -> Answer:
    _check_keys(value, Answer)
    return Answer(_text(value, "text"), value.whole("tokens"), value.truth("finished"))


def _check_keys(value: Fields, cls: type) -> None:
    """Raises InputError if a field of the class is not among the keys, or a key is none of its fields."""
    names = {field.name for field in dataclasses.fields(cls)}
    for name in sorted(names ^ value.keys()):
        raise value.error(name, "there" if name in names else "no key of a record")


def _text(value: Fields, name: str) -> str:
    text = value.text(name)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise value.error(name, "text in Unicode") from error
    return text


def _span(value: Fields, name: str, size: int | None = None) -> tuple[int, int]:
    """A stretch of what has `size` items."""
    edges = value.wholes(name)
    if len(edges) != 2 or edges[0] > edges[1] or (size is not None and edges[1] > size):
        raise value.error(name, "the two ends of a stretch" + ("" if size is None else f" of {size} characters"))
    return edges[0], edges[1]


@dataclass(frozen=True)
class Line:
    """Where a record lies: line `number` of a file, its `size` bytes from `offset` on, with its checksum."""

    file: str
    number: int
    offset: int
    size: int
    seal: str

    def fields(self) -> Fields:
        """Read from the file. Raises InputError if it is not what was there."""
        path, line = working_place(self.file, "run"), bytearray(self.size)
        try:
            got = read_into(path, self.offset, memoryview(line))
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror}") from error
        values = unsealed(line := bytes(line[:got]), place_of(path, self.number), f"{path}:{self.number}")
        if stated_seal(line) != self.seal:
            raise InputError(f"{path}:{self.number}: expected the record that was there at first, got another")
        return values

    def record(self) -> Record:
        """The record that is there. Raises InputError as `fields` does."""
        return Record.from_json(self.fields())


def read_records(folder: AnyPlace) -> Iterator[Record]:
    """The records of a finished run, in their order, one at a time.

    Raises InputError if the run is not finished, naming file and line for a line that is not what was written there or
    no record of this schema, and in the end if some are missing.
    """
    for _, record in records_with_places(folder):
        yield record


def records_with_places(folder: AnyPlace) -> Iterator[tuple[Line, Record]]:
    """As `read_records`, each with its place."""
    done, ids, seals = Fields(summary_of(folder), str(folder), "summary of done.json: "), set(), []
    expected, records = done.whole("pairs"), done.text("records")
    for path, number, offset, data in lines_of(folder):
        record = record_of(data, path, number)
        if record.id in ids:
            raise InputError(f"{path}:{number}: expected a document once, got {record.id!r} again")
        ids.add(record.id)
        seals.append(stated_seal(data))
        yield Line(str(path), number, offset, len(data), seals[-1]), record
    if len(seals) != expected:
        raise InputError(f"{folder}: expected {expected} records, got {len(seals)}")
    if digest(*seals) != records:
        raise InputError(f"{folder}: expected the records that were made, got others")


def record_of(line: bytes, path: AnyPlace, number: int) -> Record:
    """The record of a line. Raises InputError, naming file and line, for one that is not whole or of another schema."""
    return Record.from_json(unsealed(line, place_of(path, number), f"{path}:{number}"))


def shards_of(folder: AnyPlace) -> list[AnyPlace]:
    """The files that hold records, in order."""
    return logs_in(folder, "pairs-*.jsonl")


def digest_of(folder: AnyPlace) -> str:
    """SHA-256 over all records. Raises InputError if there are none."""
    shards = shards_of(folder)
    if not shards:
        raise InputError(f"{folder}: expected records in pairs-*.jsonl, got none: run `longpo pairs` first")
    return digest(*(part for path in shards for part in (path.name, sha256_of(path))))


def lines_of(folder: AnyPlace) -> Iterator[tuple[AnyPlace, int, int, bytes]]:
    """(file, number of the line, where it begins, the line) of all files that hold records."""
    for index, path in enumerate(shards_of(folder)):
        if path.name != shard_name(index):
            raise InputError(f"{folder}: expected {shard_name(index)}, got {path.name}")
        with open_log(path, ahead=_AHEAD) as file:
            offset = 0
            for number, line in enumerate(file, start=1):
                yield path, number, offset, line
                offset += len(line)


def shard_name(index: int) -> str:
    """Of the file number `index`, counted from 0."""
    return f"pairs-{index:05d}.jsonl"
