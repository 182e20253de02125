# SPDX-License-Identifier: Apache-2.0
"""A prefix in 8 bits: half the bytes to read for every token.

The key of a slot is rounded to 127 steps of its own largest element, and so is the value. Values are turned, [B, K, H,
S]: a matrix unit sums over slots, and takes 8 bits only where what it sums over lies side by side. Scores and sums stay
float32.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rapid_jax.attention.cache import KV, Prefix
from rapid_jax.attention.kernels import platform_of


def can_round(mesh: Mesh | None) -> bool:
    """Whether a prefix in 8 bits can be read there: on one device that is no TPU."""
    return mesh is None and platform_of(mesh) != "tpu"


def rounded(prefix: Prefix) -> Prefix:
    """The prefix with int8 keys and values; the given one's are deleted, a layer at a time. A rounded one stays."""
    if prefix.layers and (prefix.layers if isinstance(prefix.layers, KV) else prefix.layers[0]).k_scale_BKS is not None:
        return prefix
    if isinstance(prefix.layers, KV):
        return replace(prefix, layers=_replaced(prefix.layers))
    return replace(prefix, layers=tuple(map(_replaced, prefix.layers)))


def _replaced(kv: KV) -> KV:
    new = jax.block_until_ready(rounded_layer(kv))
    kv.k_BKSH.delete()
    kv.v_BKSH.delete()
    return new


@jax.jit
def rounded_layer(kv: KV) -> KV:
    """Keys and values in 8 bits with a float32 scale a slot and head; values by dimension. A program of its own."""

    def one(x_BKSH: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = x_BKSH.astype(jnp.float32)
        scale_BKS = jnp.max(jnp.abs(x), axis=-1) / 127
        return jnp.round(x / jnp.where(scale_BKS == 0, 1.0, scale_BKS)[..., None]).astype(jnp.int8), scale_BKS

    (k_BKSH, k_scale), (v_BKSH, v_scale) = one(kv.k_BKSH), one(kv.v_BKSH)
    return KV(k_BKSH, v_BKSH.swapaxes(-1, -2), k_scale, v_scale)
