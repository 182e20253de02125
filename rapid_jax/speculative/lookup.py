# SPDX-License-Identifier: Apache-2.0
"""Prompt lookup: drafts copied from text that was already read, at no model step.

The text is what the document, the retrieved chunks and the answer so far hold, as token ids on the device. The longest
match of the last few tokens wins; among equals the latest, so that the answer goes before the retrieved text and that
before the document.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def framed(text_BM: jax.Array, reach: int, width: int) -> jax.Array:
    """The text with -1 around it, so that windows of `reach` tokens before and `width` behind each token are inside."""
    return jnp.pad(text_BM, ((0, 0), (reach, width)), constant_values=-1)


def propose(
    framed_texts: Sequence[jax.Array], recent_BR: jax.Array, *, width: int, least: int
) -> tuple[jax.Array, jax.Array]:
    """(tokens [B, width] that followed the best earlier occurrence of the recent tokens, how many of them count [B]).

    The texts, `framed` by R and `width`, stand one behind the other with a gap between; -1 matches nothing and ends a
    copy. `recent_BR` are the last R tokens (-1 before the first), of which at least `least` must agree. A copy of
    nothing has count 0.
    """
    copied_BW, matched_B = _longest(framed_texts[0], recent_BR, width)
    for text in framed_texts[1:]:
        later_BW, longer_B = _longest(text, recent_BR, width)
        is_later_B = (longer_B >= matched_B) & (longer_B > 0)
        copied_BW = jnp.where(is_later_B[:, None], later_BW, copied_BW)
        matched_B = jnp.where(is_later_B, longer_B, matched_B)
    count_B = jnp.cumprod(copied_BW >= 0, axis=1).sum(axis=1) * (matched_B >= least)
    return jnp.maximum(copied_BW, 0), count_B.astype(jnp.int32)


def _longest(framed_BM: jax.Array, recent_BR: jax.Array, width: int) -> tuple[jax.Array, jax.Array]:
    """(what followed the latest of the longest matches, -1 behind the text [B, width], how long that is [B])."""
    R = recent_BR.shape[1]
    M = framed_BM.shape[1] - R - width
    text_BM = framed_BM[:, R : R + M]
    agree, matched_BM = jnp.ones(text_BM.shape, bool), jnp.zeros(text_BM.shape, jnp.int32)
    for back in range(1, R + 1):  # slot m continues a match of `back` tokens if text[m - back] == recent[-back]
        wanted_B1 = recent_BR[:, R - back, None]
        agree &= (framed_BM[:, R - back : R - back + M] == wanted_B1) & (wanted_B1 >= 0)
        matched_BM += agree
    matched_BM = jnp.where(text_BM >= 0, matched_BM, 0)
    matched_B = jnp.max(matched_BM, axis=1)
    best_B = jnp.max(jnp.where(matched_BM == matched_B[:, None], jnp.arange(M), 0), axis=1)
    copied_BW = jax.vmap(lambda row, at: jax.lax.dynamic_slice_in_dim(row, at, width))(framed_BM, R + best_B)
    return copied_BW, matched_B
