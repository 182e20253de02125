# SPDX-License-Identifier: Apache-2.0
"""Blockwise attention in plain XLA: forward and the flash backward pass, for every platform.

Scores of one tile of rows and one block of slots exist at a time. Blocks that nobody sees are skipped. The backward
pass recomputes each block's scores from the softmax sums (FlashAttention-2, arXiv 2307.08691, Alg. 2).
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from rapid_jax.attention.contract import check_backward, check_contract
from rapid_jax.attention.kernels import Cotangent, Gradients
from rapid_jax.attention.online_softmax import (
    Rows,
    Slots,
    SoftmaxState,
    attend_tiled,
    block_of,
    pad_rows,
    pad_slots,
    rows_of,
    seen_by_some,
    visible,
)


@dataclass(frozen=True)
class Xla:
    """`Kernel` in plain XLA, `block` slots and as many query positions at a time."""

    block: int

    def forward(
        self, rows: Rows, slots: Slots, *, scale: float, runs: int = 0, used: jax.Array | None = None
    ) -> SoftmaxState:
        """Attention of the rows over the slots."""
        check_contract("xla", rows, slots)
        del runs
        return attend_tiled(rows, slots, scale=scale, tile=self.block * rows.group, block=self.block, used=used)

    def backward(self, rows: Rows, slots: Slots, cotangent: Cotangent, *, scale: float, runs: int = 0) -> Gradients:
        """Loops over the blocks of slots, and for each over the tiles of rows that see some of it."""
        check_backward("xla", rows, slots, cotangent)
        del runs
        S, R = slots.pos_BS.shape[1], rows.pos_BR.shape[1]
        block, tile = min(S, self.block), min(R, self.block * rows.group)
        slots, rows, cotangent = pad_slots(slots, block), pad_rows(rows, tile), _pad(cotangent, tile)

        def of_block(dq_BKRH, index):
            part = block_of(slots, index * block, block)

            def of_tile(index, carry):
                dq_BKRH, dk, dv = carry
                some, some_cotangent = rows_of(rows, index * tile, tile), _cotangent_of(cotangent, index * tile, tile)

                def add():
                    q, k, v = attend_block_backward(some, part, some_cotangent, scale=scale)
                    q += lax.dynamic_slice_in_dim(dq_BKRH, index * tile, tile, axis=2)
                    return lax.dynamic_update_slice_in_dim(dq_BKRH, q, index * tile, axis=2), dk + k, dv + v

                return lax.cond(seen_by_some(some, part), add, lambda: carry)

            zero = jnp.zeros(part.k_BKSH.shape, jnp.float32)
            dq_BKRH, dk, dv = lax.fori_loop(0, rows.pos_BR.shape[1] // tile, of_tile, (dq_BKRH, zero, zero))
            return dq_BKRH, (dk, dv)

        dq_BKRH = jnp.zeros(rows.q_BKRH.shape, jnp.float32)
        dq_BKRH, (dk, dv) = lax.scan(of_block, dq_BKRH, jnp.arange(slots.pos_BS.shape[1] // block))
        return dq_BKRH[:, :, :R], _joined(dk)[:, :, :S], _joined(dv)[:, :, :S]


def attend_block_backward(rows: Rows, slots: Slots, cotangent: Cotangent, *, scale: float) -> Gradients:
    """The gradients through one block of scores s = scale q.k with p = exp(s - log_sum):

    dv = p^T d_out, ds = p (d_out v^T - delta), dq = scale ds k, dk = scale ds^T q.
    """
    dtype = rows.q_BKRH.dtype
    precision = lax.Precision.HIGHEST if dtype == jnp.float32 else None

    def product(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.einsum(spec, a, b, precision=precision, preferred_element_type=jnp.float32)

    score = product("BKRH,BKSH->BKRS", rows.q_BKRH, slots.k_BKSH) * scale
    seen = visible(rows, slots)
    log_sum = jnp.where(cotangent.log_sum_BKR == -jnp.inf, 0.0, cotangent.log_sum_BKR)
    p = jnp.where(seen, jnp.exp(jnp.where(seen, score, -jnp.inf) - log_sum[..., None]), 0.0)
    dp = product("BKRH,BKSH->BKRS", cotangent.d_out_BKRH, slots.v_BKSH)
    ds = (p * (dp - cotangent.delta_BKR[..., None]) * scale).astype(dtype)
    return (
        product("BKRS,BKSH->BKRH", ds, slots.k_BKSH),
        product("BKRS,BKRH->BKSH", ds, rows.q_BKRH),
        product("BKRS,BKRH->BKSH", p.astype(dtype), cotangent.d_out_BKRH),
    )


def _pad(cotangent: Cotangent, multiple: int) -> Cotangent:
    extra = -cotangent.delta_BKR.shape[2] % multiple
    return jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, extra), (0, 0))[: x.ndim]), cotangent)


def _cotangent_of(cotangent: Cotangent, start: jax.Array, size: int) -> Cotangent:
    return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start, size, axis=2), cotangent)


def _joined(blocks: jax.Array) -> jax.Array:
    """[blocks, B, K, s, H] -> [B, K, blocks * s, H]."""
    count, B, K, size, H = blocks.shape
    return jnp.moveaxis(blocks, 0, 2).reshape(B, K, count * size, H)
