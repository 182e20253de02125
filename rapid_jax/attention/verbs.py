# SPDX-License-Identifier: Apache-2.0
"""What a decoder layer may do with its queries, keys and values: three short compositions of the algebra.

Each returns an `attend(q_BTNH, k_BTKH, v_BTKH, layer) -> (out_BTNH, kept)` for `Decoder.hidden`.
"""

from collections.abc import Callable
from typing import Any

import jax

from rapid_jax.attention.cache import KV, Prefix, Tail, write
from rapid_jax.attention.partial import Slots, attend_blockwise, attend_tiled, finish, fold, merge, unfold

Attend = Callable[[jax.Array, jax.Array, jax.Array, Any], tuple[jax.Array, Any]]


def attend_self(pos_BT: jax.Array, *, block: int, branch_BT: jax.Array | None = None) -> Attend:
    """Causal attention of a sequence over itself; nothing is kept. Differentiable."""

    def attend(q_BTNH, k_BTKH, v_BTKH, layer):
        rows = fold(q_BTNH, pos_BT, k_BTKH.shape[2], branch_BT)
        slots = Slots(k_BTKH.swapaxes(1, 2), v_BTKH.swapaxes(1, 2), pos_BT, branch_BT)
        tile = block * q_BTNH.shape[2] // k_BTKH.shape[2]
        partial = attend_tiled(rows, slots, scale=q_BTNH.shape[-1] ** -0.5, tile=tile)
        return unfold(finish(partial, q_BTNH.dtype), q_BTNH.shape[1]), None

    return attend


def attend_chunk(pos_BT: jax.Array, written: Prefix, *, block: int) -> Attend:
    """A prompt's next chunk over the prefix written so far and over itself; `layer` is the prefix's KV.

    Kept: the chunk's own KV, to be written into the prefix by the caller once for all layers.
    """

    def attend(q_BTNH, k_BTKH, v_BTKH, layer: KV):
        scale = q_BTNH.shape[-1] ** -0.5
        rows = fold(q_BTNH, pos_BT, k_BTKH.shape[2])
        far = Slots(layer.k_BKSH, layer.v_BKSH, written.pos_BS)
        chunk = KV(k_BTKH.swapaxes(1, 2), v_BTKH.swapaxes(1, 2))
        near = Slots(chunk.k_BKSH, chunk.v_BKSH, pos_BT)
        partial = merge(
            attend_blockwise(rows, far, scale=scale, block=block, used=written.used, skip=True),
            attend_blockwise(rows, near, scale=scale, block=block),
        )
        return unfold(finish(partial, q_BTNH.dtype), q_BTNH.shape[1]), chunk

    return attend


def attend_prefix_tail(prefix: Prefix, tail: Tail, pos_BT: jax.Array, *, block: int) -> Attend:
    """A few new tokens over the prefix and the tail, themselves included; `layer` is (prefix KV, tail KV).

    Kept: the tail's KV with the new tokens written from slot `length_B` on. The tail's length is the caller's to move.
    """
    tail_pos_BS = tail.slot_positions(extra=pos_BT.shape[1])

    def attend(q_BTNH, k_BTKH, v_BTKH, layer: tuple[KV, KV]):
        far_kv, near_kv = layer
        scale = q_BTNH.shape[-1] ** -0.5
        rows = fold(q_BTNH, pos_BT, k_BTKH.shape[2])
        near_kv = write(near_kv, k_BTKH.swapaxes(1, 2), v_BTKH.swapaxes(1, 2), tail.length_B)
        far = Slots(far_kv.k_BKSH, far_kv.v_BKSH, prefix.pos_BS)
        near = Slots(near_kv.k_BKSH, near_kv.v_BKSH, tail_pos_BS)
        partial = merge(
            attend_blockwise(rows, far, scale=scale, block=block),
            attend_blockwise(rows, near, scale=scale, block=block),
        )
        return unfold(finish(partial, q_BTNH.dtype), q_BTNH.shape[1]), near_kv

    return attend
