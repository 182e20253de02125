# SPDX-License-Identifier: Apache-2.0
"""Files that somebody else made: regular ones alone, read up to a limit, text in the encoding of its mark."""

import codecs
import errno
import io
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Final

from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.storage import AnyPlace, BucketPlace

_BLOCK: Final = 1 << 20
# Names of what this process has open already: standard input, and what a shell writes for <(command).
_OPEN_ALREADY: Final = re.compile(r"/dev/(stdin|fd/\d+)|/proc/(self|\d+)/fd/\d+")
_KINDS: Final = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
# The longer mark first: UTF-32 (little endian) starts with the mark of UTF-16.
_MARKS: Final = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


def open_regular(path: str | AnyPlace, *, or_open_already: bool = False) -> BinaryIO:
    """The file, open for reading bytes. It must be a regular one: others may block, never end, or act when opened.

    `or_open_already` allows the names under which a process finds its own open files, /dev/stdin and /dev/fd/N.
    Raises InputError for another kind of file (which is not opened), and OSError as `open` does, also for a folder; for
    an object in a bucket always InputError.
    """
    if isinstance(path, BucketPlace):
        return path.open()
    shell_pipe = or_open_already and _OPEN_ALREADY.fullmatch(os.fspath(path)) is not None
    if not shell_pipe:
        _require_regular(path, os.stat(path).st_mode)
    file = open(path, "rb", opener=None if shell_pipe else _open_without_waiting)  # noqa: SIM115 - the caller closes it
    try:
        mode = os.fstat(file.fileno()).st_mode
        if not shell_pipe or stat.S_ISDIR(mode):
            _require_regular(path, mode)  # it may have been replaced in between
    except (InputError, OSError):
        file.close()
        raise
    return file


def blocks(file: BinaryIO | io.RawIOBase, most: int, source: str) -> Iterator[bytes]:
    """The bytes of a file, piece by piece. Raises InputError naming `source` once there are more than `most`."""
    size = 0
    while block := file.read(_BLOCK):
        size += len(block)
        if size > most:
            raise InputError(f"{source}: expected at most {most >> 20} MiB, got more")
        yield block


def byte_order_mark(data: bytes) -> tuple[bytes, str | None]:
    """The byte order mark that the data begins with and the encoding it stands for; (b"", None) without one."""
    return next(((mark, encoding) for mark, encoding in _MARKS if data.startswith(mark)), (b"", None))


def kind_of(mode: int) -> str | None:
    """What a file of this mode (os.stat's) is other than a regular one ("a pipe"); None for a regular file."""
    if stat.S_ISREG(mode):
        return None
    return next((kind for test, kind in _KINDS if test(mode)), "something else")


def _require_regular(path: str | Path, mode: int) -> None:
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    if (kind := kind_of(mode)) is not None:
        raise InputError(f"{path}: cannot be read: expected a regular file, got {kind}")


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # if a pipe took the file's place, open would wait for its writer
