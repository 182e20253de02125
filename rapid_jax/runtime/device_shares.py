# SPDX-License-Identifier: Apache-2.0
"""The devices of a machine shared out to commands that run at the same time, by their environment. Imports no jax."""

import os
from collections.abc import Mapping
from pathlib import Path

from rapid_jax.runtime.errors import InputError

# Chips of one process, along x, y and z of a host's grid.
_BOUNDS = {1: "1,1,1", 2: "1,2,1", 4: "2,2,1"}


def shares_of(
    jobs: int, each: int, environment: Mapping[str, str] | None = None, root: Path = Path("/")
) -> list[dict[str, str]]:
    """What each of `jobs` commands gets into its environment so that it has `each` devices for itself.

    One command alone has whatever there is, and on a CPU all share it. Raises InputError, naming --jobs, where there
    are too few GPUs or TPU chips.
    """
    environment = os.environ if environment is None else environment
    if jobs == 1:
        return [{}]
    kind, ids = _found(environment, root)
    if not ids:
        return [{} for _ in range(jobs)]
    if jobs * each > len(ids):
        raise InputError(
            f"--jobs: expected at most {len(ids) // each}, {each} a command of the {len(ids)} {kind} here, got {jobs}"
        )
    mine = [",".join(ids[at : at + each]) for at in range(0, jobs * each, each)]
    if kind == "GPUs":
        return [{"CUDA_VISIBLE_DEVICES": some} for some in mine]
    if each not in _BOUNDS:
        raise InputError(f"--jobs: expected meshes of {', '.join(map(str, _BOUNDS))} TPU chips, got one of {each}")
    same = {"TPU_PROCESS_BOUNDS": "1,1,1", "TPU_CHIPS_PER_PROCESS_BOUNDS": _BOUNDS[each]}
    return [{"TPU_VISIBLE_CHIPS": some, **same} for some in mine]


def _found(environment: Mapping[str, str], root: Path) -> tuple[str, list[str]]:
    """("GPUs" or "TPU chips", their ids); none on a machine without, or where JAX is to use the CPU."""
    if environment.get("JAX_PLATFORMS", "") == "cpu":
        return "", []
    for kind, chosen, nodes in (
        ("GPUs", "CUDA_VISIBLE_DEVICES", ("dev/nvidia[0-9]*",)),
        ("TPU chips", "TPU_VISIBLE_CHIPS", ("dev/accel[0-9]*", "dev/vfio/[0-9]*")),
    ):
        there = [path for pattern in nodes for path in root.glob(pattern)]
        if there and (given := environment.get(chosen)):
            return kind, given.split(",")
        if there:
            return kind, [str(number) for number in range(len(there))]
    return "", []
