# SPDX-License-Identifier: Apache-2.0
"""Documents from files of text, in an order that depends on the seed, the files' names and their contents alone."""

import errno
import hashlib
import heapq
import os
import sys
import tempfile
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import overload

import zstandard

from longpo_jax.config import CorpusConfig
from longpo_jax.excerpts import groups
from longpo_jax.sources import files_of
from longpo_jax.texts import texts_of
from rapid_jax.model.tokenizer import Tokenizer
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.files import digest

_TOGETHER = 4_000_000  # characters that are tokenised at once, at least
_APIECE = 128_000  # characters of a text that one processor tokenises
_CHARACTERS = 16  # a token hardly ever has as many in the mean over a text
_MARGIN = 64  # tokens by which a text's beginning alone may differ from the same in the whole text


@dataclass(frozen=True)
class Document:
    """A text, as it was read except that lines end in a newline, and its tokens as `Tokenizer.encode_quoted` counts."""

    id: str  # DOMAIN/FILE#INDEX, and .PART of a document that was split; file below the folder of the source
    domain: str
    text: str
    tokens: int


@dataclass(frozen=True)
class _Entry:
    id: str
    domain: str
    tokens: int
    offset: int
    size: int
    digest: str  # of the text


class _Spool:
    """An unnamed temporary file of texts, closed with the last who holds it."""

    def __init__(self):
        self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - it lives as long as the documents
        weakref.finalize(self, self._file.close)

    def append(self, text: str) -> tuple[int, int, str]:
        """Where it is now: (offset, bytes), and the digest of the text."""
        packed = zstandard.compress(text.encode(), 1)
        offset = self._file.tell()
        try:
            if self._file.write(packed) < len(packed):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            where = tempfile.gettempdir()
            raise InputError(f"{where}: expected room for the documents ($TMPDIR), got: {error.strerror}") from error
        return offset, len(packed), digest(text)

    def read(self, offset: int, size: int) -> str:
        return zstandard.decompress(os.pread(self._file.fileno(), size, offset)).decode()


class Documents(Sequence[Document]):
    """Documents whose texts lie in an unnamed temporary file, compressed; one is in memory while somebody holds it.

    A slice is Documents again, and reads nothing. Any number of threads may read.
    """

    def __init__(self, spool: _Spool, entries: Sequence[_Entry]):
        self._spool, self._entries = spool, entries

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def ids(self) -> list[str]:
        """Of each document, without reading it."""
        return [entry.id for entry in self._entries]

    @property
    def digest(self) -> str:
        """Of all that they are, in their order, without reading it."""
        return digest(*(part for entry in self._entries for part in (entry.id, str(entry.tokens), entry.digest)))

    @overload
    def __getitem__(self, index: int) -> Document: ...
    @overload
    def __getitem__(self, index: slice) -> "Documents": ...
    def __getitem__(self, index: int | slice) -> "Document | Documents":
        if isinstance(index, slice):
            return Documents(self._spool, self._entries[index])
        entry = self._entries[index]
        return Document(entry.id, entry.domain, self._spool.read(entry.offset, entry.size), entry.tokens)


@dataclass(frozen=True)
class Corpus:
    """The documents to learn from, and how many others were left out, by reason."""

    documents: Documents
    dropped: Mapping[str, int]


def read_corpus(config: CorpusConfig, tokenizer: Tokenizer, seed: int, *, quiet: bool = False) -> Corpus:
    """The documents of the sources with [min_tokens, max_tokens] tokens, shuffled with the seed, at most `documents`.

    Raises InputError for a source without files, a file that cannot be read, a line that is not JSON with a text (with
    its number), and if there is no document at all or none in the window.
    """
    dropped: Counter[str] = Counter()
    files = files_of(config.sources, dropped, follow_links=config.follow_links)
    store = _Store(seed, config.documents)
    least, most = sys.maxsize, 0
    parts: dict[str, int] = {}  # of a document that is split, so far
    largest = max(_TOGETHER, _CHARACTERS * config.max_tokens)

    def usable() -> Iterator[tuple[str, str, str]]:
        for id, domain, text in texts_of(files, config.text_key, config.max_mib, dropped, quiet=quiet):
            reason = _unusable(text)
            if reason is not None:
                dropped[reason] += 1
            # Whether a document that is split is beyond the limit is known for each of its parts alone.
            elif config.longer == "drop" and store.beyond(id):
                store.left_out += 1
            elif config.longer == "split" and len(text) > largest:
                for piece in _pieces(text, largest):
                    parts.setdefault(id, 0)
                    yield id, domain, piece
            else:
                yield id, domain, text

    for group in _count(usable(), tokenizer, config.max_tokens):
        counts = [tokens for *_, tokens in group]
        least, most = min(least, *counts), max(most, *counts)
        for document, kind in _documents(group, parts, tokenizer, config):
            _keep(document, config, store, dropped, kind)
    if store.left_out:
        dropped["beyond corpus.documents"] = store.left_out
    if not len(store):
        raise InputError(_nothing(config, dropped, least, most))
    return Corpus(store.documents(), dict(dropped))


