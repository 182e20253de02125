# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of training: Orbax's CheckpointManager, with a note of where the run was and a list of what was written.

    FOLDER/<step>/weights, moments   arrays by name, each device's part written by it, readable on any mesh
    FOLDER/<step>/note               JSON: schema, step, position, what decides the run, kinds and sums of arrays
    FOLDER/<step>/files.json         size of every file (checkpoint_files.py)

Orbax writes beside the training and gives the folder its name last; the list is written just before. Arrays whose sum
(runtime/value_sums.py) is another when they are read again are refused by name.
"""

import contextlib
import functools
import logging
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from longpo_jax.checkpoint_files import SCHEMA, Found, one_line, unfinished, write_list
from longpo_jax.step import TrainState
from rapid_jax.model.decoder import Decoder
from rapid_jax.runtime.buckets import failures, prepare_libraries
from rapid_jax.runtime.errors import InputError, Unavailable
from rapid_jax.runtime.files import remove_folder
from rapid_jax.runtime.mesh import agreed, put_on_mesh
from rapid_jax.runtime.storage import AnyPlace, bytes_free, library_path
from rapid_jax.runtime.value_sums import array_sums

_NONE = -1


def restore_weights(found: Found, target: Decoder) -> Decoder:
    """The weights of a checkpoint as a Decoder that lies as `target` does, whose arrays may be abstract.

    Raises InputError if they are those of another model.
    """
    graph, state = nnx.split(target, nnx.Param)
    return nnx.merge(graph, _restore(found, {"weights": state})["weights"])


def restore(found: Found, target: TrainState) -> TrainState:
    """The state of a checkpoint, which lies as `target` does; the arrays of `target` are given up for it.

    Raises InputError if it is that of another model or optimizer.
    """
    graph, weights = nnx.split(target.weights, nnx.Param)
    trees = {"weights": weights, "moments": target.moments}
    struct = jax.ShapeDtypeStruct
    shapes = {
        item: jax.tree.map(lambda x: struct(x.shape, x.dtype, sharding=x.sharding), tree)
        for item, tree in trees.items()
    }
    for leaf in jax.tree.leaves(trees):
        leaf.delete()
    got = _restore(found, shapes)
    step = put_on_mesh(target.weights.mesh, jax.P(), np.int32(found.step))
    return TrainState(step, nnx.merge(graph, got["weights"]), got["moments"])


class Checkpoints:
    """Writes the checkpoints of a run that goes on from the one of step `start`; of later ones none is whole.

    A context, left when all is written. All processes call everything.
    """

    def __init__(self, folder: AnyPlace, *, start: int = 0, keep: int, keep_every: int | None = None):
        self.folder, self._start, self._keep, self._keep_every = folder, start, keep, keep_every
        self._saving = _NONE

    def __enter__(self) -> "Checkpoints":
        ocp = _orbax()
        policies = ocp.checkpoint_managers.preservation_policy
        kept = [policies.LatestN(self._keep)]
        if self._keep_every is not None:
            kept.append(policies.EveryNSteps(self._keep_every))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(kept),
            cleanup_tmp_directories=True,
            async_options=ocp.options.AsyncOptions(post_finalization_callback=self._list),
        )
        arrays = ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_compression=False)
        moments = ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_compression=False)
        handlers = {"weights": arrays, "moments": moments, "note": ocp.JsonCheckpointHandler()}
        self.folder.mkdir(parents=True, exist_ok=True)
        self._ocp = ocp
        if jax.process_index() == 0:
            for place in unfinished(self.folder):
                remove_folder(place)
        agreed(0)
        with self._refusals(f"what is there after step {self._start} could not be taken away"):
            self._manager = ocp.CheckpointManager(library_path(self.folder), item_handlers=handlers, options=options)
            for step in self._manager.all_steps():
                if step > self._start:  # it would be kept in the place of good ones
                    self._manager.delete(step)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.wait()
            with self._refusals(_unsaved(self._start)):
                self._manager.close()
        elif jax.process_count() == 1:  # else one may wait for another that has failed
            with contextlib.suppress(InputError, OSError, ValueError, *failures()):  # the first failure is told
                self.wait()
            with contextlib.suppress(OSError, ValueError, *failures()):
                self._manager.close()

    def save(self, state: TrainState, note: Mapping[str, Any]) -> AnyPlace:
        """Starts to write the state; where it will be. Its arrays may then change.

        Waits for the write before. Raises InputError if the disk has no room or refuses either of them: what was
        written earlier stays.
        """
        self.wait()
        step, args = int(state.step), self._ocp.args
        trees = {"weights": named(nnx.state(state.weights, nnx.Param)), "moments": named(state.moments)}
        shapes = {item: _kinds(tree) for item, tree in trees.items()}
        sums = {item: _sums(item, tree) for item, tree in trees.items()}
        self._check_room(step, sum(x.nbytes for tree in trees.values() for x in tree.values()))
        with self._refusals(_unsaved(step)):
            self._saving = step
            self._manager.save(
                step,
                args=args.Composite(
                    **{item: args.PyTreeSave(tree) for item, tree in trees.items()},
                    note=args.JsonSave({**note, "schema": SCHEMA, "step": step, "arrays": shapes, "sums": sums}),
                ),
                force=True,
            )
        return self.folder / str(step)

    def wait(self) -> None:
        """Until what is being written is there. Raises InputError as `save` does."""
        if self._saving != _NONE:
            with self._refusals(_unsaved(self._saving)):
                self._manager.wait_until_finished()
            self._saving = _NONE

    def _list(self) -> None:
        """Called by Orbax, on the first process, when all is written and the folder still has a temporary name.

        Where no folder can be renamed it has its own, and Orbax marks it afterwards (checkpoint_files.py).
        """
        written = [*self.folder.glob(f"{self._saving}.orbax-checkpoint-tmp*"), self.folder / str(self._saving)]
        write_list(written[0])

    def _check_room(self, step: int, needed: int) -> None:
        free = agreed(bytes_free(self.folder))
        if needed > free:
            raise InputError(f"{self.folder}: {_unsaved(step)}: it needs {needed} bytes, {free:.0f} are free")

    @contextlib.contextmanager
    def _refusals(self, what: str) -> Iterator[None]:
        failure = None
        try:
            yield
        except (OSError, ValueError, *failures()) as error:  # ValueError: TensorStore's for everything, a full disk too
            failure = f"{self.folder}: {what}: {one_line(error)}"
        if failure is not None:
            self._saving = _NONE
            raise (InputError if isinstance(self.folder, Path) else Unavailable)(failure)


def _unsaved(step: int) -> str:
    return f"step {step} could not be saved, earlier checkpoints stay"


def _restore(found: Found, trees: Mapping[str, Any]) -> dict[str, Any]:
    """The trees with the arrays of the checkpoint's items in the place of shapes."""
    return {item: _restore_item(found, item, tree) for item, tree in trees.items()}


