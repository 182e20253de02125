# SPDX-License-Identifier: Apache-2.0
"""Stored prefixes in a folder that this machine sees: which there are, who goes first, and that each is whole.

    folder/<key>/manifest.json, <random>/  one prefix, its arrays in the folder
    folder/<key>/lock                      held shared by who reads, exclusively by who writes or removes
    folder/.<key>.<random>/                being written or removed

The time of an entry's folder is when it was last used. A lock goes with its process: what a killed one left behind is
known by its free lock, and the next save removes it.
"""

import contextlib
import fcntl
import os
import re
import secrets
import shutil
import time
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import Final

from rapid_jax.runtime.disk_cache import BOUNDED, Entry, entries, entries_of, make_room
from rapid_jax.runtime.locked_folders import aside, lock, remove_unread
from rapid_jax.runtime.storage import AnyPlace, bytes_free
from rapid_jax.speculative.prefix_manifest import MANIFEST, Manifest

ENTRY: Final = re.compile(r"[0-9a-f]{64}")  # nothing else is ever removed, whatever folder a user has chosen
_ASIDE: Final = re.compile(r"\.[0-9a-f]{64}\.[0-9a-f]{16}")
_YOUNG_S: Final = 60.0  # a folder is made an instant before its lock is taken


class PrefixFolder:
    """The entries of a folder, by key. Any number of processes may share it."""

    def __init__(self, place: Path, max_bytes: int, root: Path | None = None):
        """With the cache folder `root` the bound is of all that is kept there (runtime/disk_cache.py)."""
        self.place, self._max_bytes, self._root = place, max_bytes, root

    absent: Final = False  # a bucket may not answer

    def asking(self) -> contextlib.AbstractContextManager[None]:
        """Around what reads or writes manifests or arrays."""
        return contextlib.nullcontext()

    def has(self, key: str) -> bool:
        """Whether there is an entry of this key, good or not."""
        return (self.place / key).is_dir()

    def still(self, key: str) -> bool:
        """As `has`."""
        return self.has(key)

    def keys(self) -> list[str]:
        """Of all entries. Raises OSError where that cannot be told."""
        return [path.name for path in self._children(ENTRY)]

    def version(self) -> Hashable:
        """Another one after an entry has come or gone; None where that cannot be told."""
        try:
            return self.place.stat().st_mtime_ns
        except FileNotFoundError:  # nothing stored yet
            return 0
        except OSError:
            return None

    def entries(self) -> list[Entry]:
        """All, with their bytes and the time of their last use."""
        return list(entries_of(self.place, "prefixes"))

    @contextlib.contextmanager
    def reading(self, key: str) -> Iterator[bool]:
        """Whether there is an entry; it stays until the context is left."""
        with lock(self.place / key, fcntl.LOCK_SH) as held:
            yield held is not None

    def used(self, key: str) -> None:
        """Notes that the entry was used just now."""
        with contextlib.suppress(OSError):  # a folder that may only be read is no less useful
            os.utime(self.place / key)

    @contextlib.contextmanager
    def writing(self, key: str, size: int) -> Iterator[Path]:
        """Yields where the arrays of an entry of `size` bytes are to be written. What `commit` has not made is gone."""
        self.place.mkdir(parents=True, exist_ok=True)
        if size > (free := bytes_free(self.place)):
            raise OSError(f"it needs {size} bytes of disk, {free:.0f} are free")
        temporary = aside(self.place / key)
        arrays = temporary / secrets.token_hex(8)
        arrays.mkdir(parents=True)
        try:
            with lock(temporary, fcntl.LOCK_EX):
                yield arrays
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def commit(self, key: str, arrays: Path, manifest: bytes, size: int) -> None:
        """Makes an entry of what has been written, at once. Raises OSError if there is one already."""
        with open(arrays.parent / MANIFEST, "wb") as file:
            file.write(manifest)
            file.flush()
            os.fsync(file.fileno())
        arrays.parent.rename(self.place / key)

    def renew(self, key: str, arrays: AnyPlace) -> None:
        """Nothing: who writes holds a lock."""

    def remove(self, key: str, inside: str | None = None) -> bool:
        """Takes the entry away, if nobody reads it; whether there is none now.

        With `inside` only if its arrays are in the folder of this name, "" for one without a manifest that is whole:
        another process may have removed that one and written another.
        """
        place = self.place / key
        return remove_unread(place, lambda: inside is None or Manifest.inside_of(place, key) == inside)

    def make_room(self, room: int, newest: str | None = None) -> list[Entry]:
        """Removes entries, the least recently used first and `newest` last, until `room` more bytes may be stored.

        One that is being read stays. Returns what it removed.
        """
        kept = self.entries() if self._root is None else entries(self._root, BOUNDED)
        return make_room(kept, self._max_bytes, room, None if newest is None else self.place / newest)

    def clean(self) -> None:
        """Removes what killed processes left half written or half removed."""
        found: list[Path] = []
        with contextlib.suppress(OSError):  # then there is nothing that could be removed
            found = self._children(_ASIDE)
        for path in found:
            with contextlib.suppress(OSError):  # another process was faster
                if time.time() - path.stat().st_mtime < _YOUNG_S:
                    continue
                with lock(path, fcntl.LOCK_EX | fcntl.LOCK_NB) as held:
                    if held is not None:
                        shutil.rmtree(path, ignore_errors=True)

    def _children(self, names: re.Pattern) -> list[Path]:
        with contextlib.suppress(FileNotFoundError):  # no folder yet
            return [path for path in self.place.iterdir() if names.fullmatch(path.name)]
        return []
