# SPDX-License-Identifier: Apache-2.0
"""A place is a path on this machine or one in a bucket (gs://): what reads from it cannot tell which.

A local place is a `pathlib.Path`; one in a bucket is a `BucketPlace`, which has those of Path's names that reading
needs. What Path has no name for is a function here: a file's size, and bytes of it. In a bucket there are objects,
whole or absent, and no folders: a folder is what names of objects begin with.
"""

import base64
import io
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Final, TypeAlias

from rapid_jax.runtime import buckets
from rapid_jax.runtime.errors import InputError

# A scheme, or a well-known one with a slash too few.
_SCHEME: Final = re.compile(
    r"\s*(?:([A-Za-z][A-Za-z0-9+.-]*)://|(gs|s3|https?|ftp|hdfs|file|abfss?|az):/)", re.IGNORECASE
)
_BUCKET: Final = re.compile(r"gs://([a-z0-9][a-z0-9._-]{1,220}[a-z0-9])(?:/(.*))?", re.DOTALL)
_NOT_YET: Final = (
    "writing to a bucket is not supported yet, and only models, documents, questions and settings are read from one; "
    "name a path here and copy (gcloud storage cp -r)"
)
_AHEAD: Final = 8 << 20  # bytes that a stream reads at once


class _Seen:
    """What a bucket was found to hold: a place and those made from it look once, and so see one state of it."""

    def __init__(self, bucket: str):
        self._bucket = bucket
        self._listed: dict[str, tuple[dict[str, buckets.Object], set[str]]] = {}
        self._objects: dict[str, buckets.Object | None] = {}

    def inside(self, folder: str) -> tuple[dict[str, buckets.Object], set[str]]:
        """(the objects in a folder by name there, the folders in it); `folder` is "" or ends in "/"."""
        if folder not in self._listed:
            objects, folders = buckets.listed(self._bucket, folder)
            names = {name.rstrip("/").rpartition("/")[2] for name in folders}
            self._listed[folder] = {found.name.rpartition("/")[2]: found for found in objects}, names
        return self._listed[folder]

    def object(self, key: str) -> buckets.Object | None:
        """The object of that name, if there is one; a folder that was listed is not asked again."""
        parent, slash, name = key.rpartition("/")
        if (listed := self._listed.get(parent + slash)) is not None:
            return listed[0].get(name)
        if key not in self._objects:
            self._objects[key] = buckets.object_at(self._bucket, key) if key else None
        return self._objects[key]

    def has_folder(self, key: str) -> bool:
        """Whether any object's name begins with `key` and a slash."""
        parent, slash, name = key.rpartition("/")
        if key and (listed := self._listed.get(parent + slash)) is not None:
            return name in listed[1]
        return any(self.inside(f"{key}/" if key else ""))


@dataclass(frozen=True, order=True)
class BucketPlace:
    """An object or folder in a bucket, by its name. What it and places made from it have seen stays as it was seen.

    Whatever the store refuses is an InputError of one line that names the place.
    """

    bucket: str
    key: str  # without a slash at its end; empty for the bucket itself
    _seen: _Seen = field(compare=False, repr=False)

    def __str__(self) -> str:
        return f"gs://{self.bucket}/{self.key}".rstrip("/")

    def __truediv__(self, name: str) -> "BucketPlace":
        return BucketPlace(self.bucket, f"{self._prefix}{name}", self._seen)

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
        return BucketPlace(self.bucket, self.key.rpartition("/")[0], self._seen)

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
        objects, folders = self._seen.inside(self._prefix)
        return (self / name for name in {*objects, *folders})

    def glob(self, pattern: str) -> Iterator["BucketPlace"]:
        """What matches the pattern below the folder, part by part; a `*` does not reach over a slash."""
        first, _, rest = pattern.partition("/")
        for place in [place for place in self.iterdir() if fnmatchcase(place.name, first)]:
            if not rest:
                yield place
            elif place.is_dir():
                yield from place.glob(rest)

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
    def _prefix(self) -> str:
        return f"{self.key}/" if self.key else ""


