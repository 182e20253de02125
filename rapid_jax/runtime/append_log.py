# SPDX-License-Identifier: Apache-2.0
"""A file that grows by what is put behind it: on this machine one file, in a bucket numbered parts until it is joined.

    NAME                           what was joined; a file like any other
    NAME.parts/000000000001234     what was put behind byte 1,234 of it, one object a time

A part is written only where there is none: of two that append to one log the second is refused. A log is read as its
parts in their order, so a kill at any moment leaves all that was appended, and nothing of what was not.
"""

import contextlib
import io
import os
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import BinaryIO, Final, TypeAlias

from rapid_jax.runtime import bucket_writes, buckets
from rapid_jax.runtime.bucket_place import BucketPlace
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.storage import AnyPlace

_PARTS: Final = ".parts"
_SMALL: Final = 1 << 20  # bytes of a part that one thread reads
_MOST_PARTS: Final = 512  # then they are joined: a log is read again in few requests
_LOOKS: Final = 3  # at a log that changes while it is read


class FileLog:
    """A log on this machine. With `durable` what is appended is on the disk itself before `append` returns."""

    def __init__(self, path: Path, *, durable: bool):
        self._path, self._durable = path, durable

    @property
    def size(self) -> int:
        """In bytes; 0 where there is none."""
        return self._path.stat().st_size if self._path.exists() else 0

    def read(self) -> bytes:
        """All of it; nothing where there is none."""
        return self._path.read_bytes() if self._path.exists() else b""

    def append(self, data: bytes) -> int:
        """Puts the data behind it; the size then. Raises InputError where that cannot be: it is as it was."""
        before = self.size
        try:
            with open(self._path, "ab") as file:
                file.write(data)
                if self._durable:
                    file.flush()
                    os.fsync(file.fileno())
                return file.tell()
        except OSError as error:
            with contextlib.suppress(OSError):
                self.truncate(before)
            raise InputError(f"{self._path}: cannot be written: {error.strerror}") from error

    def truncate(self, size: int) -> None:
        """Takes away what is behind the first `size` bytes."""
        if size < self.size:
            os.truncate(self._path, size)

    def join(self) -> None:
        """Makes it one file, as readers of a stage that is done find it."""

    def remove(self) -> None:
        """Takes it away."""
        self._path.unlink(missing_ok=True)


