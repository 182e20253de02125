# SPDX-License-Identifier: Apache-2.0
"""Which of the scored chunks the drafter reads, and in which order."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rapid_jax.retrieval.chunk import Chunk
from rapid_jax.retrieval.config import JOIN_TOKENS


@dataclass(frozen=True)
class Selection:
    """The retrieved context: chunks in document order, with what was looked at and what was kept."""

    chunks: tuple[Chunk, ...]  # in document order, no chunk twice
    scores: tuple[float, ...]  # cosine similarity with the query, one for each chunk
    considered: int  # chunks that competed
    fallback: bool  # nothing reached the threshold, and the best chunk was kept nevertheless
    join: str = "\n\n"
    seconds: float = 0.0  # wall time of the whole retrieval, chunking to selection
    runs: bool = False  # neighbours stand in `text` as they do in the document, with no `join` between them

    @property
    def kept(self) -> int:
        """Number of chunks kept."""
        return len(self.chunks)

    @property
    def tokens(self) -> int:
        """Tokens of the kept chunks, those of `join` not counted."""
        return sum(chunk.tokens for chunk in self.chunks)

    @property
    def text(self) -> str:
        """The chunks' texts, or those of runs of neighbours, with `join` between them.

        Surrounding white space is stripped; the offsets keep it.
        """
        texts: list[str] = []
        end = -1
        for chunk in self.chunks:
            if self.runs and chunk.start == end:
                texts[-1] += chunk.text
            else:
                texts.append(chunk.text)
            end = chunk.end
        return self.join.join(text.strip() for text in texts)


def select(
    scores: Sequence[float] | np.ndarray, chunks: Sequence[Chunk], k: int, threshold: float, join: str = "\n\n"
) -> Selection:
    """The k best chunks whose score reaches the threshold (score >= threshold), in document order, each once.

    Equal scores prefer the earlier chunk. If no chunk reaches the threshold the best one is kept alone and `fallback`
    says so: the official code would hand the drafter an empty document.
    """
    # Scores are float32 sums: compared in float64, a cosine of float32(0.7) would not reach a threshold of 0.7.
    values = np.asarray(scores, np.float32)
    if values.shape != (len(chunks),) or not len(chunks) or k < 1:
        raise ValueError(f"expected one score a chunk and k >= 1, got {values.shape}, {len(chunks)} chunks, k = {k}")
    if not np.isfinite(values).all():
        raise ValueError("expected finite scores")
    best_first = sorted(range(len(chunks)), key=lambda i: (-values[i], chunks[i].start))
    best_of: dict[tuple[int, int], int] = {}
    for i in best_first:
        best_of.setdefault((chunks[i].start, chunks[i].end), i)
    ranked = list(best_of.values())
    reached = [i for i in ranked[:k] if values[i] >= np.float32(threshold)]
    kept = sorted(reached or ranked[:1], key=lambda i: chunks[i].start)
    return Selection(
        chunks=tuple(chunks[i] for i in kept),
        scores=tuple(float(values[i]) for i in kept),
        considered=len(ranked),
        fallback=not reached,
        join=join,
    )


def fill(
    order: Sequence[int],
    scores: Mapping[int, float],
    chunks: Sequence[Chunk],
    budget: int,
    *,
    threshold: float | None = None,
    most: int | None = None,
    join: str = "\n\n",
) -> Selection:
    """At most `most` chunks in document order whose tokens, with JOIN_TOKENS for each, are at most `budget`.

    All of them where all fit, neighbours needing no join. Else those of `order` (numbers of chunks, best first), each
    if it still fits and its score reaches the threshold; where that is none, the first alone, as `fallback` says.
    """
    room = len(chunks) if most is None else most
    if sum(chunk.tokens for chunk in chunks) <= budget and len(chunks) <= room:
        kept, fallback = list(range(len(chunks))), False
    else:
        kept, left = [], budget
        for i in order:
            cost = chunks[i].tokens + JOIN_TOKENS
            if len(kept) < room and cost <= left and (threshold is None or scores[i] >= np.float32(threshold)):
                kept.append(i)
                left -= cost
        fallback = not kept
        kept = sorted(kept or order[:1])
    return Selection(
        chunks=tuple(chunks[i] for i in kept),
        scores=tuple(float(scores[i]) for i in kept),
        considered=len(chunks),
        fallback=fallback,
        join=join,
        runs=True,
    )
