# SPDX-License-Identifier: Apache-2.0
"""The cache is two things: an immutable prefix (the document) and a small tail (what is being generated).

Keys and values of one layer are stored head-major, [B, K, S, H]: a decoding step then reads them as they lie.
`layers` holds one `KV` a layer: a tuple of them (unrolled layout) or one with a leading layer axis (stacked).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, Sharding


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KV:
    """Rotated keys and values of one layer, or of all with a leading layer axis.

    Quantised to int8 (`attention/quantized_kv.py`) they count in steps of each slot's own size, and values lie by
    dimension.
    """

    k_BKSH: jax.Array
    v_BKSH: jax.Array  # quantised: [B, K, H, S]
    k_scale_BKS: jax.Array | None = None  # float32, quantised ones alone
    v_scale_BKS: jax.Array | None = None


Layers: TypeAlias = tuple[KV, ...] | KV


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Prefix:
    """Keys and values of a prompt, written once by chunked prefill, then only read.

    Slots past a row's prompt are empty (position -1). `used` bounds the slots any row uses. Layers with a window are in
    `near`, with no more slots than what comes after the prompt can see.
    """

    layers: Layers
    pos_BS: jax.Array  # int32, position of each slot, -1 = empty
    used: jax.Array  # int32 scalar
    near: "Near | None" = None

    @property
    def slots(self) -> int:
        """Of a row, in layers without a window."""
        return self.pos_BS.shape[1]

    @property
    def groups(self) -> "tuple[Prefix, ...]":
        """Layers that keep the same slots, each group that has any as a prefix of its own."""
        every = (self,) if self.near is None else (replace(self, near=None), self.near.prefix)
        return tuple(group for group in every if isinstance(group.layers, KV) or group.layers)

    def with_groups(self, groups: "Sequence[Prefix]") -> "Prefix":
        """The inverse of `groups`."""
        if self.near is None:
            return groups[0]
        first = groups[0] if len(groups) > 1 else replace(self, near=None)
        return replace(first, near=replace(self.near, prefix=groups[-1]))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Near:
    """The layers of a model that have a window."""

    prefix: Prefix
    at: tuple[int, ...] = field(metadata={"static": True})  # which layers of the model they are
    window: int = field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Tail:
    """Keys and values after the prefix. Rolling back is setting `length_B`: what lies beyond is unreachable.

    slots      0 1 2 3 4 5 ...
    tokens     a b c x y .      length 3: x and y are still there, but empty to every query, and are overwritten next
    position   p p+1 ...        where p = start_B
    """

    layers: Layers
    start_B: jax.Array  # int32, position of slot 0
    length_B: jax.Array  # int32, slots in use

    def rolled_back(self, length_B: jax.Array) -> "Tail":
        """The same tail with only the first `length_B` slots in use."""
        return replace(self, length_B=length_B)

    def slot_positions(self, extra: int = 0) -> jax.Array:
        """int32 [B, S]: the position of each slot, -1 beyond the length plus `extra` slots about to be written."""
        slots = jnp.arange(capacity(self.layers), dtype=jnp.int32)
        inside = slots[None] < self.length_B[:, None] + extra
        return jnp.where(inside, self.start_B[:, None] + slots[None], -1)


def each_layer(cache: Prefix | Tail) -> tuple[KV, ...]:
    """The layers one by one, in the model's order; only the unrolled layout has them so."""
    if isinstance(cache.layers, KV):
        raise ValueError("expected one KV a layer, got a stack of them")
    if isinstance(cache, Tail) or cache.near is None:
        return cache.layers
    near = dict(zip(cache.near.at, each_layer(cache.near.prefix), strict=True))
    full = iter(cache.layers)
    return tuple(near[at] if at in near else next(full) for at in range(len(near) + len(cache.layers)))


def capacity(layers: Layers) -> int:
    """How many slots a row has."""
    return (layers[0] if isinstance(layers, tuple) else layers).k_BKSH.shape[-2]


