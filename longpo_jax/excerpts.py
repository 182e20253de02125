# SPDX-License-Identifier: Apache-2.0
"""Short contexts cut out of a document: whole paragraphs or LaTeX sections, in groups of as many tokens as fit. Also
what is left out of the middle of a document that is too long.

The rule is that of LongPO's data scripts (arXiv 2502.13922), with three differences: tokens are counted on the document
itself, a group is a stretch of the document with its line ends, and a paragraph that is too long is cut, not dropped.
"""

import random
import re
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np

from longpo_jax.config import ExcerptsConfig
from rapid_jax.model.tokenizer import Tokenizer

_SECTION = re.compile(r"(?=\\(?:sub){0,2}section(?![a-z]))", re.IGNORECASE)
_PARAGRAPH = re.compile(r"\n(?:[^\S\n]*\n)+")
_LINE = re.compile(r"\n")
_SENTENCE = re.compile(
    r"[.!?\u2026][\"'\u2019\u201d\u00bb)\]]*\s|[\u3002\uff01\uff1f][\"'\u2019\u201d\u300d\u300f\uff09]*"
)


@dataclass(frozen=True)
class Excerpt:
    """text[start:end] of a document, and the same in its tokens: spans(text)[first:last]."""

    start: int
    end: int
    first: int
    last: int

    @property
    def tokens(self) -> int:
        """How many of the document's tokens it has."""
        return self.last - self.first


def excerpts_of(
    text: str, tokenizer: Tokenizer, config: ExcerptsConfig, seed: int
) -> tuple[list[Excerpt], Counter[str]]:
    """At most `per_document` groups of [min_tokens, max_tokens], in the document's order; how many were left out, why.

    Which ones are drawn follows from the seed and the number of groups alone. Excerpts do not overlap.
    """
    dropped: Counter[str] = Counter()
    kept = []
    for group in groups(text, tokenizer.spans(text), config.split, config.max_tokens):
        if group.tokens < config.min_tokens:
            dropped["excerpt too short"] += 1
        elif group.tokens > config.max_tokens:  # one character of more tokens
            dropped["excerpt too long"] += 1
        else:
            kept.append(group)
    drawn = sorted(random.Random(seed).sample(range(len(kept)), min(config.per_document, len(kept))))
    if len(drawn) < len(kept):
        dropped["excerpt not drawn"] = len(kept) - len(drawn)
    return [kept[index] for index in drawn], dropped


def middle_of(text: str, room: int, tokenizer: Tokenizer) -> tuple[int, int] | None:
    """The characters in the middle without which the text has at most `room` tokens; None if it has no more anyway."""
    spans = tokenizer.spans(text)
    keep = room
    while len(spans) > room:
        if keep < 1:
            return 0, len(text)
        first, last = keep - keep // 2, keep // 2
        start = spans[first - 1][1]
        end = max(start, spans[-last][0]) if last else len(text)
        tokens = len(tokenizer.encode_quoted(text[:start] + text[end:]))
        if tokens <= room:
            return start, end
        keep -= tokens - room  # a text that was cut need not have the tokens that it had
    return None


def groups(
    text: str,
    spans: Sequence[tuple[int, int]],
    split: Literal["auto", "paragraphs", "sections"],
    max_tokens: int,
) -> list[Excerpt]:
    """All of the text but the blank lines between, in consecutive groups of as many whole pieces as `max_tokens` hold.

    `spans` are the characters of each token, in order. A piece is a paragraph (up to a blank line) or a LaTeX section
    (so is what comes before the first). One that does not fit is cut at paragraphs, lines, sentences, then tokens, and
    makes groups of its own. Only a single character can have more tokens than `max_tokens`.
    """
    if split == "auto":
        split = "sections" if _SECTION.search(text) else "paragraphs"
    layout = _Layout(text, spans, sections=split == "sections")
    found: list[Excerpt] = []
    whole: list[Excerpt] = []  # pieces that fit
    for piece in layout.pieces(0, len(text), 0):
        if piece.tokens <= max_tokens:
            whole.append(piece)
            continue
        found += _joined(layout, whole, max_tokens)
        found += _joined(layout, layout.fitting(piece, 1, max_tokens), max_tokens)
        whole = []
    return found + _joined(layout, whole, max_tokens)


def _joined(layout: "_Layout", pieces: Iterable[Excerpt], limit: int) -> list[Excerpt]:
    """Neighbours in one group as long as it holds them."""
    found: list[Excerpt] = []
    for piece in pieces:
        longer = layout.excerpt(found[-1].start, piece.end) if found else piece
        if found and longer.tokens <= limit:
            found[-1] = longer
        else:
            found.append(piece)
    return found


class _Layout:
    """Where a text may be cut, strongest places first, and which tokens lie where."""

    def __init__(self, text: str, spans: Sequence[tuple[int, int]], *, sections: bool):
        self._text = text
        table = np.asarray(spans, np.int64).reshape(-1, 2)
        self._starts, self._ends = table[:, 0], table[:, 1]
        patterns = [_SECTION, _PARAGRAPH, _LINE, _SENTENCE] if sections else [_PARAGRAPH, _LINE, _SENTENCE]
        self._cuts = [[match.end() for match in pattern.finditer(text)] for pattern in patterns]
        # No token ends before the one in front of it.
        between = self._ends[:-1][self._starts[1:] >= self._ends[:-1]]  # tears no token, and no character
        self._cuts.append(between[np.diff(between, prepend=-1) > 0].tolist())

    def excerpt(self, start: int, end: int) -> Excerpt:
        """The characters with every token that has one of them."""
        first = np.searchsorted(self._ends, start, side="right")
        last = np.searchsorted(self._starts, end, side="left")
        return Excerpt(start, end, int(first), max(int(first), int(last)))

    def pieces(self, start: int, end: int, level: int) -> Iterator[Excerpt]:
        """What lies between the cuts of a level, without white space around it but a line's indentation."""
        cuts = self._cuts[level]
        inside = cuts[bisect_right(cuts, start) : bisect_left(cuts, end)]
        for left, right in pairwise([start, *inside, end]):
            body = self._text[left:right]
            if not body or body.isspace():
                continue
            word = left + len(body) - len(body.lstrip())
            newline = self._text.rfind("\n", max(left - 1, 0), word)
            begins = newline + 1 if newline >= 0 or left == 0 else word
            yield self.excerpt(begins, left + len(body.rstrip()))

    def fitting(self, piece: Excerpt, level: int, limit: int) -> Iterator[Excerpt]:
        """The piece cut at this level, and where that is not enough at the next."""
        for part in self.pieces(piece.start, piece.end, level):
            if part.tokens > limit and level + 1 < len(self._cuts):
                yield from self.fitting(part, level + 1, limit)
            else:
                yield part
