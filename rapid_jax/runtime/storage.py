# SPDX-License-Identifier: Apache-2.0
"""A place is a path on this machine or one in a bucket (gs://, s3://): what reads from it cannot tell which.

A local place is a `pathlib.Path`; one in a bucket is a `BucketPlace`, which has those of Path's names that are needed.
What Path has no name for is a function here: a file's size, and bytes of it. In a bucket there are objects, whole or
absent, and no folders: a folder is what names of objects begin with. Files are written by files.py and append_log.py.
"""

import importlib
import io
import math
import os
import re
import shutil
from pathlib import Path
from typing import Any, BinaryIO, Final, TypeAlias

from rapid_jax.runtime import buckets
from rapid_jax.runtime.bucket_place import STORES, BucketPlace, Now, Seen
from rapid_jax.runtime.errors import InputError

# A scheme, or a well-known one with a slash too few.
_SCHEME: Final = re.compile(
    r"\s*(?:([A-Za-z][A-Za-z0-9+.-]*)://|(gs|s3|https?|ftp|hdfs|file|abfss?|az):/)", re.IGNORECASE
)
_BUCKET: Final = re.compile(r"(gs|s3)://([a-z0-9][a-z0-9._-]{1,220}[a-z0-9])(?:/(.*))?", re.DOTALL)
_NOT_YET: Final = (
    "writing to a bucket is not supported here, only longpo's run folders, evaluations, sweeps and cache.folder may be "
    "in one; name a path here and copy (gcloud storage cp -r)"
)
_AHEAD: Final = 8 << 20  # bytes that a store is asked for at once
AnyPlace: TypeAlias = Path | BucketPlace


def working_place(text: str | AnyPlace, what: str) -> AnyPlace:
    """As `place_of`, of a file or folder that is written: what is there is looked for each time."""
    place = place_of(text, what)
    if isinstance(place, Path):
        return place
    return BucketPlace(place.bucket, place.key, Now(place.bucket, place.store), place.scheme)


def place_of(text: str | AnyPlace, what: str) -> AnyPlace:
    """The place that a user gave as `what` (a setting, an option) to be read: a path, ~ filled in, or one in a bucket.

    Nothing is asked of a store yet. Raises InputError for any scheme but gs:// and s3://, as hdfs://x or file:///x.
    """
    if isinstance(text, BucketPlace):
        return text
    if not _is_in_bucket(text):
        return _local(text, what, "only gs:// and s3:// are read besides")
    parts = _BUCKET.fullmatch(str(text))
    key = ((parts and parts[3]) or "").rstrip("/")
    if parts is None or not key.isprintable():
        raise InputError(f"{what}: expected {str(text)[:2]}://BUCKET/NAME, got {str(text)!a}")
    return BucketPlace(parts[2], key, Seen(parts[2], STORES[parts[1]]), parts[1])


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
    return isinstance(text, str) and text.startswith(("gs://", "s3://"))


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


def bytes_of(place: AnyPlace) -> bytes | None:
    """All bytes of a file; None where there is none. Raises OSError or InputError where it cannot be read."""
    try:
        return place.read_bytes() if isinstance(place, Path) or place.is_file() else None
    except FileNotFoundError:
        return None


def text_in(place: AnyPlace, encoding: str) -> str:
    """The text of a file, each end of a line as \\n. Raises OSError, UnicodeDecodeError or InputError."""
    with io.TextIOWrapper(open_file(place), encoding=encoding) as file:
        return file.read()


def full_name(place: AnyPlace) -> str:
    """What tells it from all other places that this machine sees."""
    return os.path.realpath(place) if isinstance(place, Path) else str(place)


def files_below(folder: AnyPlace) -> dict[str, int]:
    """The sizes of all files in a folder and the folders in it, by their names below it, in order."""
    if not isinstance(folder, Path):
        objects, _ = folder.store.listed(folder.bucket, folder.prefix, deep=True)
        return {found.name.removeprefix(folder.prefix): found.size for found in objects}
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}


def bytes_free(folder: AnyPlace) -> float:
    """How many bytes there is room for in a folder that is there; infinite in a bucket."""
    return shutil.disk_usage(folder).free if isinstance(folder, Path) else math.inf


def library_path(place: AnyPlace) -> Any:
    """The place as a library takes it that opens folders of both kinds (Orbax, by etils)."""
    if isinstance(place, Path):
        return place.absolute()
    buckets.prepare_libraries()
    return importlib.import_module("etils.epath").Path(str(place))


def has_rename(place: AnyPlace) -> bool:
    """Whether a folder there can be written beside its place, and be given its name at once."""
    return isinstance(place, Path)


def open_file(place: AnyPlace, *, ahead: int = _AHEAD) -> BinaryIO:
    """The file, open for reading and seeking; a store is asked for at least `ahead` bytes at once.

    Raises OSError or InputError where there is none.
    """
    return open(place, "rb") if isinstance(place, Path) else place.open(ahead)


def read_into(place: AnyPlace, start: int, into: memoryview) -> int:
    """Fills `into` with the file's bytes from `start` on, no other byte is read; how many there were."""
    if not isinstance(place, Path):
        return place.store.read_into(place.bucket, place.found(), start, into)
    rest = into
    with open(place, "rb", buffering=0) as file:
        file.seek(start)
        while rest.nbytes and (got := file.readinto(rest)):
            rest = rest[got:]
    return into.nbytes - rest.nbytes