class PartsLog:
    """The same in a bucket. It knows what was there when it was opened, and is then alone in writing."""

    def __init__(self, place: BucketPlace):
        self._place, self._bucket, self._key = place, place.bucket, place.key
        self._folder = f"{self._key}{_PARTS}/"
        listed, _ = place.store.listed(self._bucket, self._folder)
        # Behind the listing: a join in between leaves parts.
        self._base = place.store.object_at(self._bucket, self._key)
        self.size: int = self._base.size if self._base else 0
        self._parts: list[buckets.Object] = []
        self._joined: list[str] = []  # that a join which was killed has left
        for found in sorted(listed, key=lambda part: part.name):
            start = _start_of(found, self._folder, place)
            if start < (self._base.size if self._base else 0):
                self._joined.append(found.name)
            elif start != self.size:
                raise InputError(f"{place}: expected a part from byte {self.size} on, got one from byte {start} on")
            else:
                self._parts.append(found)
                self.size += found.size

    def read(self) -> bytes:
        """All of it; nothing where there is none."""
        objects = ([self._base] if self._base else []) + self._parts
        data, at = memoryview(bytearray(self.size)), 0
        places = []
        for found in objects:
            places.append((found, data[at : at + found.size]))
            at += found.size
        large = [pair for pair in places if pair[0].size > _SMALL]
        small = [pair for pair in places if pair[0].size <= _SMALL]
        for found, into in large:  # which takes the threads itself
            self._place.store.read_into(self._bucket, found, 0, into)
        read = self._place.store.read_into
        list(buckets.threads().map(lambda pair: read(self._bucket, pair[0], 0, pair[1]), small))
        return bytes(data)

    @property
    def is_in_parts(self) -> bool:
        """Whether something was appended since it was joined."""
        return bool(self._parts)

    def append(self, data: bytes) -> int:
        """Puts the data behind it; the size then. Raises InputError if another has, or the store refuses."""
        if data:
            name = f"{self._folder}{self.size:015d}"
            self._parts.append(bucket_writes.write(self._place.at(name), data, match=bucket_writes.ABSENT))
            self.size += len(data)
        if len(self._parts) >= _MOST_PARTS:
            self.join()
        return self.size

    def truncate(self, size: int) -> None:
        """Takes away what is behind the first `size` bytes: parts from the last on, so that no gap is ever left."""
        if size < self.size:  # what a killed join has left would else be parts again, of what is taken away
            self._remove_joined()
        while self._parts and self.size - self._parts[-1].size >= size and self.size > size:
            last = self._parts.pop()
            bucket_writes.delete(self._place.at(last.name))
            self.size -= last.size
        if size == 0 and self._base:
            bucket_writes.delete(self._place)
            self._base, self.size = None, 0
        elif self.size > size:
            last = self._parts[-1] if self._parts else self._base
            assert last is not None
            kept = self.read()[self.size - last.size : size]
            found = bucket_writes.write(self._place.at(last.name), kept, match=last.generation)
            if self._parts:
                self._parts[-1] = found
            else:
                self._base = found
            self.size = size

    def join(self) -> None:
        """Makes it one file, as readers of a stage that is done find it."""
        if self._parts:
            match = self._base.generation if self._base else bucket_writes.ABSENT
            self._base = bucket_writes.write(self._place, self.read(), match=match)
        bucket_writes.delete_all(self._place, [*self._joined, *(part.name for part in self._parts)])
        self._parts, self._joined = [], []

    def remove(self) -> None:
        """Takes it away."""
        self._remove_joined()
        self.truncate(0)

    def _remove_joined(self) -> None:
        bucket_writes.delete_all(self._place, self._joined)
        self._joined = []


Log: TypeAlias = FileLog | PartsLog


def log_at(place: AnyPlace, *, durable: bool = True) -> Log:
    """The log of that name, to be read and written; it need not be there yet."""
    return FileLog(place, durable=durable) if isinstance(place, Path) else PartsLog(place)


def logs_in(folder: AnyPlace, pattern: str) -> list[AnyPlace]:
    """The names of the logs in a folder that match the pattern, in order, whether they were joined or not."""
    if isinstance(folder, Path):
        return [*sorted(folder.glob(pattern))]
    names = {place.name.removesuffix(_PARTS) for place in folder.iterdir()}
    return [folder / name for name in sorted(names) if fnmatchcase(name, pattern)]


def has_log(place: AnyPlace) -> bool:
    """Whether there is one of that name."""
    return place.is_file() or (isinstance(place, BucketPlace) and (place.parent / f"{place.name}{_PARTS}").is_dir())


@contextlib.contextmanager
def open_log(place: AnyPlace, *, ahead: int) -> Iterator[BinaryIO]:
    """A log open for reading, as a file; a store is asked for at least `ahead` bytes at once.

    Another process may append to it meanwhile, and join its parts.
    """
    if isinstance(place, Path):
        with open(place, "rb") as file:
            yield file
        return
    with _open(place, ahead) as file:
        yield file


def _open(place: BucketPlace, ahead: int) -> BinaryIO:
    for last in (False,) * (_LOOKS - 1) + (True,):
        log = PartsLog(place)
        try:
            return io.BytesIO(log.read()) if log.is_in_parts else place.open(ahead)
        except buckets.Replaced:  # its writer has joined it since
            if last:
                raise
    raise AssertionError


def _start_of(part: buckets.Object, folder: str, place: BucketPlace) -> int:
    name = part.name.removeprefix(folder)
    if not (name.isascii() and name.isdigit()):
        raise InputError(f"{place}{_PARTS}: expected parts that are named by where they begin, got {name!a}")
    return int(name)
