# SPDX-License-Identifier: Apache-2.0
"""Drafting from the target's own cache: weights of the target read what its latest tokens attended to most.

The drafter's prefix is a copy of blocks of the target's, chosen anew for a row every few rounds; behind it the drafter
goes on from the target's own tail, so there is no prompt of its own to read and nothing to catch up with. Any choice is
as lossless as another: it decides how many drafts are accepted.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from rapid_jax.attention.attended import attended_prefix, attended_slots
from rapid_jax.attention.cache import KV, Layers, Prefix, Tail, mesh_of
from rapid_jax.model.config import ModelConfig
from rapid_jax.model.decoder import Decoder
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.mesh import replicate
from rapid_jax.speculative.draft import read_with_queries
from rapid_jax.speculative.initial_state import RECENT
from rapid_jax.speculative.prefill import serving
from rapid_jax.speculative.state import Plan, Side, window


def latest(old_BGLNH: jax.Array, fed_BTLNH: jax.Array, taken_B: jax.Array) -> jax.Array:
    """The latest G queries once the first `taken_B` of those that were fed are part of the answer."""
    both = jnp.concatenate([old_BGLNH, fed_BTLNH.astype(old_BGLNH.dtype)], axis=1)
    return window(both, taken_B, old_BGLNH.shape[1])


def attended_side(target: Side, tail: Tail, decoder: Decoder, slots: int, plan: Plan) -> tuple[Side, jax.Array]:
    """(the drafter, which has chosen nothing yet, of at most `slots` slots; the prompt's latest queries).

    `tail` is the target's, with every token of the prompt but the last.
    """
    rows = tail.start_B.shape[0]
    prefix = _empty(target.prefix, rows, attended_slots(target.prefix, slots))
    return replace(target, decoder=decoder, prefix=prefix), _prompt_queries(target, tail, plan=plan)


def check_attended(config: ModelConfig) -> None:
    """Raises InputError for a target whose cache cannot be drafted from."""
    windows = [window for window in config.window_of if window]
    if windows:
        raise InputError(
            "models.drafter attended: expected a target whose layers see all of a document, got one with windows of "
            f"{windows[0]} tokens"
        )


@partial(jax.jit, static_argnames="plan")
def _prompt_queries(target: Side, tail: Tail, *, plan: Plan) -> jax.Array:
    """[B, RECENT, L, N, H] of the last prompt tokens, those that a tail holds; zeros before them."""
    back_B = jnp.minimum(tail.length_B, RECENT - 1)
    tokens_BT = window(jnp.pad(target.recent_BR, ((0, 0), (0, RECENT))), RECENT - 1 - back_B, RECENT)
    queries = read_with_queries(target, tail.rolled_back(tail.length_B - back_B), tokens_BT, plan, rows=1)[2]
    return latest(jnp.zeros_like(queries), queries, back_B + 1)


def _empty(prefix: Prefix, rows: int, slots: int) -> Prefix:
    """Room for so many slots of each row; none is filled."""
    mesh = mesh_of(prefix.layers)

    def zeros(x: jax.Array, axis: int) -> jax.Array:
        shape = list(x.shape)
        shape[int(isinstance(prefix.layers, KV))], shape[axis] = rows, slots
        return jnp.zeros(shape, x.dtype, device=None if mesh is None else x.sharding)

    def of(kv: KV) -> KV:
        if kv.k_scale_BKS is None or kv.v_scale_BKS is None:
            return KV(zeros(kv.k_BKSH, -2), zeros(kv.v_BKSH, -2))
        return KV(zeros(kv.k_BKSH, -2), zeros(kv.v_BKSH, -1), zeros(kv.k_scale_BKS, -1), zeros(kv.v_scale_BKS, -1))

    layers: Layers = of(prefix.layers) if isinstance(prefix.layers, KV) else tuple(map(of, prefix.layers))
    return Prefix(layers, *replicate(mesh, (np.full((rows, slots), -1, np.int32), np.int32(0))))


@partial(jax.jit, static_argnames="block", donate_argnames="chosen")
def choose(target: Side, chosen: Prefix, queries_BGLNH: jax.Array, due_B: jax.Array, *, block: int) -> Prefix:
    """What the drafter reads from now on, in the rows that are due."""
    return attended_prefix(target.prefix, chosen, queries_BGLNH, due_B, serving(target.decoder, block))


class Choices:
    """When each row chooses anew: every `every` rounds of its own, so that no row's drafts depend on the others'."""

    def __init__(self, every: int, rows: int = 1, left: Sequence[int] = ()):
        self.every = every
        self.left = list(left) or [0] * rows  # rounds of each row until its next choice

    def calls(self, rounds: int) -> list[tuple[np.ndarray, int]]:
        """So many rounds in parts: (bool [B], the rows that choose before a part; its rounds)."""
        parts = []
        while rounds:
            due = [left == 0 for left in self.left]
            self.left = [left or self.every for left in self.left]
            part = min(rounds, *self.left)
            parts.append((np.asarray(due), part))
            self.left = [left - part for left in self.left]
            rounds -= part
        return parts

    def with_row(self, other: "Choices", row: int, rows: int) -> "Choices":
        """Those of so many rows, of which one is the other's."""
        left = [*self.left, *[0] * (rows - len(self.left))]
        left[row] = other.left[0]
        return Choices(self.every, left=left)

    def of_rows(self, rows: Sequence[int]) -> "Choices":
        """Those rows alone."""
        return Choices(self.every, left=[self.left[row] for row in rows])
