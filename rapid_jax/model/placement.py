# SPDX-License-Identifier: Apache-2.0
"""Checkpoint arrays into a Decoder on its devices, and out of one again, one array at a time.

An array goes to the devices in the checkpoint's own order of axes, each device receiving its part only, and is turned
there: transposing a large array in host memory is several times slower than reading it. Hosts of a slice read every
matrix once between them: their devices exchange it faster than a disk or a bucket gives it to each.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache, partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rapid_jax.attention.strategy import Strategy
from rapid_jax.model.config import ModelConfig
from rapid_jax.model.decoder import Decoder, Layout
from rapid_jax.model.hf_names import Path, Weight, weights
from rapid_jax.runtime.axes import PARAM, Table
from rapid_jax.runtime.mesh import sharding_of
from rapid_jax.runtime.progress import progress


class _OneKey:
    """Stands for nnx.Rngs where no initial value is ever computed, only its shape.

    Rngs counts its draws in a traced variable; tracing that for every layer takes time that grows as layers squared,
    5 s of a 6 s load of 30 layers.
    """

    def params(self) -> jax.Array:
        return jax.random.key(0)


def build(
    config: ModelConfig,
    read: Callable[[str], np.ndarray],
    *,
    layout: Layout,
    dtype: jnp.dtype,
    mesh: Mesh | None = None,
    table: Table = PARAM,
    quiet: bool = False,
    read_rows: Callable[[str, range], np.ndarray] | None = None,
) -> Decoder:
    """A Decoder whose parameters are `read(key)` for every key of the checkpoint, on `mesh` or the default device.

    Peak memory is the model and about one array. `read` must return arrays of the checkpoint's shapes; `table` says
    which mesh axis each letter is split over. With `read_rows`, which gives these rows of an array's first axis, a mesh
    of one process asks for each row once that a device holds, and for no other. Of a mesh of several processes each
    asks for its share of the rows, a matrix in as many as there are devices, and the devices exchange what they are to
    hold: whichever axis a matrix is split along and however many devices hold the same of it, all processes together
    ask for it once. Vectors, and matrices whose rows cannot be shared evenly, are asked for as by one process.
    """
    graph, leaves = _outline(config, layout, dtype, mesh)
    filled: dict[Path, jax.Array] = {}
    every = weights(config)
    Strategy(block=1, mesh=mesh).kv_heads(config.num_kv_heads)  # what cannot be split is said before anything is read
    for weight in every:
        _sharding(mesh, weight.name, weight.axes, weight.shape, table)
    with progress("loading weights", len(every), "arrays", quiet=quiet) as report:
        for weight in every:
            path, source = weight.path(layout), _Source(weight, read, read_rows)
            if weight.place(layout):
                shape, sharding = _lying(config, weight, layout, mesh, table)
                if path not in filled:
                    filled[path] = _zeros(shape, dtype, sharding)
                placed = _placed(weight, source, mesh, table)
                filled[path] = _with_row(filled[path], placed, weight.place(layout), weight.to_ours, sharding)
            elif mesh is None and jax.default_backend() == "cpu":
                # The device's memory is the host's: one copy does it all, and nothing is compiled.
                filled[path] = jax.device_put(source.whole().transpose(weight.to_ours).astype(dtype, copy=False))
            else:
                sharding = _sharding(mesh, weight.name, weight.axes, weight.shape, table)
                placed = _placed(weight, source, mesh, table)
                filled[path] = _transpose(placed, weight.to_ours, dtype, sharding)
            # Dispatch is asynchronous: without the wait, every array would be read before the first is turned.
            filled[path].block_until_ready()
            report.advance(1)
    return _merge(graph, leaves, filled)


def abstract(
    config: ModelConfig, *, layout: Layout, dtype: jnp.dtype, mesh: Mesh | None = None, table: Table = PARAM
) -> Decoder:
    """The Decoder that `build` would give, with the shape of each parameter and where it lies in its place."""
    graph, leaves = _outline(config, layout, dtype, mesh)
    shapes = {}
    for weight in weights(config):
        shape, sharding = _lying(config, weight, layout, mesh, table)
        shapes[weight.path(layout)] = jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
    return _merge(graph, leaves, shapes)


def _outline(config: ModelConfig, layout: Layout, dtype: jnp.dtype, mesh: Mesh | None) -> tuple[Any, dict[Any, Any]]:
    """(the Decoder's structure, its parameters by path, without values)."""
    rngs = cast(nnx.Rngs, _OneKey())
    graph, empty = nnx.split(nnx.eval_shape(lambda: Decoder(config, layout=layout, dtype=dtype, rngs=rngs, mesh=mesh)))
    return graph, dict(nnx.to_flat_state(empty))


def _merge(graph: Any, leaves: dict[Any, Any], filled: Mapping[Path, Any]) -> Decoder:
    if filled.keys() != leaves.keys():
        raise ValueError(f"parameters without a checkpoint key: {sorted(map(str, filled.keys() ^ leaves.keys()))}")
    state = nnx.from_flat_state([(path, leaf.replace(filled[path])) for path, leaf in leaves.items()])
    return nnx.merge(graph, state)


def stored_arrays(decoder: Decoder, dtype: np.dtype) -> Iterator[tuple[Weight, np.ndarray]]:
    """Every array of the decoder's checkpoint in the checkpoint's own shape, on the host, one at a time.

    On several hosts each must run through it: every array is gathered from all of them.
    """
    if type(decoder) is not Decoder:
        raise ValueError(f"expected a Decoder, whose arrays are those of a checkpoint, got a {type(decoder).__name__}")
    _, state = nnx.split(decoder)
    leaves: dict[Any, Any] = dict(nnx.to_flat_state(state))
    for weight in weights(decoder.config):
        parameter = leaves[weight.path(decoder.layout)][...]
        if place := weight.place(decoder.layout):
            array = _stored_row(parameter, place, weight.to_stored, dtype)
        else:
            array = _transpose(parameter, weight.to_stored, dtype, None)
        if array.is_fully_addressable:
            host = np.asarray(array)
        else:
            host = np.asarray(multihost_utils.process_allgather(array, tiled=True))
        yield weight, host.reshape(weight.stored_shape)


class _Source:
    """One array of a checkpoint, heads unflattened, whole or by rows of its first axis."""

    def __init__(
        self,
        weight: Weight,
        read: Callable[[str], np.ndarray],
        read_rows: Callable[[str, range], np.ndarray] | None,
    ):
        self._weight, self._read, self._read_rows = weight, read, read_rows

    def whole(self) -> np.ndarray:
        return self._read(self._weight.key).reshape(self._weight.unflattened_shape)

    def rows(self) -> Callable[[int, int], np.ndarray]:
        """What gives the rows from the first to before the last, and reads none twice."""
        if self._read_rows is None:
            whole = self.whole()
            return lambda first, last: whole[first:last]
        return cache(self._some)

    def _some(self, first: int, last: int) -> np.ndarray:
        count, *inner = self._weight.unflattened_shape
        if (first, last) == (0, count) or self._read_rows is None:
            return self.whole()
        flat = self._weight.stored_shape[0] // count  # rows of the file in one of these: a head has several
        return self._read_rows(self._weight.key, range(first * flat, last * flat)).reshape(last - first, *inner)

    def shared(self, mesh: Mesh) -> jax.Array | None:
        """The array as it is stored, of whose rows each device of `mesh` has as many; None where it is not shared."""
        shape, read = self._weight.stored_shape, self._read_rows
        one_process = len({device.process_index for device in mesh.devices.flat}) == 1
        if read is None or one_process or len(shape) < 2 or shape[0] % mesh.size:
            return None
        sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        own = sharding.addressable_devices_indices_map(shape).values()
        ranges = _joined(index[0].indices(shape[0])[:2] for index in own if index is not None)
        held = {rows: read(self._weight.key, rows) for rows in ranges}

        def part(index: Any) -> np.ndarray:
            first, last, _ = index[0].indices(shape[0])
            rows = next(rows for rows in ranges if first in rows)
            return held[rows][first - rows.start : last - rows.start]

        return jax.make_array_from_callback(shape, sharding, part)


def _joined(bounds: Iterable[tuple[int, int]]) -> list[range]:
    """Ranges that follow one another as one."""
    found: list[range] = []
    for first, last in sorted(bounds):
        if found and found[-1].stop == first:
            first = found.pop().start
        found.append(range(first, last))
    return found


def _placed(weight: Weight, source: _Source, mesh: Mesh | None, table: Table) -> jax.Array:
    shape = weight.unflattened_shape
    sharding = _sharding(mesh, weight.name, weight.stored_axes, shape, table)
    if mesh is None or sharding is None:
        return jax.device_put(source.whole())
    if (shared := source.shared(mesh)) is not None:
        return _exchange(shared, shape, sharding)
    rows = source.rows()  # several devices may hold the same rows, or other columns of them

    def part(index: Any) -> np.ndarray:
        first, last, _ = index[0].indices(shape[0])
        return rows(first, last)[:, *index[1:]]

    return jax.make_array_from_callback(shape, sharding, part)


def _sharding(mesh: Mesh | None, name: str, axes: str, shape: tuple[int, ...], table: Table) -> NamedSharding | None:
    if mesh is None:
        return None
    stem = name.rpartition("_")[0]
    return sharding_of(mesh, f"{stem}_{axes}", shape, table)


def _lying(
    config: ModelConfig, weight: Weight, layout: Layout, mesh: Mesh | None, table: Table
) -> tuple[tuple[int, ...], NamedSharding | None]:
    """(shape of the parameter that holds the weight, where it lies)."""
    axes, shape = weight.axes, weight.shape
    if weight.expert is not None:
        axes, shape = f"X{axes}", (dict(weight.sizes)["X"], *shape)
    if layout == "stacked" and weight.layer is not None:
        axes, shape = f"L{axes}", (config.num_layers, *shape)
    return shape, _sharding(mesh, weight.name, axes, shape, table)


def _laid(array: jax.Array, sharding: NamedSharding | None) -> jax.Array:
    return array if sharding is None else jax.lax.with_sharding_constraint(array, sharding)


@partial(jax.jit, static_argnums=(1, 2))
def _exchange(stored: jax.Array, shape: tuple[int, ...], sharding: NamedSharding) -> jax.Array:
    return _laid(stored.reshape(shape), sharding)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _zeros(shape: tuple[int, ...], dtype: jnp.dtype, sharding: NamedSharding | None) -> jax.Array:
    return _laid(jnp.zeros(shape, dtype), sharding)


@partial(jax.jit, static_argnums=(1, 2, 3))
def _transpose(
    array: jax.Array, permutation: tuple[int, ...], dtype: jnp.dtype, sharding: NamedSharding | None
) -> jax.Array:
    return _laid(jnp.transpose(array, permutation).astype(dtype), sharding)


@partial(jax.jit, static_argnums=(3, 4), donate_argnums=0)
def _with_row(
    stack: jax.Array,
    array: jax.Array,
    place: tuple[int, ...],
    permutation: tuple[int, ...],
    sharding: NamedSharding | None,
) -> jax.Array:
    turned = jnp.transpose(array, permutation).astype(stack.dtype)
    return _laid(stack.at[place].set(turned), sharding)


@partial(jax.jit, static_argnums=(2, 3))
def _stored_row(stack: jax.Array, place: tuple[int, ...], permutation: tuple[int, ...], dtype: np.dtype) -> jax.Array:
    return jnp.transpose(stack[place], permutation).astype(dtype)
