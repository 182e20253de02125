# SPDX-License-Identifier: Apache-2.0
"""What keys and values are known by, and the store of them.

A name is hashes of a document's head at every multiple of the prefill chunk, and of all.

Each hash goes on from the one before, from a seed that stands for everything else that makes the numbers and for whose
they are: two heads have as many marks in common as they have whole chunks, and owners have none.
"""

import hashlib
import logging
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from rapid_jax.attention.kernels import kernel_of, platform_of
from rapid_jax.config import CacheConfig, ComputeConfig
from rapid_jax.model.decoder import Decoder
from rapid_jax.runtime.agreement import all_told, leads, told, why_not_shared
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.files import digest
from rapid_jax.runtime.storage import AnyPlace
from rapid_jax.speculative.prefix_store import PrefixStore

_log = logging.getLogger(__name__)
_LOOKING_S = 3.0  # for a file of the first process: where it does not appear nothing is stored, and nobody waits longer


@dataclass(frozen=True)
class Name:
    """The names of one head."""

    key: str  # of all its tokens
    tokens: int  # how many
    marks: tuple[str, ...]  # of its first chunk, its first two chunks ...
    room: int  # tokens that there is to be room for with it; more than those where that spares programs

    @classmethod
    def of(cls, head: Sequence[int], chunk: int, seed: str) -> "Name":
        """The names of these token ids, read `chunk` at a time."""
        data = np.asarray(head, np.int32).tobytes()
        state = hashlib.sha256(digest("heads-2", seed, str(chunk)).encode())
        marks = []
        whole = len(head) // chunk
        for index in range(whole):
            state.update(data[4 * index * chunk : 4 * (index + 1) * chunk])
            marks.append(state.copy().hexdigest())
        state.update(data[4 * whole * chunk :])
        return cls(digest("head-1", state.hexdigest(), str(len(head))), len(head), tuple(marks), len(head))


def made_by(decoder: Decoder, compute: ComputeConfig, weights: str) -> str:
    """Of all that makes keys and values of token ids, the hash of the weights too: for other numbers another text."""
    return digest(
        weights,
        repr(decoder.config),
        jax.default_backend(),
        type(kernel_of(compute.kernel, platform_of(decoder.mesh), 1)).__name__,
        jnp.dtype(decoder.embed_VD[...].dtype).name,
        compute.kv,
    )


def store_for(decoder: Decoder, cache: CacheConfig, place: AnyPlace, *, quiet: bool) -> PrefixStore | None:
    """The store below the cache folder, for prefixes on the decoder's devices; None where the settings want none.

    Nor is there one for several processes that do not all see the folder, which is said in a line.
    """
    most = min(all_told(int(cache.disk_gib * 2**30) if cache.prefixes else 0))  # each process has its own settings
    if not most:
        return None
    store = place / "prefixes"
    if refusal := why_not_shared(store, "cache.folder", _LOOKING_S):
        if leads():
            _log.warning("keys and values of documents are not stored: %s", refusal)
        return None
    root = place if isinstance(place, Path) else None
    return PrefixStore(store, most, mesh=decoder.mesh, kv_heads=decoder.config.num_kv_heads, root=root, quiet=quiet)


class StoredHeads:
    """The marks of what is on disk, read again when an entry has come or gone."""

    def __init__(self, store: PrefixStore):
        self._store = store
        self._changed: Hashable = None
        self._entries: dict[str, Sequence[str]] = {}
        self._by_mark: dict[str, str] = {}

    def find(self, marks: Sequence[str], least: int) -> tuple[int, str]:
        """(how many of the marks the best entry has, its key), for more than `least` of them; else (least, "").

        As the first process of a run finds it, on all of them, which must all ask.
        """
        count, key = told(self._found(marks, least) if leads() else None)
        return count, key

    def _found(self, marks: Sequence[str], least: int) -> tuple[int, str]:
        self._look()
        for count in range(len(marks), least, -1):
            if marks[count - 1] in self._by_mark:
                return count, self._by_mark[marks[count - 1]]
        return least, ""

    def _look(self) -> None:
        """What the store cannot tell now stays as it was, and is asked for again."""
        changed = self._store.version()
        if changed is None or changed == self._changed:
            return
        try:
            keys, known = self._store.keys(), self._entries
        except (InputError, OSError):
            return
        found = {key: known[key] if key in known else self._store.marks(key) for key in keys}
        self._entries = {key: marks for key, marks in found.items() if marks is not None}
        self._by_mark = {mark: key for key, marks in self._entries.items() for mark in marks}
        if len(self._entries) == len(found):
            self._changed = changed
