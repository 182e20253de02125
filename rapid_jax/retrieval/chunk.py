# SPDX-License-Identifier: Apache-2.0
"""Cuts a document into chunks that tile it, at the strongest separators that fit, in one pass over its tokens.

The document is tokenised once. A chunk is then a pair of offsets, its size a difference of two entries of a table of
token counts, and the furthest separator that still fits is found by bisection: nothing is tokenised twice, no piece is
searched for in the text, and a document of several megabytes takes seconds.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from rapid_jax.runtime.errors import InputError

# The character offsets [start, end) of every token of a text, in order, without special tokens: what
# `Encoding.offsets` of the `tokenizers` package holds. Two tokens may share a character (byte-level vocabularies).
TokenSpans: TypeAlias = Callable[[str], Sequence[tuple[int, int]]]

# Strongest first: blank line, newline, end of a sentence, end of a clause, space. The cut is after the match, so a
# piece ends with its separator and the next one begins with a word or with the indentation that belongs to it.
_SEPARATORS = tuple(
    re.compile(pattern)
    for pattern in (
        r"\n(?:[^\S\n]*\n)+",
        r"[\n\x0b\x0c\x85\u2028\u2029]|\r(?!\n)",
        r"[.!?\u2026][\"'\u2019\u201d\u00bb)\]]*\s|[\u3002\uff01\uff1f][\"'\u2019\u201d\u300d\u300f\uff09]*",
        r"[;,:]\s|[\uff1b\uff0c\u3001\uff1a]",
        r"\s+",
    )
)


@dataclass(frozen=True)
class Chunk:
    """A piece of a document: `text` is document[start:end], `tokens` how many of the document's tokens begin in it."""

    start: int
    end: int
    text: str
    tokens: int


class _Layout:
    """Where a document may be cut, and how many tokens lie before each place. P: the len(document) + 1 places."""

    def __init__(self, document: str, spans: Sequence[tuple[int, int]]):
        size = len(document)
        table = np.asarray(spans, np.int64).reshape(-1, 2)
        starts, ends = table[:, 0], table[:, 1]
        if len(table) and (starts.min() < 0 or ends.max() > size or (ends < starts).any()):
            raise ValueError(f"token spans must lie in [0, {size}] and not end before they start")
        begun = np.bincount(starts, minlength=size + 1)[: size + 1]
        self.tokens_before_P = np.concatenate([[0], np.cumsum(begun[:size])])
        # A token that starts at s and ends at e covers the places s+1 .. e-1: a cut there would tear it.
        wide = ends > starts + 1
        opened = np.bincount(starts[wide] + 1, minlength=size + 1)
        closed = np.bincount(ends[wide], minlength=size + 1)
        clean_P = np.cumsum(opened - closed) == 0
        places = np.arange(size + 1)
        self._clean_at_or_before_P = np.maximum.accumulate(np.where(clean_P, places, 0))
        self._cuts = [self._snap([m.end() for m in pattern.finditer(document)]) for pattern in _SEPARATORS]
        self._cuts.append(places[clean_P])
        self._counts = [self.tokens_before_P[cuts] for cuts in self._cuts]
        self.levels = len(self._cuts)

    def _snap(self, places: list[int]) -> np.ndarray:
        """The places, each moved back to the nearest one that tears no token.

        Where the space before a word belongs to the word's token (byte-level BPE, SentencePiece) the cut thereby moves
        in front of the space, and a chunk holds exactly the tokens that the document has there.
        """
        return np.unique(self._clean_at_or_before_P[np.asarray(places, np.int64)])

    def tokens(self, start: int, end: int) -> int:
        return int(self.tokens_before_P[end] - self.tokens_before_P[start])

    def furthest(self, level: int, start: int, end: int, limit: int) -> int:
        """The last cut of this level in (start, end) with at most `limit` tokens after `start`, else `start`."""
        fitting = np.searchsorted(self._counts[level], self.tokens_before_P[start] + limit, side="right") - 1
        inside = np.searchsorted(self._cuts[level], end, side="left") - 1
        last = min(fitting, inside)
        return max(int(self._cuts[level][last]), start) if last >= 0 else start

    def next(self, level: int, start: int, end: int) -> int:
        """The first cut of this level after `start`, at most `end`."""
        first = np.searchsorted(self._cuts[level], start, side="right")
        return min(int(self._cuts[level][first]), end) if first < len(self._cuts[level]) else end


def _ends(layout: _Layout, start: int, end: int, limit: int, level: int) -> list[int]:
    """Ends of the pieces of [start, end): as many pieces of this level as fit; one that does not fit, a level down."""
    ends = []
    while layout.tokens(start, end) > limit:
        cut = layout.furthest(level, start, end, limit)
        if cut > start:
            ends.append(cut)
        else:
            cut = layout.next(level, start, end)
            ends += _ends(layout, start, cut, limit, level + 1) if level + 1 < layout.levels else [cut]
        start = cut
    if start < end:
        ends.append(end)
    return ends


def _merge(layout: _Layout, ends: list[int], limit: int) -> list[int]:
    """The ends with neighbours joined wherever both fit in one chunk, so the rest of a long paragraph is not alone."""
    merged: list[int] = []
    start = 0
    for end in ends:
        if merged and layout.tokens(start, end) <= limit:
            merged[-1] = end
        else:
            start = merged[-1] if merged else 0
            merged.append(end)
    return merged


def split(document: str, token_spans: TokenSpans, chunk_tokens: int) -> list[Chunk]:
    """Chunks that tile the document: their texts, joined, are the document; each has at most `chunk_tokens` tokens.

    Pieces between the strongest separators are packed greedily; a piece that is too long is cut at the next weaker
    ones: blank line, newline, sentence, clause, space, character (the order of the official code; unlike there the
    separator stays at the end of its piece, nothing is stripped, and offsets are kept instead of searched for).
    No token is torn. Only where more than `chunk_tokens` tokens share their characters can a chunk exceed the limit.
    """
    if not document.strip():
        raise InputError("retrieval: expected a document with text in it, got an empty one")
    layout = _Layout(document, token_spans(document))
    ends = _merge(layout, _ends(layout, 0, len(document), chunk_tokens, 0), chunk_tokens)
    return [
        Chunk(start, end, document[start:end], layout.tokens(start, end))
        for start, end in zip([0, *ends[:-1]], ends, strict=True)
    ]
