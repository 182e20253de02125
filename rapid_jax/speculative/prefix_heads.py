# SPDX-License-Identifier: Apache-2.0
"""The head of a prefix in slots of its own: a longer version of a document is prefilled from where it differs.

Prefill lays chunks one behind the other on each context device (`ChunkLayout`), so the first chunks of one prefix are
the first slots of every device, in a prefix of any capacity: nothing moves between devices.
"""

from dataclasses import dataclass, replace
from functools import partial

import jax
import numpy as np
from jax import lax
from jax.sharding import Mesh

from rapid_jax.attention.cache import KV, Layers, Near, Prefix
from rapid_jax.attention.strategy import Strategy
from rapid_jax.model.decoder import Decoder
from rapid_jax.runtime.mesh import put_on_mesh, replicate
from rapid_jax.speculative.chunk_layout import ChunkLayout
from rapid_jax.speculative.prefill import empty_cache, serving
from rapid_jax.speculative.window_layout import WindowLayout


@dataclass(frozen=True)
class Place:
    """The first `tokens` of one prompt in the slots of a layout, which may have room for more.

    `window` is of the layers `near_at`, which keep the last of them. Of what is stored they are those from `first` on.
    """

    tokens: int
    layout: ChunkLayout
    window: int | None = None
    near_at: tuple[int, ...] = ()
    first: int = 0

    @classmethod
    def of(
        cls,
        tokens: int,
        longest: int,
        chunk: int,
        devices: int,
        window: int | None = None,
        near_at: tuple[int, ...] = (),
    ) -> "Place":
        """In the slots that `prefill` has for a prompt of `longest` tokens."""
        return cls(tokens, ChunkLayout.of(longest, chunk, devices), window, near_at)

    @property
    def near(self) -> "Place | None":
        """Of the layers with a window: what they keep, counted from the first token of it on."""
        if self.window is None:
            return None
        kept = WindowLayout(self.window, self.layout)
        return Place(self.tokens - kept.first_kept(self.tokens), kept.kept)

    def near_of(self, stored: int) -> "Place | None":
        """As `near`, where the last `stored` tokens are to be had: as many of those as there is room for.

        How many were stored followed from the mesh and the room of who did it. None: fewer than a later token sees.
        """
        if self.window is None:
            return None
        kept = WindowLayout(self.window, self.layout)
        if stored < min(self.tokens, kept.reach):
            return None
        tokens = min(stored, kept.kept.slots)
        return Place(tokens, kept.kept, first=stored - tokens)

    @property
    def slots_before(self) -> int:
        """Beside those of `near`, while prefill computes a chunk: of the chunks before it that a window reaches."""
        if self.window is None or (kept := WindowLayout(self.window, self.layout)).is_whole:
            return 0
        return kept.before.slots

    def positions(self) -> np.ndarray:
        """int32 [1, slots]: the position of each slot, -1 for an empty one."""
        return self.layout.slotted(self.layout.chunked([range(self.tokens)], -1), -1)

    def stored_positions(self) -> np.ndarray:
        """int32 [slots]: where what is stored has what each slot is to hold, -1 for an empty one."""
        slots = self.positions()[0]
        return np.where(slots < 0, -1, slots + self.first).astype(np.int32)

    def moved(self, array: np.ndarray, axis: int) -> np.ndarray:
        """The head of what lies along `axis` in slots of the same chunks, in this layout's slots."""
        axis %= array.ndim
        devices, share = self.layout.devices, self._share
        before, after = array.shape[:axis], array.shape[axis + 1 :]
        shares = array.reshape(*before, devices, -1, *after)
        out = np.zeros((*before, devices, self.layout.slots // devices, *after), array.dtype)
        head = (slice(None),) * (axis + 1) + (slice(share),)
        out[head] = shares[head]
        return out.reshape(*before, self.layout.slots, *after)

    @property
    def _share(self) -> int:
        if self.tokens % self.layout.chunk:
            raise ValueError(f"a head ends with a chunk of {self.layout.chunk} tokens, got {self.tokens}")
        return self.tokens // self.layout.devices

    def prefix(self, layers: Layers, mesh: Mesh | None, near: Layers = (), near_place: "Place | None" = None) -> Prefix:
        """The prefix of layers that have their keys and values so; those with a window apart, in their own place."""
        spec = Strategy(block=1, mesh=mesh, batch=("data",)).spec("pos_BS")

        def of(layers: Layers, place: Place, first: int) -> Prefix:
            slots = place.positions()
            pos_BS = np.where(slots < 0, -1, slots + first).astype(np.int32)
            return Prefix(layers, put_on_mesh(mesh, spec, pos_BS), replicate(mesh, np.int32(place.tokens)))

        found = of(layers, self, 0)
        if near_place is None or self.window is None:
            return found
        kept = of(near, near_place, self.tokens - near_place.tokens)
        return replace(found, near=Near(kept, self.near_at, self.window))


def head_of(decoder: Decoder, prefix: Prefix, place: Place) -> Prefix:
    """A copy of the first tokens of a prefix of one row that `prefill` made in chunks of the same size.

    A chunk at a time: a program for each capacity, and none for a pair of them or a length of the head.
    """
    strategy, chunk = serving(decoder, block=1), place.layout.chunk
    kv = prefix.layers[0] if isinstance(prefix.layers, tuple) else prefix.layers
    layers = empty_cache(decoder, 1, place.layout.slots, kv.k_BKSH.dtype, letter="S")
    for start in range(0, place.tokens, chunk):
        at = replicate(decoder.mesh, np.int32(start))
        piece = _piece(prefix.layers, at, chunk=chunk, strategy=strategy)
        layers = _with_piece(layers, piece, at, strategy=strategy)
    return place.prefix(layers, decoder.mesh)


def _name(array: jax.Array) -> str:
    return f"kv_{'L' * (array.ndim - 4)}BKSH"


@partial(jax.jit, static_argnames=("chunk", "strategy"))
def _piece(layers: Layers, at: jax.Array, *, chunk: int, strategy: Strategy) -> Layers:
    def cut(array):
        def local(own, at):
            size = chunk // strategy.context
            return (lax.dynamic_slice_in_dim(own, at // strategy.context, size, axis=own.ndim - 2),)

        return strategy.per_device(local, (_name(array), ""), (_name(array),))(array, at)[0]

    return jax.tree.map(cut, layers)


@partial(jax.jit, donate_argnames="layers", static_argnames="strategy")
def _with_piece(layers: Layers, piece: Layers, at: jax.Array, *, strategy: Strategy) -> Layers:
    def put(array, new):
        def local(own, new, at):
            return (lax.dynamic_update_slice_in_dim(own, new, at // strategy.context, axis=own.ndim - 2),)

        name = _name(array)
        return strategy.per_device(local, (name, name, ""), (name,))(array, new, at)[0]

    return jax.tree.map(put, layers, piece)


def layer_names(kv: KV) -> dict[str, tuple[str, int]]:
    """Array of a layer -> (its letters, the axis of its slots counted from the end)."""
    stacked = "L" * (kv.k_BKSH.ndim - 4)
    if kv.k_scale_BKS is None:
        return {"k_BKSH": (f"k_{stacked}BKSH", -2), "v_BKSH": (f"v_{stacked}BKSH", -2)}
    scales = {name: (f"scale_{stacked}BKS", -1) for name in ("k_scale_BKS", "v_scale_BKS")}
    return {"k_BKSH": (f"k_{stacked}BKSH", -2), "v_BKSH": (f"v_{stacked}BKHS", -1), **scales}
