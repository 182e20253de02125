# SPDX-License-Identifier: Apache-2.0
"""Whether arrays are what they were, and numbers at all: on their devices, in one pass, whatever mesh they lie on."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def all_finite(tree: Any) -> jax.Array:
    """Whether no number of any array is NaN or infinite; to be traced."""
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)]))


@jax.jit
def finite_each(tree: Any) -> Any:
    """A tree like the given one that says of each array whether all of it is finite."""
    return jax.tree.map(lambda x: jnp.all(jnp.isfinite(x)), tree)


@jax.jit
def checksum(tree: Any) -> jax.Array:
    """uint32: a sum of the arrays' bits, each times an odd number of its place, modulo 2^32.

    Whole numbers are added: it is the same on every device and mesh, in any order. One bit that differs always shows;
    anything else does but for one case in 2^32.
    """
    total = jnp.uint32(0)
    for index, x in enumerate(jax.tree.leaves(tree)):
        place = jnp.full(x.shape, 0x9E3779B1 * (index + 1) & 0xFFFFFFFF, jnp.uint32)
        for axis in range(x.ndim):
            step = jnp.uint32(2654435761 * (2 * axis + 1) & 0xFFFFFFFF)
            place += lax.broadcasted_iota(jnp.uint32, x.shape, axis) * step
        bits = lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(jnp.uint32)
        total += jnp.sum((bits + 1) * (2 * place + 1), dtype=jnp.uint32)
    return total
