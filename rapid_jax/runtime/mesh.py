# SPDX-License-Identifier: Apache-2.0
"""The device mesh: four named axes, made once, with errors that name both numbers before anything compiles."""

import math
from collections.abc import Sequence
from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from rapid_jax.runtime.axes import Table, letters_of, spec_of
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.mesh_config import AXES, MeshConfig


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh over `devices` (None: all of them, on every host) with axes data, fsdp, context, model.

    Raises InputError when the axes do not use exactly the devices there are.
    """
    devices = jax.devices() if devices is None else devices
    if config.devices != len(devices):
        raise InputError(f"mesh {config} needs {config.devices} devices, got {len(devices)}")
    # Auto: the compiler propagates shardings. The default (Explicit) refuses shard_map inputs that are not yet typed.
    types = (AxisType.Auto,) * len(AXES)
    if devices[0].platform != "tpu":
        return jax.make_mesh(config.sizes, AXES, axis_types=types, devices=devices)
    # A slice has three physical axes, none of which need be as long as one of ours.
    try:
        grid = mesh_utils.create_device_mesh(config.sizes, devices=devices, allow_split_physical_axes=True)
    except (AssertionError, NotImplementedError, ValueError):  # a part of a slice that is no box: in the order given
        grid = np.asarray(devices).reshape(config.sizes)
    return Mesh(grid, AXES, axis_types=types)


def make_meshes(
    first: MeshConfig, second: MeshConfig | None, devices: Sequence[Any] | None = None
) -> tuple[Mesh | None, Mesh | None]:
    """(mesh of the first, mesh of the second or the first's again), on devices of their own if both are given.

    None stands for the default device: one process, one device, and no second mesh. A process alone may leave devices
    unused; of several processes each gives the meshes equal shares of its devices, and all are used. Raises InputError
    naming both numbers when there are too few, or they cannot be shared out.
    """
    devices = list(jax.devices() if devices is None else devices)
    if first.devices == 1 and second is None and jax.process_count() == 1:
        return None, None
    wanted = [config.devices for config in (first, second) if config is not None]
    meshes = f"mesh {first}" + (f" and drafter_mesh {second}" if second else "")
    processes = sorted({device.process_index for device in devices})
    if sum(wanted) > len(devices) or (len(processes) > 1 and sum(wanted) < len(devices)):
        raise InputError(f"{meshes}: expected {sum(wanted)} devices, got {len(devices)}")
    if any(count % len(processes) for count in wanted):
        raise InputError(f"{meshes}: {wanted} devices cannot be shared out over {len(processes)} processes")
    shares: list[list[Any]] = [[] for _ in wanted]
    for process in processes:
        own = iter(device for device in devices if device.process_index == process)
        for share, count in zip(shares, wanted, strict=True):
            share.extend(islice(own, count // len(processes)))
    target = make_mesh(first, shares[0])
    return target, target if second is None else make_mesh(second, shares[1])


def put_on_mesh(mesh: Mesh | None, spec: PartitionSpec, tree: Any) -> Any:
    """The arrays of a tree, the same on every host, on the mesh as `spec` says; None: on the default device."""

    def place(array):
        if mesh is None:  # unlike jnp.asarray this compiles nothing for a new shape
            return array if isinstance(array, jax.Array) else jax.device_put(np.asarray(array), may_alias=False)
        if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(place(jax.random.key_data(array)), impl=jax.random.key_impl(array))
        array = np.asarray(array)
        return jax.make_array_from_callback(array.shape, NamedSharding(mesh, spec), lambda part: array[part])

    return jax.tree.map(place, tree)


def replicate(mesh: Mesh | None, tree: Any) -> Any:
    """The arrays of a tree, whole on every device of the mesh; None: on the default device."""
    return put_on_mesh(mesh, PartitionSpec(), tree)


def whole(mesh: Mesh | None, tree: Any) -> Any:
    """Inside a program: the arrays of a tree, told to be whole on every device of the mesh."""
    return tree if mesh is None else jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, PartitionSpec()))


def moved(tree: Any, mesh: Mesh | None) -> Any:
    """Small replicated arrays from one mesh to another, or to the default device, whatever hosts the two span.

    Every process needs a device of both meshes.
    """
    if mesh is None or jax.process_count() == 1:
        return jax.device_put(tree, jax.devices()[0] if mesh is None else NamedSharding(mesh, PartitionSpec()))
    return replicate(mesh, jax.tree.map(_here, tree))


def on_host(tree: Any) -> Any:
    """The arrays, whole, as arrays of the host; where processes hold parts of them all processes call this together."""

    def gathered(x: Any) -> Any:
        there = not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated
        return x if there else multihost_utils.process_allgather(x, tiled=True)

    return jax.device_get(jax.tree.map(gathered, tree))


def agreed(number: float) -> float:
    """The first process's number, on every process: what a clock says must not decide differently on two hosts."""
    if jax.process_count() == 1:
        return number
    return float(multihost_utils.broadcast_one_to_all(np.float32(number)))


def _here(array: jax.Array) -> jax.Array:
    """This process's copy of a replicated array."""
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(_here(jax.random.key_data(array)), impl=jax.random.key_impl(array))
    return array.addressable_data(0)


def sharding_of(mesh: Mesh | AbstractMesh, name: str, shape: Sequence[int], table: Table) -> NamedSharding:
    """Where an array of this name and shape lies: each axis split as `table` says for its letter.

    Raises InputError when a mesh axis does not divide the array's axis.
    """
    spec = spec_of(name, table)
    for letter, size, entry in zip(letters_of(name), shape, spec, strict=True):
        axes = (entry,) if isinstance(entry, str) else entry or ()
        parts = math.prod(mesh.shape[axis] for axis in axes)
        if size % parts:
            raise InputError(f"{name}: axis {letter} of size {size} cannot be split over {'*'.join(axes)} = {parts}")
    return NamedSharding(mesh, spec)
