# SPDX-License-Identifier: Apache-2.0
"""Flash attention of cuDNN on NVIDIA GPUs.

cuDNN knows three masks that are of use here: every row sees the first slots up to a length, row i sees the slots up to
i, and row i sees a window of slots that ends with i. Which of them the positions amount to is decided on the device:

    0 nothing   no row sees any slot: left out
    1 same      every row sees the same slots, and they are the first ones
    2 causal    rows and slots are the same ascending positions
    3 other     each run of rows by itself, where there are several; then plain XLA: positions in another order,
                branch tags or first positions that matter
    4 window    as 2, without gaps, and each row sees as many slots as a window that is known while tracing

In the zigzag order a device's own slots are causal; of an earlier device's, all rows see the first run; of a later
device's, the second run of rows sees all, and the first nothing.

The functions behind `jax.nn.dot_product_attention` are used, since that rounds the log of the softmax sum to the
outputs' dtype and has no backward pass for a part of the keys. Private to JAX: 0.10.2 to 0.12.0 are provided for.
"""

import inspect
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax._src.cudnn import fused_attention_stablehlo as fused

from rapid_jax.attention.contract import check_backward, check_contract
from rapid_jax.attention.kernels import Cotangent, Gradients
from rapid_jax.attention.online_softmax import Rows, Slots, SoftmaxState, nothing_seen
from rapid_jax.attention.xla import Xla

NEVER = 2**31 - 1  # a position that no row sees
LEAST = 64  # query positions, and slots: fewer are not worth a kernel
HIDDEN = 1e30  # a log of the softmax sum under which every weight is 0

_Tree = TypeVar("_Tree")


@dataclass(frozen=True)
class Cudnn:
    """`Kernel` on NVIDIA GPUs for bfloat16 and float16; `block` is of the XLA path, which takes everything else."""

    block: int

    def forward(
        self, rows: Rows, slots: Slots, *, scale: float, runs: int = 0, used: jax.Array | None = None
    ) -> SoftmaxState:
        """Attention of the rows over the slots; what cuDNN attends is divided, and rounded to the queries' dtype."""
        check_contract("cudnn", rows, slots)
        if not _fits(rows, slots):
            return Xla(self.block).forward(rows, slots, scale=scale, used=used)

        def attend(rows: Rows, runs: int) -> SoftmaxState:
            kind, length_B = _kind(rows, slots)

            def other() -> SoftmaxState:
                if runs > 1:
                    return _joined(lax.map(lambda rows: attend(rows, 1), _split(rows, runs)))
                return Xla(self.block).forward(rows, slots, scale=scale, used=used)

            branches = (
                lambda: nothing_seen(rows),
                lambda: _forward(rows, slots, length_B, scale, causal=False),
                lambda: _forward(rows, slots, length_B, scale, causal=True),
                other,
                lambda: _forward(rows, slots, length_B, scale, causal=True, window=rows.window),
            )[: 4 if rows.window is None else 5]
            return lax.switch(kind, branches)

        return attend(rows, _splits(rows, runs))

    def backward(self, rows: Rows, slots: Slots, cotangent: Cotangent, *, scale: float, runs: int = 0) -> Gradients:
        """cuDNN's backward pass, given the output and the softmax sum over all keys."""
        check_backward("cudnn", rows, slots, cotangent)
        if not _fits(rows, slots):
            return Xla(self.block).backward(rows, slots, cotangent, scale=scale)

        def attend(rows: Rows, cotangent: Cotangent, runs: int) -> Gradients:
            kind, length_B = _kind(rows, slots)

            def add(dkv: tuple[jax.Array, jax.Array], run: tuple[Rows, Cotangent]):
                dq, dk, dv = attend(*run, 1)
                return (dkv[0] + dk, dkv[1] + dv), dq

            def nothing() -> Gradients:
                dq, dk = (jnp.zeros(x.shape, jnp.float32) for x in (rows.q_BKRH, slots.k_BKSH))
                return dq, dk, dk

            def other() -> Gradients:
                if runs > 1:
                    dkv, dq = lax.scan(add, nothing()[1:], _split((rows, cotangent), runs))
                    return _joined(dq), *dkv
                return Xla(self.block).backward(rows, slots, cotangent, scale=scale)

            branches = (
                nothing,
                lambda: _backward(rows, slots, cotangent, length_B, scale, causal=False),
                lambda: _backward(rows, slots, cotangent, length_B, scale, causal=True),
                other,
                lambda: _backward(rows, slots, cotangent, length_B, scale, causal=True, window=rows.window),
            )[: 4 if rows.window is None else 5]
            return lax.switch(kind, branches)

        return attend(rows, cotangent, _splits(rows, runs))


