# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: arrays and a small JSON note on disk, written whole or not at all, and read only if nothing changed.

    folder/manifest.json     the note; every array's type and shape; every file's size and SHA-256; its own SHA-256
    folder/<item>/           the arrays of one item, as Orbax writes them

An item is a tree of arrays that is written and read on its own: a model without its optimizer, a few layers of many.
Its arrays are named by their path in the tree ("layers.3.k"), and Orbax holds them as one flat dict of these names.

Checksums are of files and not of arrays: a file's do not depend on the mesh that reads it, and they also cover what
Orbax itself needs. Orbax writes OCDBT without compression: keys, values and weights do not compress (7 % measured with
zstd, at a third of the speed).
"""

import contextlib
import gc
import json
import logging
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.files import digest, digest_file, replace_folder
from rapid_jax.runtime.json_input import Fields, read_object

if TYPE_CHECKING:
    import orbax.checkpoint as ocp

_FORMAT = 1
_MANIFEST = "manifest.json"
_HASHING_THREADS = 4
_ONE_AT_A_TIME = threading.Lock()


class DamagedCheckpoint(Exception):
    """A checkpoint that is not, byte for byte, what was written; the message is one line."""


class Writer:
    """Collects the items of the checkpoint that `write` has begun."""

    def __init__(self, folder: Path):
        self._folder = folder
        self.items: dict[str, dict[str, Any]] = {}

    def add(self, item: str, tree: Any) -> None:
        """Writes the arrays of `tree` (JAX's, NumPy's or numbers; none of size 0) to disk, under the name `item`."""
        if item in self.items or item == _MANIFEST:
            raise ValueError(f"a checkpoint cannot have two entries named {item!r}")
        arrays = {
            name: leaf if isinstance(leaf, jax.Array) else np.asarray(leaf) for name, leaf in _named(tree).items()
        }
        for name, array in arrays.items():
            if array.size == 0:
                raise ValueError(f"{item}: {name!r} has shape {array.shape}; an array without elements is not stored")
        needed, free = sum(array.nbytes for array in arrays.values()), shutil.disk_usage(self._folder).free
        if needed > free:
            raise OSError(f"{item} needs {needed} bytes of disk, {free} are free")
        failure = None
        with _orbax() as ocp:
            try:
                with ocp.Checkpointer(_handler(ocp)) as checkpointer:
                    checkpointer.save((self._folder / item).absolute(), args=ocp.args.PyTreeSave(arrays))
            except ValueError as error:  # TensorStore's type for every error, a full disk too
                failure = _one_line(error)
            if failure:
                _let_go()
        if failure:
            raise OSError(failure)
        self.items[item] = {
            "arrays": {name: [str(array.dtype), list(array.shape)] for name, array in arrays.items()},
            "files": _fingerprints(self._folder / item),
        }


@contextlib.contextmanager
def write(folder: Path, note: Mapping[str, Any]) -> Iterator[Writer]:
    """Yields a writer for a checkpoint's items; on a clean exit the checkpoint takes the place of `folder`, whole.

    `note` is what JSON can hold. Raises OSError for what the file system refuses, and InputError on several hosts:
    each would write the same files.
    """
    if jax.process_count() > 1:
        raise InputError(f"a checkpoint is written by 1 process, got {jax.process_count()}")
    with replace_folder(folder) as temporary:
        writer = Writer(temporary)
        yield writer
        content = {"format": _FORMAT, "note": dict(note), "items": writer.items}
        with open(temporary / _MANIFEST, "w", encoding="utf-8") as file:
            json.dump({"content": content, "sha256": digest(_canonical(content))}, file)
            file.flush()
            os.fsync(file.fileno())


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk whose manifest is whole; an item's files are checked when it is restored."""

    folder: Path
    note: Fields
    _items: Mapping[str, Any]

    @property
    def items(self) -> tuple[str, ...]:
        """The names of the items, in the order in which they were written."""
        return tuple(self._items)

    def restore(self, item: str, target: Any = None) -> Any:
        """The arrays of an item, after a check of every byte.

        Without a target: a flat dict of NumPy arrays by name. With one, a tree of `jax.ShapeDtypeStruct` or arrays:
        the same tree, where a leaf with a sharding comes as a JAX array that lies so, whatever mesh wrote it, and one
        without as a NumPy array. Raises DamagedCheckpoint if a byte is missing or different, InputError if the target
        has other names, shapes or types than the item, or there is no such item.
        """
        if item not in self._items:
            raise InputError(f"{self.folder}: expected one of the items {list(self._items)}, got {item!r}")
        stored = self._items[item]["arrays"]
        wanted: Mapping[str, Any] = dict.fromkeys(stored) if target is None else _named(target)
        if target is not None:
            self._compare(item, stored, wanted)
        self._verify(item)
        with _orbax() as ocp:
            how = {name: _restore_args(ocp, leaf) for name, leaf in wanted.items()}
            try:
                with ocp.Checkpointer(_handler(ocp)) as checkpointer:
                    path = (self.folder / item).absolute()
                    arrays = checkpointer.restore(path, args=ocp.args.PyTreeRestore(restore_args=how))
            except (ValueError, KeyError, OSError) as error:
                raise DamagedCheckpoint(f"{self.folder}: {item} cannot be read: {_one_line(error)}") from error
        if target is None:
            return arrays
        return jax.tree.unflatten(jax.tree.structure(target), [arrays[name] for name in wanted])

    def verify(self) -> None:
        """Raises DamagedCheckpoint if a byte of any item is missing or different."""
        for item in self._items:
            self._verify(item)

    def _compare(self, item: str, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
        for name in sorted(stored.keys() ^ wanted.keys()):
            has, lacks = ("checkpoint", "target") if name in stored else ("target", "checkpoint")
            raise InputError(f"{self.folder}: {item}: {name!r} is in the {has} but not in the {lacks}")
        for name, leaf in wanted.items():
            asked = [str(leaf.dtype), list(leaf.shape)]
            if asked != stored[name]:
                raise InputError(f"{self.folder}: {item}: {name!r}: expected {asked} as asked for, got {stored[name]}")

    def _verify(self, item: str) -> None:
        expected = self._items[item]["files"]
        try:
            for name, (size, _) in expected.items():
                got = (self.folder / item / name).stat().st_size
                if got != size:
                    raise DamagedCheckpoint(f"{self.folder}: {item}/{name} has {got} bytes, {size} were written")
            found = _fingerprints(self.folder / item, expected)
        except OSError as error:
            raise DamagedCheckpoint(f"{self.folder}: {item} cannot be read: {_one_line(error)}") from error
        for name, fingerprint in expected.items():
            if found[name] != fingerprint:
                raise DamagedCheckpoint(f"{self.folder}: {item}/{name} does not have the bytes that were written")


def read(folder: Path) -> Checkpoint:
    """The checkpoint in `folder`. Raises FileNotFoundError if there is no such folder, else DamagedCheckpoint."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no checkpoint there")
    try:
        manifest = read_object(folder / _MANIFEST)
        content: Fields = manifest.fields("content")
        if digest(_canonical(dict(content))) != manifest.text("sha256"):
            raise InputError("its checksum does not match")
        if content.whole("format") != _FORMAT:
            raise content.error("format", f"{_FORMAT}, which this program reads")
        return Checkpoint(folder, content.fields("note"), MappingProxyType(_items(content.fields("items"))))
    except (OSError, InputError) as error:
        raise DamagedCheckpoint(f"{folder}: {_MANIFEST} is unusable: {_one_line(error)}") from error


def _items(stated: Fields) -> dict[str, Any]:
    """The items of a manifest, of the types that `write` gives them."""
    items = {}
    for name in stated:
        if name != Path(name).name:
            raise stated.error(name, "of an item whose name is that of a folder in this one")
        arrays, files = (stated.fields(name).fields(key) for key in ("arrays", "files"))
        for array in arrays:
            dtype, shape = _pair(arrays, array)
            if not isinstance(dtype, str) or not isinstance(shape, list):
                raise arrays.error(array, "a type and a shape")
        for file in files:
            size, sha256 = _pair(files, file)
            if not isinstance(size, int) or not isinstance(sha256, str):
                raise files.error(file, "a size and a hash")
        items[name] = {"arrays": dict(arrays), "files": dict(files)}
    return items


def _pair(fields: Fields, key: str) -> tuple[Any, Any]:
    value = fields[key]
    if not isinstance(value, list) or len(value) != 2:
        raise fields.error(key, "a list of two")
    return value[0], value[1]


def _named(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by their path, in the order in which JAX flattens it."""
    leaves = jax.tree.leaves_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
    if len(named) != len(leaves):
        raise ValueError("two leaves of the tree have the same path when their keys are joined by dots")
    return named


def _canonical(content: Any) -> str:
    return json.dumps(content, sort_keys=True)


def _fingerprints(folder: Path, names: Mapping[str, Any] | None = None) -> dict[str, list]:
    """Size and SHA-256 of the files in a folder (all, or those named), by their path below it."""
    if names is None:
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
    else:
        paths = [folder / name for name in names]
    with ThreadPoolExecutor(_HASHING_THREADS) as threads:  # hashing leaves the interpreter free
        hashes = list(threads.map(digest_file, paths))
    return {
        path.relative_to(folder).as_posix(): [path.stat().st_size, sha256]
        for path, sha256 in zip(paths, hashes, strict=True)
    }


def _handler(ocp: Any) -> "ocp.PyTreeCheckpointHandler":
    return ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_compression=False)


