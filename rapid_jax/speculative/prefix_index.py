# SPDX-License-Identifier: Apache-2.0
"""The index of stored prefixes in a bucket: one object, replaced where nobody else has replaced it meanwhile.

A store that does not answer counts as absent, until it is found to answer again: nobody waits for that (breaker.py).
"""

import contextlib
import json
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from rapid_jax.runtime import bucket_writes, buckets
from rapid_jax.runtime.array_store import Damaged
from rapid_jax.runtime.breaker import Breaker
from rapid_jax.runtime.bucket_place import BucketPlace
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.json_input import parse_object
from rapid_jax.speculative.prefix_folder import ENTRY
from rapid_jax.speculative.prefix_manifest import INSIDE, MANIFEST, Manifest

INDEX: Final = "index.json"
_TRIES: Final = 20  # to replace the index, which others do too
_KNOWN_S: Final = 2.0  # what was read counts as what there is
_ANSWER_S: Final = 5.0  # the store describes the index within that time, or counts as absent


@dataclass
class Index:
    """What is said of a bucket's prefixes, and the generation of the object that says it."""

    entries: dict[str, tuple[int, float]] = field(default_factory=dict)  # key -> bytes, last use
    unfinished: dict[str, float] = field(default_factory=dict)  # KEY/NAME -> since when it is written; 0: removed
    generation: str = bucket_writes.ABSENT

    def as_json(self) -> bytes:
        """What `parsed` reads."""
        return json.dumps({"entries": self.entries, "unfinished": self.unfinished}).encode()

    @classmethod
    def parsed(cls, data: bytes, generation: str, source: str) -> "Index":
        """The index that was written. Raises InputError, naming `source`, for what is none."""
        fields, index = parse_object(data, source), cls(generation=generation)
        for name, since in fields.fields("unfinished").items():
            key, _, inside = name.partition("/")
            whole = ENTRY.fullmatch(key) and (inside == MANIFEST or INSIDE.fullmatch(inside))
            if not whole or not isinstance(since, int | float):
                raise fields.error("unfinished", "the times of what is unfinished")
            index.unfinished[name] = float(since)
        for key, entry in fields.fields("entries").items():
            match entry:
                case [int() as size, int() | float() as used] if ENTRY.fullmatch(key):
                    index.entries[key] = size, float(used)
                case _:
                    raise fields.error("entries", "the bytes and times of entries")
        return index


class SharedIndex:
    """The index of a place, which any process may change; of any thread."""

    def __init__(self, place: BucketPlace):
        self._folder, self._place = place, place / INDEX
        self._lock = threading.Lock()  # of what is below
        self._last, self._last_at = Index(), -_KNOWN_S
        self._breaker = Breaker(str(place), self._now, "stored documents are not used")

    @property
    def absent(self) -> bool:
        """Whether the store did not answer when it was last asked."""
        return self._breaker.is_open

    def asking(self) -> contextlib.AbstractContextManager[None]:
        """While the store is asked for something: Unavailable, raised or noticed here, makes it absent for all."""
        return self._breaker.asking()

    def known(self) -> Index:
        """The index as it was at most 2 s ago. Raises InputError."""
        last, at = self._last, self._last_at
        return last if time.monotonic() - at < _KNOWN_S and not self.absent else self.read()

    def read(self) -> Index:
        """The index as it is now. Raises InputError."""
        with self.asking():
            index = self._now()
        self._note(index)
        return index

    def change(self, change: Callable[[Index], object]) -> None:
        """Replaces the index by what `change`, which may be called several times, makes of it. Raises InputError."""
        for _ in range(_TRIES):
            index = self.read()
            before = index.as_json()
            index = Index.parsed(before, index.generation, str(self._place))  # what is known stays as it was read
            change(index)
            if index.as_json() == before:
                return
            with contextlib.suppress(bucket_writes.Taken), self.asking():
                place, data = self._place, index.as_json()
                written = bucket_writes.write(place, data, match=index.generation)
                index.generation = written.generation
                self._note(index)
                return
            time.sleep(secrets.randbelow(1000) / 1000)
        raise InputError(f"{self._place}: was replaced by others each time that it was to be changed")

    def _note(self, index: Index) -> None:
        with self._lock:
            self._last, self._last_at = index, time.monotonic()

    def _now(self) -> Index:
        place = self._place
        for _ in range(_TRIES):
            found = place.store.object_at(place.bucket, place.key, within=_ANSWER_S)
            if found is None:
                return self._made()
            data = bytearray(found.size)
            try:
                place.store.read_into(place.bucket, found, 0, memoryview(data))
            except buckets.Replaced:
                continue
            try:
                return Index.parsed(bytes(data), found.generation, str(place))
            except InputError:
                made = self._made()
                made.generation = found.generation
                return made
        raise InputError(f"{place}: was replaced each time that it was read")

    def _made(self) -> Index:
        """An index of what is there, used just now; half of what another is about to enter may be in it."""
        index, now = Index(), time.time()
        _, folders = self._folder.store.listed(self._folder.bucket, self._folder.prefix)
        for key in (name.rstrip("/").rpartition("/")[2] for name in folders):
            if ENTRY.fullmatch(key):
                try:
                    index.entries[key] = Manifest.read(self._folder / key, key).size(), now
                except Damaged:
                    index.unfinished[f"{key}/{MANIFEST}"] = now
        return index