def _fits(rows: Rows, slots: Slots) -> bool:
    """Whether cuDNN takes these shapes and this dtype."""
    R, H = rows.q_BKRH.shape[2:]
    return (
        rows.q_BKRH.dtype in (jnp.bfloat16, jnp.float16)
        and H % 8 == 0
        and H <= 128
        and R % rows.group == 0
        and min(R // rows.group, slots.pos_BS.shape[1]) >= LEAST
    )


def _splits(rows: Rows, runs: int) -> int:
    """How many runs of rows may be attended one by one: 1 if they would be too few."""
    time, rest = divmod(rows.pos_BR.shape[1] // rows.group, max(runs, 1))
    return runs if runs > 1 and rest == 0 and time >= LEAST else 1


def _split(tree: _Tree, runs: int) -> _Tree:
    """Every array with its runs of rows as a new first axis."""

    def split(x: jax.Array) -> jax.Array:
        axis = min(2, x.ndim - 1)  # pos_BR, delta_BKR, q_BKRH
        return jnp.moveaxis(x.reshape(*x.shape[:axis], runs, -1, *x.shape[axis + 1 :]), axis, 0)

    return jax.tree.map(split, tree)


def _joined(tree: _Tree) -> _Tree:
    """The inverse of `_split`, for arrays whose rows are axis 2."""

    def joined(x: jax.Array) -> jax.Array:
        x = jnp.moveaxis(x, 0, 2)
        return x.reshape(*x.shape[:2], x.shape[2] * x.shape[3], *x.shape[4:])

    return jax.tree.map(joined, tree)


def _kind(rows: Rows, slots: Slots) -> tuple[jax.Array, jax.Array]:
    """(Which of the cases it is for the whole batch, how many slots a row sees in case 1: int32 [B])."""
    q_pos_BT, kv_pos_BS = rows.pos_BR[:, :: rows.group], slots.pos_BS
    filled_BS = kv_pos_BS >= 0
    latest_B = jnp.max(q_pos_BT, axis=1)
    earliest_B = jnp.min(jnp.where(q_pos_BT >= 0, q_pos_BT, NEVER), axis=1)
    seen_BS = filled_BS & (kv_pos_BS <= latest_B[:, None])
    open_B = jnp.ones_like(latest_B, bool)  # no row's first position hides a slot that another row sees
    if rows.first_BR is not None:
        first_BT = rows.first_BR[:, :: rows.group]
        seen_BS &= kv_pos_BS >= jnp.min(jnp.where(q_pos_BT >= 0, first_BT, NEVER), axis=1)[:, None]
        last_first_B = jnp.max(jnp.where(q_pos_BT >= 0, first_BT, -1), axis=1)
        open_B = jnp.all(~seen_BS | (kv_pos_BS >= last_first_B[:, None]), axis=1)
    length_B = jnp.sum(seen_BS, axis=1, dtype=jnp.int32)
    first_B = jnp.all(seen_BS == (jnp.arange(kv_pos_BS.shape[1]) < length_B[:, None]), axis=1)
    same_B = first_B & open_B & jnp.all(~seen_BS | (kv_pos_BS <= earliest_B[:, None]), axis=1)
    causal_B = windowed_B = jnp.zeros_like(first_B)
    if q_pos_BT.shape == kv_pos_BS.shape:
        ascending_B = jnp.all((kv_pos_BS[:, 1:] > kv_pos_BS[:, :-1]) | ~filled_BS[:, 1:], axis=1)
        ordered_B = first_B & ascending_B & jnp.all(q_pos_BT == kv_pos_BS, axis=1)
        causal_B = ordered_B & open_B
        if rows.window is not None:
            follows_BS = (kv_pos_BS[:, 1:] == kv_pos_BS[:, :-1] + 1) | ~filled_BS[:, 1:]
            windowed_B = ordered_B & jnp.all(follows_BS, axis=1)
    if rows.branch_BR is not None and slots.branch_BS is not None:
        agree_B = jnp.all(rows.branch_BR == 0, axis=1) | jnp.all(slots.branch_BS == 0, axis=1) | (length_B == 0)
        same_B, causal_B, windowed_B = same_B & agree_B, causal_B & agree_B, windowed_B & agree_B
    either = jnp.where(jnp.all(causal_B), 2, jnp.where(jnp.all(windowed_B), 4, 3))
    either = jnp.where(jnp.all(same_B), 1, either)
    return jnp.where(jnp.all(length_B == 0), 0, either), length_B


def _seeing(rows: Rows, length_B: jax.Array, causal: bool) -> jax.Array:
    """bool [B, 1, R]: rows that see something."""
    some_BR = rows.pos_BR >= 0
    return (some_BR if causal else some_BR & (length_B > 0)[:, None])[:, None]


def _laid_out(x: jax.Array, group: int, causal: bool) -> jax.Array:
    """Folded rows as cuDNN takes them: by query head for a causal mask; else a kv head's rows are one query head."""
    if not causal or group == 1:
        return x
    B, K, R = x.shape[:3]
    return (
        x.reshape(B, K, R // group, group, *x.shape[3:]).swapaxes(2, 3).reshape(B, K * group, R // group, *x.shape[3:])
    )


def _fold(x: jax.Array, group: int, causal: bool) -> jax.Array:
    """The inverse of `_laid_out`."""
    if not causal or group == 1:
        return x
    B, N, T = x.shape[:3]
    return (
        x.reshape(B, N // group, group, T, *x.shape[3:]).swapaxes(2, 3).reshape(B, N // group, T * group, *x.shape[3:])
    )


def _mask(q_BNTH: jax.Array, length_B: jax.Array, causal: bool) -> tuple[fused.MaskType, Any, Any]:
    """(Mask, how many queries, how many keys). cuDNN wants at least one key."""
    if causal:
        return fused.MaskType.CAUSAL, None, None
    return fused.MaskType.PADDING, jnp.full(length_B.shape, q_BNTH.shape[2], jnp.int32), jnp.maximum(length_B, 1)


def _forward(
    rows: Rows, slots: Slots, length_B: jax.Array, scale: float, *, causal: bool, window: int | None = None
) -> SoftmaxState:
    q_BNTH = _laid_out(rows.q_BKRH, rows.group, causal)
    mask, queries_B, keys_B = _mask(q_BNTH, length_B, causal)
    results: Any = fused.dot_product_attention(
        q_BNTH,
        slots.k_BKSH,
        slots.v_BKSH,
        q_seqlen=queries_B,
        kv_seqlen=keys_B,
        scale=scale,
        mask_type=mask,
        qkv_layout="BNTH",
        sliding_window_length=window,
        return_residual=True,
    )
    out_BKRH, log_sum_BKR = (_fold(x.astype(jnp.float32), rows.group, causal) for x in results)
    sees = _seeing(rows, length_B, causal)
    return SoftmaxState(
        jnp.where(sees[..., None], out_BKRH, 0.0),
        jnp.where(sees, log_sum_BKR, -jnp.inf),
        jnp.broadcast_to(sees, log_sum_BKR.shape).astype(jnp.float32),
    )


def _backward(
    rows: Rows,
    slots: Slots,
    cotangent: Cotangent,
    length_B: jax.Array,
    scale: float,
    *,
    causal: bool,
    window: int | None = None,
) -> Gradients:
    sees = _seeing(rows, length_B, causal) & (cotangent.log_sum_BKR > -jnp.inf)
    arrays = (
        rows.q_BKRH,
        jnp.where(sees, cotangent.log_sum_BKR, HIDDEN),
        cotangent.out_BKRH,
        cotangent.d_out_BKRH.astype(rows.q_BKRH.dtype),
    )
    q, log_sum, out, d_out = (_laid_out(x, rows.group, causal) for x in arrays)
    none = jnp.zeros(0, q.dtype)
    mask, queries_B, keys_B = _mask(q, length_B, causal)
    inputs = (
        q,
        slots.k_BKSH,
        slots.v_BKSH,
        none,
        *(none if x is None else x for x in (queries_B, keys_B)),
        *[none] * 4,
    )
    options = (scale, 42, 0.0, (False, False), mask, fused.AttentionLayout.BNTH.value, window)
    rule: Any = fused._dot_product_attention_bwd_rule
    if "score_mod" in inspect.signature(rule).parameters:  # jax 0.12
        dq, dk, dv, *_ = rule(*options, None, 0, False, (*inputs, (), log_sum, out), d_out)
    else:
        dq, dk, dv, *_ = rule(*options, True, False, (*inputs, log_sum, out), d_out)
    seen = (jnp.arange(slots.pos_BS.shape[1]) < length_B[:, None])[:, None, :, None]
    dq, dk, dv = _fold(dq, rows.group, causal).astype(jnp.float32), dk.astype(jnp.float32), dv.astype(jnp.float32)
    return jnp.where(sees[..., None], dq, 0.0), jnp.where(seen, dk, 0.0), jnp.where(seen, dv, 0.0)
