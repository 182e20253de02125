# SPDX-License-Identifier: Apache-2.0
"""Cases of a few rows over a prefix and a tail, in numbers, with dense attention in float64 as their truth.

Kernels meet them interpreted on a CPU (tests/attention) and compiled on the device they are for (tests/gpu).
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from rapid_jax.attention.online_softmax import Rows, Slots
from tests.reference import dense_attention, visible

# What a quantised prefix costs: the weights are float16, off by half a step of this; values here are below 3.
FLOAT16 = 3 * 2**-11


@dataclass(frozen=True)
class Side:
    """How many slots there are, how many are used, and a run of empty ones among those.

    A `shared` side is of so many sequences, each under equally many rows of the batch.
    """

    slots: int
    used: int
    hole: tuple[int, int] = (0, 0)
    int8: bool = False
    shared: int = 0


@dataclass(frozen=True)
class Case:
    """`time` tokens of `group` query heads each; `blind` rows of the last batch row are at position -1."""

    sides: tuple[Side, ...]
    batch: int = 1
    kv_heads: int = 2
    group: int = 1
    time: int = 1
    head_dim: int = 16
    blind: int = 0
    window: int | None = None

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Made:
    """A case in numbers."""

    rows: Rows
    sides: tuple[Slots, ...]
    used: tuple[jax.Array, ...]


def positions_of(case: Case) -> tuple[list[np.ndarray], np.ndarray]:
    """(positions of each side's slots [B, S], of the rows [B, R]); sequences of a batch start apart, if they can."""
    apart = 0 if any(side.shared for side in case.sides) else 1000
    end_B, slots = apart * np.arange(case.batch)[:, None], []
    for side in case.sides:
        index = np.arange(side.slots)
        inside = (index < side.used) & ~((index >= side.hole[0]) & (index < side.hole[1]))
        slots.append(np.where(inside, end_B + index, -1).astype(np.int32)[: side.shared or None])
        end_B = end_B + side.used
    pos_BR = np.repeat(np.maximum(end_B - case.time, 0) + np.arange(case.time), case.group, axis=1)
    if case.blind:
        pos_BR[-1, -case.blind :] = -1
    return slots, pos_BR.astype(np.int32)


def made(case: Case, dtype=jnp.float32) -> Made:
    rng = np.random.default_rng(0)
    B, K, R, H = case.batch, case.kv_heads, case.group * case.time, case.head_dim
    pos, pos_BR = positions_of(case)
    sides = []
    for side, pos_BS in zip(case.sides, pos, strict=True):
        shape = (side.shared or B, K, side.slots, H)
        if side.int8:
            k, v = (rng.integers(-127, 128, shape, np.int8) for _ in range(2))
            scales = [jnp.asarray(np.float32(rng.uniform(0.2, 3, shape[:3]) / 127)) for _ in range(2)]
            sides.append(Slots(jnp.asarray(k), jnp.asarray(v.swapaxes(2, 3)), jnp.asarray(pos_BS), None, *scales))
        else:
            kv = [jnp.asarray((size * rng.normal(size=shape)).astype(dtype)) for size in (1.5, 1)]
            sides.append(Slots(*kv, jnp.asarray(pos_BS)))
    q_BKRH = (2 * rng.normal(size=(B, K, R, H))).astype(jnp.bfloat16)  # float32 and float16 have it too
    first_BR = None if case.window is None else jnp.asarray(pos_BR - case.window + 1)
    rows = Rows(jnp.asarray(q_BKRH.astype(dtype)), jnp.asarray(pos_BR), group=case.group, first_BR=first_BR)
    return Made(rows, tuple(sides), tuple(jnp.asarray(np.int32(side.used)) for side in case.sides))


def truth(given: Made) -> np.ndarray:
    """float64 [B, K, R, H]: dense attention over the numbers that the slots stand for."""

    def numbers(side: Slots) -> tuple[np.ndarray, np.ndarray]:
        k, v = (np.asarray(x, np.float64) for x in (side.k_BKSH, side.v_BKSH))
        if side.k_scale_BKS is None:
            return k, v
        return k * np.asarray(side.k_scale_BKS)[..., None], v.swapaxes(2, 3) * np.asarray(side.v_scale_BKS)[..., None]

    def of_all(x: np.ndarray) -> np.ndarray:
        return np.repeat(x, len(given.rows.pos_BR) // len(x), axis=0)

    kv = [[of_all(x) for x in numbers(side)] for side in given.sides]
    k_BKSH, v_BKSH = (np.concatenate(x, axis=2) for x in zip(*kv, strict=True))
    pos_BS = np.concatenate([of_all(np.asarray(side.pos_BS)) for side in given.sides], axis=1)
    first_BR = given.rows.first_BR
    window = None if first_BR is None else np.max(np.asarray(given.rows.pos_BR - first_BR)) + 1  # of every row
    seen = visible(given.rows.pos_BR, pos_BS, window=window)
    q_BKRH = np.asarray(given.rows.q_BKRH, np.float64)
    return dense_attention(*(x.swapaxes(1, 2) for x in (q_BKRH, k_BKSH, v_BKSH)), seen).swapaxes(1, 2)


def tagged(given: Made) -> Made:
    """The rows and slots of three branches."""
    rows = replace(given.rows, branch_BR=jnp.ones_like(given.rows.pos_BR))
    sides = tuple(replace(side, branch_BS=side.pos_BS % 3) for side in given.sides)
    return replace(given, rows=rows, sides=sides)


def error(got: jax.Array, want: np.ndarray) -> float:
    """The difference's size by the truth's."""
    got = np.asarray(got.astype(jnp.float32), np.float64)
    assert np.all(np.isfinite(got))
    return float(np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-30))
