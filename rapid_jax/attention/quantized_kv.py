# SPDX-License-Identifier: Apache-2.0
"""A prefix in 8 bits: half the bytes to read for every token.

The key of a slot is rounded to 127 steps of its own largest element, and so is the value. Values are turned, [B, K, H,
S]: a matrix unit sums over slots, and takes 8 bits only where what it sums over lies side by side. Scores and sums stay
float32.

No mesh splits the elements of a slot, so each device rounds its own part and nothing moves.
"""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from rapid_jax.attention.cache import KV, Prefix, mesh_of
from rapid_jax.attention.strategy import Strategy


def quantize_kv(prefix: Prefix) -> Prefix:
    """The prefix with int8 keys and values, on the same devices. A quantised one stays.

    The given one's are deleted, those of a layer (stacked: of all layers) at a time, keys before values: there is never
    more than a quarter of a layer, or of the stack, beside what there was.
    """
    if prefix.near is not None:
        return prefix.with_groups(list(map(quantize_kv, prefix.groups)))
    if jax.tree.leaves(prefix.layers)[0].dtype == jnp.int8:
        return prefix
    if isinstance(prefix.layers, KV):
        return replace(prefix, layers=_replace(prefix.layers))
    return replace(prefix, layers=tuple(map(_replace, prefix.layers)))


def _replace(kv: KV) -> KV:
    mesh = mesh_of(kv)
    k_BKSH, k_scale_BKS = jax.block_until_ready(quantize_array(kv.k_BKSH, turned=False, mesh=mesh))
    kv.k_BKSH.delete()
    v_BKHS, v_scale_BKS = jax.block_until_ready(quantize_array(kv.v_BKSH, turned=True, mesh=mesh))
    kv.v_BKSH.delete()
    return KV(k_BKSH, v_BKHS, k_scale_BKS, v_scale_BKS)


@partial(jax.jit, static_argnames=("turned", "mesh"))
def quantize_array(x_BKSH: jax.Array, *, turned: bool, mesh: Mesh | None) -> tuple[jax.Array, jax.Array]:
    """(int8 values, float32 scales [B, K, S]) of keys or values, or of those of every layer; values are `turned`.

    A program of its own.
    """

    def of_layer(x_BKSH: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = x_BKSH.astype(jnp.float32)
        scale_BKS = jnp.max(jnp.abs(x), axis=-1) / 127
        steps = jnp.round(x / jnp.where(scale_BKS == 0, 1.0, scale_BKS)[..., None]).astype(jnp.int8)
        return (steps.swapaxes(-1, -2) if turned else steps), scale_BKS

    def local(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return of_layer(x) if x.ndim == 4 else lax.map(of_layer, x)  # one layer at a time in float32

    stacked = "L" * (x_BKSH.ndim - 4)
    names = f"v_{stacked}{'BKHS' if turned else 'BKSH'}", f"scale_{stacked}BKS"
    strategy = Strategy(block=1, mesh=mesh, batch=("data",))
    return strategy.per_device(local, (f"kv_{stacked}BKSH",), names)(x_BKSH)
