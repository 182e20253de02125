# SPDX-License-Identifier: Apache-2.0
"""What keys and values are known by: hashes of a document's head at every multiple of the prefill chunk, and of all.

Each hash goes on from the one before, from a seed that stands for everything else that makes the numbers and for whose
they are: two heads have as many marks in common as they have whole chunks, and owners have none.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rapid_jax.runtime.files import digest
from rapid_jax.speculative.prefix_store import PrefixStore


@dataclass(frozen=True)
class Name:
    """The names of one head."""

    key: str  # of all its tokens
    tokens: int  # how many
    marks: tuple[str, ...]  # of its first chunk, its first two chunks ...

    @classmethod
    def of(cls, head: Sequence[int], chunk: int, seed: str) -> "Name":
        """The names of these token ids, read `chunk` at a time."""
        data = np.asarray(head, np.int32).tobytes()
        state = hashlib.sha256(digest("heads-1", seed, str(chunk)).encode())
        marks = []
        whole = len(head) // chunk
        for index in range(whole):
            state.update(data[4 * index * chunk : 4 * (index + 1) * chunk])
            marks.append(state.copy().hexdigest())
        state.update(data[4 * whole * chunk :])
        return cls(digest("head-1", state.hexdigest(), str(len(head))), len(head), tuple(marks))


class StoredHeads:
    """The marks of what is on disk, read again when an entry has come or gone."""

    def __init__(self, store: PrefixStore):
        self._store = store
        self._changed = -1
        self._entries: dict[str, list[str]] = {}
        self._by_mark: dict[str, str] = {}

    def find(self, marks: Sequence[str], least: int) -> tuple[int, str]:
        """(how many of the marks the best entry has, its key), for more than `least` of them; else (least, "")."""
        self._look()
        for count in range(len(marks), least, -1):
            if marks[count - 1] in self._by_mark:
                return count, self._by_mark[marks[count - 1]]
        return least, ""

    def _look(self) -> None:
        try:
            changed = self._store.folder.stat().st_mtime_ns
        except OSError:  # nothing stored yet
            return
        if changed == self._changed:
            return
        known, keys = self._entries, self._store.keys()
        self._entries = {key: known[key] if key in known else self._store.marks(key) for key in keys}
        self._by_mark = {mark: key for key, marks in self._entries.items() for mark in marks}
        self._changed = changed
