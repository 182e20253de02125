# SPDX-License-Identifier: Apache-2.0
"""Documents' keys and values on disk or in a bucket: a second question on a document skips its prefill.

The arrays go through TensorStore, each process of a run writing and reading what its own devices hold
(prefix_arrays.py, prefix_reader.py); the manifest, the locks and the bound are the first process's (prefix_folder.py,
prefix_bucket.py). The key is a hash of all that decides the numbers, so an entry is never out of date; what is damaged
is reported, removed and made again.
"""

import contextlib
import logging
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path

import jax
from jax.sharding import Mesh

from rapid_jax.attention.cache import Layers, Prefix
from rapid_jax.model.decoder import Layout
from rapid_jax.runtime.agreement import READING_S, all_told, leads, told
from rapid_jax.runtime.array_store import Array, Damaged, Moves, create, opened
from rapid_jax.runtime.errors import InputError, Unavailable, legible
from rapid_jax.runtime.progress import progress
from rapid_jax.runtime.storage import AnyPlace
from rapid_jax.speculative.prefix_arrays import layer_count, steps_of, stored_arrays, stored_groups, write
from rapid_jax.speculative.prefix_bucket import entries_at
from rapid_jax.speculative.prefix_heads import Place
from rapid_jax.speculative.prefix_manifest import NEAR, Manifest, key_of
from rapid_jax.speculative.prefix_reader import read

_log = logging.getLogger(__name__)


