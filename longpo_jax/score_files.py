# SPDX-License-Identifier: Apache-2.0
"""The reference's scores on disk: a line a record, 32 records a file, each file whole or absent."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, TypeAlias

from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.files import replace_file, sha256_of
from rapid_jax.runtime.sealed import place_of, sealed, unsealed
from rapid_jax.runtime.storage import AnyPlace, bytes_of

References: TypeAlias = Mapping[str, Sequence[float]]  # by name, an item a turn (dpo: one item)

TOGETHER: Final = 32  # records of a file
_OWNER: Final = "inputs.txt"  # beside the scores: a digest of the inputs that they are of


def files_in(place: AnyPlace) -> list[AnyPlace]:
    """The files of a folder, in the order of their records."""
    return sorted(place.glob("scores-*.jsonl"), key=lambda path: path.name) if place.is_dir() else []


def digests_in(place: AnyPlace) -> dict[str, str]:
    """SHA-256 of each file of a folder, by its name."""
    return {path.name: sha256_of(path) for path in files_in(place)}


def scores_in(path: AnyPlace, names: Sequence[str]) -> Iterator[tuple[str, References]]:
    """(id, scores) of each line. Raises InputError, naming the line, for one that is not what was written there."""
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        values = unsealed(line, place_of(path, number), f"{path}:{number}")
        yield values.text("id"), {name: values.numbers(name) for name in names}


def is_begun(place: AnyPlace) -> bool:
    """Whether scores were written there."""
    return bytes_of(place / _OWNER) is not None


class ScoreFiles:
    """The scores of a part of the records on disk, in files that are written whole; each is of the same inputs.

    `ids` are those of all records, in their order. Raises InputError for files that are not of the first of the part.
    """

    def __init__(
        self, place: AnyPlace, key: str, ids: Sequence[str], names: Sequence[str], part: range, *, leads: bool
    ):
        self._place, self._key, self._ids, self._names, self._leads = place, key, ids, names, leads
        self.next = part.start  # the number of the record whose scores are the next to be written
        self._stop = part.stop
        self._new = True
        if leads and bytes_of(place / _OWNER) == key.encode():
            self._new = False
            for path in files_in(place):
                self._check(path)
                self.next = self._end

    @property
    def _end(self) -> int:
        """Behind the records of the next file."""
        return min(self.next + TOGETHER, self._stop)

    def _check(self, path: AnyPlace) -> None:
        """Raises InputError unless these are the scores of the next file."""
        found = [id for id, _ in scores_in(path, self._names)]
        if not found or path.name != self._path().name or found != self._ids[self.next : self._end]:
            raise InputError(
                f"{path}: expected the scores of {TOGETHER} records from number {self.next + 1} on, got others: "
                f"delete {path.parent} to make them again"
            )

    def _begin(self) -> None:
        """Nothing is there but what these inputs make."""
        for path in files_in(self._place):
            path.unlink()
        with replace_file(self._place / _OWNER) as temporary:
            temporary.write_text(self._key)
        self._new = False

    def _path(self) -> AnyPlace:
        return self._place / f"scores-{self.next // TOGETHER:05d}.jsonl"

    def add(self, scores: Sequence[Mapping[str, Any]]) -> None:
        """Of the next records."""
        if self._leads:
            path = self._path()
            self._write(b"".join(sealed(score, place_of(path, number)) for number, score in enumerate(scores, start=1)))
        self.next = self._end

    def take(self, path: AnyPlace) -> None:
        """The file of the next records, which another host has written, unless it is there."""
        if path.name >= self._path().name:
            self._check(path)
            self._write(path.read_bytes())
            self.next = self._end

    def _write(self, data: bytes) -> None:
        if self._new:
            self._begin()
        with replace_file(self._path()) as temporary:
            temporary.write_bytes(data)
