# SPDX-License-Identifier: Apache-2.0
"""Documents' keys and values on disk: a second question on a document skips its prefill.

    folder/<key>/checkpoint/      one prefix (runtime.checkpoint), its layers in parts of about 1 GiB
    folder/<key>/lock             held shared by who reads, exclusively by who writes or removes
    folder/.<key>.<random>/       being written or removed

The key is a hash of all that decides the numbers, so an entry is never out of date; what is damaged is reported,
removed and made again. The time of an entry's folder is when it was last used. A lock goes with its process: what a
killed one left behind is known by its free lock, and the next save removes it.
"""

import contextlib
import fcntl
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rapid_jax.attention.cache import KV, Prefix, capacity
from rapid_jax.attention.strategy import Strategy
from rapid_jax.model.decoder import Layout
from rapid_jax.runtime import checkpoint
from rapid_jax.runtime.disk_cache import BOUNDED, entries, entries_of, make_room
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.files import digest
from rapid_jax.runtime.json_input import shown
from rapid_jax.runtime.locked_folders import aside, lock, remove_locked, taken
from rapid_jax.runtime.mesh import placed, replicated
from rapid_jax.runtime.progress import progress
from rapid_jax.speculative.prefix_arrays import (
    empty_stack,
    layer_count,
    slots_in_order,
    slots_on,
    to_devices,
    to_host,
    with_layer,
)
from rapid_jax.speculative.prefix_heads import Place

_log = logging.getLogger(__name__)
_PART_BYTES = 1 << 30  # of layers that are on the host at a time
_MOST_LAYERS, _MOST_SLOTS = 2**12, 2**31 - 1  # of a prefix that can have been stored
_YOUNG_S = 60.0  # a folder is made an instant before its lock is taken
# Nothing else is ever removed, whatever folder a user has chosen for the store.
_ENTRY = re.compile(r"[0-9a-f]{64}")
_ASIDE = re.compile(r"\.[0-9a-f]{64}\.[0-9a-f]{16}")


