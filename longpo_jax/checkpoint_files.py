# SPDX-License-Identifier: Apache-2.0
"""Which checkpoints of a training are whole, and the newest of them, or one that is asked for; nothing of it is loaded.

    FOLDER/<step>/note/metadata      JSON, as checkpoints.py writes it
    FOLDER/<step>/files.json         size of every file, SHA-256 of those that hold no values, and a checksum of its own

A folder that has no such list, or whose files are not as it says, is not used. Values are known by sums in the note.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

import jax

from rapid_jax.runtime.command_line import say
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.files import replace_file, sha256_of
from rapid_jax.runtime.json_input import Fields, read_object
from rapid_jax.runtime.mesh import agreed
from rapid_jax.runtime.sealed import sealed, unsealed
from rapid_jax.runtime.storage import AnyPlace, files_below, has_rename

SCHEMA = 3
_FILES = "files.json"
_NOTE = "note/metadata"
_FINISHED = "commit_success.txt"  # that Orbax writes last where a folder cannot be renamed
_NONE = -1


@dataclass(frozen=True)
class Found:
    """A checkpoint that is whole; `note` is what `save` was given, with step, schema, arrays and their sums."""

    folder: AnyPlace
    note: Fields

    @property
    def step(self) -> int:
        """Updates made when it was written."""
        return self.note.whole("step")


def newest(folder: AnyPlace) -> Found | None:
    """The newest checkpoint in `folder` that is whole, on every process the same; None if nothing was ever saved.

    Says on standard error which newer ones are not. Raises InputError if there are some and none is whole, or the
    newest is of another schema. `folder` is one that all processes see.
    """
    step = int(agreed(_newest_step(folder) if jax.process_index() == 0 else _NONE))
    return None if step == _NONE else _found(folder, step)


def of_step(folder: AnyPlace, step: int) -> Found:
    """The checkpoint of `step` updates. Raises InputError if it is not there, not whole, or of another schema."""
    if int(agreed((folder / str(step)).is_dir())) == 0:
        kept = ", ".join(map(str, _steps(folder))) or "none"
        raise InputError(f"{folder}: expected the checkpoint of update {step}, got only those of: {kept}")
    fault = _fault(folder / str(step)) if jax.process_index() == 0 else None
    if fault is not None:
        raise InputError(f"{folder / str(step)} is not whole: {fault}")
    return _found(folder, step)


def write_list(folder: AnyPlace) -> None:
    """Beside a checkpoint that is all written: what `newest` knows it by."""
    files = {"sizes": _sizes(folder), "digests": _digests(folder, _sizes(folder))}
    with replace_file(folder / _FILES) as temporary:
        temporary.write_bytes(sealed(files, _FILES))


def unfinished(folder: AnyPlace) -> list[AnyPlace]:
    """What killed runs have left of checkpoints under their own names: where folders are renamed, nothing."""
    places = [] if has_rename(folder) else [folder / str(step) for step in _steps(folder)]
    return [place for place in places if not (place / _FINISHED).is_file()]


def one_line(error: Exception) -> str:
    """What an error says, without TensorStore's specification, cut to a line."""
    text = " ".join(re.split(r"\[(?:tensorstore_spec|http_response)", str(error))[0].split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:120]} ... {text[-175:]}"  # TensorStore puts the cause last


def _found(folder: AnyPlace, step: int) -> Found:
    place = folder / str(step)
    found = Found(place, read_object(place / _NOTE))
    if found.note.get("schema") != SCHEMA:
        raise InputError(f"{place}: expected a checkpoint of schema {SCHEMA}, got {found.note.get('schema')}")
    if found.step != step:
        raise InputError(f"{place}: expected the checkpoint of update {step}, got that of {found.step}")
    return found


def _steps(folder: AnyPlace) -> list[int]:
    names = (path.name for path in folder.iterdir()) if folder.is_dir() else ()
    return sorted(int(name) for name in names if name.isascii() and name.isdigit())


def _newest_step(folder: AnyPlace) -> int:
    """The newest step whose checkpoint is whole; says which are not."""
    faults, half = [], unfinished(folder)  # which are nothing yet, as those under a temporary name
    for step in reversed([step for step in _steps(folder) if folder / str(step) not in half]):
        fault = _fault(folder / str(step))
        if fault is None:
            for line in faults:
                say(f"{line}; going on from step {step}")
            return step
        faults.append(f"{folder / str(step)} is not whole: {fault}")
    if faults:
        raise InputError(f"expected a checkpoint that is whole, got none: {'; '.join(faults)}")
    return _NONE


def _fault(folder: AnyPlace) -> str | None:
    """What is wrong with the files of a checkpoint, if anything is."""
    if not has_rename(folder) and not (folder / _FINISHED).is_file():
        return f"no {_FINISHED}: it was not written to its end"
    try:
        files = unsealed((folder / _FILES).read_bytes(), _FILES, _FILES)
        got, expected = _sizes(folder), files.fields("sizes")
        for name, size in expected.items():
            if got.get(name) != size:
                return f"{name} has {got.get(name, 'no')} bytes, {size} were written"
        for name, found in _digests(folder, expected).items():
            if found != files.fields("digests").get(name):
                return f"{name} has other bytes than were written"
    except (OSError, InputError) as error:
        return one_line(error)
    return None


def _digests(folder: AnyPlace, names: Iterable[str]) -> dict[str, str]:
    """Of the files that hold no values: those lie in folders d, which TensorStore's OCDBT makes."""
    return {name: sha256_of(folder / name) for name in names if name.rpartition("/")[0].rpartition("/")[2] != "d"}


def _sizes(folder: AnyPlace) -> dict[str, int]:
    # What Orbax itself notes of a folder is rewritten when it gets its name, or is marked.
    without = (_FILES, "_CHECKPOINT_METADATA")
    sizes = {name: size for name, size in files_below(folder).items() if name.rpartition("/")[2] not in without}
    return {name: size for name, size in sizes.items() if name != _FINISHED}
