# SPDX-License-Identifier: Apache-2.0
"""What is written to a bucket of Google's: objects, whole or absent, some only in the place of a known generation.

A write whose reply is lost is sent again by gcsfs. What is there then is looked at: an object with the bytes that were
sent counts as written.
"""

import base64
import contextlib
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from rapid_jax.runtime.buckets import FIELDS, Object, Taken, call, crc32c, described, object_at, refuse, system_for
from rapid_jax.runtime.errors import InputError

_AT_ONCE: Final = 32 << 20  # bytes of a file that go in one request; more go by a resumable upload, in pieces
_BLOCK: Final = 1 << 20
_TRIES: Final = 3  # of an upload in pieces


def write(bucket: str, name: str, data: bytes, *, match: str | None = None) -> Object:
    """Writes an object, whole or not at all; with `match` only if its generation is that (ABSENT: there is none).

    Raises Taken if it is not, and InputError for what the store refuses.
    """
    place = f"gs://{bucket}/{name}"
    asked: dict[str, Any] = {"uploadType": "media", "name": name, "fields": FIELDS}
    asked |= {} if match is None else {"ifGenerationMatch": match}
    path = system_for(place).base.replace("/storage/v1/", "/upload/storage/v1/") + "b/{}/o"
    head = {"Content-Type": "application/octet-stream"}
    # aiohttp warns of bytes that are many, and closes a file that it has sent: gcsfs has one for that.
    body = importlib.import_module("gcsfs.core").UnclosableBytesIO(data) if len(data) > _BLOCK else data
    try:
        item = call(place, "POST", path, bucket, data=body, headers=head, json_out=True, **asked)
    except FileNotFoundError:
        raise InputError(f"gs://{bucket}: no such bucket") from None
    except FileExistsError:
        found = object_at(bucket, name)
        if found is not None and found.generation != match and _has(found, len(data), crc32c(data)):
            return found
        raise Taken(place) from None
    made = described(item, place)
    if not _has(made, len(data), crc32c(data)):
        raise InputError(f"{place}: damaged on its way: the store has other bytes than were sent")
    return made


def upload(bucket: str, name: str, path: Path) -> None:
    """Writes an object of a file's bytes, whole or not at all, without holding them all in memory."""
    size, crc = 0, 0
    for block in _blocks(path):
        size, crc = size + len(block), crc32c(block, crc)
    if size <= _AT_ONCE:
        write(bucket, name, path.read_bytes())
        return
    place, failure = f"gs://{bucket}/{name}", None
    system: Any = system_for(place)
    for _ in range(_TRIES):
        try:
            system.put_file(str(path), f"{bucket}/{name}")
            failure = None
        except Exception as error:  # of gcsfs, aiohttp, requests, google.auth
            failure = error
        # As in `write`: the last reply may be what was lost.
        found = object_at(bucket, name) if failure is None or _may_be_there(failure) else None
        if found is not None and _has(found, size, crc):
            return
        if failure is not None and not _may_be_there(failure):
            break
    if isinstance(failure, FileNotFoundError):
        raise InputError(f"gs://{bucket}: no such bucket") from None
    if failure is not None:
        refuse(place, failure, writes=True)
    raise InputError(f"{place}: damaged on its way: the store has other bytes than were sent")


def _may_be_there(error: Exception) -> bool:
    """Whether a write that failed so may have happened all the same, or may succeed if it is tried again."""
    return not str(error).startswith("Forbidden") and str(getattr(error, "code", "")) != "401"


def delete(bucket: str, name: str, *, match: str | None = None) -> None:
    """Deletes an object, if it is there and, with `match`, of that generation."""
    asked: dict[str, Any] = {} if match is None else {"ifGenerationMatch": match}
    with contextlib.suppress(FileNotFoundError, FileExistsError):
        call(f"gs://{bucket}/{name}", "DELETE", "b/{}/o/{}", bucket, name, **asked)


def _has(found: Object, size: int, crc: int) -> bool:
    return found.size == size and base64.b64decode(found.crc32c) in (b"", crc.to_bytes(4, "big"))


def _blocks(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            yield block
