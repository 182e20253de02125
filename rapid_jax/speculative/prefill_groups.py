# SPDX-License-Identifier: Apache-2.0
"""Keys and values of a prompt while it is prefilled: layers that keep the same slots are a group."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from rapid_jax.attention.cache import KV, Layers, Prefix
from rapid_jax.attention.strategy import Strategy
from rapid_jax.runtime.mesh import put_on_mesh, replicate
from rapid_jax.speculative.chunk_layout import ChunkLayout
from rapid_jax.speculative.window_layout import WindowLayout


class Group:
    """Layers of one window, or of none, being filled a chunk at a time.

    `layers` are theirs with the slots of `layout`, or a list of their stack alone; `kept`, of a window whose slots do
    not all stay, has those of the finished prompt. All are used up. `positions` are those of the prompts' chunks, -1
    where there is none.
    """

    def __init__(
        self,
        layers: Sequence[KV],
        layout: ChunkLayout | WindowLayout,
        positions: np.ndarray,
        strategy: Strategy,
        kept: Sequence[KV] = (),
    ):
        self.layers, self._kept, self._layout = list(layers), list(kept), layout
        self._positions, self._strategy = positions, strategy
        self._lengths = [int(length) for length in positions.max(axis=(0, 2)) + 1]
        self._chunks = layout.chunks if isinstance(layout, WindowLayout) else layout
        self._moves_on = isinstance(layout, WindowLayout) and layout.before != layout.chunks
        if not isinstance(layout, WindowLayout):
            self._every_BS = self._slotted(layout, 0, len(self._positions))

    def begin(self, index: int) -> tuple[jax.Array, jax.Array]:
        """What the layers attend to while chunk `index` is computed: (positions of slots, how many are used)."""
        layout, chunk, mesh = self._layout, self._chunks.chunk, self._strategy.mesh
        if not isinstance(layout, WindowLayout):
            self._used, self._sources = replicate(mesh, np.int32(index * chunk)), None
            return self._every_BS, self._used
        first = layout.first_before(index)
        self._used = replicate(mesh, np.int32((index - first) * chunk))
        ends_B = np.array([(length - 1) // chunk == index for length in self._lengths])
        # With the first chunk also where no prompt ends: then all programs have run.
        takes = self._kept and (ends_B.any() or index == 0)
        self._sources = replicate(mesh, (layout.sources(self._lengths, index), ends_B)) if takes else None
        return self._slotted(layout.before, first, index), self._used

    def add(self, place: int, chunk: KV) -> None:
        """Takes in what layer `place` of the group, or its stack, has of the chunk."""
        kv, strategy = self.layers[place], self._strategy
        if self._sources is not None:
            self._kept[place] = _with_last(self._kept[place], kv, chunk, *self._sources, strategy=strategy)
        fill = _move_on if self._moves_on else _written
        self.layers[place] = fill(kv, chunk, self._used, strategy=strategy)

    @property
    def pending(self) -> list[KV]:
        """All that may still be under way."""
        return self.layers + self._kept

    def prefix(self, *, stacked: bool) -> Prefix:
        """Everything, after the last chunk."""
        layout, used = self._layout, max(self._lengths)
        held = self._kept or self.layers
        layers: Layers = held[0] if stacked and held else tuple(held)
        if isinstance(layout, WindowLayout):
            used -= layout.first_kept(used)
            pos_BS = put_on_mesh(self._strategy.mesh, self._strategy.spec("pos_BS"), layout.positions(self._lengths))
        else:
            pos_BS = self._every_BS
        return Prefix(layers, pos_BS, replicate(self._strategy.mesh, np.int32(used)))

    def _slotted(self, layout: ChunkLayout, first: int, last: int) -> jax.Array:
        """The positions of these chunks in the layout's slots."""
        chunks = ChunkLayout(layout.chunk, last - first, layout.slots, layout.devices)
        slots = chunks.slotted(self._positions[first:last], -1)
        return put_on_mesh(self._strategy.mesh, self._strategy.spec("pos_BS"), slots)


# A program of its own: on a CPU the layer's program takes a third longer when its cache is donated to it.
@partial(jax.jit, donate_argnames="kv", static_argnames="strategy")
def _written(kv: KV, chunk: KV, used: jax.Array, *, strategy: Strategy) -> KV:
    """The prefix with the chunk: each device writes its own part behind what it has used."""

    def put(old_BKSH, new_BKSH, used):
        new_BKSH = new_BKSH.astype(old_BKSH.dtype)
        at = used // strategy.context
        return (jax.lax.dynamic_update_slice_in_dim(old_BKSH, new_BKSH, at, axis=old_BKSH.ndim - 2),)

    name = f"kv_{'L' * (kv.k_BKSH.ndim - 4)}BKSH"
    put = strategy.per_device(put, (name, name, ""), (name,))
    return KV(put(kv.k_BKSH, chunk.k_BKSH, used)[0], put(kv.v_BKSH, chunk.v_BKSH, used)[0])


@partial(jax.jit, donate_argnames="kv", static_argnames="strategy")
def _move_on(kv: KV, chunk: KV, used: jax.Array, *, strategy: Strategy) -> KV:
    """As `_written`, of the chunks that a window reaches: where all slots are used the oldest chunk goes."""

    def move(old_BKSH, new_BKSH, used):
        axis, at = old_BKSH.ndim - 2, used // strategy.context
        slots, size = old_BKSH.shape[axis], new_BKSH.shape[axis]
        new_BKSH = new_BKSH.astype(old_BKSH.dtype)
        both = jnp.concatenate([old_BKSH, jnp.zeros_like(new_BKSH)], axis=axis)
        both = jax.lax.dynamic_update_slice_in_dim(both, new_BKSH, at, axis=axis)
        return (jax.lax.dynamic_slice_in_dim(both, jnp.maximum(at + size - slots, 0), slots, axis=axis),)

    name = f"kv_{'L' * (kv.k_BKSH.ndim - 4)}BKSH"
    move = strategy.per_device(move, (name, name, ""), (name,))
    return KV(move(kv.k_BKSH, chunk.k_BKSH, used)[0], move(kv.v_BKSH, chunk.v_BKSH, used)[0])


@partial(jax.jit, donate_argnames="kept", static_argnames="strategy")
def _with_last(kept: KV, before: KV, chunk: KV, from_BS: jax.Array, ends_B: jax.Array, *, strategy: Strategy) -> KV:
    """What stays of prompts that end in the chunk, beside what has stayed of others. Between devices slots move."""
    spec = strategy.spec(f"kv_{'L' * (kept.k_BKSH.ndim - 4)}BKSH")

    def take(kept_BKSH, before_BKSH, chunk_BKSH):
        def of_layer(arrays):
            kept_BKSH, *both = arrays
            every_BKSH = jnp.concatenate([each.astype(kept_BKSH.dtype) for each in both], axis=2)
            new_BKSH = jnp.take_along_axis(every_BKSH, from_BS[:, None, :, None], axis=2)
            return jnp.where(ends_B[:, None, None, None], new_BKSH, kept_BKSH)

        arrays = kept_BKSH, before_BKSH, chunk_BKSH
        found = of_layer(arrays) if kept_BKSH.ndim == 4 else jax.lax.map(of_layer, arrays)
        if strategy.mesh is None:
            return found
        return jax.lax.with_sharding_constraint(found, NamedSharding(strategy.mesh, spec))

    fields = (kept.k_BKSH, before.k_BKSH, chunk.k_BKSH), (kept.v_BKSH, before.v_BKSH, chunk.v_BKSH)
    return KV(*(take(*arrays) for arrays in fields))
