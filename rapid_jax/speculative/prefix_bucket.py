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
import secrets
import time
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rapid_jax.runtime import bucket_writes
from rapid_jax.runtime.array_store import Damaged
from rapid_jax.runtime.bucket_place import BucketPlace
from rapid_jax.runtime.errors import InputError, Unavailable
from rapid_jax.runtime.files import remove_folder
from rapid_jax.runtime.storage import AnyPlace
from rapid_jax.speculative.prefix_folder import PrefixFolder
from rapid_jax.speculative.prefix_index import Index, SharedIndex
from rapid_jax.speculative.prefix_manifest import MANIFEST, Manifest

_ABANDONED_S: Final = 3600.0  # what nobody has renewed for so long nobody writes
_RENEWED_S: Final = 600.0  # between two times that the index is told that something is still written
_USED_S: Final = 600.0  # of an entry's last use, which need not be known more exactly


@dataclass(frozen=True)
class BucketEntry:
    """One prefix that is kept, as `disk_cache.Entry` on this machine."""

    path: BucketPlace
    bytes: int
    used: float
    kind: str = "prefixes"


class PrefixBucket:
    """The entries of a folder in a bucket, by key. Any number of processes may share it."""

    def __init__(self, place: BucketPlace, max_bytes: int):
        """`place` is one of `working_place`."""
        self.place, self._max_bytes, self._index = place, max_bytes, SharedIndex(place)
        self._renewed: dict[str, float] = {}  # name of what is being written -> when the index was last told

    @property
    def absent(self) -> bool:
        """Whether the store did not answer a moment ago: until it is asked again there is nothing."""
        return self._index.absent

    def asking(self) -> contextlib.AbstractContextManager[None]:
        """Around what asks the store for manifests or arrays: Unavailable makes it absent."""
        return self._index.asking()

    def has(self, key: str) -> bool:
        """Whether there was an entry of this key, good or not, 2 s ago; where the store does not answer, not."""
        with contextlib.suppress(InputError):
            return key in self._index.known().entries
        return False

    def still(self, key: str) -> bool:
        """Whether there is an entry of this key now; where the store does not answer, not."""
        with contextlib.suppress(InputError):
            return key in self._index.read().entries
        return False

    def keys(self) -> list[str]:
        """Of all entries. Raises InputError where the store does not answer."""
        return list(self._index.known().entries)

    def version(self) -> Hashable:
        """Another one after an entry has come or gone; None where the store does not answer."""
        with contextlib.suppress(InputError):
            return self._index.known().generation
        return None

    def entries(self) -> list[BucketEntry]:
        """All, with their bytes and the time of their last use."""
        found = self._index.read().entries.items()
        return [BucketEntry(self.place / key, size, used) for key, (size, used) in found]

    @contextlib.contextmanager
    def reading(self, key: str) -> Iterator[bool]:
        """Whether there is an entry; others may remove it all the same."""
        yield self.has(key)

    def used(self, key: str) -> None:
        """Notes that the entry was used just now, if that was not noted of late: it replaces the index."""

        def note(index: Index) -> None:
            if key in index.entries and time.time() - index.entries[key][1] > _USED_S:
                index.entries[key] = index.entries[key][0], time.time()

        with contextlib.suppress(InputError):  # a bucket that may only be read is no less useful
            self._index.change(note)

    @contextlib.contextmanager
    def writing(self, key: str, size: int) -> Iterator[BucketPlace]:
        """Yields where the arrays of an entry of `size` bytes are to be written. What `commit` has not made is gone.

        Raises InputError if there is an entry, maybe one that a killed process has written to its end.
        """
        inside = secrets.token_hex(8)
        name = f"{key}/{inside}"
        with self.asking():
            if self._is_finished(key):
                raise InputError(f"{self.place / key}: another process has written it")
        self._index.change(lambda index: index.unfinished.update({name: time.time()}))
        self._renewed[name] = time.monotonic()
        try:
            yield self.place / name
        finally:
            del self._renewed[name]
            with contextlib.suppress(InputError):
                index = self._index.read()
                if (
                    name in index.unfinished
                    or key not in index.entries
                    or Manifest.inside_of(self.place / key, key) != inside
                ):
                    self._delete(name)

    def renew(self, key: str, arrays: AnyPlace) -> None:
        """Now and then, while it is written: it is not abandoned. Raises InputError if another took it for that."""
        name, kept = f"{key}/{arrays.name}", True
        if time.monotonic() - self._renewed[name] < _RENEWED_S:
            return
        self._renewed[name] = time.monotonic()

        def note(index: Index) -> None:
            nonlocal kept
            if kept := name in index.unfinished:
                index.unfinished[name] = time.time()

        with contextlib.suppress(Unavailable):  # the writing itself waits for the store, or fails
            self._index.change(note)
        if not kept:
            raise InputError(f"{self.place / name}: another process has removed it, as if nobody wrote it")

    def commit(self, key: str, arrays: BucketPlace, manifest: bytes, size: int) -> None:
        """Makes an entry of what has been written, at once. Raises InputError if there is one already.

        Nor is one made of what another process took for abandoned, and removed.
        """
        known, name = self.place / key / MANIFEST, f"{key}/{arrays.name}"
        with self.asking():
            written = bucket_writes.write(known, manifest, match=bucket_writes.ABSENT)
        gone = False

        def enter(index: Index) -> None:
            nonlocal gone
            gone = name not in index.unfinished and key not in index.entries
            if name in index.unfinished:
                index.entries[key] = size, time.time()
                del index.unfinished[name]

        self._index.change(enter)
        if gone:
            bucket_writes.delete(known, match=written.generation)
            raise InputError(f"{self.place / name}: another process has removed it, as if nobody wrote it")

    def remove(self, key: str, inside: str | None = None) -> bool:
        """Takes the entry away; whether there is none now.

        With `inside` only if its arrays are in the folder of this name, "" for one without a manifest that is whole:
        another process may have removed that one and written another.
        """
        with contextlib.suppress(InputError), self.asking():
            found = Manifest.inside_of(self.place / key, key)
            if inside is not None and found != inside:
                return False
            leaving = f"{key}/{found or MANIFEST}"  # without a manifest all of the entry goes

            def leave(index: Index) -> None:
                if index.entries.pop(key, None) is not None:
                    index.unfinished[leaving] = 0.0

            self._index.change(leave)
            self._delete(leaving)
            return True
        return False

    def make_room(self, room: int, newest: str | None = None) -> list[BucketEntry]:
        """Removes entries until `room` more bytes may be stored; those that it removed.

        The least recently used go first, and `newest` last and only if it alone is too large.
        """
        found = sorted(self.entries(), key=lambda entry: (entry.path.name == newest, entry.used, entry.path.name))
        total, removed = sum(entry.bytes for entry in found), []
        for entry in found:
            if total + room <= self._max_bytes:
                break
            if entry.path.name == newest and entry.bytes <= self._max_bytes:
                continue
            if self.remove(entry.path.name):
                total -= entry.bytes
                removed.append(entry)
        return removed

    def clean(self) -> None:
        """Removes what killed processes left half written or half removed, an hour later."""
        with contextlib.suppress(InputError):
            for name, since in self._index.read().unfinished.items():
                if time.time() - since > _ABANDONED_S:
                    self._delete(name)

    def _is_finished(self, key: str) -> bool:
        """Whether there is an entry; one whose writer was killed before the index had it is entered.

        A manifest that nobody is about to enter, and whose arrays are gone, goes: it would have each writer fail.
        """
        known = self.place / key / MANIFEST
        found = known.store.object_at(known.bucket, known.key)
        if found is None:
            return key in self._index.read().entries
        with contextlib.suppress(Damaged):
            manifest = Manifest.read(self.place / key, key)
            name = f"{key}/{manifest.inside}"

            def enter(index: Index) -> None:
                if key not in index.entries and index.unfinished.get(name):  # not 0: being removed
                    index.entries[key] = manifest.size(), time.time()
                    del index.unfinished[name]

            self._index.change(enter)
        if key in self._index.read().entries:
            return True
        bucket_writes.delete(known, match=found.generation)
        return False

    def _delete(self, name: str) -> None:
        """Deletes what is unfinished, and takes it out of the index."""
        key, _, inside = name.partition("/")
        entry, there = self.place / key, Manifest.inside_of(self.place / key, key)
        if there == inside:
            (entry / MANIFEST).unlink()
        if inside != MANIFEST:
            remove_folder(entry / inside)
        elif not there:
            written = [f"{self.place.prefix}{other}/" for other in self._index.read().unfinished if other != name]
            gone = [found.key for found in entry.below() if not found.key.startswith(tuple(written))]
            bucket_writes.delete_all(entry, gone)
        self._index.change(lambda index: index.unfinished.pop(name, None))


def entries_at(place: AnyPlace, max_bytes: int = 0, root: Path | None = None) -> PrefixFolder | PrefixBucket:
    """The entries of a store; `root` is the cache folder, of which all is bounded together with a local one."""
    return PrefixFolder(place, max_bytes, root) if isinstance(place, Path) else PrefixBucket(place, max_bytes)
