# SPDX-License-Identifier: Apache-2.0
"""The attention algebra: un-normalised attention over a block of keys, and how blocks add up.

Letters here: B batch, K kv heads, R query rows of one kv head (its query heads at every query position, time-major),
S key slots, H head dim. Queries are folded to [B, K, R, H] once, so that grouped-query attention is one batched matrix
product and each key is read once.

Masks are positions: a row at position p sees a slot at position s exactly when 0 <= s <= p, s is not before the row's
first position, where it has one, and their branch tags agree (tag 0 agrees with every tag). An empty slot, a padded
query, a rolled-back token all have position -1.
"""

from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
from jax import lax


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SoftmaxState:
    """Attention over some of the keys, before division by the softmax sum. All float32.

    A row that has seen no key has max -inf, sum 0 and out 0: the identity of `merge`.
    """

    out_BKRH: jax.Array  # sum over seen slots of exp(score - max) * value
    max_BKR: jax.Array  # the largest score seen
    sum_BKR: jax.Array  # sum over seen slots of exp(score - max)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rows:
    """Folded queries with what decides which slots they see."""

    q_BKRH: jax.Array
    pos_BR: jax.Array  # int32, -1 sees nothing
    branch_BR: jax.Array | None = None  # int32
    group: int = field(default=1, metadata={"static": True})  # rows of each query position
    reach_BR: jax.Array | None = None  # int32, of `Forked` alone: the last position of the trunk that the row sees
    first_BR: jax.Array | None = None  # int32, the first position that the row sees; None: 0
    # Where first_BR is pos_BR - window + 1 by a number that is known while tracing.
    window: int | None = field(default=None, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Slots:
    """Keys and values with what decides who sees them."""

    k_BKSH: jax.Array
    v_BKSH: jax.Array  # quantised: [B, K, H, S]
    pos_BS: jax.Array  # int32, -1 = empty
    branch_BS: jax.Array | None = None  # int32
    k_scale_BKS: jax.Array | None = None  # float32, of quantised keys and values alone: what multiplies each slot's
    v_scale_BKS: jax.Array | None = None


def fold(
    q_BTNH: jax.Array,
    pos_BT: jax.Array,
    kv_heads: int,
    branch_BT: jax.Array | None = None,
    first_BT: jax.Array | None = None,
    window: int | None = None,
) -> Rows:
    """Queries [B, T, N, H] as rows of their kv heads."""
    B, T, N, H = q_BTNH.shape
    group = N // kv_heads
    q_BKRH = q_BTNH.reshape(B, T, kv_heads, group, H).swapaxes(1, 2).reshape(B, kv_heads, T * group, H)
    branch_BR = None if branch_BT is None else jnp.repeat(branch_BT, group, axis=1)
    first_BR = None if first_BT is None else jnp.repeat(first_BT, group, axis=1)
    return Rows(q_BKRH, jnp.repeat(pos_BT, group, axis=1), branch_BR, group, first_BR=first_BR, window=window)


def unfold(out_BKRH: jax.Array, time: int) -> jax.Array:
    """The inverse of `fold` for outputs: [B, T, N, H]."""
    B, K, R, H = out_BKRH.shape
    return out_BKRH.reshape(B, K, time, R // time, H).swapaxes(1, 2).reshape(B, time, K * (R // time), H)


def nothing_seen(rows: Rows) -> SoftmaxState:
    """The identity of `merge`."""
    shape = rows.q_BKRH.shape
    return SoftmaxState(
        jnp.zeros(shape, jnp.float32), jnp.full(shape[:-1], -jnp.inf, jnp.float32), jnp.zeros(shape[:-1], jnp.float32)
    )


def visible(rows: Rows, slots: Slots) -> jax.Array:
    """bool [B, 1, R, S], for one block of slots only."""
    seen = (slots.pos_BS[:, None, :] >= 0) & (slots.pos_BS[:, None, :] <= rows.pos_BR[:, :, None])
    if rows.first_BR is not None:
        seen &= slots.pos_BS[:, None, :] >= rows.first_BR[:, :, None]
    if rows.branch_BR is not None and slots.branch_BS is not None:
        mine, theirs = rows.branch_BR[:, :, None], slots.branch_BS[:, None, :]
        seen &= (mine == theirs) | (theirs == 0) | (mine == 0)
    return seen[:, None]


def attend_block(rows: Rows, slots: Slots, *, scale: float, masked: bool = True) -> SoftmaxState:
    """Attention of the rows over one block of slots, un-normalised: exp(scale q.k - max) v.

    `masked=False` is for a block of which every row sees every slot.
    """
    dtype = rows.q_BKRH.dtype
    precision = lax.Precision.HIGHEST if dtype == jnp.float32 else None
    k_BKSH, v_BKSH = slots.k_BKSH, slots.v_BKSH
    if slots.k_scale_BKS is not None:
        k_BKSH, v_BKSH = k_BKSH.astype(dtype), v_BKSH.swapaxes(2, 3).astype(dtype)
    score = jnp.einsum("BKRH,BKSH->BKRS", rows.q_BKRH, k_BKSH, precision=precision, preferred_element_type=jnp.float32)
    if slots.k_scale_BKS is not None:
        score *= slots.k_scale_BKS[:, :, None]
    if masked:
        score = jnp.where(visible(rows, slots), score, -jnp.inf)
    peak = jnp.max(score, axis=-1)
    finite = jnp.where(peak == -jnp.inf, 0.0, peak) if masked else peak
    weight = jnp.exp((score - finite[..., None]) * scale)
    total = jnp.sum(weight, axis=-1)
    if slots.v_scale_BKS is not None:
        weight *= slots.v_scale_BKS[:, :, None]
    weight = weight.astype(v_BKSH.dtype)
    out_BKRH = jnp.einsum("BKRS,BKSH->BKRH", weight, v_BKSH, precision=precision, preferred_element_type=jnp.float32)
    return SoftmaxState(out_BKRH, peak * scale, total)


def merge(a: SoftmaxState, b: SoftmaxState) -> SoftmaxState:
    """Attention over the keys of both. Associative and commutative up to rounding."""
    peak = jnp.maximum(a.max_BKR, b.max_BKR)
    finite = jnp.where(peak == -jnp.inf, 0.0, peak)
    wa, wb = jnp.exp(a.max_BKR - finite), jnp.exp(b.max_BKR - finite)
    return SoftmaxState(a.out_BKRH * wa[..., None] + b.out_BKRH * wb[..., None], peak, a.sum_BKR * wa + b.sum_BKR * wb)


def finish(partial: SoftmaxState, dtype: jnp.dtype) -> jax.Array:
    """softmax(scores) @ values, [B, K, R, H]; a row that saw nothing is 0."""
    total = jnp.where(partial.sum_BKR == 0, 1.0, partial.sum_BKR)
    return (partial.out_BKRH / total[..., None]).astype(dtype)


def log_sum(partial: SoftmaxState) -> jax.Array:
    """float32 [B, K, R]: log of the softmax sum, -inf for a row that saw nothing."""
    return partial.max_BKR + jnp.log(partial.sum_BKR)


def block_of(slots: Slots, start: jax.Array | int, size: int) -> Slots:
    """`size` slots from `start` on."""

    def of(x: jax.Array) -> jax.Array:
        return lax.dynamic_slice_in_dim(x, start, size, axis=min(2, x.ndim - 1))

    if slots.v_scale_BKS is None:
        return jax.tree.map(of, slots)
    values = lax.dynamic_slice_in_dim(slots.v_BKSH, start, size, axis=3)
    return replace(jax.tree.map(of, replace(slots, v_BKSH=slots.pos_BS)), v_BKSH=values)


def seen_by_some(rows: Rows, slots: Slots) -> jax.Array:
    """bool scalar: False only if no row sees any of the slots. Branch tags are not looked at."""
    never = jnp.iinfo(jnp.int32).max
    some = jnp.max(rows.pos_BR) >= jnp.min(jnp.where(slots.pos_BS >= 0, slots.pos_BS, never))
    if rows.first_BR is not None:
        some &= jnp.max(slots.pos_BS) >= jnp.min(jnp.where(rows.pos_BR >= 0, rows.first_BR, never))
    return some


def seen_by_all(rows: Rows, slots: Slots) -> jax.Array:
    """bool scalar: True only if every row sees every slot."""
    every = jnp.all(slots.pos_BS >= 0) & (jnp.min(rows.pos_BR) >= jnp.max(slots.pos_BS))
    if rows.first_BR is not None:
        every &= jnp.min(slots.pos_BS) >= jnp.max(rows.first_BR)
    if rows.branch_BR is not None and slots.branch_BS is not None:
        every &= jnp.all(slots.branch_BS == 0)
    return every


def attend_what_is_seen(partial: SoftmaxState, rows: Rows, slots: Slots, *, scale: float) -> SoftmaxState:
    """`partial` with a block added: not visited if no row sees any of it, without a mask if every row sees it all."""
    some = seen_by_some(rows, slots)
    every = some & seen_by_all(rows, slots)

    def add(masked: bool):
        return lambda: merge(partial, attend_block(rows, slots, scale=scale, masked=masked))

    return lax.switch(some.astype(jnp.int32) + every, (lambda: partial, add(True), add(False)))


def attend_blockwise(
    rows: Rows, slots: Slots, *, scale: float, block: int, used: jax.Array | None = None, skip: bool = False
) -> SoftmaxState:
    """`attend_block` over slots of any number, holding the scores of one block at a time.

    `used`, where given, says that slots from that index on are empty: their blocks are not visited. It makes the
    number of visits depend on data, which reverse-mode differentiation cannot follow; without it the result is
    differentiable, and the backward pass recomputes each block's scores. `skip` looks at the positions of each block
    first and leaves out what nobody sees; worth it when there are many rows.
    """
    size = slots.pos_BS.shape[1]
    if size <= block and not skip:
        return attend_block(rows, slots, scale=scale)
    block = min(block, size)
    whole, rest = divmod(size, block)

    def add(partial: SoftmaxState, start: jax.Array | int, count: int) -> SoftmaxState:
        part = block_of(slots, start, count)
        if skip:
            return attend_what_is_seen(partial, rows, part, scale=scale)
        return merge(partial, attend_block(rows, part, scale=scale))

    partial = nothing_seen(rows)
    if used is not None:
        blocks = jnp.minimum((used + block - 1) // block, whole)
        partial = lax.fori_loop(0, blocks, lambda index, partial: add(partial, index * block, block), partial)
    else:
        step = jax.checkpoint(lambda partial, index: (add(partial, index * block, block), None))
        partial, _ = lax.scan(step, partial, jnp.arange(whole))
    return add(partial, whole * block, rest) if rest else partial


def attend_tiled(
    rows: Rows, slots: Slots, *, scale: float, tile: int, block: int, used: jax.Array | None = None
) -> SoftmaxState:
    """`attend_blockwise` of `tile` rows at a time, leaving out what nobody sees.

    For many rows: half of a sequence's blocks lie in the future of the rows that would look at them.
    """
    R, block = rows.pos_BR.shape[1], min(block, slots.pos_BS.shape[1])
    if tile >= R:
        return attend_blockwise(rows, slots, scale=scale, block=block, used=used, skip=True)
    rows = pad_rows(rows, tile)
    count = rows.pos_BR.shape[1] // tile

    def attend(index: jax.Array) -> SoftmaxState:
        part = rows_of(rows, index * tile, tile)
        return attend_blockwise(part, slots, scale=scale, block=block, used=used, skip=True)

    def joined(x: jax.Array) -> jax.Array:
        x = jnp.moveaxis(x, 0, 2)
        return x.reshape(*x.shape[:2], count * tile, *x.shape[4:])[:, :, :R]

    return jax.tree.map(joined, lax.map(attend, jnp.arange(count)))


def rows_of(rows: Rows, start: jax.Array | int, size: int) -> Rows:
    """`size` rows from `start` on."""
    return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start, size, axis=min(2, x.ndim - 1)), rows)


def pad_rows(rows: Rows, multiple: int) -> Rows:
    """The rows, and rows that see nothing up to a multiple of `multiple`."""
    extra = -rows.pos_BR.shape[1] % multiple
    if not extra:
        return rows
    wide, flat = ((0, 0), (0, 0), (0, extra), (0, 0)), ((0, 0), (0, extra))
    return replace(
        rows,
        q_BKRH=jnp.pad(rows.q_BKRH, wide),
        pos_BR=jnp.pad(rows.pos_BR, flat, constant_values=-1),
        branch_BR=None if rows.branch_BR is None else jnp.pad(rows.branch_BR, flat),
        first_BR=None if rows.first_BR is None else jnp.pad(rows.first_BR, flat),
    )


def pad_slots(slots: Slots, multiple: int) -> Slots:
    """The slots, and empty ones up to a multiple of `multiple`."""
    extra = -slots.pos_BS.shape[1] % multiple
    if not extra:
        return slots
    wide, flat = ((0, 0), (0, 0), (0, extra), (0, 0)), ((0, 0), (0, extra))
    return Slots(
        jnp.pad(slots.k_BKSH, wide),
        jnp.pad(slots.v_BKSH, wide),
        jnp.pad(slots.pos_BS, flat, constant_values=-1),
        None if slots.branch_BS is None else jnp.pad(slots.branch_BS, flat),
    )
