# SPDX-License-Identifier: Apache-2.0
"""Few sequences' slots under the rows of many: questions about one document read its keys and values once."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from rapid_jax.attention.online_softmax import Rows, Slots, SoftmaxState


def is_shared(rows: Rows, slots: Slots) -> bool:
    """Whether the slots are of fewer sequences than the rows: each is then that of as many rows, one behind the other.

    Raises ValueError where the sequences do not divide the rows.
    """
    few, many = slots.pos_BS.shape[0], rows.pos_BR.shape[0]
    if few < many and many % few:
        raise ValueError(f"expected rows that are a multiple of the {few} sequences of slots, got {many}")
    return few < many


def over_shared(rows: Rows, slots: Slots, attend: Callable[[Rows], SoftmaxState], *, most: int) -> SoftmaxState:
    """`attend`, which is over `slots`, for the rows that share them: slots are read once for all of their rows.

    The rows that have a sequence in common, as many as fit into `most`, are the rows of one: [B, K, R, H] with B = n m
    as [n, K, m R, H].
    """
    B, _, R, _ = rows.q_BKRH.shape
    sequences = slots.pos_BS.shape[0]
    each = B // sequences
    calls = -(-each // max(1, most // R))
    size = -(-each // calls)

    def folded(x: jax.Array, start: int) -> jax.Array:
        x = x.reshape(sequences, each, *x.shape[1:])[:, start : start + size]
        if x.ndim == 3:
            return x.reshape(sequences, -1)
        x = x.swapaxes(1, 2)
        return x.reshape(sequences, x.shape[1], -1, x.shape[4])

    def unfolded(x: jax.Array) -> jax.Array:
        return x.reshape(sequences, x.shape[1], -1, R, *x.shape[3:]).swapaxes(1, 2)

    parts = []
    for start in range(0, each, size):
        some = jax.tree.map(lambda x, start=start: folded(x, start), rows)
        parts.append(jax.tree.map(unfolded, attend(some)))
    whole = parts[0] if calls == 1 else jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *parts)
    return jax.tree.map(lambda x: x.reshape(B, *x.shape[2:]), whole)
