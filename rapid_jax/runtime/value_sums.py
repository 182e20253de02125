# SPDX-License-Identifier: Apache-2.0
"""Sums of arrays' bits by which stored values are known: computed where the values lie, before they are written.

Each word of 32 bits is added to a number of its place and mixed, and the results are summed modulo 2^32. One word that
differs always shows, since mixing is a bijection; anything else, values that changed places among it, goes unseen in
about one case of 2^32. Integers are added, so a sum is the same on every device and mesh, in any order. It is no
signature: nothing here stops somebody who wants to forge values.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from rapid_jax.runtime.files import digest

Values = jax.Array | np.ndarray

_ODD = np.uint32(0x9E3779B1)  # 2^32 over the golden ratio: multiples of it are far apart
_BLOCK = 1 << 16  # elements: what NumPy makes of them on the way stays in a processor's cache
_PLACES_ODD = np.uint32(0xC2B2AE3D)


def seed_of(*names: str) -> np.uint32:
    """A number for these names: what is summed under other names has another sum."""
    return np.uint32(int(digest(*names)[:8], 16))


def places(seed: Values | np.uint32, first: Values, *others: Values) -> Values:
    """uint32 [first, *others]: a number for each point of a grid with these coordinates; alike for one in 2^32."""
    found = mixed(seed + first.astype(np.uint32) * _ODD)
    for coordinates in others:
        found = mixed(found[..., None] + coordinates.astype(np.uint32) * _ODD)
    return found


def row_sums(x: Values, axis: int, rows: Values) -> Values:
    """uint32: the sums along one axis, whose rows lie at these `places`; of NumPy arrays computed by NumPy.

    Elements have at most 4 bytes. Where they have fewer, as many as fit a word are mixed together.
    """
    words, width = x.view(f"uint{8 * x.dtype.itemsize}").astype(np.uint32), 8 * x.dtype.itemsize
    while width < 32 and words.shape[axis] % 2 == 0:
        first, second = _halves(words, axis)
        words, width = first | (second << np.uint32(width)), 2 * width
    along = [1] * words.ndim
    along[axis] = -1
    numbers = (np.arange(words.shape[axis], dtype=np.uint32) * _PLACES_ODD).reshape(along)
    expand = jnp.expand_dims if isinstance(rows, jax.Array) else np.expand_dims
    found = mixed(words + (expand(rows, axis) + numbers))
    while found.shape[axis] % 2 == 0:  # XLA makes vector instructions of it on CPUs, of a sum along the last axis not
        first, second = _halves(found, axis)
        found = first + second
    return found.sum(axis, dtype=np.uint32)


@jax.jit
def array_sums(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """uint32 of each array, whatever mesh it lies on; its name is in its sum. Elements have at most 4 bytes."""
    return {name: _array_sum(x, seed_of(name)) for name, x in arrays.items()}


def host_sum(x: np.ndarray, name: str) -> int:
    """Of one array, in which its name is; by NumPy. Elements have at most 4 bytes."""
    flat, seed, total = np.ascontiguousarray(x).reshape(-1), seed_of(name), 0
    for number, start in enumerate(range(0, flat.size, _BLOCK)):
        row = places(seed, np.array([number]))
        total += int(row_sums(flat[None, start : start + _BLOCK], -1, row)[0])
    return total % 2**32


def mixed(x: Values) -> Values:
    """Each uint32 as another: MurmurHash3's last step (Appleby 2011), of which every input bit reaches every output."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))


def _array_sum(x: jax.Array, seed: np.uint32) -> jax.Array:
    number, stride = jnp.full(x.shape, seed, jnp.uint32), int(_PLACES_ODD)
    for axis in reversed(range(x.ndim)):
        number += lax.broadcasted_iota(jnp.uint32, x.shape, axis) * np.uint32(stride % 2**32)
        stride *= x.shape[axis]
    bits = x.view(f"uint{8 * x.dtype.itemsize}").astype(jnp.uint32)
    return jnp.sum(mixed(bits + number), dtype=jnp.uint32)


def _halves(x: Values, axis: int) -> tuple[Values, Values]:
    axis %= x.ndim
    before, middle = (slice(None),) * axis, x.shape[axis] // 2
    return x[(*before, slice(middle))], x[(*before, slice(middle, None))]
