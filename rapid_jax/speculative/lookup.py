# SPDX-License-Identifier: Apache-2.0
"""Level 0: drafts copied from text that was already read, at no model step.

The text is what the document, the retrieved chunks and the answer so far hold, as token ids on the device. The longest
match of the last few tokens wins; among equals the latest, so that the answer goes before the retrieved text and that
before the document.
"""

import jax
import jax.numpy as jnp


def propose(text_BM: jax.Array, recent_BR: jax.Array, *, width: int, least: int) -> tuple[jax.Array, jax.Array]:
    """(tokens [B, width] that followed the best earlier occurrence of the recent tokens, how many of them count [B]).

    `text_BM` ends a row's part with -1 where there is nothing; -1 matches nothing and ends a copy. `recent_BR` are the
    last R tokens (-1 before the first), of which at least `least` must agree. A copy of nothing has count 0.
    """
    M, R = text_BM.shape[1], recent_BR.shape[1]
    padded = jnp.pad(text_BM, ((0, 0), (R, width)), constant_values=-1)
    agree, matched_BM = jnp.ones(text_BM.shape, bool), jnp.zeros(text_BM.shape, jnp.int32)
    for back in range(1, R + 1):  # slot m continues a match of `back` tokens if text[m - back] == recent[-back]
        wanted_B1 = recent_BR[:, R - back, None]
        agree &= (padded[:, R - back : R - back + M] == wanted_B1) & (wanted_B1 >= 0)
        matched_BM += agree
    matched_BM = jnp.where(text_BM >= 0, matched_BM, 0)
    best_B = M - 1 - jnp.argmax(matched_BM[:, ::-1], axis=1)
    copied_BW = jax.vmap(lambda row, at: jax.lax.dynamic_slice_in_dim(row, at, width))(padded[:, R:], best_B)
    matched_B = jnp.take_along_axis(matched_BM, best_B[:, None], axis=1)[:, 0]
    count_B = jnp.cumprod(copied_BW >= 0, axis=1).sum(axis=1) * (matched_B >= least)
    return jnp.maximum(copied_BW, 0), count_B.astype(jnp.int32)
