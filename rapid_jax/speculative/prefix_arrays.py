# SPDX-License-Identifier: Apache-2.0
"""A prefix's arrays between its devices and a store: in order of position, with the checkpoint's own kv heads.

What is stored does not depend on the mesh that made it, but for the size of its pieces: no two devices write into one.
Each process writes what its own devices hold, a layer after another; of copies of kv heads one is written. Beside them
lie the sums that they are known by (prefix_sums.py). prefix_reader.py reads it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from rapid_jax.attention.cache import KV, Layers, Prefix
from rapid_jax.runtime.array_store import Array, Moves
from rapid_jax.runtime.axes import letters_of
from rapid_jax.speculative.prefix_heads import layer_names
from rapid_jax.speculative.prefix_manifest import NEAR
from rapid_jax.speculative.prefix_sums import SUMS, Slots, slot_sums

_PIECE_BYTES: Final = 8 << 20  # larger ones are slower: each is memory that the system maps anew


@dataclass(frozen=True)
class Run:
    """Consecutive slots that hold consecutive positions."""

    slot: int
    position: int
    count: int

    @property
    def slots(self) -> slice:
        """Where they are."""
        return slice(self.slot, self.slot + self.count)

    @property
    def positions(self) -> slice:
        """What they hold."""
        return slice(self.position, self.position + self.count)


@dataclass(frozen=True)
class Part:
    """What a device holds of an array and writes: slots of some kv heads, `own` of its heads are `heads` stored."""

    shard: int
    own: slice
    heads: slice
    runs: tuple[Run, ...]
    stored: np.ndarray  # which stored head each of its heads is
    positions: np.ndarray  # of its slots


def runs_of(pos_S: np.ndarray) -> tuple[Run, ...]:
    """What lies in slots with these positions, -1 of an empty one."""
    filled = np.flatnonzero(pos_S >= 0)
    if not filled.size:
        return ()
    ends = np.flatnonzero((np.diff(filled) != 1) | (np.diff(pos_S[filled]) != 1)) + 1
    return tuple(Run(int(slots[0]), int(pos_S[slots[0]]), slots.size) for slots in np.split(filled, ends))


def stored_groups(prefix: Prefix) -> dict[str, Prefix]:
    """Layers that keep the same slots, by what stands before their arrays' names, each as a prefix whose positions are
    counted from the first that it keeps."""
    near = None if prefix.near is None else prefix.near.prefix
    every = {"": replace(prefix, near=None)}
    if near is not None:
        every[NEAR] = replace(near, pos_BS=_from_first(near.pos_BS, int(prefix.used) - int(near.used)))
    return {before: group for before, group in every.items() if layer_count(group.layers)}


def _from_first(pos_BS: jax.Array | np.ndarray, first: int) -> Any:
    if isinstance(pos_BS, np.ndarray):
        return np.where(pos_BS < 0, -1, pos_BS - first)
    # Each device its own part: this may be a thread that runs no program on several.
    parts = [_shift(shard.data, first) for shard in pos_BS.addressable_shards]
    return jax.make_array_from_single_device_arrays(pos_BS.shape, pos_BS.sharding, parts)


@jax.jit
def _shift(pos_BS: jax.Array, first: int) -> jax.Array:
    return jnp.where(pos_BS < 0, -1, pos_BS - first)


def layer_count(layers: Layers) -> int:
    """How many layers there are, in either layout."""
    return len(layers) if isinstance(layers, tuple) else layers.k_BKSH.shape[0]


def steps_of(prefix: Prefix, copies: int) -> tuple[int, int]:
    """What all bounds of the parts that this process writes are multiples of: of kv heads, of positions; 0 for none."""
    heads = positions = 0
    kv, used = first_layer(prefix.layers), int(prefix.used)
    for part in _parts(kv.k_BKSH, *axes_of(kv, "k_BKSH"), prefix, copies):
        heads = math.gcd(heads, part.heads.start, part.heads.stop)
        for run in part.runs:
            end = run.position + run.count
            positions = math.gcd(positions, run.position, 0 if end == used else end)
    return heads, positions


def stored_arrays(prefix: Prefix, copies: int, steps: Sequence[int]) -> dict[str, Array]:
    """How a group of a prefix of one row is stored: fields [layers, kv heads, positions, ...], and their sums.

    `steps` is of all processes.
    """
    kv, used, count = first_layer(prefix.layers), int(prefix.used), layer_count(prefix.layers)
    stacked = isinstance(prefix.layers, KV)
    heads, positions = steps[0], steps[1] or used
    row = kv.k_BKSH.shape[-1] * kv.k_BKSH.dtype.itemsize
    while heads % 2 == 0 and heads * positions * row > _PIECE_BYTES:
        heads //= 2
    if not steps[1]:  # one run: it may be cut anywhere
        positions = -(-used // -(-used * heads * row // _PIECE_BYTES))
    found = {}
    for name in layer_names(kv):
        array, (k_axis, s_axis) = getattr(kv, name), axes_of(kv, name)
        shape, piece = list(array.shape), list(array.shape)
        shape[k_axis], piece[k_axis] = array.shape[k_axis] // copies, heads
        shape[s_axis], piece[s_axis] = used, positions
        skipped = 2 if stacked else 1  # layers, of which there is one a piece, and the row
        found[name] = Array(array.dtype.name, (count, *shape[skipped:]), (1, *piece[skipped:]))
    stored = found["k_BKSH"]
    return found | {SUMS: Array("uint32", stored.shape[:3], stored.piece[:3])}


def write(
    prefix: Prefix,
    copies: int,
    key: str,
    targets: Mapping[str, Any],
    moves: Moves,
    step: Callable[[], bool] = lambda: True,
) -> None:
    """Begins to write what this process's devices hold, a layer at a time, for as long as `step` says before each.

    The next layer is on its way to the host meanwhile. `key` is the prefix's, which its sums depend on.
    """
    kv, count = first_layer(prefix.layers), layer_count(prefix.layers)
    before_heads = 2 if isinstance(prefix.layers, KV) else 1  # the layers of a stack, and the row
    axes = {name: axes_of(kv, name) for name in layer_names(kv)}
    parts = {name: _parts(getattr(kv, name), *axes[name], prefix, copies) for name in axes}

    def leaving(layer: int) -> dict[str, list[Any]]:
        return _leaving(prefix.layers, layer, parts, key) if layer < count else {}

    coming = leaving(0)
    axes[SUMS], parts[SUMS] = (before_heads, before_heads + 1), parts["k_BKSH"]
    for layer in range(count):
        if not step():
            return
        held, coming = coming, leaving(layer + 1)
        for name, target in targets.items():
            k_axis, s_axis = (axis - before_heads for axis in axes[name])
            for part, data in zip(parts[name], held[name], strict=True):
                block = np.asarray(data)[0]
                for run in part.runs:
                    own, at = [slice(None)] * block.ndim, [slice(None)] * block.ndim
                    own[k_axis], own[s_axis] = part.own, run.slots
                    at[k_axis], at[s_axis] = part.heads, run.positions
                    moves.write(target[(layer, *at)], block[tuple(own)])


def axes_of(kv: KV, name: str) -> tuple[int, int]:
    """The axes of kv heads and of slots of a field."""
    letters = letters_of(layer_names(kv)[name][0])
    return letters.index("K"), letters.index("S")


def bounds_of(index: Sequence[slice], shape: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """The slices as (first, last) of an array of this shape."""
    return tuple(each.indices(size)[:2] for each, size in zip(index, shape, strict=True))


def first_layer(layers: Layers) -> KV:
    """The first of them, or the stack of all."""
    return layers[0] if isinstance(layers, tuple) else layers


def _shards(array: jax.Array | np.ndarray) -> list[tuple[tuple[slice, ...], Any]]:
    """What of an array this process is the one to write: (where it lies in it, itself)."""
    if isinstance(array, np.ndarray):
        return [((slice(None),) * array.ndim, array)]
    return [(shard.index, shard.data) for shard in array.addressable_shards if shard.replica_id == 0]


def _parts(array: jax.Array | np.ndarray, k_axis: int, s_axis: int, prefix: Prefix, copies: int) -> list[Part]:
    found = []
    for number, (index, _) in enumerate(_shards(array)):
        bounds = bounds_of(index, array.shape)
        first, last = bounds[k_axis]
        heads = slice(-(-first // copies), -(-last // copies))
        positions = _positions(prefix.pos_BS, *bounds[s_axis])
        runs, own = runs_of(positions), slice(heads.start * copies - first, None, copies)
        if heads.stop > heads.start and runs:
            found.append(Part(number, own, heads, runs, np.arange(first, last) // copies, positions))
    return found


def _positions(pos_BS: jax.Array | np.ndarray, first: int, last: int) -> np.ndarray:
    """Of these slots of the one row, some of which this process holds."""
    if isinstance(pos_BS, np.ndarray):
        return pos_BS[0, first:last]
    for shard in pos_BS.addressable_shards:
        _, (start, end) = bounds_of(shard.index, pos_BS.shape)
        if start <= first and last <= end:
            return np.asarray(shard.data)[0, first - start : last - start]
    raise ValueError(f"expected positions of slots {first} to {last} where their keys are, got none")


def _leaving(layers: Layers, layer: int, parts: Mapping[str, Sequence[Part]], key: str) -> dict[str, list[Any]]:
    """What this process's devices hold of a layer's fields and their sums, by part, on its way to the host."""
    kv, index = (layers, layer) if isinstance(layers, KV) else (layers[layer], None)
    shards = {name: _shards(getattr(kv, name)) for name in layer_names(kv)}
    found = {name: [_cut(each[part.shard][1], index) for part in parts[name]] for name, each in shards.items()}
    sums = []
    for at, part in enumerate(parts["k_BKSH"]):
        fields = {name: each[at] for name, each in found.items()}
        sums.append(slot_sums(fields, Slots(key, layer, part.stored, part.positions)))
    found[SUMS] = sums
    for data in (data for each in found.values() for data in each):
        if isinstance(data, jax.Array):
            data.copy_to_host_async()
    return found


def _cut(data: jax.Array | np.ndarray, layer: int | None) -> Any:
    """What a device holds of a layer: an array that forgets its copy on the host when it goes."""
    if isinstance(data, np.ndarray):
        return data if layer is None else data[layer]
    if layer is not None:
        return _layer_of(data, layer)
    return jax.make_array_from_single_device_arrays(data.shape, data.sharding, [data])


@jax.jit
def _layer_of(stack: jax.Array, layer: int) -> jax.Array:
    return lax.dynamic_index_in_dim(stack, layer, axis=0, keepdims=False)
