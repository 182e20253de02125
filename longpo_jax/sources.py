# SPDX-License-Identifier: Apache-2.0
"""The files that the sources of a corpus name, and the texts in them: plain or JSON lines, gzip or zstd."""

import glob
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zstandard

from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.files import local_path
from rapid_jax.runtime.progress import progress

_TEXT, _LINES, _PACKED = (".txt", ".md", ".tex"), ".jsonl", (".gz", ".zst")
_KINDS = "a .txt, .md, .tex or .jsonl file (or one of those with .gz or .zst)"
_BLOCK = 1 << 20
_WINDOW_BYTES = 1 << 31  # of a .zst file made with --long


@dataclass(frozen=True)
class File:
    """A file of texts; `name` is DOMAIN/FILE, file below the folder of the source."""

    name: str
    domain: str
    path: Path


def files_of(sources: Sequence[str], dropped: Counter[str]) -> list[File]:
    """Every file of the sources (DOMAIN=FOLDER, DOMAIN=GLOB) in the order of their names; hidden ones are passed over.

    Files of other kinds are counted in `dropped`. Raises InputError for no source, one without a file, and two files of
    one name.
    """
    if not sources:
        raise InputError("corpus.sources: expected DOMAIN=FOLDER or DOMAIN=GLOB, got none")
    found: dict[str, File] = {}
    for source in sources:
        domain, _, place = source.partition("=")
        matches = _matches(local_path(place, "corpus.sources"))
        known = {name: path for name, path in matches.items() if _suffix(path) in (*_TEXT, _LINES)}
        if not known:
            raise InputError(f"corpus.sources: {source}: expected {_KINDS} there, found none")
        if len(known) < len(matches):
            dropped["file of another kind"] += len(matches) - len(known)
        for name, path in known.items():
            try:
                name.encode()
            except UnicodeEncodeError as error:
                raise InputError(f"corpus.sources: {source}: expected names in UTF-8, got {name!a}") from error
            file = File(f"{domain}/{name}", domain, path)
            other = found.setdefault(file.name, file).path
            if other.resolve() != path.resolve():
                raise InputError(f"corpus.sources: {other} and {path} are both {file.name}: name the domains apart")
    return [found[name] for name in sorted(found)]


def _matches(place: Path) -> dict[str, Path]:
    """The files in a folder, or that a pattern matches, by their names below the folder that holds them all."""
    if place.exists():
        found, root = [place], place if place.is_dir() else place.parent
    else:
        found = [Path(match) for match in glob.glob(str(place), recursive=True)]
        parts = [index for index, part in enumerate(place.parts) if re.search(r"[*?[]", part)]
        root = Path(*place.parts[: parts[0]]) if parts else place.parent
    files = (file for path in found for file in (_below(path) if path.is_dir() else [path]))
    return {file.relative_to(root).as_posix(): file for file in files}


def _below(folder: Path) -> Iterator[Path]:
    """All files but the hidden ones, in folders that are links, too."""
    seen = set()
    for path, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(path)
        folders[:] = [] if real in seen else sorted(name for name in folders if not name.startswith("."))
        if real not in seen:
            yield from (Path(path, name) for name in names if not name.startswith("."))
        seen.add(real)


def _suffix(path: Path) -> str:
    bare = path.with_suffix("") if path.suffix.lower() in _PACKED else path
    return bare.suffix.lower()


def texts_of(files: Sequence[File], key: str, *, quiet: bool) -> Iterator[tuple[str, str, str]]:
    """(id, domain, text) of every document, lines ending in a newline. A text that was not UTF-8 has surrogates in it.

    The id is the file's name, "#", and which of the file it is. A line of a .jsonl file is a text or an object with one
    as `key`. Raises InputError for a file that cannot be read and, with its number, for a line that is neither.
    """
    try:
        total = sum(file.path.stat().st_size for file in files)
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be read: {error.strerror}") from error
    with progress("reading documents", total // _BLOCK, "MiB", quiet=quiet) as report:
        done = 0

        def advance(size: int) -> None:
            nonlocal done
            report.advance((done + size) // _BLOCK - done // _BLOCK)
            done += size

        for file in files:
            for index, text in _texts(file.path, key, advance):
                yield f"{file.name}#{index}", file.domain, re.sub("\r\n?", "\n", text) if "\r" in text else text


def _texts(path: Path, key: str, advance: Callable[[int], None]) -> Iterator[tuple[int, str]]:
    data = _unpacked(path, _blocks(path, advance))
    if _suffix(path) != _LINES:
        yield 0, b"".join(data).decode("utf-8-sig", "surrogateescape")
        return
    for index, line in _lines(data):
        yield index, _of_line(f"{path}, line {index + 1}", line, key)


def _of_line(place: str, line: bytes, key: str) -> str:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{place}: expected JSON: {' '.join(str(error).split())}") from error
    if isinstance(value, dict):
        if key not in value:
            raise InputError(f"{place}: expected the key {key!r} (corpus.text_key), got {', '.join(map(repr, value))}")
        value = value[key]
    if not isinstance(value, str):
        raise InputError(f"{place}: expected a text or an object with one as {key!r}, got {type(value).__name__}")
    return value


def _lines(data: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, each with its index among all lines."""
    index, rest = 0, b""
    for piece in data:
        *whole, rest = (rest + piece).split(b"\n")
        yield from ((at, line) for at, line in enumerate(whole, index) if line.strip())
        index += len(whole)
    if rest.strip():
        yield index, rest


def _blocks(path: Path, advance: Callable[[int], None]) -> Iterator[bytes]:
    try:
        with open(path, "rb") as file:
            while block := file.read(_BLOCK):
                advance(len(block))
                yield block
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error


def _unpacked(path: Path, blocks: Iterable[bytes]) -> Iterator[bytes]:
    """The bytes without their compression, whose frames may follow one another. InputError if they are damaged."""
    suffix = path.suffix.lower()
    if suffix not in _PACKED:
        yield from blocks
        return

    def new() -> Any:
        if suffix == ".gz":
            return zlib.decompressobj(31)
        return zstandard.ZstdDecompressor(max_window_size=_WINDOW_BYTES).decompressobj()

    stream, begun = new(), False
    try:
        for data in blocks:
            while data:
                yield stream.decompress(data)
                begun, data = not stream.eof, stream.unused_data if stream.eof else b""
                stream = new() if stream.eof else stream
    except (zlib.error, zstandard.ZstdError) as error:
        raise InputError(f"{path}: cannot be unpacked: {error}") from error
    if begun:
        raise InputError(f"{path}: cannot be unpacked: it ends too early")