def _count(
    texts: Iterable[tuple[str, str, str]], tokenizer: Tokenizer, most: int
) -> Iterator[list[tuple[str, str, str, int]]]:
    """Groups of texts with the tokens of each; those of a group are counted at once, by all processors.

    Of a text that has far more than `most` tokens in its beginning the rest is not counted: the number is estimated.
    """
    rest, limit = iter(texts), _CHARACTERS * most
    while True:
        group, characters = [], 0
        for item in rest:
            group.append(item)
            characters += min(len(item[2]), limit)
            if characters >= _TOGETHER:
                break
        if not group:
            return
        counts = tokenizer.counts([text[:limit] for *_, text in group])
        for at, (_, _, text) in enumerate(group):
            if (size := len(text)) > limit:
                estimate = counts[at] * size // limit
                counts[at] = estimate if counts[at] > most + _MARGIN else tokenizer.counts([text])[0]
        yield [(*item, count) for item, count in zip(group, counts, strict=True)]


def _documents(
    group: Sequence[tuple[str, str, str, int]], parts: dict[str, int], tokenizer: Tokenizer, config: CorpusConfig
) -> Iterator[tuple[Document, str]]:
    """Texts as documents or, where one is split, parts of it; which of the two. All processors look where to split."""
    split = [config.longer == "split" and (tokens > config.max_tokens or id in parts) for id, *_, tokens in group]
    spans = _spans([text for (_, _, text, _), is_split in zip(group, split, strict=True) if is_split], tokenizer)
    for (id, domain, text, tokens), is_split in zip(group, split, strict=True):
        if not is_split:
            yield Document(id, domain, text, tokens), "document"
            continue
        for piece, count in _parts(text, next(spans), tokenizer, config.max_tokens):
            part = parts.get(id, 0)
            parts[id] = part + 1
            yield Document(f"{id}.{part}", domain, piece, count), "part"


def _spans(texts: Sequence[str], tokenizer: Tokenizer) -> Iterator[list[tuple[int, int]]]:
    """Of each text, the characters of each token, but for tokens over the ends of the pieces that processors share."""
    cut = [list(_pieces(text, _APIECE)) for text in texts]
    found = iter(tokenizer.spans_of([piece for pieces in cut for piece in pieces]))
    for pieces in cut:
        spans: list[tuple[int, int]] = []
        at = 0
        for piece in pieces:
            spans += [(at + start, at + end) for start, end in next(found)]
            at += len(piece)
        yield spans


def _pieces(text: str, limit: int) -> Iterator[str]:
    """The text in consecutive pieces of at most `limit` characters, cut at a paragraph, line or word if there is one.

    Of a text of any length no more than a piece is then tokenised at once.
    """
    at = 0
    while len(text) - at > limit:
        ends = (text.rfind(mark, at + limit // 2, at + limit) + len(mark) for mark in ("\n\n", "\n", " "))
        end = next((end for end in ends if end > at + limit // 2), at + limit)
        yield text[at:end]
        at = end
    yield text[at:]


def _keep(document: Document, config: CorpusConfig, store: "_Store", dropped: Counter[str], kind: str) -> None:
    if document.tokens < config.min_tokens:
        dropped[f"{kind} too short"] += 1
    elif document.tokens > config.max_tokens:
        dropped[f"{kind} too long"] += 1
    else:
        store.add(document)


def _nothing(config: CorpusConfig, dropped: Mapping[str, int], least: int, most: int) -> str:
    reasons = ", ".join(f"{count} x {reason}" for reason, count in dropped.items()) or "no lines"
    if not most:
        return f"corpus.sources: expected documents, got none with text in it ({reasons})"
    return (
        f"corpus: expected documents of {config.min_tokens} to {config.max_tokens} tokens (min_tokens, max_tokens), "
        f"got none: {reasons}; the documents there have {least} to {most} tokens"
    )


class _Store:
    """Keeps the documents that come first in the seed's order, without remembering their texts."""

    def __init__(self, seed: int, limit: int | None):
        self._seed, self._limit = seed, limit
        self._last_first: list[tuple[int, str, _Entry]] = []  # a heap
        self._spool = _Spool()
        self.left_out = 0

    def __len__(self) -> int:
        return len(self._last_first)

    def _rank(self, id: str) -> int:
        return int.from_bytes(hashlib.sha256(f"{self._seed} {id}".encode()).digest()[:16])

    def beyond(self, id: str) -> bool:
        """Whether enough documents are known that come before this one."""
        return len(self) == self._limit and self._rank(id) > -self._last_first[0][0]

    def add(self, document: Document) -> None:
        if self.beyond(document.id):
            self.left_out += 1
            return
        if len(self) == self._limit:
            heapq.heappop(self._last_first)
            self.left_out += 1
        entry = _Entry(document.id, document.domain, document.tokens, *self._spool.append(document.text))
        heapq.heappush(self._last_first, (-self._rank(document.id), document.id, entry))

    def documents(self) -> Documents:
        return Documents(self._spool, [entry for _, _, entry in sorted(self._last_first, reverse=True)])


def _parts(text: str, spans: Sequence[tuple[int, int]], tokenizer: Tokenizer, limit: int) -> list[tuple[str, int]]:
    """Consecutive parts of at most `limit` tokens each, cut at paragraphs where there are any, and their tokens."""
    budget = limit
    while True:
        parts = [text[group.start : group.end] for group in groups(text, spans, "paragraphs", budget)]
        counts = tokenizer.counts(parts)
        excess = max(counts) - limit
        if excess <= 0 or budget == 1:
            return list(zip(parts, counts, strict=True))
        budget = max(1, budget - excess)  # some tokenizers make more tokens of a part alone than it has in the whole


def _unusable(text: str) -> str | None:
    if "\0" in text:
        return "binary"
    try:
        text.encode()
    except UnicodeEncodeError:  # a surrogate: from other bytes, or escaped in JSON
        return "not UTF-8"
    return None if text.strip() else "empty"
