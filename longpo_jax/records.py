# SPDX-License-Identifier: Apache-2.0
"""Preference pairs on disk: what a stage of generation leaves and training reads.

    pairs-00000.jsonl   a `Record` a line, `shard_pairs` lines a file
    journal.jsonl       what the run was made with, then a line for every document that is finished, kept or not
    done.json           written last (stages.py)

A record is written before its line of the journal: what the journal does not name is cut away when a run goes on.
"""

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from longpo_jax.stages import summary_of
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.files import digest, digest_file

SCHEMA = 1
_JOURNAL = "journal.jsonl"
T = TypeVar("T")


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
    def from_json(cls, value: Any, source: str) -> "Record":
        """InputError, naming `source`, for another schema and for whatever is not a record."""
        if not isinstance(value, dict) or value.get("schema") != SCHEMA:
            got = value.get("schema") if isinstance(value, dict) else type(value).__name__
            raise InputError(f"{source}: expected a record of schema {SCHEMA}, got {got}")
        try:
            size = len(value["document"])
            turns = tuple(_turn(turn, size) for turn in value["turns"])
            cut = None if value["cut"] is None else _span(value, "cut", size)
            return _built(cls, {**value, "turns": turns, "cut": cut})
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{source}: expected a record of schema {SCHEMA}, got one with {error}") from error


def _turn(value: dict[str, Any], characters: int) -> Turn:
    answers = {name: _built(Answer, value[name]) for name in ("chosen", "rejected")}
    spans = {"excerpt": _span(value, "excerpt", characters), "excerpt_tokens": _span(value, "excerpt_tokens")}
    return _built(Turn, {**value, **answers, **spans})


def _built(cls: type[T], values: dict[str, Any]) -> T:
    """An instance whose plain fields have their types."""
    for field in dataclasses.fields(cls):  # pyright: ignore[reportArgumentType]
        if field.type in (str, int, bool) and type(values.get(field.name, field.default)) is not field.type:
            raise TypeError(f"{field.name} = {values.get(field.name)!r:.60}")
    return cls(**values)


def _span(values: dict[str, Any], name: str, size: int | None = None) -> tuple[int, int]:
    """`values[name]` if it is a stretch of what has `size` items."""
    match values[name]:
        case [int(start), int(end)] if 0 <= start <= end and (size is None or end <= size):
            return start, end
    raise ValueError(f"{name} = {values[name]!r:.60}")


