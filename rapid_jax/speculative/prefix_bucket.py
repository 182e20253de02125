# SPDX-License-Identifier: Apache-2.0
"""Stored prefixes in a bucket: which there are, who goes first, and that each is whole.

    PLACE/index.json                       entries with their bytes and last use; what is half written or half removed
    PLACE/<key>/manifest.json              of one prefix, written after its arrays
    PLACE/<key>/<random>/                  its arrays

A bucket has no folder that could be moved, no locks and no time of a last use. What counts is in the index: one object,
which is replaced where nobody else has replaced it meanwhile. An entry is taken out of it before its objects go, and
comes into it after they have come; what a killed process leaves is named there, too. Who reads what another process
removes finds objects missing, which is no entry. A lost index is made again of the manifests.
"""

import contextlib
import json
import re
import secrets
import time
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from rapid_jax.runtime import bucket_writes, buckets
from rapid_jax.runtime.array_store import Damaged
from rapid_jax.runtime.bucket_place import BucketPlace
from rapid_jax.runtime.errors import InputError, Unavailable
from rapid_jax.runtime.files import remove_folder
from rapid_jax.runtime.json_input import parse_object
from rapid_jax.runtime.storage import AnyPlace
from rapid_jax.speculative.prefix_folder import ENTRY, PrefixFolder
from rapid_jax.speculative.prefix_manifest import MANIFEST, Manifest

_INDEX: Final = "index.json"
_TRIES: Final = 20  # to replace the index, which others do too
_ABANDONED_S: Final = 3600.0  # no entry takes as long to be written
_UNFINISHED: Final = re.compile(r"[0-9a-f]{64}/[^/]+")


@dataclass(frozen=True)
class BucketEntry:
    """One prefix that is kept, as `disk_cache.Entry` on this machine."""

    path: BucketPlace
    bytes: int
    used: float
    kind: str = "prefixes"


@dataclass
class _Index:
    entries: dict[str, tuple[int, float]] = field(default_factory=dict)  # key -> bytes, last use
    unfinished: dict[str, float] = field(default_factory=dict)  # KEY/NAME -> since when it is written; 0: removed
    generation: str = bucket_writes.ABSENT

    def as_json(self) -> bytes:
        return json.dumps({"entries": self.entries, "unfinished": self.unfinished}).encode()


