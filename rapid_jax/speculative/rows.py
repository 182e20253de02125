# SPDX-License-Identifier: Apache-2.0
"""Rows that come and go: copying one batch's arrays into another's, making room, and keeping some rows alone.

A part is a pytree whose arrays have a row a sequence: on its first axis, or on the second where layers are stacked.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Sharding

from rapid_jax.attention.cache import KV, Near, Prefix, Tail, with_slots
from rapid_jax.speculative.sampling import SamplingParams

T = TypeVar("T")
# What stands where no row has anything yet: an empty slot, no token, an answer that is complete. Else 0.
_EMPTY = {"pos_BS": -1, "text_BM": -1, "recent_BR": -1, "done_B": True}


def _each(visit: Callable[..., Any], first: Any, *others: Any, name: str = "") -> Any:
    """The part with `visit(name, row axis, arrays...)` for each of its arrays; a scalar has the row axis -1."""
    if isinstance(first, Prefix | Tail):
        stacked = isinstance(first.layers, KV)
        layers = [part.layers for part in (first, *others)]
        found = jax.tree.map(partial(visit, "layers", int(stacked)), *layers)
        rest = {
            field: visit(field, 0 if getattr(first, field).ndim else -1, *(getattr(x, field) for x in (first, *others)))
            for field in vars(first)
            if field not in ("layers", "near")
        }
        if isinstance(first, Prefix):
            rest["near"] = _each(visit, first.near, *(x.near for x in others))
        return type(first)(found, **rest)
    if isinstance(first, Near):
        return replace(first, prefix=_each(visit, first.prefix, *(x.prefix for x in others)))
    if isinstance(first, dict):
        return {key: _each(visit, first[key], *(x[key] for x in others), name=key) for key in first}
    if hasattr(first, "__dataclass_fields__"):
        values = {
            key: _each(visit, getattr(first, key), *(getattr(x, key) for x in others), name=key) for key in vars(first)
        }
        return type(first)(**values)
    return None if first is None else visit(name, 0, first, *others)


@partial(jax.jit, donate_argnums=0)
def written(old: T, new: T, index: jax.Array) -> T:
    """`old`, which is used up, with the rows of `new` from row `index` on; its arrays have room for them."""

    def put(name: str, axis: int, old, new):
        if axis < 0:  # the slots in use by any row
            return jnp.maximum(old, new)
        if old.dtype != new.dtype:
            new = new.astype(old.dtype)
        empty = [(0, size - own) for size, own in zip(old.shape, new.shape, strict=True)]
        empty[axis] = (0, 0)
        if name in _EMPTY:
            new = jnp.pad(new, empty, constant_values=_EMPTY[name])
        return lax.dynamic_update_slice(old, new, [index if at == axis else 0 for at in range(old.ndim)])

    return _each(put, old, new)


def with_room(old: T, new: T, rows: int) -> T:
    """`old` if it has so many rows and room for what `new` has in one; else a copy of it in larger arrays."""
    shapes = _each(partial(_shape, rows), old, new)
    if all(x.shape == shape.value for x, shape in zip(jax.tree.leaves(old), jax.tree.leaves(shapes), strict=True)):
        return old
    return written(_each(_fresh, old, shapes), old, np.int32(0))


def outline(part: T) -> T:
    """The part's shapes alone, in the place of its arrays."""
    return jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), part)


def fitted(mine: dict[str, Any], theirs: dict[str, Any], devices: int) -> tuple[dict, dict]:
    """Both parts, which `written` then takes: their one row has at least as many slots of everything as mine have.

    One program for a pair of sizes, whatever number of rows mine are. Of mine, prefixes alone grow to the size of
    theirs.
    """
    mine, theirs = with_same_slots(mine, theirs, devices)
    return mine, with_room(theirs, mine, 1)


def with_same_slots(first: dict[str, Any], second: dict[str, Any], devices: int) -> tuple[dict, dict]:
    """Both parts with prefixes, if they have any, of as many slots as the larger; devices of the context axis share
    them."""
    if "prefix" not in first:
        return first, second
    groups = [part["prefix"].groups for part in (first, second)]
    slots = [max(group.slots for group in both) for both in zip(*groups, strict=True)]

    def fitted(part: dict[str, Any]) -> dict[str, Any]:
        prefix = part["prefix"]
        if [group.slots for group in prefix.groups] == slots:
            return part
        grown = [
            group if group.slots == size else with_slots(group, size, devices)
            for group, size in zip(prefix.groups, slots, strict=True)
        ]
        return part | {"prefix": prefix.with_groups(grown)}

    return fitted(first), fitted(second)


class _Static:
    """A shape that jax.tree does not look into."""

    def __init__(self, value: tuple[int, ...]):
        self.value = value


def _shape(rows: int, name: str, axis: int, old: jax.Array, new: jax.Array) -> _Static:
    sizes = [max(pair) for pair in zip(old.shape, new.shape, strict=True)]
    if axis >= 0:
        sizes[axis] = rows
    return _Static(tuple(sizes))


def _fresh(name: str, axis: int, like: jax.Array, shape: _Static) -> jax.Array:
    """Nothing, lying as `like` does: bound to devices only if that is, else each program would be compiled twice."""
    sharding = like.sharding if like.committed else None
    if jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
        if sharding is None:
            return jax.random.split(jax.random.key(0), shape.value)
        return _key_maker(shape.value, sharding)()
    empty = _EMPTY.get(name, 0)
    if sharding is None:
        return jnp.full(shape.value, empty, like.dtype)
    return _filler(shape.value, empty, like.dtype, sharding)()


# Programs, for arrays that lie on devices of several processes.
@cache
def _filler(shape: tuple[int, ...], value: int, dtype: jnp.dtype, sharding: Sharding) -> Callable[[], jax.Array]:
    return jax.jit(partial(jnp.full, shape, value, dtype), out_shardings=sharding)


@cache
def _key_maker(shape: tuple[int, ...], sharding: Sharding) -> Callable[[], jax.Array]:
    return jax.jit(lambda: jax.random.split(jax.random.key(0), shape), out_shardings=sharding)


@jax.jit
def _taken(part, rows: jax.Array):
    return _each(lambda name, axis, x: x if axis < 0 else jnp.take(x, rows, axis=axis), part)


def taken(part: T, rows: Sequence[int]) -> T:
    """Those rows alone, in that order."""
    return _taken(part, np.asarray(rows, np.int32))


def params_with_row(params: SamplingParams, new: SamplingParams, row: int, rows: int) -> SamplingParams:
    """The numbers of so many rows, those of one replaced by the first of `new`."""

    def put(old: np.ndarray, new: np.ndarray) -> np.ndarray:
        found = np.repeat(new[:1], rows)
        found[: len(old)] = old
        found[row] = new[0]
        return found

    numbers = jax.tree.map(put, replace(params, allowed_V=None), replace(new, allowed_V=None))
    return replace(numbers, allowed_V=params.allowed_V)


def params_of_rows(params: SamplingParams, rows: list[int]) -> SamplingParams:
    """The numbers of those rows alone."""
    numbers = jax.tree.map(lambda numbers: numbers[rows], replace(params, allowed_V=None))
    return replace(numbers, allowed_V=params.allowed_V)
