# SPDX-License-Identifier: Apache-2.0
"""One sequence's slots under the rows of many: questions about one document read its keys and values once."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from rapid_jax.attention.partial import Partial, Rows, Slots


def is_shared(rows: Rows, slots: Slots) -> bool:
    """Whether the slots are of one sequence and the rows of several."""
    return slots.pos_BS.shape[0] == 1 < rows.pos_BR.shape[0]


def over_shared(rows: Rows, attend: Callable[[Rows], Partial], *, most: int) -> Partial:
    """`attend` for rows of several sequences that all see the slots of a single one: these are read once for all rows.

    The rows of as many sequences as fit into `most` are the rows of one, [B, K, R, H] as [1, K, B R, H].
    """
    B, _, R, _ = rows.q_BKRH.shape
    calls = -(-B // max(1, most // R))
    size = -(-B // calls)

    def folded(x: jax.Array) -> jax.Array:
        return x.reshape(1, -1) if x.ndim == 2 else x.swapaxes(0, 1).reshape(1, x.shape[1], -1, x.shape[3])

    def unfolded(x: jax.Array) -> jax.Array:
        return x.reshape(x.shape[1], -1, R, *x.shape[3:]).swapaxes(0, 1)

    parts = []
    for start in range(0, B, size):
        some = jax.tree.map(lambda x, start=start: folded(x[start : start + size]), rows)
        parts.append(jax.tree.map(unfolded, attend(some)))
    return parts[0] if calls == 1 else jax.tree.map(lambda *x: jnp.concatenate(x), *parts)
