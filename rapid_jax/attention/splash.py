# SPDX-License-Identifier: Apache-2.0
"""Block-sparse flash attention on TPUs: JAX's splash kernels, told at run time which blocks to visit.

The kernels take a mask `slot index <= limit[row]` and, for every block of rows and block of slots, whether to visit it.
Positions become such limits where the slots that a row sees are the first of those it visits: where positions ascend.
A kv head's rows are one query head to the kernel, so that a block of keys is fetched once for all its query heads.

With branch tags, or when nothing is promised of the positions, whether they can be told this way is decided on the
device, and plain XLA attends where they cannot. With tags they can if positions ascend over what a branch sees and no
block of slots holds two branches, or a branch and what the others see too; blocks are those of `blocks_of`.

The kernels are private to JAX; their signatures are the same from 0.10.2 to 0.12.0.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo

from rapid_jax.attention.contract import check_backward, check_contract
from rapid_jax.attention.kernels import Cotangent, Gradients
from rapid_jax.attention.partial import Partial, Rows, Slots, block_of, padded_rows, padded_slots, visible
from rapid_jax.attention.xla import Xla

LANES = 128
LARGEST = 1024  # rows and slots of a block: 2,048 do not fit the scoped VMEM
LARGEST_TAGGED = 512  # what a branch must be padded to
PAIRS = 340_000  # of blocks: scalar memory has 1 MiB, and a pair takes 3 bytes
NEVER = 2**31 - 1  # a position that no row sees

_Of = TypeVar("_Of")


@dataclass(frozen=True)
class Splash:
    """`Kernel` on TPUs. `block` is of the XLA path; `interpret` runs the kernels on any platform, slowly."""

    block: int
    interpret: Any = False  # or Pallas's InterpretParams

    def forward(
        self, rows: Rows, slots: Slots, *, scale: float, runs: int = 0, used: jax.Array | None = None
    ) -> Partial:
        """Attention of the rows over the slots; `out_BKRH` is divided and rounded to the queries' dtype already."""
        check_contract("splash", rows, slots)
        plain = Xla(self.block)
        if not _fits(rows, slots):
            return plain.forward(rows, slots, scale=scale, runs=runs, used=used)

        def attend(rows: Rows, slots: Slots) -> Partial:
            def planned(plan: Plan) -> Partial:
                return _forward(rows, slots, plan, scale, self.interpret)

            return _either(rows, slots, runs, planned, lambda: plain.forward(rows, slots, scale=scale, used=used))

        return _each(attend, rows, slots)

    def backward(self, rows: Rows, slots: Slots, cotangent: Cotangent, *, scale: float, runs: int = 0) -> Gradients:
        """Two kernels that recompute the scores: one for dq, one for dk and dv; each rounds to the inputs' dtype."""
        check_backward("splash", rows, slots, cotangent)
        plain = Xla(self.block)
        if not _fits(rows, slots):
            return plain.backward(rows, slots, cotangent, scale=scale, runs=runs)

        def attend(rows: Rows, slots: Slots, cotangent: Cotangent) -> Gradients:
            def planned(plan: Plan) -> Gradients:
                return _backward(rows, slots, cotangent, plan, scale, self.interpret)

            return _either(rows, slots, runs, planned, lambda: plain.backward(rows, slots, cotangent, scale=scale))

        return _each(attend, rows, slots, cotangent)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Plan:
    """Which slots a row sees, as the kernels take it. B is 1 and left out; r and s number blocks of rows and slots."""

    limit_R: jax.Array  # int32, the last slot that the row sees, -1 if none
    visit_rs: jax.Array  # bool
    block_r: int = field(metadata={"static": True})
    block_s: int = field(metadata={"static": True})
    filled_S: jax.Array | None = None  # int32 0 or 1, where empty slots may lie below a limit


