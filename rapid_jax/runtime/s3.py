# SPDX-License-Identifier: Apache-2.0
"""What a bucket of S3 is asked: objects and their bytes, to read; as buckets.py asks one of Google's.

Writing is in s3_writes.py.

s3fs sends the requests. botocore below it asks again where the service is busy, fails or hangs up, with waits of up to
1, 2, 4, 8 and 16 s, and finds the credentials as Amazon's tools do; nobody else asks again, but for a range whose
answer breaks off. s3fs is imported when a bucket is first asked, from the extra `cloud`.
"""

import functools
import importlib
import logging
from typing import Any, Final, NoReturn

from rapid_jax.runtime.buckets import TRAFFIC, Object, Replaced, fill
from rapid_jax.runtime.errors import InputError, Unavailable, extra
from rapid_jax.runtime.store_failures import Cause, Terms, failure

_TRIES: Final = 3  # of a range whose answer breaks off
_REQUESTS: Final = 6  # at most for one call
_TERMS: Final = Terms(
    "aws configure, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "s3:GetObject and s3:ListBucket",
    "s3:PutObject, s3:DeleteObject, s3:GetObject and s3:ListBucket",
)
_UNKNOWN: Final = (
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "ExpiredToken",
    "InvalidToken",
    "TokenRefreshRequired",
)


class Conflict(Unavailable):
    """Another writes the object at the same time (409); the message names it."""


def object_at(bucket: str, name: str, *, within: float | None = None) -> Object | None:
    """The object of that name; None where there is none, or no such bucket.

    Raises Unavailable where the store has not answered `within` so many seconds, however often it was asked.
    """
    try:
        found = call(f"s3://{bucket}/{name}", "head_object", within=within, Bucket=bucket, Key=name)
    except FileNotFoundError:
        return None
    return _describe(name, found["ContentLength"], found["ETag"])


def listed(bucket: str, folder: str, *, deep: bool = False) -> tuple[list[Object], list[str]]:
    """(the objects in a folder, the names of the folders in it), each name whole; `folder` is "" or ends in "/".

    With `deep` all objects below it, and no folders. Raises InputError where there is no such bucket.
    """
    asked: dict[str, Any] = {"Bucket": bucket, "Prefix": folder} | ({} if deep else {"Delimiter": "/"})
    objects: list[Object] = []
    folders: list[str] = []
    while True:
        try:
            page = call(f"s3://{bucket}/{folder}".rstrip("/"), "list_objects_v2", **asked)
        except FileNotFoundError:
            raise InputError(f"s3://{bucket}: no such bucket") from None
        for item in page.get("Contents", []):
            if item["Key"] != folder:
                objects.append(_describe(item["Key"], item["Size"], item["ETag"]))
        folders += [item["Prefix"] for item in page.get("CommonPrefixes", [])]
        if not page.get("IsTruncated"):
            return objects, folders
        asked["ContinuationToken"] = page["NextContinuationToken"]


def read_into(bucket: str, found: Object, start: int, into: memoryview) -> int:
    """Fills `into` with the object's bytes from `start` on, several pieces at once; how many there were.

    Raises Replaced where the object has become another since it was found.
    """
    size = max(0, min(into.nbytes, found.size - start))
    fill(into, size, lambda first, last: _range(bucket, found, start + first, start + last))
    return size


def _range(bucket: str, found: Object, first: int, last: int) -> bytes:
    place, data = f"s3://{bucket}/{found.name}", b""
    asked: dict[str, Any] = {
        "Bucket": bucket,
        "Key": found.name,
        "IfMatch": found.generation,
        "Range": f"bytes={first}-{last - 1}",
    }
    for left in reversed(range(_TRIES)):
        try:
            answer = call(place, "get_object", **asked)
        except (FileNotFoundError, FileExistsError):
            raise Replaced(f"{place}: was replaced or removed while it was read") from None
        try:
            data = _body(place, answer)
        except Unavailable:  # it broke off
            if not left:
                raise
        if len(data) == last - first:
            TRAFFIC.add(len(data))
            return data
    raise InputError(f"{place}: expected {last - first} bytes from byte {first} on, got {len(data)}")


def _describe(name: str, size: int, tag: str) -> Object:
    """A tag is of the bytes and of how they were uploaded: equal for equal bytes that were uploaded in one way."""
    return Object(name, size, tag, "", tag.strip('"'))


def call(place: str, method: str, *, within: float | None = None, writes: bool = False, **asked: Any) -> Any:
    """What the store answers, within so many seconds if they are given.

    Raises FileNotFoundError, FileExistsError for another tag, Conflict, and else InputError.
    """
    system = client_for(place)
    try:
        sync = importlib.import_module("fsspec.asyn").sync
        return sync(system.loop, system._call_s3, method, timeout=within, **asked)
    except Exception as error:  # of s3fs, botocore, aiohttp, whose classes are not at hand here
        refuse(place, error, writes=writes)


def _body(place: str, answer: Any) -> bytes:
    body = answer["Body"]
    try:
        return importlib.import_module("fsspec.asyn").sync(client_for(place).loop, body.read)
    except Exception as error:  # as above
        refuse(place, error)
    finally:
        body.close()


def refuse(place: str, error: Exception, *, writes: bool = False) -> NoReturn:
    """Raises what says in a line why the store did not answer."""
    below = error.__cause__
    origin = below if isinstance(below, Exception) and hasattr(below, "response") else error
    answer = getattr(origin, "response", None) or {}
    code = str(answer.get("Error", {}).get("Code", ""))
    status = int(answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    if status == 404 or isinstance(error, FileNotFoundError):
        raise FileNotFoundError(place) from error
    if status == 412:
        raise FileExistsError(place) from error
    if status == 409:
        raise Conflict(f"{place}: another is writing it at the same time") from error
    network = isinstance(origin, OSError | TimeoutError) or type(origin).__module__.startswith(("aiohttp", "botocore"))
    unknown = code in _UNKNOWN or "Credentials" in type(origin).__name__
    cause = Cause(origin, status, unknown, forbidden=status == 403, unreached=network and not status)
    raise failure(place, cause, _TERMS, writes=writes) from error


def client_for(place: str) -> Any:
    """The client, to ask for `place`. Raises InputError where there is none."""
    try:
        return client()
    except ImportError as error:
        raise InputError(f"{place}: a bucket of S3 needs s3fs: {extra('cloud')}") from error


@functools.cache
def client() -> Any:
    """The one client of this process."""
    s3fs = importlib.import_module("s3fs")
    for name in ("s3fs", "botocore", "aiobotocore"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # what failed is told by us, in one line
    retries = {"mode": "standard", "total_max_attempts": _REQUESTS}
    config = {"connect_timeout": 20, "read_timeout": 60, "retries": retries}
    system = s3fs.S3FileSystem(config_kwargs=config, skip_instance_cache=True)
    system.retries = 1  # else it would ask for all of botocore's requests again, and again
    return system
