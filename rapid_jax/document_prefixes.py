# SPDX-License-Identifier: Apache-2.0
"""The target's keys and values of documents: the last ones in memory, others on disk."""

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

import jax
from jax.sharding import Mesh

from rapid_jax.attention.cache import Prefix
from rapid_jax.attention.kernels import kernel_of, platform_of
from rapid_jax.attention.rounded import rounded
from rapid_jax.config import RapidConfig
from rapid_jax.model.load import LoadedModel
from rapid_jax.runtime.files import digest
from rapid_jax.speculative.prefix_store import PrefixStore


class DocumentPrefixes:
    """Prefixes by the tokens of prompts, one a row, up to the end of their documents."""

    def __init__(self, config: RapidConfig, target: LoadedModel, mesh: Mesh | None, cache: Path, *, quiet: bool):
        self._config, self._target, self._mesh, self._cache, self._quiet = config, target, mesh, cache, quiet
        self._memory: dict[str, Prefix] = {}  # the last one
        self._unsaved: tuple[str, Prefix] | None = None  # to be stored once the answer is out

    def under(self, config: RapidConfig) -> "DocumentPrefixes":
        """The same under other settings, with the same memory."""
        other = DocumentPrefixes(config, self._target, self._mesh, self._cache, quiet=self._quiet)
        other._memory = self._memory
        return other

    @cached_property
    def _store(self) -> PrefixStore | None:
        limit = int(self._config.cache.disk_gib * 2**30)
        if jax.process_count() > 1 or not self._config.cache.prefixes:
            limit = 0  # every process would have to find the same entry
        place, heads = self._cache / "prefixes", self._target.config.num_kv_heads
        how = {"mesh": self._mesh, "kv_heads": heads, "root": self._cache, "quiet": self._quiet}
        return PrefixStore(place, limit, **how) if limit else None

    def of(self, heads: Sequence[list[int]], make: Callable[[], Prefix]) -> tuple[Prefix, bool]:
        """(the prefix of these rows, whether it was there already): from memory, from disk, or made anew."""
        target, compute = self._target, self._config.compute
        dtype = target.decoder.embed_VD[...].dtype
        kernel = kernel_of(compute.kernel, platform_of(target.decoder.mesh), 1)
        how = (str(compute.prefill_chunk), type(kernel).__name__, compute.kv)
        known = digest(*(",".join(map(str, head)) for head in heads), *how)
        if known in self._memory:
            return self._memory[known], True
        self._memory.clear()  # frees the last document's before the new one is made
        prefix, store, key = None, self._store, ""
        if store is not None:
            arithmetic = f"{target.config!r} on {jax.default_backend()} by {type(kernel).__name__}"
            chunk = compute.prefill_chunk
            key = store.key(target.weights_hash, heads, arithmetic=arithmetic, dtype=dtype, chunk=chunk)
            prefix = store.load(key, layout=self._config.models.layout)
        reused = prefix is not None
        if prefix is None:
            prefix = make()
            self._unsaved = None if store is None else (key, prefix)
        if compute.kv != "full":
            self.save()  # what is rounded is no longer there in full
        prefix = self.as_asked(prefix)
        self._memory[known] = prefix
        return prefix, reused

    def as_asked(self, prefix: Prefix) -> Prefix:
        """The prefix, rounded where the settings say so; the given one is then used up."""
        return prefix if self._config.compute.kv == "full" else rounded(prefix)

    def forget(self) -> None:
        """What was made last is neither kept nor stored."""
        self._unsaved = None
        self._memory.clear()

    def save(self) -> None:
        """Stores what was made anew: many gigabytes of a long document, and the answer need not wait for them."""
        unsaved, self._unsaved = self._unsaved, None
        if unsaved is not None and self._store is not None:
            self._store.save(*unsaved)
