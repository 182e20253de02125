# SPDX-License-Identifier: Apache-2.0
"""The device mesh: four named axes, made once, with errors that name both numbers before anything compiles."""

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding

from rapid_jax.runtime.axes import Table, letters_of, spec_of
from rapid_jax.runtime.errors import InputError


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; their product is the number of devices."""

    data: int = 1  # copies of the model, each with its own part of the batch
    fsdp: int = 1  # parts of each weight along embed, gathered where used; also splits the batch
    context: int = 1  # parts of a sequence: ring attention
    model: int = 1  # parts of the heads, the ffn and the vocabulary

    def __post_init__(self):
        for axis in fields(self):
            size = getattr(self, axis.name)
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise InputError(f"mesh axis {axis.name} must be a positive whole number, got {size!r}")


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh over `devices` (None: all of them, on every host) with axes data, fsdp, context, model.

    Raises InputError when the axes do not use exactly the devices there are.
    """
    devices = jax.devices() if devices is None else devices
    sizes = astuple(config)
    names = tuple(axis.name for axis in fields(config))
    if math.prod(sizes) != len(devices):
        shape = " x ".join(f"{name} {size}" for name, size in zip(names, sizes, strict=True))
        raise InputError(f"mesh {shape} needs {math.prod(sizes)} devices, got {len(devices)}")
    # Auto: the compiler propagates shardings. The default (Explicit) refuses shard_map inputs that are not yet typed.
    return jax.make_mesh(sizes, names, axis_types=(AxisType.Auto,) * len(names), devices=devices)


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
