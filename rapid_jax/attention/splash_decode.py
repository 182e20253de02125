# SPDX-License-Identifier: Apache-2.0
"""Attention of a few query rows over a long prefix on TPUs: JAX's splash kernel with one block of rows a kv head.

Every block of keys and values that some row sees is fetched once, from where it lies, and no score leaves the chip's
fast memory. Rows are padded to a tile, not to the blocks of `splash.py`. Slots beyond the last whole block are attended
by plain XLA, for padding them would copy all. As in `splash.py`, float32 is multiplied at the kernel's own precision.

JAX's other kernels for decoding do not fit: `paged_attention` takes one query position and tells no softmax sums, so
that nothing can be merged with it; `ragged_paged_attention` wants keys beside values in pages of all heads.
"""

import jax.numpy as jnp

from rapid_jax.attention.partial import Partial, Rows, Slots, attend_block, block_of, merge
from rapid_jax.attention.splash import Plan, _forward, _promised_limits

TILE_ROWS = 16  # of 16-bit numbers
MOST_ROWS = 256  # more are not a few
BLOCKS = (4096, 2048, 1024, 512)  # slots: large, for every step of the kernel costs time besides its transfer


def fits(rows: Rows, slots: Slots) -> bool:
    """Whether the kernel takes these: one sequence, not rounded, no branch tags, heads of half a lane's width or more.

    A second sequence would need its keys sliced from the batch, which copies them.
    """
    B, _, R, H = rows.q_BKRH.shape
    tags = rows.branch_BR is not None and slots.branch_BS is not None
    plain = slots.k_scale_BKS is None and not tags and rows.reach_BR is None
    return plain and B == 1 and R <= MOST_ROWS and H % 64 == 0 and slots.pos_BS.shape[1] >= BLOCKS[-1]


def block_for(slots: int) -> int:
    """The largest block that leaves at most a sixty-fourth of the slots over, else the smallest."""
    return next((block for block in BLOCKS if slots % block * 64 <= slots), BLOCKS[-1])


def splash_decode(rows: Rows, slots: Slots, *, scale: float, interpret: bool = False) -> Partial:
    """Attention of the rows over one sequence's slots, whose positions ascend, empty ones last.

    `out_BKRH` is divided and rounded to the queries' dtype already. Blocks that no row sees are not fetched.
    """
    size = slots.pos_BS.shape[1]
    block = block_for(size)
    rest = size % block
    padded = -(rows.pos_BR.shape[1] // -TILE_ROWS) * TILE_ROWS
    limit_R = jnp.minimum(_promised_limits(rows, slots, padded), size - rest - 1)
    visit_S = jnp.max(limit_R) >= jnp.arange(0, size - rest, block)
    seen = _forward(rows, slots, Plan(limit_R, visit_S[None], padded, block), scale, interpret)
    return merge(seen, attend_block(rows, block_of(slots, size - rest, rest), scale=scale)) if rest else seen