class PrefixStore:
    """Prefixes under a folder, within `max_bytes`: the least recently used go first.

    A stored prefix is read back exactly (its empty slots as zeros), on whatever mesh, or not at all. Neither damage nor
    a full disk stops an answer: both are one warning. Any number of processes may share a folder.
    """

    def __init__(
        self,
        folder: Path,
        max_bytes: int,
        *,
        mesh: Mesh | None = None,
        kv_heads: int | None = None,
        root: Path | None = None,
        quiet: bool = False,
    ):
        """`mesh` is where prefixes are wanted; `kv_heads` the checkpoint's, where a mesh holds copies of them.

        With the cache folder `root` the bound is of all that is kept there (runtime/disk_cache.py).
        """
        if max_bytes < 0:
            raise InputError(f"a prefix store needs a size of at least 0 bytes, got {max_bytes}")
        self.folder, self.max_bytes, self._quiet = folder, max_bytes, quiet
        self._mesh, self._kv_heads, self._root = mesh, kv_heads, root

    @staticmethod
    def key(
        weights_hash: str, prompts: Sequence[Sequence[int]], *, arithmetic: str, dtype: jnp.dtype, chunk: int
    ) -> str:
        """The name of the prefix that `prefill` makes of these prompts with these weights.

        `arithmetic` is whatever else decides its numbers: the architecture with its rope (`repr` of a ModelConfig), the
        attention kernel, the precision of products.
        """
        rows = [np.asarray(prompt, np.int32).tobytes() for prompt in prompts]
        return digest("prefix-1", weights_hash, arithmetic, jnp.dtype(dtype).name, str(chunk), *rows)

    def load(self, key: str, *, layout: Layout, place: Place | None = None) -> Prefix | None:
        """The prefix stored under the key, on the store's mesh; None if there is none, or none to be trusted.

        Of a prompt of one row `place` takes the first tokens, and lays them out so.
        """
        folder = self.folder / key
        with lock(folder, fcntl.LOCK_SH) as held:
            if held is None:
                return None
            try:
                prefix = self._read(folder, key, layout, place)
            except (checkpoint.DamagedCheckpoint, InputError, OSError) as error:
                _log.warning("stored document in %s is unusable and will be computed again: %s", folder, error)
                if taken(folder, held, fcntl.LOCK_EX | fcntl.LOCK_NB):
                    remove_locked(folder)
                return None
        with contextlib.suppress(OSError):  # a folder that may only be read is no less useful
            os.utime(folder)
        return prefix

    def save(
        self, key: str, prefix: Prefix, marks: Sequence[str] = (), wanted: Callable[[], bool] = lambda: True
    ) -> None:
        """Stores the prefix, whole or not at all; returns when it is on disk. `marks` is what `marks` gives of it.

        One that is there already stays, and one larger than `max_bytes` is not written, nor what is no longer `wanted`.
        """
        folder = self.folder / key
        if folder.is_dir():
            return
        size = self._used_bytes(prefix)
        if size > self.max_bytes:
            _log.warning("document not stored in %s: it has %d bytes, of %d allowed", folder, size, self.max_bytes)
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.clean()
            self._evict(size)
            self._write(folder, key, prefix, marks, wanted)
            self._evict(0, newest=folder)
        except (OSError, InputError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):  # XLA's word: out of memory
                raise
            if not folder.is_dir():  # there: another process stored the same prefix first
                _log.warning("document could not be stored in %s: %s", folder, error)

    def has(self, key: str) -> bool:
        """Whether a prefix is stored under the key, good or not."""
        return (self.folder / key).is_dir()

    def remove(self, key: str) -> None:
        """Takes the entry away, if there is one and nobody reads it."""
        with lock(self.folder / key, fcntl.LOCK_EX | fcntl.LOCK_NB) as held:
            if held is not None:
                remove_locked(self.folder / key)

    def marks(self, key: str) -> list[str]:
        """What `save` was told to find the entry by; nothing of one that is damaged or gone."""
        try:
            return checkpoint.read(self.folder / key / "checkpoint").note.texts("marks", default=[])
        except (checkpoint.DamagedCheckpoint, InputError, OSError):
            return []

    def bytes(self) -> int:
        """Of all entries."""
        return sum(entry.bytes for entry in entries_of(self.folder, "prefixes"))

    def keys(self) -> list[str]:
        """Of all entries."""
        with contextlib.suppress(OSError):  # no folder yet
            return [path.name for path in self._children(_ENTRY)]
        return []

    def _write(self, folder: Path, key: str, prefix: Prefix, marks: Sequence[str], wanted: Callable[[], bool]) -> None:
        used, count = int(prefix.used), layer_count(prefix.layers)
        per_part = max(1, _PART_BYTES * count // self._used_bytes(prefix))
        slots, order, copies = prefix.pos_BS.shape[1], slots_in_order(prefix), self._copies(prefix)
        pos_BS = np.full(prefix.pos_BS.shape, -1, np.int32)
        pos_BS[:, :used] = np.asarray(prefix.pos_BS)[:, order]
        note = {"key": key, "used": used, "slots": slots, "layers": count, "layers_per_part": per_part}
        note["marks"] = list(marks)
        temporary = aside(folder)
        temporary.mkdir()
        try:
            with (
                lock(temporary, fcntl.LOCK_EX),
                checkpoint.write(temporary / "checkpoint", note) as writer,
                progress("storing the document's cache", count, "layers", quiet=self._quiet) as report,
            ):
                writer.add("positions", {"pos_BS": pos_BS})
                for part in _parts(count, per_part):
                    if not wanted():
                        break
                    writer.add(_item(part), {f"{layer}": to_host(prefix, layer, order, copies) for layer in part})
                    report.advance(len(part))
            if wanted():
                temporary.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _read(self, folder: Path, key: str, layout: Layout, place: Place | None) -> Prefix:
        stored = checkpoint.read(folder / "checkpoint")
        note = stored.note
        if note.text("key") != key:
            raise checkpoint.DamagedCheckpoint(f"{folder}: it holds another document, {shown(note['key'])}")
        count, per_part = note.whole("layers", least=1, most=_MOST_LAYERS), note.whole("layers_per_part", least=1)
        used = note.whole("used", most=_MOST_SLOTS)
        slots = slots_on(self._mesh, note.whole("slots", least=max(used, 1), most=_MOST_SLOTS))
        if place is not None and place.tokens > used:
            raise checkpoint.DamagedCheckpoint(f"{folder}: expected at least {place.tokens} tokens, got {used}")
        layers: list[KV] = []
        stack: KV | None = None
        with progress("reading the document's cache", count, "layers", quiet=self._quiet) as report:
            for part in _parts(count, per_part):
                arrays = stored.restore(_item(part))
                for layer in part:
                    own = [name for name in arrays if name.startswith(f"{layer}.")]
                    on_host = {name.partition(".")[2]: arrays.pop(name) for name in own}
                    kv = to_devices(on_host, slots if place is None else place, self._mesh)
                    if layout == "unrolled":
                        layers.append(kv)
                    else:
                        stack = with_layer(empty_stack(count, kv) if stack is None else stack, kv, layer)
                report.advance(len(part))
        layers_or_stack = tuple(layers) if stack is None else stack
        if place is not None:
            return place.prefix(layers_or_stack, self._mesh)
        pos_BS = stored.restore("positions")["pos_BS"]
        pos_BS = np.pad(pos_BS, ((0, 0), (0, slots - pos_BS.shape[1])), constant_values=-1)
        spec = Strategy(block=1, mesh=self._mesh, batch=("data",)).spec("pos_BS")
        return Prefix(layers_or_stack, placed(self._mesh, spec, pos_BS), replicated(self._mesh, np.int32(used)))

    def _copies(self, prefix: Prefix) -> int:
        held = jax.tree.leaves(prefix.layers)[0].shape[-3]
        return held // (self._kv_heads or held)

    def _used_bytes(self, prefix: Prefix) -> int:
        every = sum(leaf.nbytes for leaf in jax.tree.leaves(prefix.layers))
        return every // self._copies(prefix) // capacity(prefix.layers) * int(prefix.used)

    def clean(self) -> None:
        """Removes what killed processes left half written or half removed."""
        if not self.folder.is_dir():
            return
        for path in self._children(_ASIDE):
            with contextlib.suppress(OSError):  # another process was faster
                if time.time() - path.stat().st_mtime < _YOUNG_S:
                    continue
                with lock(path, fcntl.LOCK_EX | fcntl.LOCK_NB) as held:
                    if held is not None:
                        shutil.rmtree(path, ignore_errors=True)

    def _evict(self, room: int, newest: Path | None = None) -> None:
        """Removes entries, the least recently used first and `newest` last, until `room` more bytes may be stored.

        One that is being read stays.
        """
        kept = entries_of(self.folder, "prefixes") if self._root is None else entries(self._root, BOUNDED)
        for entry in make_room(kept, self.max_bytes, room, newest):
            if entry.path == newest:
                said = "document not kept in %s: it has %d bytes, of %d allowed"
                _log.warning(said, entry.path, entry.bytes, self.max_bytes)

    def _children(self, names: re.Pattern) -> list[Path]:
        return [path for path in self.folder.iterdir() if names.fullmatch(path.name)]


def _parts(count: int, per_part: int) -> list[range]:
    return [range(first, min(first + per_part, count)) for first in range(0, count, per_part)]


def _item(part: range) -> str:
    return f"layers-{part.start}"
