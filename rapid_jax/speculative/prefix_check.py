# SPDX-License-Identifier: Apache-2.0
"""Whether a stored prefix is as it was written, a piece at a time on the host: no device is needed."""

from collections.abc import Mapping

import numpy as np
from jax import ShapeDtypeStruct

from rapid_jax.attention.cache import KV
from rapid_jax.runtime.array_store import Array, Damaged, Moves, opened
from rapid_jax.runtime.storage import AnyPlace
from rapid_jax.speculative.prefix_arrays import axes_of
from rapid_jax.speculative.prefix_manifest import Manifest, key_of
from rapid_jax.speculative.prefix_sums import SUMS, Slots, slot_sums


def check_entry(entry: AnyPlace) -> None:
    """Reads every value of an entry. Raises Damaged, and OSError or InputError where it cannot be read now."""
    manifest = Manifest.read(entry, entry.name)
    for before, (_, arrays) in manifest.groups.items():
        _check_group(entry / manifest.inside, before, arrays, key_of(entry.name, before))


def _check_group(folder: AnyPlace, before: str, arrays: Mapping[str, Array], key: str) -> None:
    sources = {name: opened(folder / f"{before}{name}", array) for name, array in arrays.items()}
    structs = {name: ShapeDtypeStruct((1, *array.shape[1:]), array.dtype) for name, array in arrays.items()}
    del structs[SUMS]
    axes = {name: axes_of(KV(**structs), name) for name in structs} | {SUMS: (1, 2)}  # type: ignore[arg-type]
    shape, piece = arrays[SUMS].shape, arrays[SUMS].piece
    for at in np.ndindex(*(-(-size // part) for size, part in zip(shape, piece, strict=True))):
        layer, *rest = (range(size)[part * index :][:part] for index, part, size in zip(at, piece, shape, strict=True))
        heads, positions = map(np.asarray, rest)
        read = {}
        with Moves(folder) as moves:
            for name, source in sources.items():
                part, (k_axis, s_axis) = [slice(None)] * len(source.shape), axes[name]
                part[0], part[k_axis] = slice(layer[0], layer[0] + 1), slice(heads[0], heads[-1] + 1)
                part[s_axis] = slice(positions[0], positions[-1] + 1)
                wanted = source[tuple(part)]
                read[name] = np.empty(wanted.shape, np.dtype(arrays[name].dtype))
                moves.read(wanted, read[name])
        if not np.array_equal(read.pop(SUMS), slot_sums(read, Slots(key, layer[0], heads, positions))):
            where = f"layer {layer[0]}, kv heads from {heads[0]} and tokens from {positions[0]} on"
            raise Damaged(f"{where}: expected the keys and values that were written, got others")
