# SPDX-License-Identifier: Apache-2.0
"""Attention of a few query rows over a long prefix on TPUs: JAX's splash kernel over the blocks that are full.

Every block of keys and values is fetched once, from where it lies, also in an array of all layers: to the kernel all
of it is one line of blocks, and each kv head is told which of them are its own. No score leaves the chip's fast memory.
The last, partly filled block is attended by plain XLA. As in `splash.py`, float32 is multiplied at the kernel's own
precision.

JAX's other kernels for decoding do not fit: `paged_attention` takes one query position and tells no softmax sums, so
that nothing can be merged with it; `ragged_paged_attention` wants keys beside values in pages of all heads.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax import lax

from rapid_jax.attention.contract import check_contract
from rapid_jax.attention.partial import Partial, Rows, Slots, attend_block, block_of, merge
from rapid_jax.attention.shared_prefix import is_shared, over_shared
from rapid_jax.runtime.contract import contract

TILE_ROWS = 16  # of 16-bit numbers
MOST_ROWS = 256  # more are not a few
BLOCKS = (4096, 2048, 1024, 512)  # slots: large, for every step of the kernel costs time besides its transfer


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Stack:
    """The slots of one layer, as keys and values of all layers [L, B, K, S, H] and which layer is meant."""

    every: Slots  # all fields but the positions and the tags with a leading layer axis
    layer: jax.Array  # int32 scalar

    def one(self) -> Slots:
        """The layer's slots: a copy, to a kernel and to a loop."""
        names = ("k_BKSH", "v_BKSH", "k_scale_BKS", "v_scale_BKS")
        given = {name: getattr(self.every, name) for name in names}
        found = {
            name: lax.dynamic_index_in_dim(x, self.layer, keepdims=False) for name, x in given.items() if x is not None
        }
        return replace(self.every, **found)

    def block(self, start: jax.Array | int, size: int) -> Slots:
        """`size` of the layer's slots from `start` on: cut out of the stack at once, which XLA fuses with its use."""

        def of(x: jax.Array, axis: int) -> jax.Array:
            starts, sizes = [jnp.int32(0)] * x.ndim, list(x.shape)
            starts[0], starts[axis] = self.layer, jnp.int32(start)
            sizes[0], sizes[axis] = 1, size
            return lax.dynamic_slice(x, starts, sizes)[0]

        every = self.every
        pos_BS = lax.dynamic_slice_in_dim(every.pos_BS, start, size, axis=1)
        if every.k_scale_BKS is None or every.v_scale_BKS is None:
            return Slots(of(every.k_BKSH, 3), of(every.v_BKSH, 3), pos_BS)
        scales = of(every.k_scale_BKS, 3), of(every.v_scale_BKS, 3)
        return Slots(of(every.k_BKSH, 3), of(every.v_BKSH, 4), pos_BS, None, *scales)


def block_for(slots: int) -> int | None:
    """The largest block that divides the slots."""
    return next((block for block in BLOCKS if slots % block == 0), None)


def fits(rows: Rows, slots: Slots) -> bool:
    """Whether the kernel takes these: one sequence of whole blocks, not rounded, no tags, heads of whole or half lanes.

    Rows may be of several sequences that share that one. `slots` may be a stack's `every`.
    """
    R, H = rows.q_BKRH.shape[2:]
    tags = rows.branch_BR is not None and slots.branch_BS is not None
    plain = slots.k_scale_BKS is None and not tags and rows.reach_BR is None
    sequences, S = slots.pos_BS.shape
    return plain and sequences == 1 and R <= MOST_ROWS and H % 64 == 0 and block_for(S) is not None


