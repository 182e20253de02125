# SPDX-License-Identifier: Apache-2.0
"""A prefix's arrays between its devices and a file: in order of position, with the checkpoint's own kv heads.

What is stored does not depend on the mesh that made it, and is laid out for the mesh that reads it: there each context
device takes its share of consecutive slots, since only the writing of a prefix needs the zigzag order.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rapid_jax.attention.cache import KV, Layers, Prefix
from rapid_jax.attention.strategy import Strategy
from rapid_jax.runtime.mesh import placed


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
    """One layer's used slots in order of position, [B, K, used, H]: cut on the devices, so that only they travel."""
    mesh = _mesh_of(prefix)
    index = None
    kv = prefix.layers
    if isinstance(kv, tuple):
        kv = kv[layer]
    else:
        index = jnp.asarray(layer)
    in_place = None if np.array_equal(order, np.arange(order.size)) else placed(mesh, PartitionSpec(), order)
    cut = _cut(kv, index, in_place, used=order.size, copies=copies)
    return {"k_BKSH": np.asarray(cut.k_BKSH), "v_BKSH": np.asarray(cut.v_BKSH)}


def _mesh_of(prefix: Prefix) -> Mesh | None:
    sharding = jax.tree.leaves(prefix.layers)[0].sharding
    mesh = sharding.mesh if isinstance(sharding, NamedSharding) else None
    return mesh if isinstance(mesh, Mesh) else None


@partial(jax.jit, static_argnames=("used", "copies"))
def _cut(kv: KV, layer: jax.Array | None, order, *, used: int, copies: int) -> KV:
    def cut(array):
        if layer is not None:
            array = lax.dynamic_index_in_dim(array, layer, axis=0, keepdims=False)
        array = array[:, ::copies]
        return lax.slice_in_dim(array, 0, used, axis=2) if order is None else jnp.take(array, order, axis=2)

    return jax.tree.map(cut, kv)


def slots_on(mesh: Mesh | None, slots: int) -> int:
    """`slots`, rounded up so that every context device gets as many."""
    return slots + -slots % (1 if mesh is None else mesh.shape["context"])


def to_devices(k_BKSH: np.ndarray, v_BKSH: np.ndarray, slots: int, mesh: Mesh | None) -> KV:
    """One layer on its devices with all its slots.

    Without a mesh it is uncommitted, as what `prefill` makes: a committed array would have every program of decoding
    compiled again.
    """
    strategy = Strategy(block=1, mesh=mesh, batch=("data",))
    copies = strategy.kv_heads(k_BKSH.shape[1]) // k_BKSH.shape[1]

    def place(array_BKSH):
        batch, heads, used, head_dim = array_BKSH.shape
        if used < slots:
            padded_BKSH = np.zeros((batch, heads, slots, head_dim), array_BKSH.dtype)
            padded_BKSH[:, :, :used] = array_BKSH
            array_BKSH = padded_BKSH
        if mesh is None:
            return jax.device_put(array_BKSH)
        return placed(mesh, strategy.spec("kv_BKSH"), np.repeat(array_BKSH, copies, axis=1))

    return KV(place(k_BKSH), place(v_BKSH))


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
