# SPDX-License-Identifier: Apache-2.0
"""Files that are written whole or not at all, content hashes, and the cache folder."""

import contextlib
import fcntl
import hashlib
import os
import re
import secrets
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rapid_jax.runtime import bucket_writes
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.storage import AnyPlace, BucketPlace, local_path, open_file, working_place

_RESTLESS_S = 2.0  # a file that changed so lately may change again within one tick of its file system's clock

_CACHE = "RAPID_JAX_CACHE"
_AHEAD = 8 << 20  # bytes that a store is asked for at once
_UNFINISHED = ".unfinished"  # in a bucket's folder that is being written
# What is being written has such a name beside its own, or, moved aside, with the ending; its writer holds its lock.
_TEMPORARY = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{16}(?P<old>\.old)?")


@contextlib.contextmanager
def replace_file(path: AnyPlace) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on a clean exit it replaces `path` at once, else it is removed.

    The file gets the permissions that the process gives to any new file. What killed processes have left of it is
    removed first. Of a place in a bucket the temporary file is on this machine, and is uploaded.
    """
    if isinstance(path, BucketPlace):
        with tempfile.TemporaryDirectory(prefix="rapid-") as here:
            yield (written := Path(here, "file"))
            bucket_writes.upload(path, written)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent, path.name)
    temporary, held = _made(path, lambda new: os.open(new, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666))
    try:
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
        os.close(held)


@contextlib.contextmanager
def replace_folder(path: Path) -> Iterator[Path]:
    """Yields an empty temporary folder beside `path`; on a clean exit it takes the place of `path`, else it is removed.

    What was at `path` is moved aside first, put back if the new folder cannot be moved in, and deleted last: a reader
    never finds a half-written folder, and for the instant between the two moves finds none. What killed processes have
    left of it is removed first, and what they had moved aside put back. Raises InputError if `path` is a file.
    """
    if path.is_file():
        raise InputError(f"{path}: expected a folder or nothing there, got a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent, path.name)

    def make(new: Path) -> int:
        new.mkdir()
        return os.open(new, os.O_RDONLY | os.O_DIRECTORY)

    temporary, held = _made(path, make)
    old = path.with_name(f"{_beside(path).name}.old")
    try:
        yield temporary
        with _kept(path):
            if path.exists():
                path.rename(old)
            try:
                temporary.rename(path)
            except OSError:
                if old.exists():
                    old.rename(path)
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
        os.close(held)


@contextlib.contextmanager
def new_folder(place: AnyPlace, *, known_by: str) -> Iterator[Callable[[str], contextlib.AbstractContextManager[Path]]]:
    """As `replace_folder`, a file at a time: what is yielded opens a file by its name, as a path to write it to.

    In a bucket, where no folder can be moved, what is at `place` is deleted first, and `known_by`, the file without
    which the folder is none, before all else: it must be written last. Until then the folder is one that `may_replace`
    says yes to. Files are on this machine, one at a time, until they are uploaded.
    """
    if isinstance(place, Path):
        with replace_folder(place) as temporary:
            yield lambda name: contextlib.nullcontext(temporary / name)
        return
    with replace_file(place / _UNFINISHED) as mark:
        mark.write_text("this folder is being written")
    bucket_writes.delete(place / known_by)
    old = [found.key for found in place.below() if found.name != _UNFINISHED]
    bucket_writes.delete_all(place, old)
    yield lambda name: replace_file(place / name)
    (place / _UNFINISHED).unlink()


def remove_folder(place: AnyPlace) -> None:
    """Takes away a folder and everything in it, if it is there."""
    if isinstance(place, Path):
        shutil.rmtree(place, ignore_errors=True)
    else:
        bucket_writes.delete_all(place, [found.key for found in place.below()])


class LocalFolder:
    """A folder for what only writes to this machine (TensorBoard): the place itself, or for one in a bucket a copy.

    The copy begins empty and is temporary; `push` uploads the files of it that have changed.
    """

    def __init__(self, place: AnyPlace):
        self._place, self.path = place, place if isinstance(place, Path) else Path(tempfile.mkdtemp(prefix="rapid-"))
        self._pushed: dict[Path, int] = {}
        if self.path is not place:
            weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)

    def push(self) -> None:
        """Everything in it is at the place."""
        if isinstance(self._place, Path):
            return
        for path in [path for path in self.path.rglob("*") if path.is_file()]:
            if self._pushed.get(path) != (size := path.stat().st_size):
                target = self._place / path.relative_to(self.path).as_posix()
                bucket_writes.upload(target, path)
                self._pushed[path] = size


def may_replace(place: AnyPlace, *, known_by: str) -> bool:
    """Whether there is nothing at `place`, an empty folder, or one that `new_folder` has written or begun to write."""
    if not place.exists():
        return True
    names = {path.name for path in place.iterdir()} if place.is_dir() else {""}
    return not names or known_by in names or (_UNFINISHED in names and not isinstance(place, Path))


def remove_leftovers(folder: AnyPlace, name: str | None = None) -> None:
    """Removes what `replace_file` and `replace_folder` of killed processes have left in `folder`, if it is there.

    Of one `name` alone, where others keep files in that folder, too. A folder that had been moved aside is put back
    where nothing has taken its place. What a living process writes is left alone: it holds a lock (between machines as
    far as the file system has locks between them). In a bucket they leave nothing.
    """
    if isinstance(folder, BucketPlace):
        return
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in list(entries):
            match = _TEMPORARY.fullmatch(entry.name)
            if match is not None and name in (None, match["name"]) and not entry.is_symlink():
                _remove_leftover(Path(entry.path), Path(entry.path).with_name(match["name"]), match["old"] is not None)


def _remove_leftover(path: Path, target: Path, is_old: bool) -> None:
    with contextlib.suppress(OSError):  # another was faster, no permission, or no locks there
        held = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if is_old and not target.exists():
                path.rename(target)
            elif path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()
        finally:
            os.close(held)


def _made(path: Path, make: Callable[[Path], int]) -> tuple[Path, int]:
    """(a new temporary file or folder beside `path`, its descriptor, which holds its lock)."""
    while True:
        temporary = _beside(path)
        held = make(temporary)
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(held, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):  # who removes leftovers came between the two lines above
            if os.stat(temporary).st_ino == os.fstat(held).st_ino:
                return temporary, held
        os.close(held)


@contextlib.contextmanager
def _kept(folder: Path) -> Iterator[None]:
    """While it is moved aside, `folder` is nobody's leftover."""
    held = None
    with contextlib.suppress(OSError):  # nothing there, or no locks
        held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(held, fcntl.LOCK_SH | fcntl.LOCK_NB)
    try:
        yield
    finally:
        if held is not None:
            os.close(held)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}")


