# SPDX-License-Identifier: Apache-2.0
"""What the Pallas kernel of `tpu_decode_kernel.py` is told while it is made, and what its rows have seen."""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

LANES = 128
LEAST, UNSEEN = -1e38, -2e38  # for -inf where differences of two must not be NaN: below every score, and below that
NOWHERE = jnp.iinfo(jnp.int32).max  # the position of an empty slot: behind every row


@dataclass(frozen=True)
class Cut:
    """How the work is cut. Static."""

    each: int  # sequences of rows that are one sequence's of the prefix, together in a program
    rows: int  # of one of those, and kv head
    calls: int  # programs for each sequence of the prefix
    heads: int  # kv heads of a program
    shares: int  # of the prefix, for the two cores of a chip that have nothing else to share out
    blocks: tuple[int, int]  # slots at a time, of the prefix and of a tail
    steps: tuple[int, int]  # blocks of a share, and of a tail


@dataclass(frozen=True)
class How:
    """What else the kernel is told. Static."""

    cut: Cut
    scale: float
    scaled: bool  # the prefix is quantised
    turned: bool  # keys and values come as [H, S]: so XLA lays out heads that fill no line of lanes
    new: bool
    several: bool  # counts of used slots, one for each sequence of the prefix
    windowed: bool  # rows have a first position
    finished: bool


@dataclass(frozen=True)
class Seen:
    """One kv head's rows and what they have seen: references into fast memory."""

    q_RH: Any
    pos_R1: Any  # int32
    first_R1: Any  # int32, the first position that a row sees; None: 0
    max_RX: Any  # float32, all lanes alike, before `scale`
    sum_RX: Any  # float32, all lanes alike
    out_RH: Any  # float32

    def start(self, how: How, marks_refs: Any, program: Any) -> None:
        """Nothing seen; the rows' positions, and the first that they see, as columns."""
        self.max_RX[...] = jnp.full(self.max_RX.shape, LEAST, jnp.float32)
        self.sum_RX[...] = jnp.zeros(self.sum_RX.shape, jnp.float32)
        self.out_RH[...] = jnp.zeros(self.out_RH.shape, jnp.float32)
        T = marks_refs[0].shape[1]
        shape = (self.pos_R1.shape[0], T)
        token = lax.div(lax.broadcasted_iota(jnp.int32, shape, 0), jnp.int32(how.cut.rows // T))
        for column, ref in zip((self.pos_R1, self.first_R1), marks_refs, strict=False):
            column[...] = jnp.full(column.shape, -1, jnp.int32)
            for own in range(how.cut.each):
                here = lax.broadcasted_iota(jnp.int32, shape, 1) + own * T == token
                mark_RT = jnp.where(here, ref[pl.ds(program * how.cut.each + own, 1), :], -1)
                column[...] = jnp.maximum(column[...], jnp.max(mark_RT, axis=1, keepdims=True))

    def add(self, how: How, pos_1S, k, v, *, turned: tuple[bool, bool], own: Any = None, scales: Any = ()) -> None:
        """Adds slots; `own`: which of a program's sequences of rows may see them, None: all."""
        q_RH = self.q_RH[...]
        score_RS = product(q_RH, k.astype(q_RH.dtype), 0 if turned[0] else 1)
        if scales:
            score_RS *= scales[0]
        seen_RS = jnp.where(pos_1S < 0, NOWHERE, pos_1S) <= self.pos_R1[...]
        if how.windowed:
            seen_RS &= pos_1S >= self.first_R1[...]
        if own is not None and how.cut.each > 1:
            row = lax.broadcasted_iota(jnp.int32, (q_RH.shape[0], 1), 0)
            seen_RS &= (row >= own * how.cut.rows) & (row < (own + 1) * how.cut.rows)
        score_RS = jnp.where(seen_RS, score_RS, UNSEEN)
        most_RX = jnp.maximum(self.max_RX[...], jnp.max(score_RS, axis=1, keepdims=True))
        log2_scale = how.scale * math.log2(math.e)
        keep_RX = jnp.exp2((self.max_RX[...] - most_RX) * log2_scale)
        weight_RS = jnp.exp2((score_RS - most_RX[:, :1]) * log2_scale)
        self.sum_RX[...] = self.sum_RX[...] * keep_RX + jnp.sum(weight_RS, axis=1, keepdims=True)
        if scales:
            weight_RS *= scales[1]
        added_RH = product(weight_RS.astype(q_RH.dtype), v.astype(q_RH.dtype), 1 if turned[1] else 0)
        self.out_RH[...] = self.out_RH[...] * keep_RX[:, :1] + added_RH
        self.max_RX[...] = most_RX

    def finish(self, how: How, out_refs: Any) -> None:
        """Writes what came of it."""
        if how.finished:
            total_RX = jnp.where(self.sum_RX[...] == 0, 1.0, self.sum_RX[...])
            out_refs[0][...] = (self.out_RH[...] / total_RX[:, :1]).astype(out_refs[0].dtype)
        else:
            out_refs[0][...] = self.out_RH[...]
            lane = lax.broadcasted_iota(jnp.int32, self.max_RX.shape, 1)
            out_refs[1][...] = jnp.where(lane == 0, self.max_RX[...], self.sum_RX[...])


def product(a: jax.Array, b: jax.Array, axis: int) -> jax.Array:
    """a over its last axis with b over `axis`, in float32."""
    if b.shape[0] == 1:  # one slot: no product that the compiler knows
        both = a.astype(jnp.float32) * b.astype(jnp.float32)
        return both if axis == 0 else jnp.sum(both, axis=1, keepdims=True)
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(a, b, (((1,), (axis,)), ((), ())), precision=precision, preferred_element_type=jnp.float32)
