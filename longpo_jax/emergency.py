# SPDX-License-Identifier: Apache-2.0
"""Copies of the training state on each process's own disk, between the checkpoints that all processes see.

    FOLDER/<run>/<process>-of-<count>/<step>/values.safetensors   what this process's devices hold, as bytes
                                             note.json            step, note of a checkpoint, sums of the values

A process that is killed finds them after a restart on the same machine, and nobody else does. They are used where every
process has the same step, whole, for the same devices; else the newest checkpoint is.
"""

# Orbax has emergency checkpoints (0.12, experimental.emergency), which are of no use here: they refuse less than two
# data-parallel replicas, of which one writes to the bucket and the others to their disks, where a run here holds its
# state once. And its restore meets in barriers: one process whose copy is damaged would leave the others waiting.

import contextlib
import json
from collections.abc import Mapping, Sequence
from threading import Thread
from typing import Any, Final

import jax
import numpy as np
from flax import nnx
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from longpo_jax.checkpoint_files import one_line
from longpo_jax.checkpoints import named
from longpo_jax.config import EMERGENCY_KEPT, TrainConfig
from longpo_jax.metrics import FILE
from longpo_jax.step import TrainState
from rapid_jax.runtime.agreement import READING_S, all_told, leads, told
from rapid_jax.runtime.append_log import has_log
from rapid_jax.runtime.command_line import say
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.files import digest, remove_folder, replace_folder
from rapid_jax.runtime.json_input import Fields
from rapid_jax.runtime.mesh import put_on_mesh
from rapid_jax.runtime.sealed import sealed, unsealed
from rapid_jax.runtime.storage import AnyPlace, full_name, local_path
from rapid_jax.runtime.value_sums import host_sum

_VALUES: Final = "values.safetensors"
_NOTE: Final = "note.json"