def _fits(rows: Rows, slots: Slots) -> bool:
    """Whether the kernels take these shapes. Fewer rows or slots than a lane has are not worth a kernel."""
    R, S = rows.pos_BR.shape[1], slots.pos_BS.shape[1]
    bq, bkv = blocks_of(R, S, tagged=_tagged(rows, slots))
    pairs = -(R // -bq) * (S // bkv // LANES + 1) * LANES
    return rows.first_BR is None and R >= LANES and S >= LANES and rows.q_BKRH.shape[-1] % 64 == 0 and pairs <= PAIRS


def _tagged(rows: Rows, slots: Slots) -> bool:
    return rows.branch_BR is not None and slots.branch_BS is not None


def blocks_of(rows: int, slots: int, *, tagged: bool = False) -> tuple[int, int]:
    """Rows and slots in a block: powers of two from 128 on, the largest that add at most an eighth of padding."""

    def fitting(size: int) -> int:
        block = LARGEST_TAGGED if tagged else LARGEST
        while block > LANES and 8 * (-size % block) > size:
            block //= 2
        return block

    return fitting(rows), fitting(slots)


def _each(attend: Callable[..., _Of], *trees: Any) -> _Of:
    """`attend` for one sequence of the batch after the other; it is given arrays of batch 1."""
    batch = trees[0].pos_BR.shape[0]
    if batch == 1:
        return attend(*trees)
    split = jax.tree.map(lambda x: x[:, None], trees)
    return jax.tree.map(lambda x: x[:, 0], lax.map(lambda trees: attend(*trees), split))


def _either(rows: Rows, slots: Slots, runs: int, planned: Callable[[Plan], _Of], plain: Callable[[], _Of]) -> _Of:
    """`planned` where a plan can be made. The program has no branch if ascending positions are promised."""
    tagged = _tagged(rows, slots)
    bq, bkv = blocks_of(rows.pos_BR.shape[1], slots.pos_BS.shape[1], tagged=tagged)
    if runs and not tagged:
        limit_R = _promised_limits(rows, slots, bq)
        visit_rs = jnp.max(limit_R.reshape(-1, bq), axis=1)[:, None] >= jnp.arange(0, slots.pos_BS.shape[1], bkv)
        return planned(Plan(limit_R, visit_rs, bq, bkv))
    whole = padded_slots(slots, bkv)
    visit_rs, holds = _visits(padded_rows(rows, bq), whole, bq, bkv)
    plan = Plan(_limits(rows, slots, bq, bkv), visit_rs, bq, bkv, (whole.pos_BS[0] >= 0).astype(jnp.int32))
    return lax.cond(holds, lambda: planned(plan), plain)


def _promised_limits(rows: Rows, slots: Slots, bq: int) -> jax.Array:
    """`_limits` where the slots ascend and the empty ones are last: as many as are not later than the row.

    A loop here, or a change of the slots, would have XLA's scheduler finish the transfer of the next slots before the
    kernel. The comparisons are fused into their sum: the compiled program has no array of rows by slots.
    """
    pos_T, pos_S = rows.pos_BR[0, :: rows.group], slots.pos_BS[0]
    limit_T = jnp.sum((pos_S >= 0) & (pos_S <= pos_T[:, None]), axis=1, dtype=jnp.int32) - 1
    return jnp.pad(jnp.repeat(limit_T, rows.group), (0, -rows.pos_BR.shape[1] % bq), constant_values=-1)


def _limits(rows: Rows, slots: Slots, bq: int, bkv: int) -> jax.Array:
    """int32 [R, padded to blocks]: the last slot that each row sees, or -1."""
    R = rows.pos_BR.shape[1]
    group = rows.group if R % rows.group == 0 else 1  # rows of one query position see the same
    tags = None if rows.branch_BR is None else rows.branch_BR[:, ::group]
    times, slots = replace(rows, pos_BR=rows.pos_BR[:, ::group], branch_BR=tags), padded_slots(slots, bkv)

    def later(limit_T: jax.Array, start: jax.Array):
        seen_TS = visible(times, block_of(slots, start, bkv))[0, 0]
        return jnp.maximum(limit_T, jnp.max(jnp.where(seen_TS, start + jnp.arange(bkv), -1), axis=1)), None

    start = jnp.full(times.pos_BR.shape[1], -1, jnp.int32)
    limit_T, _ = lax.scan(later, start, jnp.arange(0, slots.pos_BS.shape[1], bkv, dtype=jnp.int32))
    return jnp.pad(jnp.repeat(limit_T, group), (0, -R % bq), constant_values=-1)


def _visits(rows: Rows, slots: Slots, bq: int, bkv: int) -> tuple[jax.Array, jax.Array]:
    """(Blocks that some row sees, whether in what it visits each row sees exactly the filled slots up to its limit)."""
    q_pos, kv_pos = rows.pos_BR[0].reshape(-1, bq), slots.pos_BS[0].reshape(-1, bkv)
    last_r = jnp.max(q_pos, axis=1)
    first_s, last_s = jnp.min(jnp.where(kv_pos >= 0, kv_pos, NEVER), axis=1), jnp.max(kv_pos, axis=1)
    holds = jnp.all((kv_pos < 0) | (kv_pos >= lax.cummax(kv_pos, axis=1)))
    near_rs = last_r[:, None] >= first_s
    if rows.branch_BR is not None and slots.branch_BS is not None:
        theirs, mine = (
            _tags(tag[0].reshape(pos.shape), pos >= 0)
            for tag, pos in ((slots.branch_BS, kv_pos), (rows.branch_BR, q_pos))
        )
        mine = tuple(x[:, None] for x in mine)
        free = (mine[1] == 0) | (theirs[1] == 0)
        agree_rs = free | ((mine[1] == theirs[1]) & (mine[2] == mine[1]) & (theirs[2] == theirs[1]))
        alone = (mine[0] == mine[1]) & (theirs[0] == theirs[1]) & (mine[1] != theirs[1])
        holds &= jnp.all(agree_rs | alone | ~near_rs) & jnp.all(mine[0] >= 0) & jnp.all(theirs[0] >= 0)
        near_rs &= agree_rs
    before_rs = lax.cummax(jnp.where(near_rs, last_s, -1), axis=1)[:, :-1]
    return near_rs, holds & jnp.all(~near_rs[:, 1:] | (before_rs <= first_s[1:]))


def _tags(tag: jax.Array, filled: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of the filled entries of each block: the least tag, the greatest, the least that is not 0 (0 if all are)."""
    greatest = jnp.max(jnp.where(filled, tag, 0), axis=1)
    least = jnp.min(jnp.where(filled, tag, NEVER), axis=1)
    branch = jnp.min(jnp.where(filled & (tag != 0), tag, NEVER), axis=1)
    return least, greatest, jnp.where(branch == NEVER, 0, branch)


def _forward(rows: Rows, slots: Slots, plan: Plan, scale: float, interpret: Any) -> Partial:
    bq, bkv = plan.block_r, plan.block_s
    R, slots = rows.pos_BR.shape[1], padded_slots(slots, bkv)
    out_KRH, (log_sum_KR,) = splash._splash_attention_forward(
        _mask(plan, _next_needed(plan.visit_rs, wrap=1)),
        _scaled(padded_rows(rows, bq).q_BKRH[0], scale),
        slots.k_BKSH[0],
        slots.v_BKSH[0],
        _segments(plan),
        None,
        mask_value=splash.DEFAULT_MASK_VALUE,
        is_mqa=False,
        block_sizes=splash.BlockSizes(block_q=bq, block_kv=bkv, block_kv_compute=min(bkv, 512)),
        residual_checkpoint_name=None,
        save_residuals=True,
        mask_function=_seen,
        interpret=interpret,
    )
    sees_R = plan.limit_R[:R] >= 0
    return Partial(
        jnp.where(sees_R[:, None], out_KRH[:, :R].astype(jnp.float32), 0.0)[None],
        jnp.where(sees_R, log_sum_KR[:, :R], -jnp.inf)[None],
        jnp.broadcast_to(sees_R.astype(jnp.float32), (1, log_sum_KR.shape[0], R)),
    )


def _backward(rows: Rows, slots: Slots, cotangent: Cotangent, plan: Plan, scale: float, interpret: Any) -> Gradients:
    bq, bkv, R, S = plan.block_r, plan.block_s, rows.pos_BR.shape[1], slots.pos_BS.shape[1]
    rows, slots = padded_rows(rows, bq), padded_slots(slots, bkv)
    extra = ((0, 0), (0, plan.limit_R.shape[0] - R))
    arrays = (
        _scaled(rows.q_BKRH[0], scale),
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
    mask: Any = dict(mask_value=splash.DEFAULT_MASK_VALUE, mask_function=_seen, attn_logits_soft_cap=None)
    shared = block | mask | dict(is_mqa=False, interpret=interpret)
    dq = splash._splash_attention_bwd_dq(*arrays, mask_info=_mask(plan, _next_needed(plan.visit_rs, wrap=1)), **shared)
    by_slots = _mask(plan, _next_needed(plan.visit_rs.T, wrap=0).T)
    _, dk, dv = splash._splash_attention_bwd_dkv(
        *arrays, mask_info=by_slots, bkv_compute=min(bkv, 512), use_fused_bwd_kernel=False, **shared
    )
    dq, dk, dv = (x.astype(jnp.float32)[None] for x in (dq, dk, dv))
    return dq[:, :, :R] * scale, dk[:, :, :S], dv[:, :, :S]


def _seen(limit: jax.Array, slot: jax.Array) -> jax.Array:
    return slot <= limit


def _scaled(q_KRH: jax.Array, scale: float) -> jax.Array:
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
