# SPDX-License-Identifier: Apache-2.0
"""A stored prefix onto a mesh, in the order of prefill's chunks: each process reads what its own devices hold.

What has come is compared with its sums (prefix_sums.py) where it lies then: on the devices.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rapid_jax.attention.cache import KV, Layers
from rapid_jax.attention.strategy import Strategy
from rapid_jax.model.decoder import Layout
from rapid_jax.runtime.array_store import Array, Damaged, Moves
from rapid_jax.speculative.prefix_arrays import Run, axes_of, bounds_of, runs_of
from rapid_jax.speculative.prefix_heads import Place, layer_names
from rapid_jax.speculative.prefix_sums import SUMS, Slots, are_same

_AHEAD_BYTES: Final = 1 << 28  # of layers that are read before they are on their devices


def read(
    sources: Mapping[str, Any],
    arrays: Mapping[str, Array],
    place: Place,
    layout: Layout,
    mesh: Mesh | None,
    moves: Moves,
    key: str,
    step: Callable[[], object],
) -> Layers:
    """The layers on the mesh, in their place; empty slots are zeros. `step` is called after each layer.

    Raises Damaged if what this process has read is not what was written under `key`.

    Without a mesh they are uncommitted, as what `prefill` makes: a committed array would have every program of decoding
    compiled again.
    """
    reader = _Reader(sources, arrays, place, mesh, moves, key)
    layers: list[KV] = []
    stack: KV | None = None
    count = next(iter(arrays.values())).shape[0]
    for layer, kv in enumerate(reader.layers(count)):
        if layout == "unrolled":
            layers.append(kv)
        else:
            stack = _with_layer(_empty_stack(count, kv) if stack is None else stack, kv, layer)
        step()
    reader.check()
    return tuple(layers) if stack is None else stack


@dataclass(frozen=True)
class _Wanted:
    """What a device is to hold of a field."""

    heads: slice  # of those stored
    runs: tuple[Run, ...]
    shape: tuple[int, ...]  # with these heads
    own: slice  # of the heads, each as often as it is copied


class _Reader:
    """Reads layers ahead of those that are asked for."""

    def __init__(self, sources, arrays, place: Place, mesh: Mesh | None, moves: Moves, key: str):
        self._sources, self._moves, self._key = sources, moves, key
        structs = {name: jax.ShapeDtypeStruct((1, *array.shape[1:]), array.dtype) for name, array in arrays.items()}
        sums = structs.pop(SUMS)
        kv = KV(**structs)  # type: ignore[arg-type]  # shapes
        self._axes = {name: axes_of(kv, name) for name in structs} | {SUMS: (1, 2)}
        self._dtypes = {name: jnp.dtype(array.dtype) for name, array in arrays.items()}
        strategy = Strategy(block=1, mesh=mesh, batch=("data",))
        self._copies = strategy.kv_heads(kv.k_BKSH.shape[1]) // kv.k_BKSH.shape[1]
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._shardings: dict[str, NamedSharding | None] = {}
        self._wanted: dict[str, dict[tuple, _Wanted]] = {}
        self._compared: list[tuple[int, jax.Array]] = []  # (layer, whether it is what was written)
        self._pos_S = pos_S = place.stored_positions()
        letters_of_each = {name: letters for name, (letters, _) in layer_names(kv).items()} | {SUMS: SUMS}
        for name, letters in letters_of_each.items():
            k_axis, s_axis = self._axes[name]
            shape = list((structs | {SUMS: sums})[name].shape)
            shape[k_axis], shape[s_axis] = shape[k_axis] * self._copies, pos_S.size
            self._shapes[name] = tuple(shape)
            sharding = None if mesh is None else NamedSharding(mesh, strategy.spec(letters))
            self._shardings[name] = sharding
            whole = [(slice(None),) * len(shape)]
            indices = whole if sharding is None else sharding.addressable_devices_indices_map(tuple(shape)).values()
            self._wanted[name] = {bounds_of(index, shape): self._of(name, index, pos_S) for index in indices if index}

    def _of(self, name: str, index: Sequence[slice], pos_S: np.ndarray) -> _Wanted:
        (k_axis, s_axis), copies = self._axes[name], self._copies
        bounds = bounds_of(index, self._shapes[name])
        (first, last), slots = bounds[k_axis], slice(*bounds[s_axis])
        heads = slice(first // copies, -(-last // copies))
        shape = [end - start for start, end in bounds]
        shape[k_axis] = heads.stop - heads.start
        own = slice(first - heads.start * copies, last - heads.start * copies)
        return _Wanted(heads, runs_of(pos_S[slots]), tuple(shape), own)

    def layers(self, count: int) -> Iterator[KV]:
        """All, in their order, on their devices."""
        ahead: deque = deque()
        for layer in range(count):
            ahead.append(self._begun(layer))
            size = sum(array.nbytes for begun in ahead[-1][0].values() for array in begun.values())
            while len(ahead) * size > _AHEAD_BYTES:
                yield self._ended(layer + 1 - len(ahead), *ahead.popleft())
        while ahead:
            yield self._ended(count - len(ahead), *ahead.popleft())

    def check(self) -> None:
        """Raises Damaged if a layer is not what was written."""
        for (layer, _), same in zip(self._compared, jax.device_get([same for _, same in self._compared]), strict=True):
            if not same:
                raise Damaged(f"layer {layer}: expected the keys and values that were written, got others")

    def _begun(self, layer: int) -> tuple[dict[str, dict[tuple, np.ndarray]], list[Any]]:
        """(what each device is to hold of each field, what is waited for)."""
        found: dict[str, dict[tuple, np.ndarray]] = {}
        futures = []
        for name, source in self._sources.items():
            k_axis, s_axis = self._axes[name]
            found[name] = {}
            for bounds, wanted in self._wanted[name].items():
                into = np.zeros(wanted.shape, self._dtypes[name])
                found[name][bounds] = into
                for run in wanted.runs:
                    own, at = [slice(None)] * into.ndim, [slice(None)] * into.ndim
                    own[s_axis] = run.slots
                    at[0], at[k_axis], at[s_axis] = slice(layer, layer + 1), wanted.heads, run.positions
                    futures.append(self._moves.read(source[tuple(at)], into[tuple(own)]))
        return found, futures

    def _ended(self, layer: int, found: Mapping[str, Mapping[tuple, np.ndarray]], futures: Sequence[Any]) -> KV:
        for future in futures:
            self._moves.await_(future)
        fields = {name: self._placed(name, parts) for name, parts in found.items()}
        self._compare(layer, fields)
        del fields[SUMS]
        return KV(**fields)

    def _compare(self, layer: int, fields: Mapping[str, jax.Array]) -> None:
        """Begins to compare what each device holds with its sums, once for each part that several hold."""
        shards = {name: array.addressable_shards for name, array in fields.items()}
        parts = {bounds_of(shard.index, fields[SUMS].shape): at for at, shard in enumerate(shards[SUMS])}
        for (_, (first, last), slots), at in parts.items():
            held = {name: every[at].data for name, every in shards.items()}
            heads, positions = np.arange(first, last) // self._copies, self._pos_S[slice(*slots)]
            same = are_same(held, held.pop(SUMS), Slots(self._key, layer, heads, positions))
            self._compared.append((layer, same))

    def _placed(self, name: str, parts: Mapping[tuple, np.ndarray]) -> jax.Array:
        shape, sharding = self._shapes[name], self._shardings[name]
        if sharding is None:
            return jax.device_put(next(iter(parts.values())))
        k_axis, _ = self._axes[name]

        def part(index: Any) -> np.ndarray:
            bounds = bounds_of(index, shape)
            array, own = parts[bounds], [slice(None)] * len(shape)
            if self._copies == 1:
                return array
            own[k_axis] = self._wanted[name][bounds].own
            return np.repeat(array, self._copies, axis=k_axis)[tuple(own)]

        return jax.make_array_from_callback(shape, sharding, part)


def _empty_stack(count: int, kv: KV) -> KV:
    """Room for `count` layers like this one, lying as it does."""

    def zeros(array):
        sharding = None
        if isinstance(array.sharding, NamedSharding):
            sharding = NamedSharding(array.sharding.mesh, PartitionSpec(None, *array.sharding.spec))
        return jnp.zeros((count, *array.shape), array.dtype, device=sharding)

    return jax.tree.map(zeros, kv)


@partial(jax.jit, donate_argnames="stack")
def _with_layer(stack: KV, kv: KV, layer: int) -> KV:
    """The stack with one layer put in."""
    return jax.tree.map(partial(lax.dynamic_update_index_in_dim, index=layer, axis=0), stack, kv)
