# SPDX-License-Identifier: Apache-2.0
"""Where a run writes, whether it may, and whether there is room for it."""

import math
import os
import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from longpo_jax.config import EMERGENCY_KEPT, LongPOConfig, TrainConfig
from longpo_jax.findings import Findings
from longpo_jax.round import folder_of
from rapid_jax.plan.topologies import GIB
from rapid_jax.runtime.files import default_cache_dir, replace_file
from rapid_jax.runtime.storage import AnyPlace, local_path

_TRIED = "check.tmp"


@dataclass(frozen=True)
class Room:
    """What a run still needs, in bytes, of the file system of its folder; `there` is a folder that is there already."""

    folder: Path
    there: Path
    needed: int
    passing: int  # of what is needed, for the checkpoint that is being written: runs one after another need it once

    @property
    def free(self) -> int:
        """Bytes that are free there."""
        return shutil.disk_usage(self.there).free


def bytes_on_disk(config: LongPOConfig, parameters: int, steps: int | None) -> int:
    """Of the checkpoints that are there at most, and the export."""
    return most_checkpoints(config.train, steps) * bytes_of_checkpoint(config, parameters) + 2 * parameters


def bytes_of_checkpoint(config: LongPOConfig, parameters: int) -> int:
    """Of one: weights in float32 and the optimizer's moments."""
    optimizer = config.optimizer
    moments = (2 if optimizer.name == "adamw" else 1) * (4 if optimizer.moments_dtype == "float32" else 2)
    return parameters * (4 + moments)


def bytes_of_copies(config: LongPOConfig, parameters: int, devices: int) -> int:
    """Of the emergency copies on the disk of a process that has so many of the devices, at most, one being written."""
    if config.train.emergency_folder is None:
        return 0
    mesh = config.mesh  # whose data axis has as many copies of the state
    held = min(devices * mesh.data, mesh.devices) * bytes_of_checkpoint(config, parameters) // mesh.devices
    return (EMERGENCY_KEPT + 1) * held


def check_copies(config: LongPOConfig, needed: int, room: Room | None, found: Findings) -> None:
    """Whether the folder of emergency copies can be written to and has room for `needed` bytes of them.

    `room` is what the run needs of a disk, which may be the same one.
    """
    assert config.train.emergency_folder is not None
    place = local_path(config.train.emergency_folder, "train.emergency_folder").absolute()
    there = _existing(place)
    if not there.is_dir() or not os.access(there, os.W_OK):
        kind = "one without the permission" if there.is_dir() else "a file"
        fault = f"train.emergency_folder: expected a folder to write to, got {kind}: {there}"
        found.add_of_here("emergency copies", str(place), kind, fault)
        return
    free = shutil.disk_usage(there).free
    if room is not None and room.there.stat().st_dev == there.stat().st_dev:
        free = max(0, free - room.needed)
    sizes = f"{needed / GIB:.2f} GiB", f"{free / GIB:.2f} GiB"
    fault = f"train.emergency_folder: expected {sizes[0]} of room in {there}, got {sizes[1]}" if needed > free else ""
    kept = f"{EMERGENCY_KEPT} of them, one more while it is written"
    found.add_of_here("emergency copies", f"{sizes[0]} a process: {kept}", f"{sizes[1]} free for them", fault)


def most_checkpoints(train: TrainConfig, steps: int | None) -> int:
    """How many checkpoints are there at most, with the one that is being written.

    Those of train.keep_every are not among them where the number of updates is not known.
    """
    older = 0  # than those of train.keep
    if train.keep_every is not None and steps is not None:
        before_last = range(train.save_every, steps, train.save_every)
        past = before_last[: max(0, len(before_last) - train.keep)]
        older = past[-1] // math.lcm(train.save_every, train.keep_every) if past else 0
    return train.keep + 1 + older


def check_places(config: LongPOConfig, space: int, passing: int, found: Findings, *, reached: bool) -> Room | None:
    """Whether the folders can be written to, and whether there is room; what the run needs of a disk.

    It needs `space` bytes in all, `passing` of them for the checkpoint that is being written. A bucket that was not
    `reached` before is not asked again.
    """
    folder = folder_of(config)
    if not isinstance(folder, Path):
        if reached and found.try_("folder, run", lambda: _try_out(folder)):
            found.add("folder, run", str(folder), "can be written to")
        found.add("bucket", f"{space / GIB:.2f} GiB", "")
        return None
    folder = folder.absolute()
    for name, place in _written(config, folder):
        there = _existing(place)
        if not there.is_dir() or not os.access(there, os.W_OK):
            kind = "one without the permission" if there.is_dir() else "a file"
            fault = f"{name}: expected a folder to write to, got {kind}: {there}"
            found.add_of_here(f"folder, {name}", str(place), kind, fault)
        else:
            found.add_of_here(f"folder, {name}", str(place), "can be written to")
    inside = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0
    needed = max(0, space - inside)
    room = Room(folder, _existing(folder), needed, min(passing, needed))
    free, needed = f"{room.free / GIB:.2f} GiB", f"{room.needed / GIB:.2f} GiB"
    fault = f"run: expected {needed} of room in {room.there}, got {free}" if room.needed > room.free else ""
    found.add_of_here("disk", f"{needed}: checkpoints, the export", f"{free} free", fault)
    return room


def short_together(rooms: Iterable[Room]) -> Iterator[str]:
    """What would fail of runs each of which has room by itself: those on one file system, where all do not fit."""
    by_device: dict[int, dict[Path, Room]] = defaultdict(dict)
    for room in rooms:
        by_device[room.there.stat().st_dev][room.folder] = room
    for together in map(list, map(dict.values, by_device.values())):
        needed = sum(room.needed - room.passing for room in together) + max(room.passing for room in together)
        free = together[0].free
        if needed > free and all(room.needed <= free for room in together):
            yield (
                f"{len(together)} runs: expected {needed / GIB:.2f} GiB of room for them, one after another, in "
                f"{together[0].there}, got {free / GIB:.2f} GiB"
            )


def _existing(place: Path) -> Path:
    return next(path for path in (place, *place.parents) if path.exists())


def _try_out(folder: AnyPlace) -> bool:
    """Writes an object there and deletes it. Raises InputError where that is not allowed."""
    with replace_file(folder / _TRIED) as temporary:
        temporary.write_bytes(b"")
    (folder / _TRIED).unlink(missing_ok=True)
    return True


def _written(config: LongPOConfig, folder: Path) -> Iterator[tuple[str, Path]]:
    yield "run", folder
    if config.compute.programs:
        yield "compiled programs", (default_cache_dir() / "programs").absolute()
