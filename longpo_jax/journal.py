# SPDX-License-Identifier: Apache-2.0
"""How preference pairs are written, a document at a time, and how a stage that was ended goes on.

    journal.jsonl    what the run was made with, then a line for every document that is finished, kept or not

A record is written before its line of the journal: what the journal does not name is cut away when a run goes on.
"""

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

from longpo_jax.records import SCHEMA, Record, lines_of, shard_name, shards_of
from longpo_jax.stages import mark_done
from rapid_jax.runtime.append_log import Log, log_at
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.files import digest
from rapid_jax.runtime.json_input import Fields
from rapid_jax.runtime.sealed import place_of, seal_of, sealed, stated_seal, unsealed
from rapid_jax.runtime.storage import AnyPlace

_JOURNAL = "journal.jsonl"


class Writer:
    """Appends the documents of a run, one at a time, each whole or not at all, and goes on where a run was ended.

    The folder is made with the first of them. Raises InputError if it holds records of an unfinished run of other
    inputs, or files that are not as its journal says.
    """

    def __init__(self, folder: AnyPlace, inputs: Mapping[str, Any], *, shard_pairs: int):
        self.finished: list[str] = []  # ids, in the order in which they were added
        self.counts: Counter[str] = Counter()  # sums of what was counted
        self._folder, self._shard_pairs = folder, shard_pairs
        self._seals: list[str] = []  # of each record
        self._header = {"schema": SCHEMA, "inputs": json.loads(json.dumps(dict(inputs)))}
        self._journal = log_at(folder / _JOURNAL)
        self._shards: dict[str, Log] = {}  # that were written to
        lines = _whole_lines(self._journal, folder / _JOURNAL)
        self._new = not lines  # or only of documents that other settings made nothing of
        if lines:
            self._new = _are_others(self._header, lines[0], folder)
        elif shards_of(folder):
            raise InputError(f"{folder}: expected an empty folder or an unfinished run, got records without a journal")
        self._journaled = 0 if self._new else len(lines)
        self._resume([] if self._new else lines[1:])

    def _resume(self, lines: list[Fields]) -> None:
        """Takes in what the journal says, and cuts away what it does not name."""
        ends: dict[str, int] = {}
        for line in lines:
            if "record" not in line:
                raise line.error("record", "where the record ends, or null")
            place, counts = line.fields("record", None), line.fields("counts")
            self._count(line.text("id"), {name: counts.whole(name) for name in counts})
            if place is not None:
                ends[shard_name(len(self._seals) // self._shard_pairs)] = place.whole("end")
                self._seals.append(place.text("seal"))
        newest = max(ends, default="")
        for path in shards_of(self._folder):
            if path.name > newest:
                log_at(path).remove()
            elif path.name == newest:
                self._shard(newest).truncate(ends[newest])
        for name, end in ends.items():
            if (size := self._shard(name).size) != end:
                raise InputError(f"{self._folder / name}: expected {end} bytes, as the journal says, got {size}")
        found = [
            seal_of(line, place_of(path, number), f"{path}:{number}")
            for path, number, _, line in lines_of(self._folder)
        ]
        if found != self._seals:
            raise InputError(f"{self._folder}: expected the records that the journal names, got others")

    def add(self, id: str, record: Record | None, counts: Mapping[str, int]) -> None:
        """The next document is finished: with a record, or dropped; `counts` says what was made of it, and why.

        Raises InputError if the disk is full.
        """
        if self._new:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._journal.remove()
            self._append_journal(self._header)
            self._new = False
        place = None
        if record is not None:
            path = self._folder / shard_name(len(self._seals) // self._shard_pairs)
            at = place_of(path, len(self._seals) % self._shard_pairs + 1)
            line = sealed(record.to_json(), at)
            place = {"end": self._shard(path.name).append(line), "seal": stated_seal(line)}
        self._append_journal({"id": id, "record": place, "counts": dict(counts)})
        self._count(id, counts)
        if place is not None:
            self._seals.append(place["seal"])

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Marks the stage done, with this summary and what tells its records from any others."""
        for log in (*self._shards.values(), self._journal):
            log.join()
        records = {"pairs": len(self._seals), "records": digest(*self._seals)}
        mark_done(self._folder, self._header["inputs"], {**summary, **records})

    def _append_journal(self, value: Mapping[str, Any]) -> None:
        self._journal.append(sealed(value, place_of(self._folder / _JOURNAL, self._journaled + 1)))
        self._journaled += 1

    def _shard(self, name: str) -> Log:
        if name not in self._shards:
            self._shards[name] = log_at(self._folder / name)
        return self._shards[name]

    def _count(self, id: str, counts: Mapping[str, int]) -> None:
        self.finished.append(id)
        self.counts.update(counts)


def _whole_lines(journal: Log, path: AnyPlace) -> list[Fields]:
    """The lines of a journal; a last one that was cut off is cut away."""
    data = journal.read()
    whole = data[: data.rfind(b"\n") + 1]
    journal.truncate(len(whole))
    lines = enumerate(whole.splitlines(keepends=True), start=1)
    try:
        return [unsealed(line, place_of(path, number), f"{path}:{number}") for number, line in lines]
    except InputError as error:
        raise InputError(f"{error}: delete {path.parent} to start again") from error


def _are_others(expected: Mapping[str, Any], got: Fields, folder: AnyPlace) -> bool:
    """Whether a journal is of other inputs, but no record was made with them. Raises InputError if some were."""
    if got.get("schema") != SCHEMA:
        raise got.error("schema", str(SCHEMA))
    ours, theirs = expected["inputs"], got.fields("inputs")
    for key in (*ours, *theirs):
        if ours.get(key) != theirs.get(key) or (key in ours) != (key in theirs):
            if not shards_of(folder):
                return True
            raise InputError(
                f"{folder} holds an unfinished run with {key} = {json.dumps(theirs.get(key)):.60}, expected "
                f"{json.dumps(ours.get(key)):.60}: choose another run folder, or delete {folder} to start again"
            )
    return False
