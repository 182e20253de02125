# SPDX-License-Identifier: Apache-2.0
"""Entries of a cache that are folders: who reads one holds its lock shared, who writes or removes one exclusively.

A lock goes with its process. An entry is removed by moving it aside first: it is there whole or not at all.
"""

import contextlib
import fcntl
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path


def aside(folder: Path) -> Path:
    """A new name beside the folder, for what is being written or removed."""
    return folder.with_name(f".{folder.name}.{secrets.token_hex(8)}")


def remove_unread(folder: Path, still: Callable[[], bool] = lambda: True) -> bool:
    """Takes an entry away, whole, unless somebody reads it or it is no longer what is meant; whether there is none now.

    `still` says whether it is, and is asked when nobody else can change the entry.
    """
    with lock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB) as held:
        if held is not None and still():
            _remove_locked(folder)
    return not folder.exists()


def _remove_locked(folder: Path) -> None:
    away = aside(folder)
    with contextlib.suppress(OSError):  # a folder that may only be read, or another process was faster
        folder.rename(away)
        shutil.rmtree(away, ignore_errors=True)


def bytes_in(folder: Path) -> int:
    """Of all files below the folder; those that go meanwhile count or do not."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.stat(os.path.join(parent, name)).st_size
    return total


@contextlib.contextmanager
def lock(folder: Path, how: int) -> Iterator[int | None]:
    """Yields the lock of a folder of the store, held as asked until the end; None if the folder is gone or in use."""
    held = None
    # The second way is for a folder that may only be read.
    for flags in (os.O_RDWR | os.O_CREAT, os.O_RDONLY):
        with contextlib.suppress(OSError):
            held = os.open(folder / "lock", flags | os.O_CLOEXEC, 0o666)
            break
    try:
        yield held if held is not None and taken(folder, held, how) else None
    finally:
        if held is not None:
            os.close(held)


def taken(folder: Path, held: int, how: int) -> bool:
    """Takes or changes the lock; False if it is not to be had, or no longer this folder's."""
    try:
        fcntl.flock(held, how)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks: what they prevent is rare, and checksums find it
        pass
    try:
        return os.fstat(held).st_ino == os.stat(folder / "lock").st_ino
    except FileNotFoundError:
        return False