class EmergencyCopies:
    """The copies of one run on this process's disk; none where `train.emergency_every` is null.

    All processes call everything. What goes wrong with a copy is told and ends nothing.
    """

    def __init__(self, train: TrainConfig, run: AnyPlace, inputs: Mapping[str, Any]):
        self._every, self._inputs = train.emergency_every, json.loads(json.dumps(inputs))
        self._process = f"{jax.process_index()}-of-{jax.process_count()}"
        self._writing: Thread | None = None
        self._metrics = run / FILE
        if train.emergency_folder is not None:
            folder = local_path(train.emergency_folder, "train.emergency_folder")
            self._folder = folder / digest(full_name(run))[:16] / self._process

    def are_due(self, step: int) -> bool:
        """Whether a copy of the state after `step` updates is to be written."""
        return self._every is not None and step % self._every == 0

    def save(self, state: TrainState, note: Mapping[str, Any]) -> None:
        """Begins to write what this process's devices hold, which is on the host when this returns."""
        self._wait()
        shards = {key: shard for item, tree in _trees(state).items() for key, shard in _shards(item, tree).items()}
        for shard in shards.values():
            shard.copy_to_host_async()
        values = {key: np.array(shard) for key, shard in shards.items()}  # copies: the devices' own will change
        self._writing = Thread(target=self._write, args=(int(state.step), values, dict(note)))
        self._writing.start()

    def restore(self, target: TrainState, *, after: int) -> tuple[TrainState, Fields] | None:
        """The newest state of more than `after` updates that all processes have whole, and its note.

        It lies as `target` does, whose arrays are given up for it. None also where the run has told nothing of itself:
        somebody has deleted it, to begin anew.
        """
        if self._every is None or not told(leads() and has_log(self._metrics), patience=READING_S):
            return None
        every = all_told([step for step in self._steps() if step > after], patience=READING_S)
        for step in sorted(set.intersection(*map(set, every)), reverse=True):
            fault, values, note = "", {}, None
            try:
                values, note = self._read(step, target)
            except (OSError, InputError, SafetensorError) as error:
                fault = f"{self._folder / str(step)}: {one_line(error)}"
            if fault := next(filter(None, all_told(fault, patience=READING_S)), ""):
                if leads():
                    say(f"train: a copy is not used: {fault}")
                continue
            assert note is not None
            if leads():
                say(f"train: going on from the copies of update {step} in {self._folder.parent}")
            return _with_values(target, values, step), note
        return None

    def drop(self, step: int) -> None:
        """Takes away the copies of up to `step` updates: a checkpoint of them is whole."""
        if self._every is not None:
            self._wait()
            for old in self._steps():
                if old <= step:
                    remove_folder(self._folder / str(old))

    def close(self) -> None:
        """Takes away all of them: the run has ended."""
        if self._every is not None:
            self._wait()
            remove_folder(self._folder)
            with contextlib.suppress(OSError):  # another process's are there
                self._folder.parent.rmdir()

    def _wait(self) -> None:
        if self._writing is not None:
            self._writing.join()
            self._writing = None

    def _write(self, step: int, values: dict[str, np.ndarray], note: dict[str, Any]) -> None:
        parts = {key: [x.dtype.name, list(x.shape), host_sum(x, key)] for key, x in values.items()}
        said = {"step": step, "note": note, "parts": parts}
        try:
            with replace_folder(self._folder / str(step)) as temporary:
                save_file({key: _bytes(x) for key, x in values.items()}, temporary / _VALUES)
                (temporary / _NOTE).write_bytes(sealed(said, self._place(step)))
            newest = {str(step) for step in self._steps()[-EMERGENCY_KEPT:]}
            for path in list(self._folder.iterdir()):
                if path.name not in newest:  # half written by a process that was killed, too
                    remove_folder(path)
        except (OSError, InputError, SafetensorError) as error:
            say(f"train: no copy of update {step} in {self._folder}: {one_line(error)}")

    def _read(self, step: int, target: TrainState) -> tuple[dict[str, np.ndarray], Fields]:
        """(values by part, the note). Raises InputError, OSError or SafetensorError for what is not to be used."""
        folder = self._folder / str(step)
        said = unsealed((folder / _NOTE).read_bytes(), self._place(step), str(folder / _NOTE))
        note, parts = said.fields("note"), said.fields("parts")
        if note["inputs"] != self._inputs:
            raise InputError("it is of a run with other settings or data")
        shards = {key: shard for item, tree in _trees(target).items() for key, shard in _shards(item, tree).items()}
        if {key: [x.dtype.name, list(x.shape)] for key, x in shards.items()} != {
            key: x[:2] for key, x in parts.items()
        }:
            raise InputError("it is of another model or optimizer, or of other devices")
        stored, values = load_file(folder / _VALUES), {}
        for key, shard in shards.items():
            if key not in stored or stored[key].size != shard.nbytes:
                raise InputError(f"{key} is missing")
            values[key] = stored[key].view(shard.dtype).reshape(shard.shape)
            if host_sum(values[key], key) != parts[key][2]:
                raise InputError(f"{key} has other values than were written")
        return values, note

    def _place(self, step: int) -> str:
        return f"{self._process}/{step}"

    def _steps(self) -> list[int]:
        names = [path.name for path in self._folder.iterdir()] if self._folder.is_dir() else []
        return sorted(int(name) for name in names if name.isascii() and name.isdigit())


def _trees(state: TrainState) -> dict[str, Any]:
    return {"weights": nnx.state(state.weights, nnx.Param), "moments": state.moments}


def _shards(item: str, tree: Any) -> dict[str, jax.Array]:
    """What this process's devices hold, each part once, by a name that says where it belongs."""
    return {
        _key(item, name, shard.index, x.shape): shard.data
        for name, x in named(tree).items()
        for shard in x.addressable_shards
    }


def _key(item: str, name: str, index: Sequence[slice], shape: Sequence[int]) -> str:
    spans = (each.indices(size)[:2] for each, size in zip(index, shape, strict=True))
    return f"{item}.{name}[{','.join(f'{start}:{stop}' for start, stop in spans)}]"


def _bytes(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x).reshape(-1).view(np.uint8)


def _with_values(target: TrainState, values: Mapping[str, np.ndarray], step: int) -> TrainState:
    """The state with these values in the place of its own, an array at a time."""
    graph, weights = nnx.split(target.weights, nnx.Param)

    def filled(item: str, tree: Any) -> Any:
        leaves = []
        for name, x in named(tree).items():
            devices = x.sharding.addressable_devices_indices_map(x.shape)
            keys = {device: _key(item, name, index, x.shape) for device, index in devices.items()}
            x.delete()
            parts = [jax.device_put(values[key], device) for device, key in keys.items()]
            leaves.append(jax.make_array_from_single_device_arrays(x.shape, x.sharding, parts, dtype=x.dtype))
        return jax.tree.unflatten(jax.tree.structure(tree), leaves)

    number = put_on_mesh(target.weights.mesh, jax.P(), np.int32(step))
    return TrainState(number, nnx.merge(graph, filled("weights", weights)), filled("moments", target.moments))
