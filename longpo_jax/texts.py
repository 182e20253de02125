# SPDX-License-Identifier: Apache-2.0
"""The texts in a corpus' files: plain or JSON lines, gzip or zstd, read piece by piece within limits."""

import codecs
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import PurePath
from typing import Any, Final

import zstandard

from longpo_jax.sources import LINES, PACKED, File, suffix_of
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.input_files import byte_order_mark, open_regular
from rapid_jax.runtime.json_input import parse_json
from rapid_jax.runtime.progress import progress
from rapid_jax.runtime.storage import AnyPlace, size_of

_MIB: Final = 1 << 20
_BLOCK: Final = 1 << 18  # bytes read at once
_ZSTD_BLOCK: Final = 1 << 10  # bytes unpacked at once: 4 of them may be 128 KiB of text
_WINDOW_BYTES: Final = 1 << 31  # of a .zst file made with --long
# Text is packed to a fifth or a tenth, lists and tables to a fiftieth; what grows more is made to fill a memory.
_MOST_GROWTH: Final = 200
_GROWTH_FREE: Final = 16 * _MIB  # unpacked, before that is looked at


def texts_of(
    files: Sequence[File], key: str, max_mib: int, dropped: Counter[str], *, quiet: bool
) -> Iterator[tuple[str, str, str]]:
    """(id, domain, text) of every document, lines ending in a newline. A text that was not UTF-8 has surrogates in it.

    The id is the file's name, "#", and which of the file it is. A line of a .jsonl file is a text or an object with one
    as `key`. Files are in UTF-8, or in the encoding of their byte order mark. Documents of more than `max_mib` MiB
    (lines of a .jsonl file) are counted in `dropped` and not held in memory. Raises InputError for a file that cannot
    be read, is damaged, or unpacks to more than 200 times its size, and, with its number, for a line that is neither.
    """
    try:
        ends, total = [], 0
        for file in files:
            total += size_of(file.path)
            ends.append(total)
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be read: {error.strerror}") from error
    with progress("reading documents", total // _MIB, "MiB", quiet=quiet) as report:
        done = 0

        def advance(size: int) -> None:
            nonlocal done
            report.advance((done + size) // _MIB - done // _MIB)
            done += size

        for file, end in zip(files, ends, strict=True):
            for index, text in _texts(file.path, key, max_mib * _MIB, advance):
                if text is None:
                    dropped[f"larger than {max_mib} MiB (corpus.max_mib)"] += 1
                    continue
                yield f"{file.name}#{index}", file.domain, re.sub("\r\n?", "\n", text) if "\r" in text else text
            advance(max(0, end - done))  # of a file that was not read to its end


def _texts(path: AnyPlace, key: str, most: int, advance: Callable[[int], None]) -> Iterator[tuple[int, str | None]]:
    """The texts of a file, each with its index; None for one of more than `most` bytes."""
    data = _in_utf8(_unpack(path, _blocks(path, advance)))
    if suffix_of(path) == LINES:
        for index, line in _lines(data, most):
            yield index, None if line is None else _of_line(f"{path}, line {index + 1}", line, key)
        return
    whole = bytearray()
    for piece in data:
        whole += piece
        if len(whole) > most:
            yield 0, None
            return
    yield 0, whole.decode("utf-8", "surrogateescape")


def _of_line(place: str, line: bytes, key: str) -> str:
    value = parse_json(line, place)
    if isinstance(value, dict):
        if key not in value:
            keys = ", ".join(map(repr, list(value)[:20]))
            raise InputError(f"{place}: expected the key {key!r} (corpus.text_key), got {keys}")
        value = value[key]
    if not isinstance(value, str):
        raise InputError(f"{place}: expected a text or an object with one as {key!r}, got {type(value).__name__}")
    return value


def _lines(data: Iterable[bytes], most: int) -> Iterator[tuple[int, bytes | None]]:
    """The lines that are not blank, each with its index among all lines; None for one of more than `most` bytes."""
    index, held = 0, _Line(most)
    for piece in data:
        first, *others = piece.split(b"\n")
        held.add(first)
        if not others:
            continue
        yield from held.taken(index)
        *whole, rest = others
        for at, line in enumerate(whole, index + 1):
            if line.strip():
                yield at, line if len(line) <= most else None
        index += len(others)
        held.add(rest)
    yield from held.taken(index)


class _Line:
    """A line that comes in pieces; of one that is too long no more is kept."""

    def __init__(self, most: int):
        self._most = most
        self._pieces, self._size = [], 0

    def add(self, piece: bytes) -> None:
        self._size += len(piece)
        self._pieces.append(piece)
        if self._size > self._most:
            self._pieces.clear()

    def taken(self, index: int) -> Iterator[tuple[int, bytes | None]]:
        line = b"".join(self._pieces)
        if self._size > self._most:
            yield index, None
        elif line.strip():
            yield index, line
        self._pieces, self._size = [], 0


def _blocks(path: AnyPlace, advance: Callable[[int], None]) -> Iterator[bytes]:
    try:
        with open_regular(path) as file:
            while block := file.read(_BLOCK):
                advance(len(block))
                yield block
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error


def _in_utf8(data: Iterator[bytes]) -> Iterator[bytes]:
    """The text in UTF-8 without a mark. What is no text in its marked encoding is none in UTF-8 either."""
    head = b""
    for piece in data:
        head += piece
        if len(head) >= len(codecs.BOM_UTF32_LE):
            break
    mark, encoding = byte_order_mark(head)
    head = head[len(mark) :]
    if encoding in (None, "utf-8"):
        yield head
        yield from data
        return
    decoder = codecs.getincrementaldecoder(encoding)("surrogatepass")
    try:
        yield decoder.decode(head).encode("utf-8", "surrogatepass")
        for piece in data:
            yield decoder.decode(piece).encode("utf-8", "surrogatepass")
        yield decoder.decode(b"", final=True).encode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        yield b"\xff"


def _unpack(path: AnyPlace, blocks: Iterator[bytes]) -> Iterator[bytes]:
    """The bytes without their compression, in pieces of some MiB at most. InputError if they are damaged."""
    suffix = PurePath(path.name).suffix.lower()
    if suffix not in PACKED:
        yield from blocks
        return
    packed = unpacked = 0
    pieces = _gunzip(path, blocks) if suffix == ".gz" else _unzstd(path, blocks)
    try:
        for size, piece in pieces:
            packed, unpacked = packed + size, unpacked + len(piece)
            if unpacked > max(_GROWTH_FREE, _MOST_GROWTH * packed):
                raise InputError(
                    f"{path}: expected at most {_MOST_GROWTH} bytes for each packed one, got {unpacked} for {packed}"
                )
            yield piece
    except (zlib.error, zstandard.ZstdError, MemoryError) as error:
        reason = str(error) or "it needs too much memory"
        raise InputError(f"{path}: cannot be unpacked: {reason}") from error


def _gunzip(path: AnyPlace, blocks: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    """(packed bytes that were used, what was in them): members one behind the other, and zeros behind the last."""
    stream: Any = None
    for block in blocks:
        data = block
        while data:
            if stream is None:
                used, data = len(data), data.lstrip(b"\0")
                yield used - len(data), b""
                if not data:
                    break
                stream = zlib.decompressobj(31)
            piece = stream.decompress(data, _MIB)
            rest = stream.unused_data if stream.eof else stream.unconsumed_tail
            yield len(data) - len(rest), piece
            # Without input left there may be output left: the next call, with more or without, gives it.
            data, stream = rest, None if stream.eof else stream
    while stream is not None:
        piece = stream.decompress(b"", _MIB)
        if stream.eof:
            stream = None
        elif not piece:
            raise InputError(f"{path}: cannot be unpacked: it ends too early")
        yield 0, piece


def _unzstd(path: AnyPlace, blocks: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    """(packed bytes that were used, what was in them): frames one behind the other."""
    stream: Any = None
    for block in blocks:
        for at in range(0, len(block), _ZSTD_BLOCK):
            data = block[at : at + _ZSTD_BLOCK]
            while data:
                if stream is None:
                    stream = zstandard.ZstdDecompressor(max_window_size=_WINDOW_BYTES).decompressobj()
                piece = stream.decompress(data)
                rest = stream.unused_data if stream.eof else b""
                yield len(data) - len(rest), piece
                data, stream = rest, None if stream.eof else stream
    if stream is not None:
        raise InputError(f"{path}: cannot be unpacked: it ends too early")