AnyPlace: TypeAlias = Path | BucketPlace


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
        got = buckets.read_into(self._place.bucket, self._object, self._at, into)
        if got and self._at == self._summed:
            self._crc, self._summed = buckets.crc32c(into[:got], self._crc), self._at + got
            if self._summed == self._object.size:
                _check_sum(self._place, self._object, self._crc)
        self._at += got
        return got


def _check_sum(place: BucketPlace, found: buckets.Object, crc: int) -> None:
    if found.crc32c and base64.b64decode(found.crc32c) != crc.to_bytes(4, "big"):
        raise InputError(f"{place}: damaged on its way: its bytes do not have the checksum that the store says")


def place_of(text: str | AnyPlace, what: str) -> AnyPlace:
    """The place that a user gave as `what` (a setting, an option) to be read: a path, ~ filled in, or one in a bucket.

    Nothing is asked of a store yet. Raises InputError for any scheme but gs://, as hdfs://x or file:///x.
    """
    if isinstance(text, BucketPlace):
        return text
    if not _is_in_bucket(text):
        return _local(text, what, "only gs:// is read besides")
    parts = _BUCKET.fullmatch(str(text))
    key = ((parts and parts[2]) or "").rstrip("/")
    if parts is None or not key.isprintable():
        raise InputError(f"{what}: expected gs://BUCKET/NAME, got {str(text)!a}")
    return BucketPlace(parts[1], key, _Seen(parts[1]))


def local_path(text: str | Path, what: str) -> Path:
    """The path that a user gave as `what` (a setting, an option), where only this machine will do; ~ filled in.

    Raises InputError for a place with a scheme, as gs://bucket/run or file:///run: Path would make a folder gs: of it.
    """
    scheme = _SCHEME.match(str(text))
    is_bucket = scheme is not None and (scheme[1] or scheme[2]).lower() in ("gs", "s3")
    return _local(text, what, _NOT_YET if is_bucket else "")


def is_local(text: str) -> bool:
    """Whether the text names a place on this machine, by its form."""
    return _SCHEME.match(text) is None


def _is_in_bucket(text: str | Path) -> bool:
    return isinstance(text, str) and text.startswith("gs://")


def _local(text: str | Path, what: str, besides: str) -> Path:
    scheme = _SCHEME.match(str(text))
    if scheme is not None:
        why = besides or f"no {scheme[1] or scheme[2]}:// is read or written here"
        raise InputError(f"{what}: expected a path on this machine, got {str(text)!a}: {why}")
    try:
        is_name = b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        is_name = False
    if not is_name:
        raise InputError(f"{what}: expected a path, got {str(text)!a}")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:  # ~somebody
        raise InputError(f"{what}: expected a path, got {str(text)!a}: {error}") from error


def size_of(place: AnyPlace) -> int:
    """The size of a file in bytes. Raises OSError or InputError where there is none."""
    return place.stat().st_size if isinstance(place, Path) else place.found().size


def open_file(place: AnyPlace, *, ahead: int) -> BinaryIO:
    """The file, open for reading and seeking; a store is asked for at least `ahead` bytes at once.

    Raises OSError or InputError where there is none.
    """
    return open(place, "rb") if isinstance(place, Path) else place.open(ahead)


def read_into(place: AnyPlace, start: int, into: memoryview) -> int:
    """Fills `into` with the file's bytes from `start` on, no other byte is read; how many there were."""
    if not isinstance(place, Path):
        return buckets.read_into(place.bucket, place.found(), start, into)
    rest = into
    with open(place, "rb", buffering=0) as file:
        file.seek(start)
        while rest.nbytes and (got := file.readinto(rest)):
            rest = rest[got:]
    return into.nbytes - rest.nbytes
