# SPDX-License-Identifier: Apache-2.0
"""TPU slices by name, and their devices without hardware: what programs are compiled for ahead of time. GPUs by name.

jax is imported when devices are asked for: the command line knows the names without it.
"""

import difflib
import functools
import importlib.util
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal

from rapid_jax.runtime.errors import InputError, extra

GIB = 2**30
# Read by libtpu when it loads: no look for a machine's metadata, no log, and several processes at once.
_QUIET = MappingProxyType(
    {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        "TPU_ACCELERATOR_TYPE": "v5p-128",  # any will do for every topology; without one a line is printed
        "TPU_STDERR_LOG_LEVEL": "4",
        "TPU_MIN_LOG_LEVEL": "4",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "TPU_LOG_DIR": "disabled",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
)


@dataclass(frozen=True)
class Generation:
    """One generation of chips; every figure is of one JAX device, and a chip is one device unless said.

    Peaks are Google's published figures (cloud.google.com/tpu/docs/v5e, v5p, v6e, tpu7x: "System architecture"); the
    memory is what the compiler lets a program have, which is less than the chip's by what libtpu keeps for itself.
    GPUs: NVIDIA's data sheets (SXM, dense); the memory is the share of the card's that JAX takes.
    """

    flops: float  # bfloat16 a second
    hbm_bytes: int  # that a program may use
    hbm_rate: float  # bytes a second
    link_rate: float  # bytes a second over one link of the interconnect, one way
    shapes: tuple[str, ...]
    devices_per_chip: int = 1
    platform: Literal["tpu", "gpu"] = "tpu"  # for gpu there is no compiler without one: programs are counted


CHIPS_PER_HOST = 4  # of every slice named here: Google's machine types ...-4t, and libtpu's own split of these shapes
_TORUS = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16")
_SQUARE = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
# Interconnect: v5e 1,600 Gbit/s over 4 links, v5p 4,800 over 6, v6e 3,584 over 4, tpu7x 9,600 over 6 and 2 devices.
GENERATIONS: Mapping[str, Generation] = MappingProxyType(
    {
        "v5e": Generation(197e12, int(15.75 * GIB), 819e9, 50e9, _SQUARE),
        "v5p": Generation(459e12, int(95.74 * GIB), 2765e9, 100e9, _TORUS),
        "v6e": Generation(918e12, int(31.25 * GIB), 1640e9, 112e9, _SQUARE),
        "tpu7x": Generation(1153e12, int(94.75 * GIB), 3690e9, 100e9, _TORUS, devices_per_chip=2),
    }
)
# One card; the memory is all that nvidia-smi shows.
GPUS: Mapping[str, Generation] = MappingProxyType(
    {
        "h100": Generation(989e12, 81559 * 2**20, 3350e9, 0.0, (), platform="gpu"),
        "h200": Generation(989e12, 143771 * 2**20, 4800e9, 0.0, (), platform="gpu"),
    }
)
FRACTION = 0.75  # of a GPU's memory: what JAX takes when it starts, and all that it uses
FRACTION_NAMES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")  # another one; the second is the older


@dataclass(frozen=True)
class Card:
    """Stands for a GPU that need not be there."""

    platform: str = "gpu"
    process_index: int = 0


@dataclass(frozen=True)
class Topology:
    """A slice of TPU chips, or one GPU."""

    name: str  # v5p:4x4x4, h200
    generation: Generation
    devices: tuple[Any, ...]

    @property
    def chips(self) -> int:
        """How many chips it has."""
        return len(self.devices) // self.generation.devices_per_chip


def generation_of(name: str) -> Generation:
    """The generation of a topology's name. Raises InputError, with the right names, for a name that is none."""
    family, colon, shape = name.partition(":")
    if family not in GENERATIONS:
        nearest = difflib.get_close_matches(family, GENERATIONS, n=1)
        hint = f"; did you mean {nearest[0]}:{shape or GENERATIONS[nearest[0]].shapes[0]}?" if nearest else ""
        raise InputError(
            f"--topology {name}: expected GENERATION:SHAPE with one of {', '.join(GENERATIONS)}, as v5p:4x4x4{hint}"
        )
    generation = GENERATIONS[family]
    if not colon or shape not in generation.shapes:
        raise InputError(
            f"--topology {name}: {family} comes as {', '.join(f'{family}:{x}' for x in generation.shapes)}"
        )
    return generation


def chips_of(name: str) -> int:
    """How many chips a topology's name stands for; loads nothing."""
    generation_of(name)
    return math.prod(int(side) for side in name.partition(":")[2].split("x"))


def hosts_of(name: str) -> int:
    """How many hosts, and so processes of a run, a slice of that name has; loads nothing."""
    return chips_of(name) // CHIPS_PER_HOST


def card_of(name: str) -> Topology | None:
    """The GPU of that name, with the memory that JAX takes of it under this environment; None: no GPU's name.

    Raises InputError for several of them, and for a fraction that is none.
    """
    family, colon, _ = name.lower().partition(":")
    if family not in GPUS:
        return None
    if colon:
        raise InputError(f"--topology {name}: plans are of one GPU, expected one of {', '.join(GPUS)}")
    import jax

    jax.config.update("jax_platforms", "cpu")  # shapes are all that is asked for; no machine's GPU is taken
    card = GPUS[family]
    return Topology(family, replace(card, hbm_bytes=int(card.hbm_bytes * _fraction())), (Card(),))


def _fraction() -> float:
    """Of a GPU's memory, the share that JAX would take."""
    given = next(((name, os.environ[name]) for name in FRACTION_NAMES if os.environ.get(name)), None)
    if given is None:
        return FRACTION
    try:
        share = float(given[1])
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise InputError(f"{given[0]}: expected a share of the GPU's memory above 0 and up to 1, got {given[1]!r}")
    return share


def topology_of(name: str) -> Topology:
    """The slice of that name. Raises InputError for a wrong name, and where libtpu is not installed."""
    generation = generation_of(name)
    if importlib.util.find_spec("libtpu") is None:
        raise InputError(f"planning needs the TPU compiler, which is not installed; {extra('tpu')}")
    return Topology(name, generation, _devices(name))


@functools.cache
def _devices(name: str) -> tuple[Any, ...]:
    for key, value in _QUIET.items():
        os.environ.setdefault(key, value)

    import jax
    from jax.experimental import topologies

    jax.config.update("jax_platforms", "cpu")  # libtpu compiles; no machine's TPU is taken
    return tuple(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
