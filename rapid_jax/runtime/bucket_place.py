# SPDX-License-Identifier: Apache-2.0
"""An object or a folder in a bucket, with those of Path's names that are needed (storage.py)."""

import base64
import io
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import BinaryIO, Final, Protocol

from rapid_jax.runtime import bucket_writes, buckets, s3
from rapid_jax.runtime.errors import InputError

_AHEAD: Final = 8 << 20  # bytes that a stream reads at once


class Store(Protocol):
    """What is asked of buckets of a kind: a module."""

    def object_at(self, bucket: str, name: str, *, within: float | None = None) -> buckets.Object | None:
        """The object of that name, if there is one."""
        ...

    def listed(self, bucket: str, folder: str, *, deep: bool = False) -> tuple[list[buckets.Object], list[str]]:
        """(the objects in a folder, the names of the folders in it)."""
        ...

    def read_into(self, bucket: str, found: buckets.Object, start: int, into: memoryview) -> int:
        """Fills `into` with the object's bytes."""
        ...


STORES: Final[dict[str, Store]] = {"gs": buckets, "s3": s3}


class Seen:
    """What a bucket was found to hold: a place and those made from it look once, and so see one state of it."""

    def __init__(self, bucket: str, store: Store = buckets):
        self._bucket, self._store = bucket, store
        self._listed: dict[str, tuple[dict[str, buckets.Object], set[str]]] = {}
        self._objects: dict[str, buckets.Object | None] = {}

    def inside(self, folder: str) -> tuple[dict[str, buckets.Object], set[str]]:
        """(the objects in a folder by name there, the folders in it); `folder` is "" or ends in "/"."""
        if folder not in self._listed:
            objects, folders = self._store.listed(self._bucket, folder)
            names = {name.rstrip("/").rpartition("/")[2] for name in folders}
            self._listed[folder] = {found.name.rpartition("/")[2]: found for found in objects}, names
        return self._listed[folder]

    def object(self, key: str) -> buckets.Object | None:
        """The object of that name, if there is one; a folder that was listed is not asked again."""
        parent, slash, name = key.rpartition("/")
        if (listed := self._listed.get(parent + slash)) is not None:
            return listed[0].get(name)
        if key not in self._objects:
            self._objects[key] = self._store.object_at(self._bucket, key) if key else None
        return self._objects[key]

    def has_folder(self, key: str) -> bool:
        """Whether any object's name begins with `key` and a slash."""
        parent, slash, name = key.rpartition("/")
        if key and (listed := self._listed.get(parent + slash)) is not None:
            return name in listed[1]
        return any(self.inside(f"{key}/" if key else ""))


class Now(Seen):
    """Looks again each time: this process and others write there."""

    def inside(self, folder: str) -> tuple[dict[str, buckets.Object], set[str]]:
        """As there is now."""
        return Seen(self._bucket, self._store).inside(folder)

    def object(self, key: str) -> buckets.Object | None:
        """As there is now."""
        return Seen(self._bucket, self._store).object(key)

    def has_folder(self, key: str) -> bool:
        """As there is now."""
        return Seen(self._bucket, self._store).has_folder(key)


