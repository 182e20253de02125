# SPDX-License-Identifier: Apache-2.0
"""What sampling asks of rows over the vocabulary, by sums and maxima: nothing is sorted and nothing is gathered.

A row may lie over the chips of a mesh: each reduces its own part, and what chips exchange are a few numbers a row. Not
so `largest`, by which log-probabilities are told: it ranks one number of each group of a row, and a few groups whole.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

_GROUP = 64


def best(z_V: jax.Array) -> jax.Array:
    """int32: the index of the largest number of the last axis, the first of equal ones. NaN counts as the largest."""
    top = jnp.max(z_V, axis=-1, keepdims=True)
    index_V = lax.broadcasted_iota(jnp.int32, z_V.shape, z_V.ndim - 1)
    return jnp.min(jnp.where((z_V == top) | jnp.isnan(z_V), index_V, z_V.shape[-1] - 1), axis=-1)


def at(z_V: jax.Array, index: jax.Array) -> jax.Array:
    """The number of the last axis at each index, which has the other axes."""
    index_V = lax.broadcasted_iota(jnp.int32, z_V.shape, z_V.ndim - 1)
    # Whatever stands beside it: an infinite number times zero is none.
    return jnp.sum(jnp.where(index_V == index[..., None], z_V, 0), axis=-1)


def largest(z_V: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """(the largest numbers of the last axis in falling order, their indices), equal ones by index: as lax.top_k.

    They are in the groups with the largest maxima, as many groups as numbers: only those are ranked.
    """
    size = z_V.shape[-1]
    if size <= count * _GROUP:
        return lax.top_k(z_V, count)
    groups = -(-size // _GROUP**2) * _GROUP  # so many that chips share them evenly
    padding = [(0, 0)] * (z_V.ndim - 1) + [(0, groups * _GROUP - size)]
    grouped = jnp.pad(z_V, padding, constant_values=-jnp.inf).reshape(*z_V.shape[:-1], groups, _GROUP)
    chosen = jnp.sort(lax.top_k(jnp.max(grouped, axis=-1), count)[1], axis=-1)[..., None]
    ranked, place = lax.top_k(jnp.take_along_axis(grouped, chosen, axis=-2).reshape(*z_V.shape[:-1], -1), count)
    return ranked, jnp.take_along_axis(chosen[..., 0], place // _GROUP, axis=-1) * _GROUP + place % _GROUP


def kth_largest(z_V: jax.Array, k: jax.Array) -> jax.Array:
    """The k-th largest number of the last axis, equal ones counted each, with that axis as 1. k is 1 to its size."""
    key_V = _order(z_V)
    below = _edge(key_V, jnp.ones_like(z_V), (z_V.shape[-1] - k).astype(jnp.float32))
    return _number(below)


def nucleus(z_V: jax.Array, outside: jax.Array) -> jax.Array:
    """z with -inf for the least probable tokens of softmax(z), as many as have a mass of at most `outside` together.

    Of equal tokens those of lower ids go first, as in transformers; the most probable one always stays.
    """
    p_V, bound = jax.nn.softmax(z_V, axis=-1), jnp.maximum(outside, 0)
    key_V = _order(z_V)
    edge = _number(jnp.minimum(_edge(key_V, p_V, bound), jnp.max(key_V, axis=-1, keepdims=True)))
    at_edge_V = z_V == edge
    equal = jnp.sum(at_edge_V, axis=-1, keepdims=True)
    left = bound - jnp.sum(jnp.where(z_V < edge, p_V, 0), axis=-1, keepdims=True)
    each = jnp.max(jnp.where(at_edge_V, p_V, 0), axis=-1, keepdims=True)
    fit = jnp.floor(left / each)  # from below or above by rounding
    fit = fit - (fit * each > left) + ((fit + 1) * each <= left)
    out = jnp.clip(fit, 0, equal - 1).astype(jnp.float32)  # all of them would be below the edge

    def some_stay(z_V):
        index_V = lax.broadcasted_iota(jnp.uint32, z_V.shape, z_V.ndim - 1)
        first = _edge(index_V, at_edge_V.astype(jnp.float32), out)
        return jnp.where((z_V < edge) | (at_edge_V & (index_V < first)), -jnp.inf, z_V)

    return lax.cond(jnp.any(out > 0), some_stay, lambda z_V: jnp.where(z_V < edge, -jnp.inf, z_V), z_V)


def _order(z_V: jax.Array) -> jax.Array:
    """uint32 in the order of the float32 numbers; equal where they are."""
    bits_V = lax.bitcast_convert_type(jnp.where(z_V == 0, 0.0, z_V), jnp.uint32)  # of -0 those of 0
    return jnp.where(bits_V >> 31 == 1, ~bits_V, bits_V | jnp.uint32(1 << 31))


def _number(key: jax.Array) -> jax.Array:
    """The float32 number of an `_order` key."""
    return lax.bitcast_convert_type(jnp.where(key >> 31 == 1, key & jnp.uint32((1 << 31) - 1), ~key), jnp.float32)


def _edge(key_V: jax.Array, weight_V: jax.Array, bound: jax.Array) -> jax.Array:
    """uint32: the largest key that the weights of smaller keys, none below 0, come to `bound` at most for.

    `bound` has 1 in the place of the last axis. The key is found from its first bits to its last, some in a pass. Four
    a pass: chips exchange numbers eight times. A CPU, which sums one after the other, takes the least time by one bit.
    """
    by = {bits: partial(_edge_by, bits) for bits in (1, 4)}
    return lax.platform_dependent(key_V, weight_V, bound, cpu=by[1], default=by[4])


def _edge_by(bits: int, key_V: jax.Array, weight_V: jax.Array, bound: jax.Array) -> jax.Array:
    digits = jnp.arange(1, 1 << bits, dtype=jnp.uint32)

    def step(index: jax.Array, found: jax.Array) -> jax.Array:
        shift = jnp.uint32(32 - bits) - jnp.uint32(bits) * index.astype(jnp.uint32)
        is_below = key_V[..., None, :] < (found + (digits << shift))[..., :, None]
        below = jnp.sum(jnp.where(is_below, weight_V[..., None, :], 0), axis=-1)
        return found + (jnp.sum(below <= bound, axis=-1, keepdims=True).astype(jnp.uint32) << shift)

    return lax.fori_loop(0, 32 // bits, step, jnp.zeros((*key_V.shape[:-1], 1), jnp.uint32))