class PrefixStore:
    """Prefixes of one row at a place, within `max_bytes`: the least recently used go first.

    A stored prefix is read back exactly (its empty slots as zeros), on whatever mesh; one whose values are not those
    written there for this document, or with a piece missing, not at all. Neither damage nor a full disk stops an
    answer: both are one warning. Any number of runs may share a place. All processes of a run, which must see the
    place, call everything in the same order but for `sees`.
    """

    def __init__(
        self,
        place: AnyPlace,
        max_bytes: int,
        *,
        mesh: Mesh | None = None,
        kv_heads: int | None = None,
        root: Path | None = None,
        quiet: bool = False,
    ):
        """`mesh` is where prefixes are wanted; `kv_heads` the checkpoint's, where a mesh holds copies of them."""
        if max_bytes < 0:
            raise InputError(f"a prefix store needs a size of at least 0 bytes, got {max_bytes}")
        self.place, self.max_bytes, self._quiet = place, max_bytes, quiet
        self._mesh, self._kv_heads = mesh, kv_heads
        self._entries = entries_at(place, max_bytes, root)

    def load(self, key: str, *, layout: Layout, place: Place) -> Prefix | None:
        """The first tokens of the prefix stored under the key, on the store's mesh and in their place.

        None if there is none, or none to be trusted.
        """
        with self._entries.reading(key) if leads() else contextlib.nullcontext(True) as there:
            if not told(there, patience=READING_S):
                return None
            prefix, fault, damaged, inside, silent = None, "", False, "", False
            try:
                with self._entries.asking():
                    manifest = Manifest.read(self.place / key, key)
                    inside = manifest.inside
                    prefix = self._read(key, manifest, layout, place)
            except Damaged as error:
                fault, damaged = str(error), True
            except (InputError, OSError) as error:
                fault, silent = legible(str(error)), isinstance(error, Unavailable)  # which `asking` has told
            every = all_told([fault, damaged, inside], patience=READING_S)
        if not any(fault for fault, _, _ in every):
            if leads():
                self._entries.used(key)
            return prefix
        if leads() and not silent and self._entries.still(key):  # else another run has removed it meanwhile
            fault, entry = next(fault for fault, _, _ in every if fault), self.place / key
            _log.warning("stored document in %s is unusable and will be computed again: %s", entry, fault)
            for inside in [inside for _, damaged, inside in every if damaged][:1]:
                self._entries.remove(key, inside)
        return None

    def save(
        self, key: str, prefix: Prefix, marks: Sequence[str] = (), wanted: Callable[[], bool] = lambda: True
    ) -> None:
        """Stores the prefix, whole or not at all; returns when it is there. `marks` is what `marks` gives of it.

        One that is there already stays, and one larger than `max_bytes` is not written, nor what is no longer `wanted`.
        """
        if told(leads() and (self._entries.has(key) or self._entries.absent), patience=READING_S):
            return
        entry, size = self.place / key, self._used_bytes(prefix)
        if size > self.max_bytes:
            if leads():
                _log.warning("document not stored in %s: it has %d bytes, of %d allowed", entry, size, self.max_bytes)
            return
        fault = self._write(key, prefix, marks, size, wanted)
        if not leads():
            return
        if fault and not self._entries.has(key):  # there: another run stored the same prefix first
            _log.warning("document could not be stored in %s: %s", entry, fault)
        with contextlib.suppress(InputError):
            for removed in self._entries.make_room(0, newest=key):
                if removed.path == entry:
                    said = "document not kept in %s: it has %d bytes, of %d allowed"
                    _log.warning(said, entry, removed.bytes, self.max_bytes)

    def has(self, key: str) -> bool:
        """Whether a prefix is stored under the key, good or not."""
        return told(leads() and self._entries.has(key), patience=READING_S)

    def sees(self, key: str) -> bool:
        """As `has`, as this process sees it; of any thread, and of any process alone."""
        return self._entries.has(key)

    def remove(self, key: str) -> None:
        """Takes the entry away, if there is one and nobody reads it."""
        if leads():
            self._entries.remove(key)

    def marks(self, key: str) -> Sequence[str] | None:
        """What `save` was told to find the entry by; nothing of one that is damaged or gone. None: not known now."""
        try:
            with self._entries.asking():
                return Manifest.read(self.place / key, key).marks
        except Damaged:
            return []
        except (InputError, OSError):
            return None

    def bytes(self) -> int:
        """Of all entries, as this process sees them; 0 where a bucket does not answer."""
        with contextlib.suppress(InputError):
            return sum(entry.bytes for entry in self._entries.entries())
        return 0

    def keys(self) -> list[str]:
        """Of all entries, as this process sees them. Raises InputError or OSError where that cannot be told."""
        return self._entries.keys()

    def version(self) -> Hashable:
        """Another one after an entry has come or gone; None where that cannot be told."""
        return self._entries.version()

    def _write(self, key: str, prefix: Prefix, marks: Sequence[str], size: int, wanted: Callable[[], bool]) -> str:
        """Stores a prefix that is wanted to its end; why it could not be stored, on every process the same."""
        copies = self._copies(prefix)
        groups, arrays = stored_groups(prefix), {}
        for before, group in groups.items():
            heads, positions = zip(*all_told(steps_of(group, copies), patience=READING_S), strict=True)
            stored = stored_arrays(group, copies, (math.gcd(*heads), math.gcd(*positions)))
            arrays |= {f"{before}{name}": array for name, array in stored.items()}
        with contextlib.ExitStack() as stack:
            folder, fault = None, ""
            if leads():
                try:
                    with self._entries.asking():
                        self._entries.clean()
                        self._entries.make_room(size)
                        folder = stack.enter_context(self._entries.writing(key, size))
                        for name, array in arrays.items():
                            create(folder / name, array)
                except (Damaged, InputError, OSError) as error:
                    fault = legible(str(error))
            fault, inside = told([fault, None if folder is None else self._below(folder)], patience=READING_S)
            if fault:
                return fault
            fault = self._write_own(key, self.place / inside, groups, copies, arrays, wanted)
            faults, wants = zip(*all_told([fault, wanted()], patience=READING_S), strict=True)
            if fault := next(filter(None, faults), ""):
                return fault
            if leads() and all(wants):
                assert folder is not None
                near_tokens = int(groups[NEAR].used) if NEAR in groups else 0
                manifest = Manifest(int(prefix.used), folder.name, arrays, marks, near_tokens)
                try:
                    self._entries.commit(key, folder, manifest.sealed(key), manifest.size())  # pyright: ignore
                except (InputError, OSError) as error:
                    fault = legible(str(error))
        return told(fault, patience=READING_S)

    def _below(self, folder: AnyPlace) -> str:
        return str(folder).removeprefix(f"{self.place}/")

    def _write_own(
        self,
        key: str,
        folder: AnyPlace,
        groups: Mapping[str, Prefix],
        copies: int,
        arrays: Mapping[str, Array],
        wanted: Callable[[], bool],
    ) -> str:
        """Writes what this process's devices hold; why that failed, if it did."""
        count = sum(layer_count(group.layers) for group in groups.values())
        try:
            with (
                self._entries.asking(),
                Moves(folder) as moves,
                progress("storing the document's cache", count, "layers", quiet=self._quiet or not leads()) as report,
            ):

                def step() -> bool:
                    report.advance(1)
                    if leads():
                        self._entries.renew(key, folder)
                    return wanted()

                for before, group in groups.items():
                    own = {name.removeprefix(before): opened(folder / name, array)
                           for name, array in arrays.items() if name.startswith(NEAR) == (before == NEAR)}  # fmt: skip
                    write(group, copies, key_of(key, before), own, moves, step)
        except (Damaged, OSError, InputError) as error:
            return legible(str(error))
        except RuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):  # XLA's word: out of memory
                raise
            return legible(str(error))
        return ""

    def _read(self, key: str, manifest: Manifest, layout: Layout, place: Place) -> Prefix:
        entry = self.place / key
        if place.tokens > manifest.tokens:
            raise Damaged(f"{entry}: expected at least {place.tokens} tokens, got {manifest.tokens}")
        folder, groups, near = entry / manifest.inside, manifest.groups, None
        if (place.window is None) != (NEAR not in groups):
            raise Damaged(f"{entry}: expected layers with a window where the model has some, got {list(groups)}")
        if place.window is not None:
            if place.tokens != manifest.tokens:
                raise ValueError(
                    f"expected all {manifest.tokens} tokens where layers have a window, got {place.tokens}"
                )
            if (near := place.near_of(manifest.near_tokens)) is None:
                raise Damaged(f"{entry}: expected all that a window sees, got its last {manifest.near_tokens} tokens")
        count, quiet = sum(arrays["k_BKSH"].shape[0] for _, arrays in groups.values()), self._quiet or not leads()
        with (
            progress("reading the document's cache", count, "layers", quiet=quiet) as report,
            Moves(folder) as moves,
        ):
            shares = self._mesh is not None  # another mesh, with larger parts, may have written it
            found: dict[str, Layers] = {}
            for before, (_, arrays) in groups.items():
                at, own = near if before == NEAR else place, key_of(key, before)
                assert at is not None
                sources = {name: opened(folder / f"{before}{name}", array, shares=shares)
                           for name, array in arrays.items()}  # fmt: skip
                found[before] = read(sources, arrays, at, layout, self._mesh, moves, own, lambda: report.advance(1))
        return place.prefix(found.get("", ()), self._mesh, found.get(NEAR, ()), near)

    def _copies(self, prefix: Prefix) -> int:
        held = jax.tree.leaves(prefix.groups[0].layers)[0].shape[-3]
        return held // (self._kv_heads or held)

    def _used_bytes(self, prefix: Prefix) -> int:
        def of(group: Prefix) -> int:
            return sum(leaf.nbytes for leaf in jax.tree.leaves(group.layers)) // group.slots * int(group.used)

        return sum(map(of, prefix.groups)) // self._copies(prefix)
