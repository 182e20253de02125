# SPDX-License-Identifier: Apache-2.0
"""A prefix's arrays between its devices and a file: in order of position, with the checkpoint's own kv heads.

What is stored does not depend on the mesh that made it, and is laid out for the mesh that reads it: in the order of
prefill's chunks where more is to be prefilled behind it, else each context device takes its share of consecutive slots.
"""

from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rapid_jax.attention.cache import KV, Layers, Prefix, mesh_of
from rapid_jax.attention.strategy import Strategy
from rapid_jax.runtime.mesh import placed
from rapid_jax.speculative.prefix_heads import Place, layer_names


def layer_count(layers: Layers) -> int:
    """How many layers there are, in either layout."""
    return len(layers) if isinstance(layers, tuple) else layers.k_BKSH.shape[0]


def slots_in_order(prefix: Prefix) -> np.ndarray:
    """int32 [used]: the slot of each position of the longest row; a shorter row has empty slots in the same places."""
    pos_BS = np.asarray(prefix.pos_BS)
    longest = pos_BS[np.argmax(np.sum(pos_BS >= 0, axis=1))]
    return np.argsort(np.where(longest >= 0, longest, pos_BS.shape[1]), kind="stable")[: int(prefix.used)].astype(
        np.int32
    )


def to_host(prefix: Prefix, layer: int, order: np.ndarray, copies: int) -> dict[str, np.ndarray]:
    """One layer's used slots in order of position, [B, K, used, H] (values that are rounded: [B, K, H, used]).

    Cut on the devices, so that only they travel; arrays that are on the host already are cut there.
    """
    kv = prefix.layers
    index = None
    if isinstance(kv, tuple):
        kv = kv[layer]
    else:
        index = jnp.asarray(layer)
    if isinstance(kv.k_BKSH, np.ndarray):
        kv = kv if index is None else jax.tree.map(lambda array: array[layer], kv)
        axes = {name: axis for name, (_, axis) in layer_names(kv).items()}
        return {name: np.take(getattr(kv, name)[:, ::copies], order, axis) for name, axis in axes.items()}
    in_place = None
    if not np.array_equal(order, np.arange(order.size)):
        in_place = placed(mesh_of(prefix.layers), PartitionSpec(), order)
    cut = _cut(kv, index, in_place, used=order.size, copies=copies)
    return {name: np.asarray(getattr(cut, name)) for name in layer_names(cut)}


@partial(jax.jit, static_argnames=("used", "copies"))
def _cut(kv: KV, layer: jax.Array | None, order, *, used: int, copies: int) -> KV:
    if layer is not None:
        kv = jax.tree.map(lambda array: lax.dynamic_index_in_dim(array, layer, axis=0, keepdims=False), kv)

    def cut(array, axis):
        array, axis = array[:, ::copies], axis % array.ndim
        return lax.slice_in_dim(array, 0, used, axis=axis) if order is None else jnp.take(array, order, axis=axis)

    return KV(**{name: cut(getattr(kv, name), axis) for name, (_, axis) in layer_names(kv).items()})


def slots_on(mesh: Mesh | None, slots: int) -> int:
    """`slots`, rounded up so that every context device gets as many."""
    return slots + -slots % (1 if mesh is None else mesh.shape["context"])


def to_devices(layer: Mapping[str, np.ndarray], slots: int | Place, mesh: Mesh | None) -> KV:
    """One layer of `to_host` on its devices: with so many slots in order of position, or in their place.

    Without a mesh it is uncommitted, as what `prefill` makes: a committed array would have every program of decoding
    compiled again.
    """
    kv = KV(**layer)  # type: ignore[arg-type]  # NumPy's arrays
    strategy = Strategy(block=1, mesh=mesh, batch=("data",))
    copies = strategy.kv_heads(kv.k_BKSH.shape[1]) // kv.k_BKSH.shape[1]

    def place(array, name, axis):
        axis %= array.ndim
        if isinstance(slots, Place):
            array = slots.spread(array, axis)
        elif array.shape[axis] < slots:
            padded = np.zeros((*array.shape[:axis], slots, *array.shape[axis + 1 :]), array.dtype)
            padded[(slice(None),) * axis + (slice(array.shape[axis]),)] = array
            array = padded
        if mesh is None:
            return jax.device_put(array)
        return placed(mesh, strategy.spec(name), np.repeat(array, copies, axis=1))

    return KV(**{field: place(getattr(kv, field), *how) for field, how in layer_names(kv).items()})


def empty_stack(count: int, kv: KV) -> KV:
    """Room for `count` layers like this one, lying as it does."""

    def zeros(array):
        sharding = None
        if isinstance(array.sharding, NamedSharding):
            sharding = NamedSharding(array.sharding.mesh, PartitionSpec(None, *array.sharding.spec))
        return jnp.zeros((count, *array.shape), array.dtype, device=sharding)

    return jax.tree.map(zeros, kv)


@partial(jax.jit, donate_argnames="stack")
def with_layer(stack: KV, kv: KV, layer: int) -> KV:
    """The stack with one layer put in."""
    return jax.tree.map(partial(lax.dynamic_update_index_in_dim, index=layer, axis=0), stack, kv)
