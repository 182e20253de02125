# SPDX-License-Identifier: Apache-2.0
"""What splash's kernels are told of positions: for each row the slots it sees, for each block whether to visit it."""

from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
from jax import lax

from rapid_jax.attention.online_softmax import Rows, Slots, block_of, pad_rows, pad_slots, visible

LANES = 128
LARGEST = 1024  # rows and slots of a block: 2,048 do not fit the scoped VMEM
LARGEST_TAGGED = 512  # what a branch must be padded to
PAIRS = 340_000  # of blocks: scalar memory has 1 MiB, and a pair takes 3 bytes
WINDOWED = 2**15  # slots at once where rows have a first slot: it and the last one are halves of one number
NEVER = 2**31 - 1  # a position that no row sees


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Plan:
    """Which slots a row sees, as the kernels take it. B is 1 and left out; r and s number blocks of rows and slots."""

    limit_R: (
        jax.Array
    )  # int32, the last slot that the row sees, -1 if none; windowed: `_span` of the first and the last
    visit_rs: jax.Array  # bool
    block_r: int = field(metadata={"static": True})
    block_s: int = field(metadata={"static": True})
    filled_S: jax.Array | None = None  # int32 0 or 1, where empty slots may lie below a limit
    windowed: bool = field(default=False, metadata={"static": True})

    @property
    def sees_R(self) -> jax.Array:
        """bool, whether a row sees any slot."""
        return self.limit_R != 0 if self.windowed else self.limit_R >= 0


def seen(limit: jax.Array, slot: jax.Array) -> jax.Array:
    """The kernels' mask."""
    return slot <= limit


def seen_span(span: jax.Array, slot: jax.Array) -> jax.Array:
    """The same of windowed rows. A row that sees no slot is told the span 0: none is before slot 0."""
    return (slot < lax.shift_right_logical(span, jnp.full_like(span, 16))) & (slot >= span & 0xFFFF)


def fits(rows: Rows, slots: Slots, runs: int) -> bool:
    """Whether the kernels take these shapes. Fewer rows or slots than a lane has are not worth a kernel."""
    R, S = rows.pos_BR.shape[1], slots.pos_BS.shape[1]
    if rows.first_BR is not None and (runs == 0 or tagged(rows, slots)):
        return False
    bq, bkv = blocks_of(R, S, tagged=tagged(rows, slots))
    pairs = -(R // -bq) * (S // bkv // LANES + 1) * LANES
    return R >= LANES and S >= LANES and rows.q_BKRH.shape[-1] % 64 == 0 and pairs <= PAIRS


def tagged(rows: Rows, slots: Slots) -> bool:
    """Whether branch tags decide."""
    return rows.branch_BR is not None and slots.branch_BS is not None


def blocks_of(rows: int, slots: int, *, tagged: bool = False) -> tuple[int, int]:
    """Rows and slots in a block: powers of two from 128 on, the largest that add at most an eighth of padding."""

    def fitting(size: int) -> int:
        block = LARGEST_TAGGED if tagged else LARGEST
        while block > LANES and 8 * (-size % block) > size:
            block //= 2
        return block

    return fitting(rows), fitting(slots)


def promised_plan(rows: Rows, slots: Slots) -> Plan:
    """Where rows and slots ascend, and the empty slots are last."""
    S = slots.pos_BS.shape[1]
    bq, bkv = blocks_of(rows.pos_BR.shape[1], S)
    limit_R, first_R = _ascending_limits(rows, slots, bq)
    starts_s = jnp.arange(0, S, bkv)
    visit_rs = jnp.max(limit_R.reshape(-1, bq), axis=1)[:, None] >= starts_s
    if first_R is None:
        return Plan(limit_R, visit_rs, bq, bkv)
    sees_R = first_R <= limit_R
    visit_rs &= jnp.min(jnp.where(sees_R, first_R, NEVER).reshape(-1, bq), axis=1)[:, None] < starts_s + bkv
    return Plan(jnp.where(sees_R, _span(first_R, limit_R), 0), visit_rs, bq, bkv, windowed=True)


def plan_of(rows: Rows, slots: Slots) -> tuple[Plan, jax.Array]:
    """(A plan, whether it is right: bool) where nothing is promised."""
    bq, bkv = blocks_of(rows.pos_BR.shape[1], slots.pos_BS.shape[1], tagged=tagged(rows, slots))
    whole = pad_slots(slots, bkv)
    visit_rs, holds = visits(pad_rows(rows, bq), whole, bq, bkv)
    return Plan(_limits(rows, slots, bq, bkv), visit_rs, bq, bkv, (whole.pos_BS[0] >= 0).astype(jnp.int32)), holds


def _span(first: jax.Array, last: jax.Array) -> jax.Array:
    """Of two slots one number, which is 0 for no row that sees any."""
    return (last + 1) << 16 | first


def _ascending_limits(rows: Rows, slots: Slots, bq: int) -> tuple[jax.Array, jax.Array | None]:
    """`_limits` where the slots ascend and the empty ones are last: as many as are not later than the row.

    Of rows with a first position also the first slot that they see: as many slots as are earlier.

    A loop here, or a change of the slots, would have XLA's scheduler finish the transfer of the next slots before the
    kernel. The comparisons are fused into their sum: the compiled program has no array of rows by slots.
    """
    pos_T, pos_S = rows.pos_BR[0, :: rows.group], slots.pos_BS[0]

    def counted(pos_T: jax.Array) -> jax.Array:
        count_T = jnp.sum((pos_S >= 0) & (pos_S <= pos_T[:, None]), axis=1, dtype=jnp.int32)
        return jnp.pad(jnp.repeat(count_T, rows.group), (0, -rows.pos_BR.shape[1] % bq))

    first_R = None if rows.first_BR is None else counted(rows.first_BR[0, :: rows.group] - 1)
    return counted(pos_T) - 1, first_R


def _limits(rows: Rows, slots: Slots, bq: int, bkv: int) -> jax.Array:
    """int32 [R, padded to blocks]: the last slot that each row sees, or -1."""
    R = rows.pos_BR.shape[1]
    group = rows.group if R % rows.group == 0 else 1  # rows of one query position see the same
    tags = None if rows.branch_BR is None else rows.branch_BR[:, ::group]
    times, slots = replace(rows, pos_BR=rows.pos_BR[:, ::group], branch_BR=tags), pad_slots(slots, bkv)

    def later(limit_T: jax.Array, start: jax.Array):
        seen_TS = visible(times, block_of(slots, start, bkv))[0, 0]
        return jnp.maximum(limit_T, jnp.max(jnp.where(seen_TS, start + jnp.arange(bkv), -1), axis=1)), None

    start = jnp.full(times.pos_BR.shape[1], -1, jnp.int32)
    limit_T, _ = lax.scan(later, start, jnp.arange(0, slots.pos_BS.shape[1], bkv, dtype=jnp.int32))
    return jnp.pad(jnp.repeat(limit_T, group), (0, -R % bq), constant_values=-1)


def visits(rows: Rows, slots: Slots, bq: int, bkv: int) -> tuple[jax.Array, jax.Array]:
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
