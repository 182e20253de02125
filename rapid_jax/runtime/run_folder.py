# SPDX-License-Identifier: Apache-2.0
"""A folder that one run at a time works in: by a lock on this machine, by a lease in a bucket."""

import contextlib
import fcntl
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from rapid_jax.runtime import bucket_writes
from rapid_jax.runtime.append_log import Log, log_at
from rapid_jax.runtime.command_line import say
from rapid_jax.runtime.errors import Again, Busy, InputError, Unavailable
from rapid_jax.runtime.files import remove_leftovers, replace_file
from rapid_jax.runtime.lease import Lease
from rapid_jax.runtime.storage import AnyPlace, bytes_of

LEASE = "lease.json"


@contextlib.contextmanager
def working_in(folder: AnyPlace, part: str) -> Iterator[None]:
    """`folder` is there, and no other run works in it, until the context is left; `part` is the folder in it that is.

    Raises Busy if another does, InputError where nothing can be written, and for a file in the place of the part. On
    this machine: a folder that was not there before and is empty in the end is taken away; of file systems that know no
    locks, as some network ones, nobody learns whether another works there. Where a bucket's store stops answering while
    the run works, it ends with one line and status 75 (`Again`).
    """
    if not isinstance(folder, Path):
        with Lease(folder / LEASE), again_when_a_store_fails():
            _refuse_file(folder / part)
            yield
        return
    try:
        new = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise InputError(f"{folder}: expected a folder to write to, got: {error.strerror}") from error
    try:
        place = folder / part
        _refuse_file(place)
        if not os.access(place if place.exists() else folder, os.W_OK):
            raise InputError(f"{folder}: expected a folder to write to, got one without the permission")
        with contextlib.suppress(OSError):  # no locks there
            _lock(held, folder)
        for each in (folder, place):  # of runs that were killed
            remove_leftovers(each)
        yield
    finally:
        os.close(held)
        with contextlib.suppress(OSError):  # not empty
            for path in new:
                path.rmdir()


@contextlib.contextmanager
def alone_in_logs(folder: AnyPlace, names: Sequence[str], lease: str, *, quiet: bool = False) -> Iterator[list[Log]]:
    """The logs of these names in a folder that is there; no other run writes to them until the context is left.

    By a lock on each on this machine, which makes the files; in a bucket by one lease of that name, for all of them:
    unless `quiet` it is said when that must be watched. Raises Busy if another run writes to them.
    """
    with contextlib.ExitStack() as stack:
        if not isinstance(folder, Path):
            stack.enter_context(Lease(folder / lease, say=(lambda _: None) if quiet else say))
        else:
            for path in (folder / name for name in names):
                _lock(stack.enter_context(open(path, "ab")).fileno(), path)
        yield [log_at(folder / name) for name in names]


@contextlib.contextmanager
def again_when_a_store_fails() -> Iterator[None]:
    """Work that can be gone on with: raises Again where a bucket's store stops answering."""
    try:
        yield
    except Unavailable as error:
        raise Again(f"{error}: nothing is lost, the run can be started again") from error


def is_entered(stack: contextlib.ExitStack, work: contextlib.AbstractContextManager) -> bool:
    """Enters one of the contexts above, to be left with the stack; False if another run is at work there."""
    try:
        stack.enter_context(work)
    except Busy:
        return False
    return True


def write_once(place: AnyPlace, data: bytes) -> bytes:
    """The bytes of a file that several runs may write at once: the data, unless another was first."""
    if not isinstance(place, Path):
        with contextlib.suppress(bucket_writes.Taken):
            bucket_writes.write(place, data, match=bucket_writes.ABSENT)
        return place.read_bytes()
    if (there := bytes_of(place)) is not None:
        return there
    place.parent.mkdir(parents=True, exist_ok=True)
    with open(place.with_name(f"{place.name}.lock"), "ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        if not place.exists():
            with replace_file(place) as temporary:
                temporary.write_bytes(data)
        return place.read_bytes()


def _refuse_file(place: AnyPlace) -> None:
    if place.exists() and not place.is_dir():
        raise InputError(f"{place}: expected a folder or nothing there, got a file")


def _lock(descriptor: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise Busy(
            f"{folder}: expected no other run there, got one that is at work: wait for it, or choose another run folder"
        ) from error
