# SPDX-License-Identifier: Apache-2.0
"""What a bucket of Google Cloud Storage is asked: objects and their bytes, to read; every failure one clear line.

Writing is in gs_writes.py.

gcsfs sends the requests. It asks again where the service is busy, fails or hangs up (408, 429, 5xx, a connection that
is cut), with waits of 1, 2, 4, 8 and 16 s, and finds the credentials as Google's tools do. It is imported when a bucket
is first asked, from the extra `cloud`.
"""

import functools
import importlib
import importlib.util
import logging
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final, NoReturn

from rapid_jax.runtime.errors import InputError, extra
from rapid_jax.runtime.store_failures import Cause, Terms, failure

_PIECE: Final = 8 << 20  # bytes of one request: a stream of a store gives some 50 MB/s, so a tensor takes several
_AT_ONCE: Final = 16  # requests of a process; with _PIECE this bounds the memory that they take, too
_CONNECT_S: Final = 20.0
_SILENCE_S: Final = 60.0  # between two packets of an answer
ABSENT: Final = "0"  # the generation of what is not there
FIELDS: Final = "name,size,generation,crc32c,md5Hash"
_TERMS: Final = Terms(
    "gcloud auth application-default login, or GOOGLE_APPLICATION_CREDENTIALS",
    "the role Storage Object Viewer",
    "the role Storage Object User",
)


@dataclass(frozen=True)
class Object:
    """An object as the store describes it: one of its generations, whose bytes never change."""

    name: str  # in its bucket
    size: int  # in bytes
    generation: str
    crc32c: str  # in base64; empty where the store does not say
    md5: str  # the same; composed objects have none

    @property
    def checksum(self) -> str:
        """What the store says of the bytes: equal for equal bytes that were uploaded in the same way."""
        return f"{self.size} bytes, crc32c {self.crc32c}, md5 {self.md5}"


class Replaced(InputError):
    """The object is no longer the one that was found; the message names it."""


class Taken(InputError):
    """Another has written the object meanwhile; the message names it."""

    def __init__(self, place: str):
        super().__init__(f"{place}: expected to be the only writer, but another process has written it meanwhile")


class _Traffic:
    """Bytes that this process has read from buckets."""

    def __init__(self) -> None:
        self._lock, self._bytes = threading.Lock(), 0

    def add(self, count: int) -> None:
        with self._lock:
            self._bytes += count

    @property
    def bytes_read(self) -> int:
        return self._bytes


TRAFFIC: Final = _Traffic()


def object_at(bucket: str, name: str, *, within: float | None = None) -> Object | None:
    """The object of that name; None where there is none, or no such bucket.

    Raises Unavailable where the store has not answered `within` so many seconds, however often it was asked.
    """
    place = f"gs://{bucket}/{name}"
    asked: dict[str, Any] = {"json_out": True, "fields": FIELDS}
    try:
        return described(call(place, "GET", "b/{}/o/{}", bucket, name, within=within, **asked), place)
    except FileNotFoundError:
        return None


def listed(bucket: str, folder: str, *, deep: bool = False) -> tuple[list[Object], list[str]]:
    """(the objects in a folder, the names of the folders in it), each name whole; `folder` is "" or ends in "/".

    With `deep` all objects below it, and no folders. Raises InputError where there is no such bucket.
    """
    place = f"gs://{bucket}/{folder}".rstrip("/")
    asked: dict[str, Any] = {"prefix": folder, "fields": f"items({FIELDS}),prefixes,nextPageToken"}
    if not deep:
        asked["delimiter"] = "/"
    objects: list[Object] = []
    folders: list[str] = []
    while True:
        try:
            page = call(place, "GET", "b/{}/o", bucket, json_out=True, **asked)
        except FileNotFoundError:
            raise InputError(f"gs://{bucket}: no such bucket") from None
        objects += [described(item, place) for item in page.get("items", []) if item["name"] != folder]
        folders += page.get("prefixes", [])
        token = page.get("nextPageToken")
        if token is None:
            return objects, folders
        asked["pageToken"] = token


def read_into(bucket: str, found: Object, start: int, into: memoryview) -> int:
    """Fills `into` with the object's bytes from `start` on, several pieces at once; how many there were.

    Raises Replaced where the object has become another since it was found.
    """
    size = max(0, min(into.nbytes, found.size - start))
    fill(into, size, lambda first, last: _range(bucket, found, start + first, start + last))
    return size


def fill(into: memoryview, size: int, read: Callable[[int, int], bytes]) -> None:
    """Fills the first `size` bytes with what `read` gives from one byte to before another, several pieces at once."""
    places = range(0, size, _PIECE)

    def piece(at: int) -> None:
        end = min(at + _PIECE, size)
        into[at:end] = read(at, end)

    if len(places) > 1:
        list(threads().map(piece, places))
    elif size:
        piece(0)


def crc32c(data: bytes | memoryview, before: int = 0) -> int:
    """The CRC-32C of data behind others, whose CRC is `before`."""
    return importlib.import_module("google_crc32c").extend(before, bytes(data))


