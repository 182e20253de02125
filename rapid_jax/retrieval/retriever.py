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
from rapid_jax.retrieval.config import PAPER_THRESHOLD, RetrievalConfig, chunk_count, retrieved_tokens
from rapid_jax.retrieval.index import Index
from rapid_jax.retrieval.select import Selection, fill, select
from rapid_jax.retrieval.store import EmbeddingStore
from rapid_jax.runtime.disk_cache import BOUNDED, entries, make_room
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.files import digest

_log = logging.getLogger(__name__)
_Key: TypeAlias = tuple[str, str, TokenSpans]  # whose, hash of a document, what cuts it
_BYTES_OF_CHUNK = 250  # of its offsets, its place in the list and in the index
_CANDIDATES = 4  # fill: chunks that are ranked for each full one that there is room for, at least


class TextEmbedder(Protocol):
    """What retrieval asks of an encoder; `Embedder` is one."""

    threshold: float | None  # cosine of a chunk's best window below which it says nothing; None: not known

    @functools.cached_property
    def fingerprint(self) -> str:
        """Equal for equal vectors of equal texts."""
        ...

    def embed(
        self, texts: Sequence[str], progress_label: str | None = None, *, are_queries: bool = False
    ) -> np.ndarray:
        """Unit vectors [n, E] in float32, one a text, as of documents or of queries."""
        ...

    def embed_windows(
        self, texts: Sequence[str], window_tokens: int | None, progress_label: str | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Unit vectors [W, E] of the texts' windows, and which text each is of, ascending; no text has none."""
        ...


@dataclass(frozen=True)
class _Prepared:
    """What is known of a document before any question."""

    chunks: list[Chunk]
    index: Index  # of windows
    owners_W: np.ndarray  # the chunk that each is of

    def scores(self, query_QE: np.ndarray, wanted: int, config: RetrievalConfig) -> dict[int, float]:
        """Chunk -> score of its best window, of the first query, best first: of `wanted` chunks at least, or of all."""
        most = int(np.bincount(self.owners_W).max())
        scores_QK, rows_QK = self.index.search(query_QE, wanted * most, config)
        best: dict[int, float] = {}
        for owner, score in zip(self.owners_W[rows_QK[0]].tolist(), scores_QK[0].tolist(), strict=True):
            best.setdefault(owner, score)
        return best

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
        """The chunks of `document` nearest to `query`, in its order, chosen by `fill` or, for the paper's policy, by
        `select`; `seconds` is the time of this call.

        `document` is to be what the target sees of it, after any truncation: the drafter must not read what the target
        cannot. `token_spans` tokenises with the target's tokenizer (see `TokenSpans`); a second question re-uses the
        document's chunks, vectors and index if it comes with the same callable. `length_tokens` is the length L
        of the target's whole prompt, which decides how much is taken (see `chunk_count`). What is made of the
        document is found by the same `whose` alone.
        """
        start = time.perf_counter()
        _check_text(document, "a document")
        _check_text(query, "a question")
        config = self.config
        prepared = self._prepare(document, token_spans, whose)
        count, chunks = chunk_count(length_tokens, config), prepared.chunks
        query_1E = self.embedder.embed([query], are_queries=True)
        if config.policy == "paper":
            threshold = PAPER_THRESHOLD if config.threshold is None else config.threshold
            found = prepared.scores(query_1E, count, config)
            selection = select(list(found.values()), [chunks[i] for i in found], count, threshold, join=config.join)
        else:
            threshold = self.embedder.threshold if config.threshold is None else config.threshold
            found = prepared.scores(query_1E, _CANDIDATES * count, config)
            budget, most = retrieved_tokens(length_tokens, config), config.max_chunks
            selection = fill(list(found), found, chunks, budget, threshold=threshold, most=most, join=config.join)
        return dataclasses.replace(selection, considered=len(prepared.chunks), seconds=time.perf_counter() - start)

    def _prepare(self, document: str, token_spans: TokenSpans, whose: str) -> _Prepared:
        key = (whose, digest(document), token_spans)
        # One document at a time: a second question about the same one waits for its vectors instead of making them too.
        with self._lock:
            if key in self._recent:
                self._recent.move_to_end(key)
                return self._recent[key]
            chunks = split(document, token_spans, self.config.chunk_tokens)
            prepared = _Prepared(chunks, *self._index([chunk.text for chunk in chunks], whose))
            self._recent[key] = prepared
            self._bytes += prepared.bytes
            while self._bytes > self._remember_bytes:
                self._bytes -= self._recent.popitem(last=False)[1].bytes
            return prepared

    def _vectors(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        label = None if self._quiet else "embedding"
        if self.config.policy == "paper":
            return self.embedder.embed(texts, label), np.arange(len(texts), dtype=np.int32)
        return self.embedder.embed_windows(texts, self.config.window_tokens, label)

    def _index(self, texts: list[str], whose: str) -> tuple[Index, np.ndarray]:
        """The index of the texts' windows and whose they are, as much of it from disk as is there."""
        if self._store is None or self._indices is None:
            vectors_WE, owners_W = self._vectors(texts)
            return Index.build(vectors_WE, self.config), owners_W
        windows = "mean" if self.config.policy == "paper" else str(self.config.window_tokens)
        name = self._store.key(self.embedder.fingerprint, windows, texts, whose)
        stored = self._store.load(name)
        if stored is None or stored[1].max(initial=-1) != len(texts) - 1:
            stored = self._vectors(texts)
            if self._has_room(stored[0].nbytes):
                self._store.save(name, *stored)
        vectors_WE, owners_W = stored
        settings = (self.config.index, str(self.config.exact_below), str(self.config.leaves))
        folder = self._indices / digest("index-1", name, *settings)
        if folder.is_dir():
            try:
                found = Index.load(folder)
                with contextlib.suppress(OSError):  # when it was last used
                    os.utime(folder)
                return found, owners_W
            except InputError as error:
                _log.warning("cached index is unusable and will be made again: %s", error)
        index = Index.build(vectors_WE, self.config)
        if index.kind == "tree" and self._has_room(vectors_WE.nbytes):
            try:
                index.save(folder)
            except OSError as error:
                _log.warning("the index could not be cached in %s: %s", self._indices, error)
        return index, owners_W

    def _has_room(self, wanted: int) -> bool:
        """Makes room on disk; False for what is larger than all of it."""
        if self._cache_dir is None or self._disk_bytes is None:
            return True
        if wanted > self._disk_bytes:
            return False
        make_room(entries(self._cache_dir, BOUNDED), self._disk_bytes, wanted)
        return True
