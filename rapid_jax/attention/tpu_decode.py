# SPDX-License-Identifier: Apache-2.0
"""Attention of a few query rows over a prefix, a tail and the new tokens themselves on TPUs: one Pallas kernel.

Keys and values are read once, from where they lie, also in arrays of all layers (Flash-Decoding, Dao et al. 2023). A
step of the kernel (`tpu_decode_kernel.py`) adds one block of the prefix or of a tail to an un-normalised softmax in
fast memory; no score leaves it. Blocks from `used` on are not fetched: the last one before stays named, and what is
named again stays where it is.

Scores, softmax and sums are float32; softmax weights meet the values in the queries' dtype. A prefix of one sequence
under the rows of many is read once for as many of them as `MOST_ROWS` has room for; each has a tail of its own.

JAX's own kernels do not fit: `paged_attention` takes one query position and tells no softmax sums, so that nothing can
be merged with it; `ragged_paged_attention` wants keys beside values in pages of all heads.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

import chex
import jax
import jax.numpy as jnp
from jax import lax

from rapid_jax.attention.contract import check_contract
from rapid_jax.attention.online_softmax import Rows, Slots, SoftmaxState, finish
from rapid_jax.attention.tpu_decode_kernel import Given, attended
from rapid_jax.attention.tpu_decode_state import LANES, NOWHERE, Cut
from rapid_jax.runtime.contract import contract

MOST_ROWS = 256  # that read a prefix together; more are not a few
MOST_BYTES = 12 * 2**20  # of fast memory: a kernel may use 16 MiB of it on every generation
BLOCKS = (8192, 4096, 2048, 1024, 512, 256, 128)  # slots: large, for every step costs time besides its transfer
SHORT = 1024  # slots of a tail's block: few of them are used


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Stack:
    """The slots of one layer, as keys and values of all layers [L, B, K, S, H] and which layer is meant."""

    every: Slots  # all fields but the positions and the tags with a leading layer axis
    layer: jax.Array  # int32 scalar

    def one(self) -> Slots:
        """The layer's slots. To a kernel, unlike to XLA, this is a copy."""
        return _each(self.every, lambda x: lax.dynamic_index_in_dim(x, self.layer, keepdims=False))

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


def _each(slots: Slots, of: Callable[[jax.Array], jax.Array]) -> Slots:
    """The slots with `of` each of their keys, values and scales."""
    names = ("k_BKSH", "v_BKSH", "k_scale_BKS", "v_scale_BKS")
    return replace(slots, **{name: of(x) for name in names if (x := getattr(slots, name)) is not None})


Side: TypeAlias = Slots | Stack


def _slots(side: Side) -> Slots:
    return side.every if isinstance(side, Stack) else side


def block_for(slots: int, most: int, slot_bytes: int, room: int) -> int | None:
    """The largest block that divides the slots and for which there is room, at so many bytes a slot."""
    if slots <= min(most, LANES):
        return slots
    return next((size for size in BLOCKS if size <= most and slots % size == 0 and size * slot_bytes <= room), None)