def _range(bucket: str, found: Object, first: int, last: int) -> bytes:
    """The bytes of this very generation from `first` to before `last`."""
    place = f"gs://{bucket}/{found.name}"
    system, head = system_for(place), {"Range": f"bytes={first}-{last - 1}", "Accept-Encoding": "identity"}
    try:
        _, data = call(place, "GET", system.url(f"{bucket}/{found.name}", generation=found.generation), headers=head)
    except FileNotFoundError:
        raise Replaced(f"{place}: was replaced or removed while it was read") from None
    if len(data) != last - first:
        raise InputError(f"{place}: expected {last - first} bytes from byte {first} on, got {len(data)}")
    TRAFFIC.add(len(data))
    return data


def described(item: dict[str, Any], place: str) -> Object:
    """An object as the store's JSON describes it."""
    try:
        checks = item.get("crc32c") or "", item.get("md5Hash") or ""
        return Object(item["name"], int(item["size"]), str(item["generation"]), *checks)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{place}: expected an object's name, size and generation from the store") from error


def call(place: str, method: str, path: str, *arguments: str, within: float | None = None, **options: Any) -> Any:
    """What the store answers, within so many seconds if they are given.

    Raises FileNotFoundError for 404, FileExistsError for a precondition that does not hold (412), and InputError naming
    `place` for other failures.
    """
    system = system_for(place)
    try:
        sync = importlib.import_module("fsspec.asyn").sync
        return sync(system.loop, system._call, method, path, *arguments, timeout=within, **options)
    except (FileNotFoundError, FileExistsError):
        raise
    except Exception as error:  # of gcsfs, aiohttp, requests, google.auth, json: whose classes are not at hand here
        refuse(place, error, writes=method != "GET")


def failures() -> tuple[type[Exception], ...]:
    """What a library that opens a bucket itself (Orbax) may raise besides OSError and ValueError."""
    if "gcsfs" not in sys.modules:
        return ()
    names = ("gcsfs.retry", "HttpError"), ("aiohttp", "ClientError"), ("requests", "RequestException")
    names += (("google.auth.exceptions", "GoogleAuthError"),)
    return tuple(getattr(importlib.import_module(module), name) for module, name in names)


def refuse(place: str, error: Exception, *, writes: bool = False) -> NoReturn:
    """Raises the InputError that says in a line why the store did not answer."""
    code, origin = str(getattr(error, "code", None) or ""), type(error).__module__
    network = isinstance(error, OSError | TimeoutError) or origin.startswith(("aiohttp", "requests"))
    cause = Cause(
        error,
        status=int(code) if code.isdigit() else 0,
        unknown=code == "401" or origin.startswith("google.auth"),
        forbidden=str(error).startswith("Forbidden"),
        unreached=network and not code,
    )
    raise failure(place, cause, _TERMS, writes=writes) from error


def system_for(place: str) -> Any:
    """The client, to ask for `place`. Raises InputError where there is none, or no credentials."""
    try:
        return client()
    except ImportError as error:
        raise InputError(f"{place}: a bucket needs gcsfs: {extra('cloud')}") from error
    except Exception as error:  # credentials that cannot be used
        refuse(place, error)


def prepare_libraries() -> None:
    """What others that open a bucket in this process (Orbax, etils, TensorStore) must know before they do.

    The user's environment stands.
    """
    # Else gcsfs asks a service by gRPC for every bucket's kind first: without that service it waits for 60 s.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    os.environ.setdefault("EPATH_USE_TF", "false")  # TensorFlow, where it is installed, would open buckets its own way
    # TensorStore has no bound of its own: of a store that says nothing a read would never end.
    os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS", f"{_SILENCE_S:.0f}")
    os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES", "1")
    os.environ.setdefault("TENSORSTORE_CURL_CONNECT_TIMEOUT_SECONDS", f"{_CONNECT_S:.0f}")
    if emulator := os.environ.get("STORAGE_EMULATOR_HOST"):
        os.environ.setdefault("TENSORSTORE_GCS_HTTP_URL", emulator)
        os.environ.setdefault("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none is needed")  # of TensorStore, which looks for one
    if importlib.util.find_spec("fsspec") is not None:
        # What TensorStore or another process writes must be seen, too.
        conf = importlib.import_module("fsspec.config").conf
        conf["gcs"] = {"use_listings_cache": False} | conf.get("gcs", {})


@functools.cache
def client() -> Any:
    """The one client of this process."""
    prepare_libraries()
    gcsfs, aiohttp = importlib.import_module("gcsfs.core"), importlib.import_module("aiohttp")
    importlib.import_module("google_crc32c")
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # what failed is told by us, in one line
    # An emulator needs no credentials: none are looked for.
    token = "anon" if os.environ.get("STORAGE_EMULATOR_HOST") else None
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S, sock_read=_SILENCE_S)
    return gcsfs.GCSFileSystem(access="read_write", token=token, requests_timeout=timeout, skip_instance_cache=True)


@functools.cache
def threads() -> ThreadPoolExecutor:
    """Those that ask a store several things at once."""
    return ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="bucket")