@dataclass(frozen=True, order=True)
class BucketPlace:
    """An object or folder in a bucket, by its name. What it and places made from it have seen stays as it was seen.

    Unless it is one of `working_place`. Whatever the store refuses is an InputError of one line that names the place.
    """

    bucket: str
    key: str  # without a slash at its end; empty for the bucket itself
    _seen: Seen = field(compare=False, repr=False)
    scheme: str = "gs"

    def __str__(self) -> str:
        return f"{self.scheme}://{self.bucket}/{self.key}".rstrip("/")

    def __truediv__(self, name: str) -> "BucketPlace":
        return replace(self, key=f"{self.prefix}{name}")

    def at(self, key: str) -> "BucketPlace":
        """The object of this name in the same bucket."""
        return replace(self, key=key)

    @property
    def store(self) -> Store:
        """What its bucket is asked by."""
        return STORES[self.scheme]

    @property
    def name(self) -> str:
        """The last part of the name."""
        return self.key.rpartition("/")[2]

    @property
    def suffix(self) -> str:
        """The end of the name as Path has it, ".gguf"."""
        return PurePosixPath(self.name).suffix

    @property
    def parent(self) -> "BucketPlace":
        """The folder that it is in; the bucket's own is itself."""
        return replace(self, key=self.key.rpartition("/")[0])

    def relative_to(self, folder: "BucketPlace") -> PurePosixPath:
        """Its name below a folder that it is in."""
        return PurePosixPath(self.key).relative_to(folder.key or ".")

    def mkdir(self, *, parents: bool = False, exist_ok: bool = False) -> None:
        """Nothing: a folder is there when something is in it."""

    def unlink(self, missing_ok: bool = False) -> None:
        """Deletes the object; none there is no error."""
        bucket_writes.delete(self)

    def is_file(self) -> bool:
        """Whether there is an object of this name."""
        return self._seen.object(self.key) is not None

    def is_dir(self) -> bool:
        """Whether anything is below this name. Raises InputError where there is no such bucket."""
        return self._seen.has_folder(self.key)

    def exists(self) -> bool:
        """Whether it is a file or a folder."""
        return self.is_file() or self.is_dir()

    def iterdir(self) -> Iterator["BucketPlace"]:
        """What is in the folder."""
        objects, folders = self._seen.inside(self.prefix)
        return (self / name for name in {*objects, *folders})

    def glob(self, pattern: str) -> Iterator["BucketPlace"]:
        """What matches the pattern below the folder, part by part; a `*` does not reach over a slash."""
        first, _, rest = pattern.partition("/")
        for place in [place for place in self.iterdir() if fnmatchcase(place.name, first)]:
            if not rest:
                yield place
            elif place.is_dir():
                yield from place.glob(rest)

    def below(self) -> Iterator["BucketPlace"]:
        """Every object in the folder and in the folders in it."""
        objects, _ = self.store.listed(self.bucket, self.prefix, deep=True)
        return (replace(self, key=found.name) for found in objects)

    def found(self) -> buckets.Object:
        """The object. Raises InputError that says what is there instead."""
        if (found := self._seen.object(self.key)) is not None:
            return found
        raise InputError(
            f"{self}: cannot be read: {'expected a file, got a folder' if self.is_dir() else 'no such file'}"
        )

    def read_bytes(self) -> bytes:
        """All bytes, checked against the store's own sum of them."""
        with self.open() as file:
            return file.read()

    def open(self, ahead: int = _AHEAD) -> BinaryIO:
        """The object's bytes as a file that is read and sought in; at least `ahead` bytes are read at once."""
        return io.BufferedReader(_Stream(self), ahead)

    @property
    def prefix(self) -> str:
        """What names of objects in the folder begin with."""
        return f"{self.key}/" if self.key else ""


class _Stream(io.RawIOBase):
    """The bytes of an object. Where they are read from the first to the last they must have the store's checksum."""

    def __init__(self, place: BucketPlace):
        super().__init__()
        self._place, self._object = place, place.found()
        self._at, self._crc, self._summed = 0, 0, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._object.size}[whence]
        return self._at

    def readall(self) -> bytes:
        data = bytearray(max(0, self._object.size - self._at))
        self.readinto(data)
        return bytes(data)

    def readinto(self, buffer) -> int:
        into = memoryview(buffer).cast("B")
        got = self._place.store.read_into(self._place.bucket, self._object, self._at, into)
        if got and self._at == self._summed:
            self._crc, self._summed = buckets.crc32c(into[:got], self._crc), self._at + got
            if self._summed == self._object.size:
                _check_sum(self._place, self._object, self._crc)
        self._at += got
        return got


def _check_sum(place: BucketPlace, found: buckets.Object, crc: int) -> None:
    if found.crc32c and base64.b64decode(found.crc32c) != crc.to_bytes(4, "big"):
        raise InputError(f"{place}: damaged on its way: its bytes do not have the checksum that the store says")