class Writer:
    """Appends the documents of a run, one at a time, each whole or not at all, and goes on where a run was ended.

    The folder is made with the first of them. Raises InputError if it holds records of an unfinished run of other
    inputs, or files that are not as its journal says.
    """

    def __init__(self, folder: Path, inputs: Mapping[str, Any], *, shard_pairs: int):
        self.finished: list[str] = []  # ids, in the order in which they were added
        self.counts: Counter[str] = Counter()  # sums of what was counted
        self._folder, self._shard_pairs, self._records = folder, shard_pairs, 0
        self._header = {"schema": SCHEMA, "inputs": json.loads(json.dumps(dict(inputs)))}
        lines = _whole_lines(folder / _JOURNAL)
        self._new = not lines  # or only of documents that other settings made nothing of
        if lines:
            self._new = _are_others(self._header, lines[0], folder)
        elif shards_of(folder):
            raise InputError(f"{folder}: expected an empty folder or an unfinished run, got records without a journal")
        try:
            self._resume([] if self._new else lines[1:])
        except (AttributeError, KeyError, TypeError) as error:
            raise InputError(f"{folder / _JOURNAL}: expected a line a document, got one with {error}") from error

    def _resume(self, lines: list[dict[str, Any]]) -> None:
        """Takes in what the journal says, and cuts away what it does not name."""
        ends: dict[str, int] = {}
        for line in lines:
            place = line["record"]
            self._count(line["id"], place is not None, line["counts"])
            ends |= {} if place is None else {place["file"]: place["end"]}
        newest = max(ends, default="")
        for path in shards_of(self._folder):
            if path.name > newest:
                path.unlink()
            elif path.name == newest and path.stat().st_size > ends[newest]:
                os.truncate(path, ends[newest])
        for name, end in ends.items():
            path = self._folder / name
            size = path.stat().st_size if path.exists() else 0
            if size != end:
                raise InputError(f"{path}: expected {end} bytes, as the journal says, got {size}")

    def add(self, id: str, record: Record | None, counts: Mapping[str, int]) -> None:
        """The next document is finished: with a record, or dropped; `counts` says what was made of it, and why.

        Raises InputError if the disk is full.
        """
        if self._new:
            self._folder.mkdir(parents=True, exist_ok=True)
            (self._folder / _JOURNAL).unlink(missing_ok=True)
            self._append(_JOURNAL, self._header)
            self._new = False
        place = None
        if record is not None:
            name = _shard(self._records // self._shard_pairs)
            place = {"file": name, "end": self._append(name, record.to_json())}
        self._append(_JOURNAL, {"id": id, "record": place, "counts": dict(counts)})
        self._count(id, record is not None, counts)

    def _append(self, name: str, value: Mapping[str, Any]) -> int:
        """Puts a line behind a file, onto the disk itself; the file's size then."""
        try:
            with open(self._folder / name, "ab") as file:
                file.write(json.dumps(value, ensure_ascii=False).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
                return file.tell()
        except OSError as error:
            raise InputError(f"{self._folder / name}: cannot be written: {error.strerror}") from error

    def _count(self, id: str, kept: bool, counts: Mapping[str, int]) -> None:
        self.finished.append(id)
        self.counts.update(counts)
        self._records += kept


def read_records(folder: Path) -> Iterator[Record]:
    """The records of a finished run, in their order, one at a time.

    Raises InputError if the run is not finished, and, naming file and line, for a line that is not a whole record of
    this schema.
    """
    expected, seen = summary_of(folder).get("pairs"), set()
    for index, path in enumerate(shards_of(folder)):
        if path.name != _shard(index):
            raise InputError(f"{folder}: expected {_shard(index)}, got {path.name}")
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                record = record_of(line, path, number)
                if record.id in seen:
                    raise InputError(f"{path}:{number}: expected a document once, got {record.id!r} again")
                seen.add(record.id)
                yield record
    if expected is not None and len(seen) != expected:
        raise InputError(f"{folder}: expected {expected} records, got {len(seen)}")


def record_of(line: bytes, path: Path, number: int) -> Record:
    """The record of a line. Raises InputError, naming file and line, for one that is not whole or of another schema."""
    return Record.from_json(_parsed(line, path, number), f"{path}:{number}")


def shards_of(folder: Path) -> list[Path]:
    """The files that hold records, in order."""
    return sorted(folder.glob("pairs-*.jsonl"))


def digest_of(folder: Path) -> str:
    """SHA-256 over all records. Raises InputError if there are none."""
    shards = shards_of(folder)
    if not shards:
        raise InputError(f"{folder}: expected records in pairs-*.jsonl, got none: run `longpo pairs` first")
    return digest(*(part for path in shards for part in (path.name, digest_file(path))))


def _shard(index: int) -> str:
    return f"pairs-{index:05d}.jsonl"


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a journal; a last one that was cut off is cut away."""
    data = path.read_bytes() if path.exists() else b""
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        os.truncate(path, len(whole))
    return [_parsed(line, path, number) for number, line in enumerate(whole.splitlines(keepends=True), start=1)]


def _parsed(line: bytes, path: Path, number: int) -> Any:
    if not line.endswith(b"\n"):
        raise InputError(f"{path}:{number}: expected a whole line, got one that is cut off")
    try:
        return json.loads(line)
    except ValueError as error:
        raise InputError(f"{path}:{number}: expected JSON, got {error}") from error


def _are_others(expected: Mapping[str, Any], got: Any, folder: Path) -> bool:
    """Whether a journal is of other inputs, but no record was made with them. Raises InputError if some were."""
    schema = got.get("schema") if isinstance(got, dict) else type(got).__name__
    if schema != SCHEMA or not isinstance(got.get("inputs"), dict):
        raise InputError(f"{folder / _JOURNAL}: expected schema {SCHEMA} and inputs, got schema {schema}")
    ours, theirs = expected["inputs"], got["inputs"]
    for key in (*ours, *theirs):
        if ours.get(key) != theirs.get(key) or (key in ours) != (key in theirs):
            if not shards_of(folder):
                return True
            raise InputError(
                f"{folder} holds an unfinished run with {key} = {json.dumps(theirs.get(key)):.60}, expected "
                f"{json.dumps(ours.get(key)):.60}: choose another run folder, or delete {folder} to start again"
            )
    return False
