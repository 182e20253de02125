# SPDX-License-Identifier: Apache-2.0
"""Prefixes on the host: what the devices have no room for, a copy away from them."""

import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from math import prod

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, Sharding

from rapid_jax.attention.cache import KV, Prefix
from rapid_jax.attention.kernels import platform_of
from rapid_jax.model.decoder import Decoder
from rapid_jax.runtime.mesh import put_on_mesh
from rapid_jax.speculative.prefill import serving
from rapid_jax.speculative.prefix_heads import Place, layer_names

_CPU_BYTES = 4 * 2**30  # for keys and values, where no device says what it has left


def device_bytes(prefix: Prefix) -> int:
    """Memory of this process's devices that the prefix takes, copies counted."""

    def size(array: jax.Array) -> int:
        held = len(array.sharding.addressable_devices)
        return held * prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize

    return sum(map(size, jax.tree.leaves(prefix)))


def head_bytes(decoder: Decoder, place: Place, *, everywhere: bool = False, filling: bool = False) -> int:
    """As `device_bytes`, of a head in full precision that would lie so; or of `everywhere`, all processes' devices.

    `filling`: while it is prefilled, when layers with a window have the chunks that it reaches, too.
    """
    config, strategy = decoder.config, serving(decoder, block=1)

    def on_devices(name: str, shape: tuple[int, ...], dtype: jnp.dtype) -> int:
        parts = 1
        if strategy.mesh is not None:
            sharding = NamedSharding(strategy.mesh, strategy.spec(name))
            devices = sharding.device_set if everywhere else sharding.addressable_devices
            shape, parts = sharding.shard_shape(shape), len(devices)
        return prod(shape) * parts * jnp.dtype(dtype).itemsize

    near, total = len(place.near_at), 0
    for layers, part in ((config.num_layers - near, place), (near, place.near)):
        if part is not None:
            slots, int32 = part.layout.slots, jnp.dtype("int32")
            held = slots + (place.slots_before if filling and part is not place else 0)
            kv = (1, strategy.kv_heads(config.num_kv_heads), held, config.head_dim)
            total += 2 * layers * on_devices("kv_BKSH", kv, decoder.embed_VD[...].dtype)
            total += on_devices("pos_BS", (1, slots), int32) + on_devices("", (), int32)
    return total


def bytes_left(decoder: Decoder) -> int:
    """Bytes of this process's devices of the decoder that nothing takes yet."""
    devices = jax.local_devices()[:1] if decoder.mesh is None else decoder.mesh.local_devices
    left = 0
    for device in devices:
        stats = device.memory_stats() or {}
        if "bytes_limit" not in stats:
            return _CPU_BYTES
        left += stats["bytes_limit"] - stats["bytes_in_use"]
    return left


@dataclass(frozen=True)
class Parts:
    """What this process's devices had of an array that lies over several processes, each piece once."""

    shape: tuple[int, ...]
    pieces: Mapping[Hashable, np.ndarray]  # by where they begin and end

    @classmethod
    def of(cls, array: jax.Array) -> "Parts":
        """A copy of them."""
        return cls(array.shape, {_span(shard.index): np.array(shard.data) for shard in array.addressable_shards})

    def __getitem__(self, index: tuple[slice, ...] | None) -> np.ndarray:
        return self.pieces[_span(index)]

    @property
    def nbytes(self) -> int:
        """Of the pieces."""
        return sum(piece.nbytes for piece in self.pieces.values())


def _span(index: tuple[slice, ...] | None) -> Hashable:
    return tuple((part.start, part.stop) for part in index or ())


@dataclass(frozen=True)
class HostPrefix:
    """A prefix's arrays in the host's memory; over several processes each has its own `Parts` of them."""

    prefix: Prefix  # of NumPy's arrays, or of Parts
    shardings: Prefix  # how each lay on the devices
    bytes: int


class HostMoves:
    """Moves prefixes between a decoder's devices and the host, bit for bit, and measures the way to the devices."""

    def __init__(self, decoder: Decoder):
        self._decoder = decoder
        self._strategy = serving(decoder, block=1)
        # A CPU's arrays are the host's memory: without a copy nothing would be freed.
        self._copied = platform_of(decoder.mesh) == "cpu"
        self.bytes = 0
        self.seconds = 0.0

    @property
    def is_parted(self) -> bool:
        """Whether several processes hold the prefixes, each its own parts."""
        mesh = self._decoder.mesh
        return mesh is not None and len({device.process_index for device in mesh.devices.flat}) > 1

    def host_bytes(self, prefix: Prefix) -> int:
        """Of this host's memory that a prefix on the devices takes there."""

        def size(array: jax.Array) -> int:
            if not self.is_parted:
                return array.nbytes
            spans = {_span(shard.index) for shard in array.addressable_shards}
            return len(spans) * prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize

        return sum(map(size, jax.tree.leaves(prefix)))

    @property
    def on_one_device(self) -> bool:
        """Whether prefixes lie on one device, not parted over several."""
        return self._decoder.mesh is None

    @property
    def gigabytes_per_second(self) -> float | None:
        """10^9 bytes a second from the host to the devices, over all moves so far; None before the first."""
        return self.bytes / self.seconds / 1e9 if self.seconds else None

    def to_host(self, prefix: Prefix) -> HostPrefix:
        """A copy of the prefix; the given one stays."""
        for array in jax.tree.leaves(prefix):
            array.copy_to_host_async()
        take = Parts.of if self.is_parted else np.array if self._copied else np.asarray
        kept = jax.tree.map(take, prefix)
        shardings = jax.tree.map(lambda array: array.sharding, prefix)
        return HostPrefix(kept, shardings, sum(array.nbytes for array in jax.tree.leaves(kept)))

    def to_devices(self, kept: HostPrefix) -> Prefix:
        """The prefix as it was: the same bits, lying as they lay."""

        def put(array: np.ndarray | Parts, sharding: Sharding) -> jax.Array:
            if isinstance(array, np.ndarray) and self._decoder.mesh is None:  # uncommitted, as what prefill makes
                return jax.device_put(array)
            return jax.make_array_from_callback(array.shape, sharding, lambda part: array[part])

        return self._time(lambda: jax.tree.map(put, kept.prefix, kept.shardings))

    def head(self, kept: HostPrefix, place: Place) -> Prefix:
        """The first tokens of a prefix in full precision, in slots of their own."""
        mesh, layers = self._decoder.mesh, kept.prefix.layers

        def put(kv: KV) -> KV:
            moved = {}
            for field, (name, axis) in layer_names(kv).items():
                array = place.moved(getattr(kv, field), axis)
                spec = self._strategy.spec(name)
                moved[field] = jax.device_put(array) if mesh is None else put_on_mesh(mesh, spec, array)
            return KV(**moved)

        return self._time(
            lambda: place.prefix(tuple(map(put, layers)) if isinstance(layers, tuple) else put(layers), mesh)
        )

    def _time(self, move: Callable[[], Prefix]) -> Prefix:
        start = time.perf_counter()
        prefix = jax.block_until_ready(move())
        self.seconds += time.perf_counter() - start
        self.bytes += device_bytes(prefix)
        return prefix