def cut_of(rows: Rows, far: Slots, near: Slots) -> Cut | None:
    """How the kernel cuts its work; None: the prefix or a tail has no block."""
    B, K, R, H = rows.q_BKRH.shape
    n, S = far.pos_BS.shape
    together = max(B // n, 1)
    each = max(m for m in range(1, together + 1) if together % m == 0 and (m == 1 or m * R <= MOST_ROWS))
    calls = together // each
    heads = K if K % 2 else K // 2
    # As it lies in fast memory: in whole tiles, and what comes or goes twice.
    wide, high = -(-H // LANES) * LANES, -(-each * R // 16) * 16
    state = heads * high * (4 * (2 * LANES + wide) + 2 * wide * (rows.q_BKRH.dtype.itemsize + 4))

    def block(side: Slots, sequences: int, most: int) -> int | None:
        scales = 0 if side.k_scale_BKS is None else 16 * max(8, K)
        slot = 4 * wide * side.k_BKSH.dtype.itemsize + 8 * sequences + scales + 12 * high  # and scores and weights
        return block_for(side.pos_BS.shape[1], most, slot, MOST_BYTES - state)

    sizes = block(far, n, BLOCKS[0]), block(near, B, SHORT)
    if sizes[0] is None or sizes[1] is None:
        return None
    shares = 2 if n * calls * K // heads == 1 and S // sizes[0] > 1 else 1
    steps = -(-(S // sizes[0]) // shares), near.pos_BS.shape[1] // sizes[1]
    return Cut(each, R, calls, heads, shares, (sizes[0], sizes[1]), steps)


def fits(rows: Rows, far: Side, near: Side) -> bool:
    """Whether the kernel takes these: slots in whole blocks, heads of 64 or whole lanes, few rows, no branch tags."""
    far, near = _slots(far), _slots(near)
    R, H = rows.q_BKRH.shape[2:]
    tags = rows.branch_BR is not None and (far.branch_BS is not None or near.branch_BS is not None)
    plain = not tags and rows.reach_BR is None and near.k_scale_BKS is None and rows.q_BKRH.dtype != jnp.float16
    return plain and R <= MOST_ROWS and (H == 64 or H % LANES == 0) and cut_of(rows, far, near) is not None


def tpu_decode(
    rows: Rows, sides: tuple[Side, ...], used: tuple[jax.Array, ...], *, scale: float, interpret: Any = False
) -> SoftmaxState:
    """Attention of the rows over a prefix, a tail and, as a third side, the new tokens; un-normalised.

    The same as `attend_block` over them in one, but for rounding. `used` is int32, one number or, of a prefix, one a
    sequence, and at most the number of slots: those from there on are empty. The third side are the tokens that the
    rows are of, whose positions are the rows'; 0 or all of them are used. A prefix of few sequences is that of equal
    runs of rows. `interpret` may be Pallas's InterpretParams. Raises ValueError, while tracing, for shapes that do not
    go together.
    """
    cut = _check(rows, sides, used)
    out, stats = attended(_given(rows, sides, used, cut), cut, scale, interpret, finished=False)
    peak, total = stats[..., 0], stats[..., 1]
    peak = jnp.where(total > 0, peak * scale, -jnp.inf)
    top = jnp.max(peak, axis=2)
    weight = jnp.exp(peak - jnp.where(top == -jnp.inf, 0.0, top)[:, :, None])
    whole = SoftmaxState(jnp.sum(out * weight[..., None], axis=2), top, jnp.sum(total * weight, axis=2))
    return jax.tree.map(partial(_unfold, cut), whole)


def tpu_decoded(
    rows: Rows, sides: tuple[Side, ...], used: tuple[jax.Array, ...], *, scale: float, interpret: Any = False
) -> jax.Array:
    """`tpu_decode`, finished: [B, K, R, H] in the queries' dtype, 0 for a row that saw nothing."""
    cut = _check(rows, sides, used)
    if cut.shares > 1:
        return finish(tpu_decode(rows, sides, used, scale=scale, interpret=interpret), rows.q_BKRH.dtype)
    (out,) = attended(_given(rows, sides, used, cut), cut, scale, interpret, finished=True)
    return _unfold(cut, out[:, :, 0])


def _check(rows: Rows, sides: tuple[Side, ...], used: tuple[jax.Array, ...]) -> Cut:
    name = "tpu_decode"
    with contract(name):
        assert 2 <= len(sides) <= 3, f"expected a prefix, a tail and perhaps new tokens, got {len(sides)} sides"
        assert len(used) == len(sides), f"expected {len(sides)} counts of used slots, got {len(used)}"
        chex.assert_type(used, [jnp.int32] * len(used))
        for side in sides:
            if isinstance(side, Stack):
                chex.assert_shape(side.layer, ())
                chex.assert_type(side.layer, jnp.int32)
                chex.assert_rank([side.every.k_BKSH, side.every.v_BKSH], 5)
                lead = [x.shape[0] for x in jax.tree.leaves(replace(side.every, pos_BS=None, branch_BS=None))]
                assert len(set(lead)) == 1, f"expected as many layers of each, got {lead}"
    for index, side in enumerate(sides):
        one = jax.eval_shape(side.one) if isinstance(side, Stack) else side
        check_contract(name, rows, one, shared=index == 0, quantized=index == 0)
    with contract(name):
        far, near, *new = map(_slots, sides)
        sequences, tokens = far.pos_BS.shape[0], rows.pos_BR.shape[1] // rows.group
        assert used[0].size in (1, sequences), f"expected 1 or {sequences} counts of used slots, got {used[0].shape}"
        assert all(x.size == 1 for x in used[1:]), "expected one count of a tail's used slots"
        assert all(fits(rows, sides[0], side) for side in sides[1:]), (
            f"expected slots in whole blocks, at most {MOST_ROWS} rows of a kv head, heads of 64 or more, a tail in "
            f"full and no branch tags, got rows {rows.q_BKRH.shape} and slots {[_slots(x).k_BKSH.shape for x in sides]}"
        )
        for side in new:
            assert not isinstance(sides[2], Stack), "expected the new tokens of one layer"
            assert side.pos_BS.shape[1] == tokens, f"expected the {tokens} tokens of the rows, got {side.pos_BS.shape}"
    cut = cut_of(rows, far, near)
    assert cut is not None
    return cut


def _given(rows: Rows, sides: Sequence[Side], used: tuple[jax.Array, ...], cut: Cut) -> Given:
    """The rows of a program side by side, and keys and values as of stacks."""
    q = rows.q_BKRH
    if cut.each > 1:
        q = q.reshape(-1, cut.each, *q.shape[1:]).swapaxes(1, 2)
        q = q.reshape(*q.shape[:2], -1, q.shape[4])
    first, second, *others = sides
    far, near = (side if isinstance(side, Stack) else _lead(side) for side in (first, second))
    new = _slots(others[0]) if others else None
    marks, skipped = [rows.pos_BR if new is None else new.pos_BS], None
    if rows.first_BR is not None:
        marks.append(rows.first_BR if new is None else rows.first_BR[:, :: rows.group])
        skipped = _skipped(rows, far.every.pos_BS)
    layers = far.layer.reshape(1), near.layer.reshape(1)
    return Given(q, tuple(marks), far.every, near.every, new, layers, tuple(x.reshape(-1) for x in used), skipped)


def _skipped(rows: Rows, pos_BS: jax.Array) -> jax.Array:
    """int32 [sequences of the prefix]: slots before the first that any of the rows over it may see."""
    assert rows.first_BR is not None
    n, S = pos_BS.shape
    earliest_B = jnp.min(jnp.where(rows.pos_BR >= 0, rows.first_BR, NOWHERE).reshape(n, -1), axis=1)
    seen_BS = pos_BS >= jnp.maximum(earliest_B, 0)[:, None]
    return jnp.min(jnp.where(seen_BS, jnp.arange(S, dtype=jnp.int32), S), axis=1)


def _lead(slots: Slots) -> Stack:
    """As a stack of one layer."""
    return Stack(_each(replace(slots, branch_BS=None), lambda x: x[None]), jnp.int32(0))


def _unfold(cut: Cut, x: jax.Array) -> jax.Array:
    """[programs, K, rows, ...] as [B, K, R, ...]."""
    if cut.each == 1:
        return x
    x = x.reshape(*x.shape[:2], cut.each, cut.rows, *x.shape[3:]).swapaxes(1, 2)
    return x.reshape(-1, *x.shape[2:])