def _restore_item(found: Found, item: str, tree: Any) -> Any:
    stored, wanted = found.note.fields("arrays").fields(item), named(tree)
    kinds = _kinds(wanted)
    for name in (*wanted, *stored):
        ours, theirs = kinds.get(name, "no such array"), stored.get(name, "no such array")
        if ours != theirs:
            raise InputError(
                f"{found.folder} is of another model or optimizer: {name} in {item}: expected {ours}, got {theirs}"
            )
    ocp, alone = _orbax(), jax.sharding.SingleDeviceSharding(jax.devices()[0])
    how = {name: ocp.ArrayRestoreArgs(sharding=x.sharding or alone, dtype=x.dtype) for name, x in wanted.items()}
    failure = None
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=True)) as checkpointer:
            arrays = checkpointer.restore(
                library_path(found.folder / item), args=ocp.args.PyTreeRestore(restore_args=how)
            )
        read = {name: arrays[name] for name in wanted}
        sums, written = _sums(item, read), found.note.fields("sums").fields(item)
        other = [name for name, total in sums.items() if total != written.get(name)]
        if not other:
            return jax.tree.unflatten(jax.tree.structure(tree), list(read.values()))
        failure = f"{other[0]} has other values than were written"
    except failures() as error:
        raise Unavailable(f"{found.folder}: {item} cannot be read now: {one_line(error)}") from error
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:  # Orbax takes its metadata as they come
        failure = one_line(error)
    raise InputError(f"{found.folder}: {item} cannot be read: {failure}: delete it to go on from the one before")


def named(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by their path, in the order in which JAX flattens it."""
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _sums(item: str, arrays: Mapping[str, Any]) -> dict[str, int]:
    """By array; of the values of another, in either item, it is another."""
    sums = jax.device_get(array_sums({f"{item}.{name}": x for name, x in arrays.items()}))
    return {name: int(sums[f"{item}.{name}"]) for name in arrays}


def _kinds(arrays: Mapping[str, Any]) -> dict[str, str]:
    return {name: f"{x.dtype}{list(x.shape)}" for name, x in arrays.items()}


@functools.cache
def _orbax() -> Any:
    """Orbax, imported when first used, and silent: what it logs as an error, it raises too.

    Reads and writes that it leaves under way after a failure end at any later time, and find their event loop closed.
    """
    prepare_libraries()
    import orbax.checkpoint as ocp

    def is_kept(record: logging.LogRecord) -> bool:
        return "orbax" not in record.pathname and "exception was never retrieved" not in record.getMessage()

    def report(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            reported(unraisable)

    reported, sys.unraisablehook = sys.unraisablehook, report
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(is_kept)
    return ocp
