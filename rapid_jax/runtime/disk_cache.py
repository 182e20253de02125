# SPDX-License-Identifier: Apache-2.0
"""What is kept under the cache folder, of all kinds under one bound; what has not been used for longest goes first.

    prefixes/<sha256>/          keys and values of documents (speculative/prefix_folder.py)
    embeddings/<sha256>.npy     of a document's chunks (retrieval/store.py)
    indices/<sha256>/           trees over them (retrieval/index.py)
    programs/*-cache            compiled by JAX, which bounds them only with files beside them that older ones lack
    digests/<sha256>.txt        of weight files: a few bytes each and hours to make, outside of the bound

Nothing else is ever removed, whatever folder a user has chosen. The time of an entry is when it was last used; of a
program as far as the file system keeps that.
"""

import contextlib
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rapid_jax.runtime.locked_folders import aside, bytes_in, remove_unread

_FOLDERS = ("prefixes", "indices")
_NAMES = {
    "prefixes": re.compile(r"[0-9a-f]{64}"),
    "embeddings": re.compile(r"[0-9a-f]{64}\.npy"),
    "indices": re.compile(r"[0-9a-f]{64}"),
    "programs": re.compile(r".+-[0-9a-f]{64}-cache"),
    "digests": re.compile(r"[0-9a-f]{64}\.txt"),
}
KINDS = tuple(_NAMES)
BOUNDED = tuple(kind for kind in KINDS if kind != "digests")


@dataclass(frozen=True)
class Entry:
    """One thing that is kept."""

    kind: str
    path: Path
    bytes: int
    used: float  # seconds since 1970


def entries_of(folder: Path, kind: str) -> Iterator[Entry]:
    """What lies in the folder of a kind; what goes meanwhile is there or not."""
    with contextlib.suppress(OSError), os.scandir(folder) as found:  # no such folder yet
        for item in list(found):
            if _NAMES[kind].fullmatch(item.name) and item.is_dir(follow_symlinks=False) == (kind in _FOLDERS):
                with contextlib.suppress(OSError):
                    status = item.stat(follow_symlinks=False)
                    size = bytes_in(Path(item.path)) if kind in _FOLDERS else status.st_size
                    used = max(status.st_mtime, status.st_atime) if kind == "programs" else status.st_mtime
                    yield Entry(kind, Path(item.path), size, used)


def entries(root: Path, kinds: Iterable[str] = KINDS) -> list[Entry]:
    """What is kept under the cache folder."""
    return [entry for kind in kinds for entry in entries_of(root / kind, kind)]


def remove(entry: Entry) -> bool:
    """Takes an entry away, whole; False if somebody reads it or the folder may only be read."""
    if entry.kind == "prefixes":
        remove_unread(entry.path)
    elif entry.kind == "indices":
        away = aside(entry.path)
        with contextlib.suppress(OSError):
            entry.path.rename(away)
            shutil.rmtree(away, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            entry.path.unlink(missing_ok=True)
        if entry.kind == "programs":
            with contextlib.suppress(OSError):  # JAX's note of when it was read
                entry.path.with_name(f"{entry.path.name.removesuffix('-cache')}-atime").unlink(missing_ok=True)
    return not entry.path.exists()


def make_room(found: Iterable[Entry], most_bytes: int, wanted: int, newest: Path | None = None) -> list[Entry]:
    """Removes entries until `wanted` more bytes fit into `most_bytes`; those that it removed.

    The least recently used go first, and `newest` last and only if it alone is too large.
    """
    ordered = sorted(found, key=lambda entry: (entry.path == newest, entry.used, entry.path.name))
    total, removed = sum(entry.bytes for entry in ordered), []
    for entry in ordered:
        if total + wanted <= most_bytes:
            break
        if entry.path == newest and entry.bytes <= most_bytes:
            continue
        if remove(entry):
            total -= entry.bytes
            removed.append(entry)
    return removed
