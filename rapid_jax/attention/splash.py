# SPDX-License-Identifier: Apache-2.0
"""Block-sparse flash attention on TPUs: JAX's splash kernels, told at run time which blocks to visit.

The kernels take a mask `slot index <= limit[row]` and, for every block of rows and block of slots, whether to visit it.
Positions become such limits where the slots that a row sees are the first of those it visits: where positions ascend.
Rows with a first position are told a first slot besides, in the same number, if ascending positions are promised; else
plain XLA attends. A kv head's rows are one query head to the kernel, so that a block of keys is
fetched once for all its query heads.

With branch tags, or when nothing is promised of the positions, whether they can be told this way is decided on the
device, and plain XLA attends where they cannot. With tags they can if positions ascend over what a branch sees and no
block of slots holds two branches, or a branch and what the others see too; blocks are those of `splash_plan.blocks_of`.

The kernels are private to JAX; their signatures are the same from 0.10.2 to 0.12.0.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo

from rapid_jax.attention.contract import check_backward, check_contract
from rapid_jax.attention.kernels import Cotangent, Gradients
from rapid_jax.attention.online_softmax import (
    Rows,
    Slots,
    SoftmaxState,
    block_of,
    merge,
    nothing_seen,
    pad_rows,
    pad_slots,
    seen_by_some,
)
from rapid_jax.attention.splash_plan import (
    NEVER,
    WINDOWED,
    Plan,
    fits,
    plan_of,
    promised_plan,
    seen,
    seen_span,
    tagged,
)
from rapid_jax.attention.xla import Xla

_Of = TypeVar("_Of")


@dataclass(frozen=True)
class Splash:
    """`Kernel` on TPUs. `block` is of the XLA path; `interpret` runs the kernels on any platform, slowly."""

    block: int
    interpret: Any = False  # or Pallas's InterpretParams

    def forward(
        self, rows: Rows, slots: Slots, *, scale: float, runs: int = 0, used: jax.Array | None = None
    ) -> SoftmaxState:
        """Attention of the rows over the slots; `out_BKRH` is divided and rounded to the queries' dtype already."""
        check_contract("splash", rows, slots)
        plain = Xla(self.block)
        if not fits(rows, slots, runs):
            return plain.forward(rows, slots, scale=scale, runs=runs, used=used)
        if rows.first_BR is not None and slots.pos_BS.shape[1] > WINDOWED:
            return self._forward_by_parts(rows, pad_slots(slots, WINDOWED), scale)

        def attend(rows: Rows, slots: Slots) -> SoftmaxState:
            def planned(plan: Plan) -> SoftmaxState:
                return _forward(rows, slots, plan, scale, self.interpret)

            return _either(rows, slots, runs, planned, lambda: plain.forward(rows, slots, scale=scale, used=used))

        return _each(attend, rows, slots)

    def backward(self, rows: Rows, slots: Slots, cotangent: Cotangent, *, scale: float, runs: int = 0) -> Gradients:
        """Two kernels that recompute the scores: one for dq, one for dk and dv; each rounds to the inputs' dtype."""
        check_backward("splash", rows, slots, cotangent)
        plain = Xla(self.block)
        if not fits(rows, slots, runs):
            return plain.backward(rows, slots, cotangent, scale=scale, runs=runs)
        if rows.first_BR is not None and slots.pos_BS.shape[1] > WINDOWED:
            dq, dk, dv = self._backward_by_parts(rows, pad_slots(slots, WINDOWED), cotangent, scale)
            return dq, dk[:, :, : slots.pos_BS.shape[1]], dv[:, :, : slots.pos_BS.shape[1]]

        def attend(rows: Rows, slots: Slots, cotangent: Cotangent) -> Gradients:
            def planned(plan: Plan) -> Gradients:
                return _backward(rows, slots, cotangent, plan, scale, self.interpret)

            return _either(rows, slots, runs, planned, lambda: plain.backward(rows, slots, cotangent, scale=scale))

        return _each(attend, rows, slots, cotangent)

    def _forward_by_parts(self, rows: Rows, slots: Slots, scale: float) -> SoftmaxState:
        """As many slots at a time as rows with a first slot can be told of; a part that no row sees is left out."""

        def add(index: jax.Array, total: SoftmaxState) -> SoftmaxState:
            part = block_of(slots, index * WINDOWED, WINDOWED)
            more = partial(self.forward, rows, part, scale=scale, runs=1)
            return lax.cond(seen_by_some(rows, part), lambda: merge(total, more()), lambda: total)

        return lax.fori_loop(0, slots.pos_BS.shape[1] // WINDOWED, add, nothing_seen(rows))

    def _backward_by_parts(self, rows: Rows, slots: Slots, cotangent: Cotangent, scale: float) -> Gradients:
        def add(dq_BKRH: jax.Array, index: jax.Array):
            part = block_of(slots, index * WINDOWED, WINDOWED)
            zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in (dq_BKRH, part.k_BKSH, part.v_BKSH))
            more = partial(self.backward, rows, part, cotangent, scale=scale, runs=1)
            dq, dk, dv = lax.cond(seen_by_some(rows, part), more, lambda: zeros)
            return dq_BKRH + dq, (dk, dv)

        none = jnp.zeros(rows.q_BKRH.shape, jnp.float32)
        dq_BKRH, kv = lax.scan(add, none, jnp.arange(slots.pos_BS.shape[1] // WINDOWED))
        dk, dv = (jnp.moveaxis(x, 0, 2).reshape(slots.k_BKSH.shape) for x in kv)
        return dq_BKRH, dk, dv


def _each(attend: Callable[..., _Of], *trees: Any) -> _Of:
    """`attend` for one sequence of the batch after the other; it is given arrays of batch 1."""
    batch = trees[0].pos_BR.shape[0]
    if batch == 1:
        return attend(*trees)
    split = jax.tree.map(lambda x: x[:, None], trees)
    return jax.tree.map(lambda x: x[:, 0], lax.map(lambda trees: attend(*trees), split))


def _either(rows: Rows, slots: Slots, runs: int, planned: Callable[[Plan], _Of], plain: Callable[[], _Of]) -> _Of:
    """`planned` where a plan can be made. The program has no branch if ascending positions are promised."""
    if runs and not tagged(rows, slots):
        return planned(promised_plan(rows, slots))
    plan, holds = plan_of(rows, slots)
    return lax.cond(holds, lambda: planned(plan), plain)


def _forward(rows: Rows, slots: Slots, plan: Plan, scale: float, interpret: Any) -> SoftmaxState:
    bq, bkv = plan.block_r, plan.block_s
    R, slots = rows.pos_BR.shape[1], pad_slots(slots, bkv)
    out_KRH, (log_sum_KR,) = splash._splash_attention_forward(
        _mask(plan, _next_needed(plan.visit_rs, wrap=1)),
        _scale(pad_rows(rows, bq).q_BKRH[0], scale),
        slots.k_BKSH[0],
        slots.v_BKSH[0],
        _segments(plan),
        None,
        mask_value=splash.DEFAULT_MASK_VALUE,
        is_mqa=False,
        block_sizes=splash.BlockSizes(block_q=bq, block_kv=bkv, block_kv_compute=min(bkv, 512)),
        residual_checkpoint_name=None,
        save_residuals=True,
        mask_function=seen_span if plan.windowed else seen,
        interpret=interpret,
    )
    sees_R = plan.sees_R[:R]
    return SoftmaxState(
        jnp.where(sees_R[:, None], out_KRH[:, :R].astype(jnp.float32), 0.0)[None],
        jnp.where(sees_R, log_sum_KR[:, :R], -jnp.inf)[None],
        jnp.broadcast_to(sees_R.astype(jnp.float32), (1, log_sum_KR.shape[0], R)),
    )


def _backward(rows: Rows, slots: Slots, cotangent: Cotangent, plan: Plan, scale: float, interpret: Any) -> Gradients:
    bq, bkv, R, S = plan.block_r, plan.block_s, rows.pos_BR.shape[1], slots.pos_BS.shape[1]
    rows, slots = pad_rows(rows, bq), pad_slots(slots, bkv)
    extra = ((0, 0), (0, plan.limit_R.shape[0] - R))
    arrays = (
        _scale(rows.q_BKRH[0], scale),
        slots.k_BKSH[0],
        slots.v_BKSH[0],
        _segments(plan),
        None,
        jnp.pad(jnp.where(cotangent.log_sum_BKR == -jnp.inf, 0.0, cotangent.log_sum_BKR)[0], extra),
        jnp.pad(cotangent.d_out_BKRH[0], (*extra, (0, 0))),
        jnp.pad(cotangent.delta_BKR[0], extra),
    )
    minor = splash.QKVLayout.HEAD_DIM_MINOR
    block: Any = dict(bq=bq, bkv=bkv, q_layout=minor, k_layout=minor, v_layout=minor)
    which = seen_span if plan.windowed else seen
    mask: Any = dict(mask_value=splash.DEFAULT_MASK_VALUE, mask_function=which, attn_logits_soft_cap=None)
    shared = block | mask | dict(is_mqa=False, interpret=interpret)
    dq = splash._splash_attention_bwd_dq(*arrays, mask_info=_mask(plan, _next_needed(plan.visit_rs, wrap=1)), **shared)
    by_slots = _mask(plan, _next_needed(plan.visit_rs.T, wrap=0).T)
    _, dk, dv = splash._splash_attention_bwd_dkv(
        *arrays, mask_info=by_slots, bkv_compute=min(bkv, 512), use_fused_bwd_kernel=False, **shared
    )
    dq, dk, dv = (x.astype(jnp.float32)[None] for x in (dq, dk, dv))
    return dq[:, :, :R] * scale, dk[:, :, :S], dv[:, :, :S]


def _scale(q_KRH: jax.Array, scale: float) -> jax.Array:
    """The kernels know no scale. Rounded once more, by both passes alike; exact where the scale is a power of two."""
    return (q_KRH.astype(jnp.float32) * scale).astype(q_KRH.dtype)


def _segments(plan: Plan) -> splash.SegmentIds | None:
    return None if plan.filled_S is None else splash.SegmentIds(jnp.ones_like(plan.limit_R), plan.filled_S)


def _mask(plan: Plan, next_rs: jax.Array) -> MaskInfo:
    """Both arrays lie in scalar memory, so they are as narrow as their values allow."""
    next_rs = next_rs.astype(jnp.int8 if max(next_rs.shape) < 128 else jnp.int16)[None]
    limit_R: Any = plan.limit_R
    return MaskInfo(next_rs, None, plan.visit_rs.astype(jnp.int8)[None], None, limit_R)


def _next_needed(visit: jax.Array, *, wrap: int) -> jax.Array:
    """int32 [lines, steps]: the step whose block is to be in memory at each step, so that no other is fetched.

    At a step that is visited it is that step, else the next one visited; after the last of a line, the first one of
    the line `wrap` further on.
    """
    steps = jnp.where(visit, jnp.arange(visit.shape[1], dtype=jnp.int32), NEVER)
    after = lax.cummin(steps, axis=1, reverse=True)
    after = jnp.where(after == NEVER, jnp.roll(after[:, :1], -wrap, axis=0), after)
    return jnp.where(after == NEVER, 0, after)