def mesh_of(layers: Layers) -> Mesh | None:
    """The mesh that keys and values lie on, arrays or shapes; None: one device."""
    sharding = jax.tree.leaves(layers)[0].sharding
    mesh = sharding.mesh if isinstance(sharding, NamedSharding) else None
    return mesh if isinstance(mesh, Mesh) else None


def empty_layers(
    *,
    num_layers: int,
    batch: int,
    kv_heads: int,
    slots: int,
    head_dim: int,
    dtype: jnp.dtype,
    stacked: bool,
    sharding: Sharding | None = None,
) -> Layers:
    """Zeroed keys and values for every layer; `sharding` says how one array of them lies."""
    shape = (batch, kv_heads, slots, head_dim)

    def zeros(*shape: int) -> jax.Array:
        return jnp.zeros(shape, dtype, device=sharding)

    if stacked:
        return KV(zeros(num_layers, *shape), zeros(num_layers, *shape))
    return tuple(KV(zeros(*shape), zeros(*shape)) for _ in range(num_layers))


def write(kv: KV, k_BKTH: jax.Array, v_BKTH: jax.Array, slot_B: jax.Array) -> KV:
    """`kv` with T new slots of each row from `slot_B` on; the caller has made sure that they fit."""
    k_BKTH, v_BKTH = k_BKTH.astype(kv.k_BKSH.dtype), v_BKTH.astype(kv.v_BKSH.dtype)
    if kv.k_BKSH.shape[0] == 1:  # a plain slice update: in place on every backend, where a batched one is a scatter
        at = (0, 0, slot_B[0], 0)
        return KV(lax.dynamic_update_slice(kv.k_BKSH, k_BKTH, at), lax.dynamic_update_slice(kv.v_BKSH, v_BKTH, at))
    update = jax.vmap(lambda old_KSH, new_KTH, slot: lax.dynamic_update_slice(old_KSH, new_KTH, (0, slot, 0)))
    return KV(update(kv.k_BKSH, k_BKTH, slot_B), update(kv.v_BKSH, v_BKTH, slot_B))


def write_layers(stack: KV, k_LBKTH: jax.Array, v_LBKTH: jax.Array, slot_B: jax.Array) -> KV:
    """`write` for all layers at once: a slice update a row, each in place."""

    def updated(old_LBKSH: jax.Array, new_LBKTH: jax.Array) -> jax.Array:
        for row in range(old_LBKSH.shape[1]):
            at = (0, row, 0, slot_B[row], 0)
            old_LBKSH = lax.dynamic_update_slice(old_LBKSH, new_LBKTH[:, row : row + 1].astype(old_LBKSH.dtype), at)
        return old_LBKSH

    return KV(updated(stack.k_BKSH, k_LBKTH), updated(stack.v_BKSH, v_LBKTH))


@partial(jax.jit, static_argnames=("slots", "devices"))
def with_slots(prefix: Prefix, slots: int, devices: int) -> Prefix:
    """A copy with so many slots, at least those there are; each of `devices` context devices keeps its own share.

    Of one group of layers.
    """

    def padded(x: jax.Array, axis: int, empty: int = 0) -> jax.Array:
        axis %= x.ndim
        shares = x.reshape(*x.shape[:axis], devices, -1, *x.shape[axis + 1 :])
        room = [(0, 0)] * shares.ndim
        room[axis + 1] = (0, slots // devices - shares.shape[axis + 1])
        return jnp.pad(shares, room, constant_values=empty).reshape(*x.shape[:axis], slots, *x.shape[axis + 1 :])

    def of_layer(kv: KV) -> KV:
        if kv.k_scale_BKS is None or kv.v_scale_BKS is None:
            return KV(padded(kv.k_BKSH, -2), padded(kv.v_BKSH, -2))
        scales = padded(kv.k_scale_BKS, -1), padded(kv.v_scale_BKS, -1)
        return KV(padded(kv.k_BKSH, -2), padded(kv.v_BKSH, -1), *scales)

    layers = prefix.layers
    found = of_layer(layers) if isinstance(layers, KV) else tuple(map(of_layer, layers))
    return Prefix(found, padded(prefix.pos_BS, -1, -1), prefix.used)
