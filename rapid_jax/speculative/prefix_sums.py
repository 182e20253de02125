# SPDX-License-Identifier: Apache-2.0
"""Sums by which a stored prefix's keys and values are known (runtime/value_sums.py): one a slot of a kv head.

They are stored beside the values as scales are, so whoever reads the first tokens of a prefix, or a part of its heads,
checks what it reads. Each is of all that the slot has (keys, values, scales) and of where it belongs: the document's
key, the layer, the head, the position.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np

from rapid_jax.attention.cache import KV
from rapid_jax.runtime.axes import letters_of
from rapid_jax.runtime.value_sums import places, row_sums, seed_of
from rapid_jax.speculative.prefix_heads import layer_names

SUMS: Final = "sums_BKS"
_HOST_SLOTS: Final = 1 << 10  # of a head at a time: what NumPy makes on the way stays in a processor's cache


@dataclass(frozen=True)
class Slots:
    """Which slots of a prefix these are."""

    key: str
    layer: int
    heads: np.ndarray  # int [K]: which stored kv head each is
    positions: np.ndarray  # int [S]: -1 of an empty slot, whose sum is 0

    def numbers(self, fields: Iterable[str]) -> tuple[Any, ...]:
        """What decides their sums beside the values: data of a program, which serves all layers and documents."""
        seeds = {name: seed_of(self.key, name) for name in fields}
        return seeds, np.array([self.layer], np.int32), self.heads.astype(np.int32), self.positions.astype(np.int32)


def slot_sums(fields: Mapping[str, Any], slots: Slots) -> Any:
    """uint32 [1, K, S] of a layer's fields by their names in KV, of one row each.

    Computed on the device that all lie on, or by NumPy where they are NumPy's.
    """
    if all(isinstance(field, np.ndarray) for field in fields.values()):
        return _on_host(fields, *slots.numbers(fields))
    return _on_device(dict(fields), *slots.numbers(fields))


def are_same(fields: Mapping[str, jax.Array], stored: jax.Array, slots: Slots) -> jax.Array:
    """Whether `stored` are the sums of the fields; on the device that all lie on."""
    return _compared(dict(fields), stored, *slots.numbers(fields))


@jax.jit
def _on_device(fields: dict[str, jax.Array], *numbers: Any) -> jax.Array:
    return _sums(fields, *numbers)


@jax.jit
def _compared(fields: dict[str, jax.Array], stored: jax.Array, *numbers: Any) -> jax.Array:
    return jnp.all(_sums(fields, *numbers) == stored)


def _on_host(fields: Mapping[str, np.ndarray], seeds: Any, layer: Any, heads: Any, positions: Any) -> np.ndarray:
    sums = np.zeros((1, heads.size, positions.size), np.uint32)
    axes = {name: _axes(fields, name)[1] for name in fields}
    for k in range(heads.size):
        for start in range(0, positions.size, _HOST_SLOTS):
            span, parts = slice(start, start + _HOST_SLOTS), {}
            for name, field in fields.items():
                at = [slice(None)] * field.ndim
                at[1], at[axes[name]] = slice(k, k + 1), span
                parts[name] = field[tuple(at)]
            sums[:, k : k + 1, span] = _sums(parts, seeds, layer, heads[k : k + 1], positions[span])
    return sums


def _sums(fields: Mapping[str, Any], seeds: Any, layer: Any, heads: Any, positions: Any) -> Any:
    total: Any = 0
    for name, field in fields.items():
        element, _ = _axes(fields, name)
        rows = places(seeds[name], layer, heads, positions)
        total = total + (row_sums(field, element, rows) if element else row_sums(field[..., None], -1, rows))
    return total * (positions >= 0)


def _axes(fields: Mapping[str, Any], name: str) -> tuple[int, int]:
    """The axes of a slot's elements (0: it has one) and of slots."""
    letters = letters_of(layer_names(KV(**fields))[name][0])
    return letters.index("H") if "H" in letters else 0, letters.index("S")