def splash_decode(rows: Rows, far: Slots | Stack, *, scale: float, interpret: Any = False) -> Partial:
    """Attention of the rows over one sequence's slots, empty ones last; a row at a position sees every filled one.

    What comes of the full blocks is divided and rounded to the queries' dtype before the rest is added. Rows of several
    sequences are rows of one (`over_shared`). `interpret` may be Pallas's InterpretParams. Raises ValueError, while
    tracing, for shapes that do not go together.
    """
    slots = far if isinstance(far, Slots) else far.every
    _check(rows, far)
    if is_shared(rows, slots):
        attend = partial(splash_decode, far=far, scale=scale, interpret=interpret)
        return over_shared(rows, slots, attend, most=MOST_ROWS)
    size = slots.pos_BS.shape[1]
    block = block_for(size)
    assert block is not None
    filled = jnp.sum(slots.pos_BS >= 0, dtype=jnp.int32)
    full = filled // block
    start = jnp.minimum(full * block, size - block)  # of the last block; if that is full, too, it holds no more
    index = jnp.arange(size, dtype=jnp.int32)
    late = replace(slots, pos_BS=jnp.where(index >= full * block, slots.pos_BS, -1))
    rest = block_of(late, start, block) if isinstance(far, Slots) else Stack(late, far.layer).block(start, block)
    layer = jnp.int32(0) if isinstance(far, Slots) else far.layer
    return merge(_full_blocks(rows, slots, layer, full, block, scale, interpret), attend_block(rows, rest, scale=scale))


def _check(rows: Rows, far: Slots | Stack) -> None:
    slots = far if isinstance(far, Slots) else far.every
    with contract("splash_decode"):
        if isinstance(far, Stack):
            chex.assert_shape(far.layer, ())
            chex.assert_rank([slots.k_BKSH, slots.v_BKSH], 5)
            chex.assert_equal_shape([slots.k_BKSH, slots.v_BKSH])
        assert fits(rows, slots), (
            f"expected one sequence of whole blocks in full, at most {MOST_ROWS} rows of a kv head, heads of 64 or "
            f"more and no branch tags, got rows {rows.q_BKRH.shape} and slots {slots.k_BKSH.shape}"
        )
    one = jax.eval_shape(far.one) if isinstance(far, Stack) else slots
    check_contract("splash_decode", rows, one, shared=True)


def _full_blocks(rows: Rows, slots: Slots, layer, full, block: int, scale: float, interpret: Any) -> Partial:
    """Of the first `full` blocks of each kv head of the layer, without a mask."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo

    _, K, R, H = rows.q_BKRH.shape
    steps = slots.pos_BS.shape[1] // block
    padded = -(R // -TILE_ROWS) * TILE_ROWS
    step = jnp.arange(steps, dtype=jnp.int32)
    # Beyond the full blocks the last of them stays named, so that no other is fetched.
    own = jnp.minimum(step, jnp.maximum(full - 1, 0)) + steps * (layer * K + jnp.arange(K, dtype=jnp.int32))[:, None]
    visit = jnp.broadcast_to((step < full).astype(jnp.int32), own.shape)
    q_KRH = (rows.q_BKRH[0].astype(jnp.float32) * scale).astype(rows.q_BKRH.dtype)  # the kernel knows no scale
    out_KRH, (log_sum_KR,) = splash._splash_attention_forward(
        MaskInfo(own[:, None], None, visit[:, None], None, None),
        jnp.pad(q_KRH, ((0, 0), (0, padded - R), (0, 0))),
        slots.k_BKSH.reshape(-1, H),
        slots.v_BKSH.reshape(-1, H),
        None,
        None,
        mask_value=splash.DEFAULT_MASK_VALUE,
        is_mqa=True,
        block_sizes=splash.BlockSizes(block_q=padded, block_kv=block, block_kv_compute=512),
        residual_checkpoint_name=None,
        save_residuals=True,
        mask_function=None,
        interpret=interpret,
    )
    sees_R = (rows.pos_BR[0] >= 0) & (full > 0)
    return Partial(
        jnp.where(sees_R[:, None], out_KRH[:, :R].astype(jnp.float32), 0.0)[None],
        jnp.where(sees_R, log_sum_KR[:, :R], -jnp.inf)[None],
        jnp.broadcast_to(sees_R.astype(jnp.float32), (1, K, R)),
    )
