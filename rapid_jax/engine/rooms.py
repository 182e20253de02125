# SPDX-License-Identifier: Apache-2.0
"""Room for prompts of few sizes, where requests are to share programs."""

from typing import Final

from rapid_jax.retrieval.config import RetrievalConfig, chunk_count

# Tokens that there is room for at least: of a question about a document and what the chat template puts behind it,
# around a drafter's text, and between two chunks of it.
QUESTION_TOKENS: Final = 128
_FRAME_TOKENS: Final = 256
_JOIN_TOKENS: Final = 2


def room_of_short(tokens: int, chunk: int) -> int:
    """Tokens that there is room for with a prompt of so many that others are not to begin with: of two sizes."""
    return chunk // 4 if tokens <= chunk // 4 else chunk


def room_of_retrieved(slots: int, retrieval: RetrievalConfig) -> int:
    """Tokens that a drafter's prompt has at most for any document of so many slots, whatever is found."""
    return chunk_count(slots, retrieval) * (retrieval.chunk_tokens + _JOIN_TOKENS) + _FRAME_TOKENS
