# SPDX-License-Identifier: Apache-2.0
"""What is written to a bucket, of either kind: objects, each whole or absent, some only in the place of a known one.

What happens is in gs_writes.py and s3_writes.py. An object is known by its generation: a number of Google's that is
never used again, an ETag of S3, which is another one for other bytes.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Final, Protocol

from rapid_jax.runtime import gs_writes, s3_writes
from rapid_jax.runtime.buckets import ABSENT, Object, Taken, threads

__all__ = ["ABSENT", "Taken", "delete", "delete_all", "upload", "write"]


class Writer(Protocol):
    """What writes to buckets of a kind: a module."""

    def write(self, bucket: str, name: str, data: bytes, *, match: str | None = None) -> Object:
        """Writes an object."""
        ...

    def upload(self, bucket: str, name: str, path: Path) -> None:
        """Writes an object of a file's bytes."""
        ...

    def delete(self, bucket: str, name: str, *, match: str | None = None) -> None:
        """Deletes an object."""
        ...


class Named(Protocol):
    """A place in a bucket (bucket_place.py)."""

    @property
    def scheme(self) -> str:
        """The kind of its bucket, gs or s3."""
        ...

    @property
    def bucket(self) -> str:
        """Its bucket's name."""
        ...

    @property
    def key(self) -> str:
        """The object's name in it."""
        ...


_WRITERS: Final[dict[str, Writer]] = {"gs": gs_writes, "s3": s3_writes}


def write(place: Named, data: bytes, *, match: str | None = None) -> Object:
    """Writes an object, whole or not at all; with `match` only if that is its generation (ABSENT: there is none).

    Raises Taken if it is not, and InputError for what the store refuses.
    """
    return _WRITERS[place.scheme].write(place.bucket, place.key, data, match=match)


def upload(place: Named, path: Path) -> None:
    """Writes an object of a file's bytes, whole or not at all, without holding them all in memory."""
    _WRITERS[place.scheme].upload(place.bucket, place.key, path)


def delete(place: Named, *, match: str | None = None) -> None:
    """Deletes an object, if it is there and, with `match`, of that generation."""
    _WRITERS[place.scheme].delete(place.bucket, place.key, match=match)


def delete_all(place: Named, names: Iterable[str]) -> None:
    """Deletes several objects of the place's bucket at once, in any order."""
    gone = _WRITERS[place.scheme].delete
    list(threads().map(lambda name: gone(place.bucket, name), names))