def _restore_args(ocp: Any, leaf: Any) -> "ocp.RestoreArgs":
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        return ocp.RestoreArgs(restore_type=np.ndarray)
    return ocp.ArrayRestoreArgs(sharding=sharding, global_shape=leaf.shape, dtype=leaf.dtype)


@contextlib.contextmanager
def _orbax() -> Iterator[Any]:
    """Orbax, imported when first used (it takes 2 s), for one thread at a time, and silent.

    What it logs as an error, it raises too. A write that fails leaves others under way, whose errors asyncio and the
    interpreter report once nobody waits for them.
    """
    import orbax.checkpoint as ocp

    def is_kept(record: logging.LogRecord) -> bool:
        return "orbax" not in record.pathname and "exception was never retrieved" not in record.getMessage()

    def report(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            reported(unraisable)

    loggers = logging.getLogger("absl"), logging.getLogger("asyncio")
    with _ONE_AT_A_TIME:
        reported, sys.unraisablehook = sys.unraisablehook, report
        for logger in loggers:
            logger.addFilter(is_kept)
        try:
            yield ocp
        finally:
            sys.unraisablehook = reported
            for logger in loggers:
                logger.removeFilter(is_kept)


def _let_go() -> None:
    """Waits, where it is silent, for the writes that Orbax leaves under way when one has failed."""
    for _ in range(5):
        gc.collect()
        time.sleep(0.1)


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).partition("[tensorstore_spec=")[0].split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:120]} ... {text[-175:]}"  # TensorStore puts the cause last
