# SPDX-License-Identifier: Apache-2.0
"""Every number of the retrieval pipeline; chunks and budgets are those of RAPID (arXiv 2502.20330, section 3.1)."""

import math
from dataclasses import dataclass
from typing import Final, Literal, get_args

from rapid_jax.runtime.errors import InputError

IndexKind = Literal["auto", "exact", "tree"]
Policy = Literal["fill", "paper"]

JOIN_TOKENS: Final = 2  # that there is room for between two chunks
PAPER_THRESHOLD: Final = 0.3  # measured by its authors for BGE-M3


@dataclass(frozen=True)
class RetrievalConfig:
    """How a document is cut, how much of it is kept for the drafter, and how it is searched.

    The paper's numbers: chunks of 512 target tokens, lambda = 24, at least 4096 tokens. Policy `paper` is its policy:
    as many chunks as would fill the budget if each were full, by the mean of their windows, above its threshold.
    Policy `fill`: all of a document that fits the budget; else chunks by their best windows until it is filled.
    """

    policy: Policy = "fill"  # which chunks are taken, above
    chunk_tokens: int = 512  # tokens of the target's tokenizer in a chunk, at most
    compression: int = 24  # lambda: the retrieved text is 1/lambda of the input, once that exceeds min_tokens
    min_tokens: int = 4096  # the retrieved text is not cut below this many tokens while the document has them
    # fill: a chunk is scored by its best window of so many of the encoder's tokens, at most, special ones and its
    # prompt included; null = its whole input.
    window_tokens: int | None = 64
    # Cosine that a chunk must reach (inclusive); null = paper: 0.3, fill: the encoder's, known of minilm alone.
    threshold: float | None = None
    max_chunks: int | None = None  # upper limit on the number of chunks whatever the length; null = no limit
    index: IndexKind = "auto"  # exact: compares with every window; tree: with the nearest leaves of a ScaNN tree
    exact_below: int = 32768  # index auto is exact for fewer windows than this
    leaves: int | None = None  # tree: number of leaves; null = sqrt(number of windows)
    leaves_to_search: int | None = None  # tree: leaves that a query looks into; null = half of them
    reorder: int | None = None  # tree: candidates compared again exactly; null = 10 per result, at least 200
    batch_size: int = 32  # texts that the encoder takes at once
    join: str = "\n\n"  # stands between two chunks in the retrieved text

    def __post_init__(self):
        # A character can be four tokens of a byte-level vocabulary: below 8 a chunk could not hold two of them.
        for name, least in (
            ("chunk_tokens", 8),
            ("compression", 1),
            ("min_tokens", 1),
            ("window_tokens", 1),
            ("max_chunks", 1),
            ("exact_below", 0),
            ("leaves", 1),
            ("leaves_to_search", 1),
            ("reorder", 1),
            ("batch_size", 1),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"retrieval.{name}: expected at least {least}, got {value}")
        if self.threshold is not None and not (math.isfinite(self.threshold) and -1.0 <= self.threshold <= 1.0):
            raise InputError(f"retrieval.threshold: expected a cosine between -1 and 1, got {self.threshold}")
        for name, known in (("index", get_args(IndexKind)), ("policy", get_args(Policy))):
            value = getattr(self, name)
            if value not in known:
                raise InputError(f"retrieval.{name}: expected one of {', '.join(known)}, got {value!r}")


def chunk_count(length_tokens: int, config: RetrievalConfig) -> int:
    """Number k of chunks that are retrieved for a prompt of `length_tokens` tokens L, in exact integer arithmetic.

    k = ceil(max(L / (chunk * lambda), min(min_tokens / chunk, L / chunk))), then at most `max_chunks`: all of a short
    input, `min_tokens` of a middling one, L / lambda of a long one (rule of the official code; with the defaults the
    last begins at 98,305 tokens, so below that more than 1/lambda is kept).
    """
    if length_tokens < 1:
        raise InputError(f"retrieval: expected a prompt of at least one token, got {length_tokens}")

    def chunks_of(tokens: int, per_chunk: int) -> int:
        return -(-tokens // per_chunk)

    compressed = chunks_of(length_tokens, config.chunk_tokens * config.compression)
    floor = chunks_of(min(config.min_tokens, length_tokens), config.chunk_tokens)
    count = max(compressed, floor)
    return count if config.max_chunks is None else min(count, config.max_chunks)


def retrieved_tokens(length_tokens: int, config: RetrievalConfig) -> int:
    """Tokens that what is retrieved for such a prompt has at most, whatever is found: of full chunks and joins."""
    return chunk_count(length_tokens, config) * (config.chunk_tokens + JOIN_TOKENS)
