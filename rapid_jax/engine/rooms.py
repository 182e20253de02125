# SPDX-License-Identifier: Apache-2.0
"""Room for prompts of few sizes, where requests are to share programs."""

from collections.abc import Iterable
from typing import Final

from rapid_jax.retrieval.config import RetrievalConfig, retrieved_tokens

# Tokens that there is room for at least: of a question about a document and what the chat template puts behind it,
# around a drafter's text.
QUESTION_TOKENS: Final = 128
_FRAME_TOKENS: Final = 256


# A document gets as many slots as one that programs have been compiled for, if those are no more than so many times its
# tokens. Empty slots cost memory, and time where a document is shorter than a prefill chunk, which is as wide as its
# room, and in plain XLA; the decoding kernels leave them out.
_SPARE: Final = 4


def room_of_document(tokens: int, sizes: Iterable[int]) -> int:
    """Tokens that there is room for with a document of so many; `sizes` are slots of documents that have programs."""
    return min((size for size in sizes if tokens <= size <= _SPARE * tokens), default=tokens)


def room_of_short(tokens: int, chunk: int) -> int:
    """Tokens that there is room for with a prompt of so many that others are not to begin with: of two sizes."""
    return chunk // 4 if tokens <= chunk // 4 else chunk


def room_of_retrieved(slots: int, retrieval: RetrievalConfig) -> int:
    """Tokens that a drafter's prompt has at most for any document of so many slots, whatever is found."""
    return retrieved_tokens(slots, retrieval) + _FRAME_TOKENS