class PrefixBucket:
    """The entries of a folder in a bucket, by key. Any number of processes may share it."""

    def __init__(self, place: BucketPlace, max_bytes: int):
        """`place` is one of `working_place`."""
        self.place, self._max_bytes = place, max_bytes

    def has(self, key: str) -> bool:
        """Whether there is an entry of this key, good or not; where the store does not answer, not."""
        return key in self._known().entries

    def keys(self) -> list[str]:
        """Of all entries."""
        return list(self._known().entries)

    def version(self) -> Hashable:
        """Another one after an entry has come or gone."""
        return self._known().generation

    def entries(self) -> list[BucketEntry]:
        """All, with their bytes and the time of their last use."""
        found = self._read().entries.items()
        return [BucketEntry(self.place / key, size, used) for key, (size, used) in found]

    @contextlib.contextmanager
    def reading(self, key: str) -> Iterator[bool]:
        """Whether there is an entry; others may remove it all the same."""
        yield self.has(key)

    def used(self, key: str) -> None:
        """Notes that the entry was used just now."""

        def note(index: _Index) -> None:
            if key in index.entries:
                index.entries[key] = index.entries[key][0], time.time()

        with contextlib.suppress(InputError):  # a bucket that may only be read is no less useful
            self._change(note)

    @contextlib.contextmanager
    def writing(self, key: str, size: int) -> Iterator[BucketPlace]:
        """Yields where the arrays of an entry of `size` bytes are to be written. What `commit` has not made is gone."""
        name = f"{key}/{secrets.token_hex(8)}"
        self._change(lambda index: index.unfinished.update({name: time.time()}))
        try:
            yield self.place / name
        finally:
            with contextlib.suppress(InputError):
                if name in self._read().unfinished:
                    self._delete(name)

    def commit(self, key: str, arrays: BucketPlace, manifest: bytes, size: int) -> None:
        """Makes an entry of what has been written, at once. Raises InputError if there is one already."""
        known = self.place / key / MANIFEST
        bucket_writes.write(known.bucket, known.key, manifest, match=bucket_writes.ABSENT)

        def enter(index: _Index) -> None:
            index.entries[key] = size, time.time()
            index.unfinished.pop(f"{key}/{arrays.name}", None)

        self._change(enter)

    def remove(self, key: str) -> bool:
        """Takes the entry away; whether there is none now."""
        with contextlib.suppress(InputError):
            try:
                name = Manifest.read(self.place / key, key).inside
            except Damaged:
                name = MANIFEST  # then all of the entry goes
            leaving = f"{key}/{name}"

            def leave(index: _Index) -> None:
                if index.entries.pop(key, None) is not None:
                    index.unfinished[leaving] = 0.0

            self._change(leave)
            self._delete(leaving)
            return True
        return False

    def make_room(self, room: int, newest: str | None = None) -> list[BucketEntry]:
        """Removes entries, the least recently used first and `newest` last, until `room` more bytes may be stored.

        Returns what it removed.
        """
        found = sorted(self.entries(), key=lambda entry: (entry.path.name == newest, entry.used, entry.path.name))
        total, removed = sum(entry.bytes for entry in found), []
        for entry in found:
            if total + room <= self._max_bytes:
                break
            if self.remove(entry.path.name):
                total -= entry.bytes
                removed.append(entry)
        return removed

    def clean(self) -> None:
        """Removes what killed processes left half written or half removed, an hour later."""
        with contextlib.suppress(InputError):
            for name, since in self._read().unfinished.items():
                if time.time() - since > _ABANDONED_S:
                    self._delete(name)

    def _delete(self, name: str) -> None:
        """Deletes what is unfinished, and takes it out of the index."""
        key, _, inside = name.partition("/")
        entry, there = self.place / key, None
        with contextlib.suppress(Damaged):
            there = Manifest.read(entry, key).inside
        if there == inside:
            (entry / MANIFEST).unlink()
        if inside != MANIFEST:
            remove_folder(entry / inside)
        elif there is None:
            remove_folder(entry)
        self._change(lambda index: index.unfinished.pop(name, None))

    def _known(self) -> _Index:
        """The index, or where the store does not answer an empty one."""
        with contextlib.suppress(InputError):
            return self._read()
        return _Index()

    def _read(self) -> _Index:
        place = self.place / _INDEX
        for _ in range(_TRIES):
            found = buckets.object_at(place.bucket, place.key)
            if found is None:
                return self._made()
            data = bytearray(found.size)
            try:
                buckets.read_into(place.bucket, found, 0, memoryview(data))
            except Unavailable:
                raise
            except InputError:  # replaced meanwhile
                continue
            try:
                return self._parsed(bytes(data), found.generation)
            except InputError:
                made = self._made()
                made.generation = found.generation
                return made
        raise Unavailable(f"{place}: was replaced each time that it was read")

    def _parsed(self, data: bytes, generation: str) -> _Index:
        fields, index = parse_object(data, str(self.place / _INDEX)), _Index(generation=generation)
        for name, since in fields.fields("unfinished").items():
            if not _UNFINISHED.fullmatch(name) or not isinstance(since, int | float):
                raise fields.error("unfinished", "the times of what is unfinished")
            index.unfinished[name] = float(since)
        for key, entry in fields.fields("entries").items():
            match entry:
                case [int() as size, int() | float() as used] if ENTRY.fullmatch(key):
                    index.entries[key] = size, float(used)
                case _:
                    raise fields.error("entries", "the bytes and times of entries")
        return index

    def _made(self) -> _Index:
        """An index of what is there, used just now; half of what another is about to enter may be in it."""
        index, now = _Index(), time.time()
        _, folders = buckets.listed(self.place.bucket, self.place.prefix)
        for key in (name.rstrip("/").rpartition("/")[2] for name in folders):
            if ENTRY.fullmatch(key):
                try:
                    index.entries[key] = Manifest.read(self.place / key, key).size(), now
                except Damaged:
                    index.unfinished[f"{key}/{MANIFEST}"] = now
        return index

    def _change(self, change: Callable[[_Index], object]) -> None:
        place = self.place / _INDEX
        for _ in range(_TRIES):
            index = self._read()
            before = index.as_json()
            change(index)
            if index.as_json() == before:
                return
            with contextlib.suppress(bucket_writes.Taken):
                bucket_writes.write(place.bucket, place.key, index.as_json(), match=index.generation)
                return
            time.sleep(secrets.randbelow(1000) / 1000)
        raise Unavailable(f"{place}: was replaced by others each time that it was to be changed")


def entries_at(place: AnyPlace, max_bytes: int = 0, root: Path | None = None) -> PrefixFolder | PrefixBucket:
    """The entries of a store; `root` is the cache folder, of which all is bounded together with a local one."""
    return PrefixFolder(place, max_bytes, root) if isinstance(place, Path) else PrefixBucket(place, max_bytes)
