# SPDX-License-Identifier: Apache-2.0
"""What is written to a bucket of S3: objects, whole or absent, some only where none or a known one is there.

S3 keeps If-None-Match: * and If-Match on writes, and If-Match on deletion. A store that takes the same requests and
does not keep them would have two runs in one folder: each bucket is tried once, before the first condition is relied
on, and one that fails is refused. botocore sends a checksum of the bytes along, which the store compares.

A write whose reply is lost is sent again by botocore. What is there then is looked at: an object with the bytes that
were sent counts as written.
"""

import contextlib
import os
import secrets
from pathlib import Path
from typing import Any, Final

from rapid_jax.runtime.buckets import ABSENT, Object, Taken
from rapid_jax.runtime.errors import InputError, Unavailable
from rapid_jax.runtime.s3 import Conflict, call, client_for, object_at, read_into, refuse

_AT_ONCE: Final = 32 << 20  # bytes of a file that go in one request; more go as an upload of several parts
_TRIED: Final[set[tuple[str | None, str]]] = set()  # (endpoint, bucket) that keep conditions
_TRIES: Final = 5  # of a write that another under way made fail (409)


def write(bucket: str, name: str, data: bytes, *, match: str | None = None) -> Object:
    """Writes an object, whole or not at all; with `match` only if that is its ETag (buckets.ABSENT: there is none).

    Raises Taken if it is not, and InputError for what the store refuses.
    """
    if match is not None and (tried := (os.environ.get("AWS_ENDPOINT_URL_S3"), bucket)) not in _TRIED:
        _try_conditions(bucket, name[: name.rfind("/") + 1])
        _TRIED.add(tried)
    return _write(bucket, name, data, match)


def upload(bucket: str, name: str, path: Path) -> None:
    """Writes an object of a file's bytes, whole or not at all, without holding them all in memory."""
    if path.stat().st_size <= _AT_ONCE:
        _write(bucket, name, path.read_bytes(), None)
        return
    place = f"s3://{bucket}/{name}"
    system: Any = client_for(place)
    try:
        system.put_file(str(path), f"{bucket}/{name}", chunksize=_AT_ONCE)
    except FileNotFoundError:
        raise InputError(f"s3://{bucket}: no such bucket") from None
    except Exception as error:  # of s3fs, botocore, aiohttp
        refuse(place, error, writes=True)
    found = object_at(bucket, name)
    if found is None or found.size != path.stat().st_size:
        raise InputError(f"{place}: damaged on its way: the store has other bytes than were sent")


def delete(bucket: str, name: str, *, match: str | None = None) -> None:
    """Deletes an object, if it is there and, with `match`, of that ETag."""
    asked: dict[str, Any] = {} if match is None else {"IfMatch": match}
    with contextlib.suppress(FileNotFoundError, FileExistsError):
        call(f"s3://{bucket}/{name}", "delete_object", Bucket=bucket, Key=name, writes=True, **asked)


def _write(bucket: str, name: str, data: bytes, match: str | None) -> Object:
    place = f"s3://{bucket}/{name}"
    asked: dict[str, Any] = {} if match is None else {"IfNoneMatch": "*"} if match == ABSENT else {"IfMatch": match}
    for _ in range(_TRIES):
        try:
            made = call(place, "put_object", Bucket=bucket, Key=name, Body=data, writes=True, **asked)
            return Object(name, len(data), made["ETag"], "", made["ETag"].strip('"'))
        except FileNotFoundError:  # of an object that is to be replaced, too
            if match not in (None, ABSENT):
                raise Taken(place) from None
            raise InputError(f"s3://{bucket}: no such bucket") from None
        except FileExistsError:
            found = object_at(bucket, name)
            if found is not None and found.generation != match and _has(bucket, found, data):
                return found
            raise Taken(place) from None
        except Conflict:
            continue
    raise Unavailable(f"{place}: others wrote it each time that it was to be written")


def _has(bucket: str, found: Object, data: bytes) -> bool:
    there = bytearray(found.size)
    with contextlib.suppress(InputError):  # replaced meanwhile
        return found.size == len(data) and read_into(bucket, found, 0, memoryview(there)) == len(data) and there == data
    return False


def _try_conditions(bucket: str, folder: str) -> None:
    """Raises InputError where the store does not keep a condition. What is tried is an object of its own."""
    name, place = f"{folder}conditions-{secrets.token_hex(8)}", f"s3://{bucket}"
    failed = []
    try:
        first = _write(bucket, name, b"first", ABSENT)
        for match, said in ((ABSENT, "If-None-Match"), ('"00000000000000000000000000000000"', "If-Match")):
            with contextlib.suppress(Taken):
                _write(bucket, name, b"second", match)
                failed.append(said)
        if not failed:
            with contextlib.suppress(InputError):
                delete(bucket, name, match='"00000000000000000000000000000000"')
            if object_at(bucket, name) != first:
                failed.append("If-Match of a deletion")
    finally:
        delete(bucket, name)
    if failed:
        raise InputError(
            f"{place}: this store does not keep {', '.join(failed)}, so nothing would keep two runs apart: expected "
            "one that does, as Amazon's S3, or gs:// or a folder here"
        )
