# SPDX-License-Identifier: Apache-2.0
"""From a document and a question to the chunks that the drafter reads; what belongs to the document is made once."""

import contextlib
import dataclasses
import functools
import logging
import os
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeAlias

import numpy as np

from rapid_jax.retrieval.chunk import Chunk, TokenSpans, split
from rapid_jax.retrieval.config import RetrievalConfig, chunk_count
from rapid_jax.retrieval.index import Index
from rapid_jax.retrieval.select import Selection, select
from rapid_jax.retrieval.store import EmbeddingStore
from rapid_jax.runtime.disk_cache import BOUNDED, entries, make_room
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.files import digest

_log = logging.getLogger(__name__)
_Key: TypeAlias = tuple[str, str, TokenSpans]  # whose, hash of a document, what cuts it
_BYTES_OF_CHUNK = 250  # of its offsets, its place in the list and in the index


class TextEmbedder(Protocol):
    """What retrieval asks of an encoder; `Embedder` is one."""

    @functools.cached_property
    def fingerprint(self) -> str:
        """Equal for equal vectors of equal texts."""
        ...

    def embed(self, texts: Sequence[str], progress_label: str | None = None) -> np.ndarray:
        """Unit vectors [n, E] in float32."""
        ...


@dataclass(frozen=True)
class _Prepared:
    """What is known of a document before any question."""

    chunks: list[Chunk]
    index: Index

    @property
    def bytes(self) -> int:
        """About what it takes of memory: texts, vectors, and what a chunk is made of."""
        texts = sum(sys.getsizeof(chunk.text) for chunk in self.chunks)
        return texts + len(self.index) * (self.index.dim * 4 + _BYTES_OF_CHUNK)


def _check_text(text: str, what: str) -> None:
    if not text.strip():
        raise InputError(f"retrieval: expected {what} with text in it, got an empty one")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"retrieval: expected {what} in valid Unicode, got half a character at {error.start}"
        ) from None


class Retriever:
    """Retrieves from one document at a time; remembers documents up to `remember_bytes`, the last used of them, and all
    of them on disk if told where. Of any thread. Each of those who ask has documents of their own, in memory and on
    disk: how long an answer takes tells nobody what others have asked about.

    Under `cache_dir` lie `embeddings/` (every document) and `indices/` (trees only: an exact index is built faster
    than it is read). Everything there is named by the hash of what made it, and what is damaged is made again. With
    `disk_bytes` all that is kept there stays within them (runtime/disk_cache.py).
    """

    def __init__(
        self,
        embedder: TextEmbedder,
        config: RetrievalConfig | None = None,
        cache_dir: Path | None = None,
        *,
        remember_bytes: int = 1 << 30,
        disk_bytes: int | None = None,
        quiet: bool = False,
    ):
        self.embedder = embedder
        self.config = config or RetrievalConfig()
        self._store = None if cache_dir is None else EmbeddingStore(Path(cache_dir) / "embeddings")
        self._indices = None if cache_dir is None else Path(cache_dir) / "indices"
        self._cache_dir, self._disk_bytes = cache_dir, disk_bytes
        self._remember_bytes, self._bytes = remember_bytes, 0
        self._quiet = quiet
        self._recent: OrderedDict[_Key, _Prepared] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def bytes(self) -> int:
        """Of the documents that are remembered."""
        return self._bytes

    def remembers(self, document: str, token_spans: TokenSpans, whose: str = "") -> bool:
        """Whether a question about the document finds its chunks and index in memory; counts as no use."""
        return (whose, digest(document), token_spans) in self._recent

    def retrieve(
        self, document: str, query: str, token_spans: TokenSpans, length_tokens: int, whose: str = ""
    ) -> Selection:
        """The chunks of `document` nearest to `query`, as `select` orders them; `seconds` is the time of this call.

        `document` is to be what the target sees of it, after any truncation: the drafter must not read what the target
        cannot. `token_spans` tokenises with the target's tokenizer (see `TokenSpans`); a second question re-uses the
        document's chunks, vectors and index if it comes with the same callable. `length_tokens` is the length L
        of the target's whole prompt, which decides how many chunks are taken (see `chunk_count`). What is made of the
        document is found by the same `whose` alone.
        """
        start = time.perf_counter()
        _check_text(document, "a document")
        _check_text(query, "a question")
        config = self.config
        prepared = self._prepare(document, token_spans, whose)
        count = chunk_count(length_tokens, config)
        scores_1K, ids_1K = prepared.index.search(self.embedder.embed([query]), count, config)
        selection = select(
            scores_1K[0], [prepared.chunks[i] for i in ids_1K[0]], count, config.threshold, join=config.join
        )
        return dataclasses.replace(selection, considered=len(prepared.chunks), seconds=time.perf_counter() - start)

    def _prepare(self, document: str, token_spans: TokenSpans, whose: str) -> _Prepared:
        key = (whose, digest(document), token_spans)
        # One document at a time: a second question about the same one waits for its vectors instead of making them too.
        with self._lock:
            if key in self._recent:
                self._recent.move_to_end(key)
                return self._recent[key]
            chunks = split(document, token_spans, self.config.chunk_tokens)
            prepared = _Prepared(chunks, self._index([chunk.text for chunk in chunks], whose))
            self._recent[key] = prepared
            self._bytes += prepared.bytes
            while self._bytes > self._remember_bytes:
                self._bytes -= self._recent.popitem(last=False)[1].bytes
            return prepared

    def _index(self, texts: list[str], whose: str) -> Index:
        """The index of the texts, as much of it from disk as is there."""
        label = None if self._quiet else "embedding"
        if self._store is None or self._indices is None:
            return Index.build(self.embedder.embed(texts, label), self.config)
        name = self._store.key(self.embedder.fingerprint, texts, whose)
        vectors_NE = self._store.load(name)
        if vectors_NE is None or len(vectors_NE) != len(texts):
            vectors_NE = self.embedder.embed(texts, label)
            if self._has_room(vectors_NE.nbytes):
                self._store.save(name, vectors_NE)
        settings = (self.config.index, str(self.config.exact_below), str(self.config.leaves))
        folder = self._indices / digest("index-1", name, *settings)
        if folder.is_dir():
            try:
                found = Index.load(folder)
                with contextlib.suppress(OSError):  # when it was last used
                    os.utime(folder)
                return found
            except InputError as error:
                _log.warning("cached index is unusable and will be made again: %s", error)
        index = Index.build(vectors_NE, self.config)
        if index.kind == "tree" and self._has_room(vectors_NE.nbytes):
            try:
                index.save(folder)
            except OSError as error:
                _log.warning("the index could not be cached in %s: %s", self._indices, error)
        return index

    def _has_room(self, wanted: int) -> bool:
        """Makes room on disk; False for what is larger than all of it."""
        if self._cache_dir is None or self._disk_bytes is None:
            return True
        if wanted > self._disk_bytes:
            return False
        make_room(entries(self._cache_dir, BOUNDED), self._disk_bytes, wanted)
        return True