def digest(*parts: bytes | str) -> str:
    """SHA-256 of the parts in hexadecimal; each part is length-prefixed: no two lists of parts collide by joining."""
    state = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        state.update(len(data).to_bytes(8, "little"))
        state.update(data)
    return state.hexdigest()


def sha256_of(path: AnyPlace) -> str:
    """SHA-256 of a file's bytes in hexadecimal, wherever it lies: all of it is read."""
    state = hashlib.sha256()
    with open_file(path, ahead=_AHEAD) as file:
        while block := file.read(1 << 20):
            state.update(block)
    return state.hexdigest()


def digest_file(path: AnyPlace) -> str:
    """SHA-256 of a file's bytes in hexadecimal; of an object in a bucket that of its size and the store's checksums.

    So an object is known without its bytes being read for it, and not by the name of the copy of a file that it is.
    """
    if isinstance(path, BucketPlace):
        return digest("in a bucket", path.found().checksum)
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digests_of(paths: Sequence[AnyPlace], kept: Path) -> list[str]:
    """`digest_file` of each, several at once; a file on this machine is read again only if it has changed.

    What was read is kept in the folder `kept`, named by everything that changes with a file: inode, size, the times of
    the last change to its bytes and to its inode, the second of which no program can set.
    """
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as readers:
        return list(readers.map(lambda path: _digest_of(path, kept), paths))


def _digest_of(path: AnyPlace, kept: Path) -> str:
    if isinstance(path, BucketPlace):
        return digest_file(path)
    before = path.stat()
    marks = (before.st_dev, before.st_ino, before.st_size, before.st_mtime_ns, before.st_ctime_ns)
    note = kept / f"{digest(str(path.resolve()), *map(str, marks))}.txt"
    with contextlib.suppress(OSError, ValueError):
        if re.fullmatch("[0-9a-f]{64}", known := note.read_text(encoding="ascii")):
            return known
    found = digest_file(path)
    after = path.stat()
    if after.st_ctime_ns == before.st_ctime_ns and time.time() - after.st_ctime > _RESTLESS_S:
        with contextlib.suppress(OSError), replace_file(note) as temporary:
            temporary.write_text(found, encoding="ascii")
    return found


def cache_place(chosen: str | None) -> AnyPlace:
    """Where the setting cache.folder, else $RAPID_JAX_CACHE, has documents' keys and values: it may be in a bucket."""
    for text, what in ((chosen, "cache.folder"), (os.environ.get(_CACHE), f"${_CACHE}")):
        if text:
            return working_place(text, what)
    return default_cache_dir()


def cache_dir(chosen: str | None) -> Path:
    """The folder on this machine for all that is kept besides: that of `cache_place`, else the default one."""
    place = cache_place(chosen)
    return place if isinstance(place, Path) else default_cache_dir()


def default_cache_dir() -> Path:
    """`$RAPID_JAX_CACHE` on this machine, else `$XDG_CACHE_HOME/rapid_jax`, else `~/.cache/rapid_jax`, as it is now."""
    if (chosen := os.environ.get(_CACHE)) and isinstance(place := working_place(chosen, f"${_CACHE}"), Path):
        return place
    if chosen := os.environ.get("XDG_CACHE_HOME"):
        return local_path(chosen, "$XDG_CACHE_HOME") / "rapid_jax"
    return Path.home() / ".cache" / "rapid_jax"
