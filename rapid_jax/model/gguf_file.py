# SPDX-License-Identifier: Apache-2.0
"""GGUF files: metadata and where each tensor lies, and one tensor at a time as dense float32.

The format is llama.cpp's, version 2 or 3. The gguf package's own reader makes two numpy views for every string of the
vocabulary and the merges: 3.4 s for SmolLM2, where this takes a tenth; nor does it bound what a header makes it
allocate. Its dequantisation is used as it is.
"""

import math
import struct
from dataclasses import dataclass
from typing import Any, BinaryIO, Final

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from gguf.quants import dequantize

from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.input_files import open_regular
from rapid_jax.runtime.json_input import Fields, shown
from rapid_jax.runtime.storage import AnyPlace, read_into

# What no model comes near: a header has some 10 MB, 500,000 merges, 60 pairs and 1,000 tensors.
_MOST_BYTES: Final = 1 << 28  # of a header
_MOST_TEXT: Final = 1 << 24  # bytes of one text
_MOST_VALUES: Final = 1 << 22  # of one array
_MOST_PAIRS: Final = 1 << 16
_MOST_TENSORS: Final = 1 << 20
_MOST_AXES: Final = 4  # llama.cpp's own limits, this and the next
_MOST_NAME: Final = 64  # characters of a tensor's name
_MOST_KEY: Final = 256
_SCALARS: Final = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}


@dataclass(frozen=True)
class Tensor:
    """Where one tensor lies."""

    file: AnyPlace
    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]  # outermost axis first, as in Hugging Face checkpoints
    start: int  # of its bytes, from the beginning of the file
    size: int  # in bytes


class _Header:
    """Reads the parts of a header in order; any that reaches past the file's end, or a limit, is an InputError.

    `place` is what is being read, for the errors.
    """

    def __init__(self, path: AnyPlace, file: BinaryIO):
        self._path, self._file = path, file
        self._left = file.seek(0, 2)
        file.seek(0)
        self._allowed = _MOST_BYTES
        self.place = "the header"

    def error(self, words: str) -> InputError:
        return InputError(f"{self._path}: {self.place}: {words}")

    def take(self, size: int) -> bytes:
        self._left -= size
        self._allowed -= size
        if self._left < 0:
            raise InputError(f"{self._path}: cut short: the file ends inside its header, in {self.place}")
        if self._allowed < 0:
            raise InputError(f"{self._path}: expected a header of at most {_MOST_BYTES} bytes, got a longer one")
        return self._file.read(size)

    def numbers(self, code: str, count: int = 1) -> tuple[Any, ...]:
        return struct.unpack(f"<{count}{code}", self.take(count * struct.calcsize(f"<{code}")))

    def count(self, what: str, most: int, code: str = "Q") -> int:
        (count,) = self.numbers(code)
        if count > self._left:  # each takes a byte at least
            raise InputError(f"{self._path}: cut short: {self.place} has {count} {what}, the file ends before")
        if count > most:
            raise self.error(f"expected at most {most} {what}, got {count}")
        return count

    def text(self) -> str:
        data = self.take(self.count("bytes of text", _MOST_TEXT))
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise self.error(f"expected text in UTF-8, got {shown(data)}") from error

    def name(self, most: int) -> str:
        """The name of a key or tensor, fit to be printed in an error."""
        name = self.text()
        if len(name) > most or not (name.isascii() and name.isprintable()):
            raise self.error(f"expected a name of at most {most} printable ASCII characters, got {shown(name)}")
        return name

    def value(self) -> Any:
        kind = self._kind()
        if kind == GGUFValueType.STRING:
            return self.text()
        if kind != GGUFValueType.ARRAY:
            return self.numbers(_SCALARS[kind])[0]
        inner = self._kind()
        if inner == GGUFValueType.ARRAY:  # llama.cpp reads none
            raise self.error("expected an array of numbers or texts, got one of arrays")
        count = self.count("values", _MOST_VALUES)
        if inner in _SCALARS:
            return list(self.numbers(_SCALARS[inner], count))
        return [self.text() for _ in range(count)]

    def entry(self) -> tuple[str, GGMLQuantizationType, tuple[int, ...], int]:
        """(name, kind, shape, start behind the header) of a tensor."""
        name = self.name(_MOST_NAME)
        self.place = f"tensor {name}"
        shape = tuple(reversed(self.numbers("Q", self.count("axes", _MOST_AXES, "I"))))
        (kind,) = self.numbers("I")
        if kind not in GGMLQuantizationType.__members__.values():
            raise self.error(f"expected a kind of numbers that the gguf package knows, got {kind}")
        return name, GGMLQuantizationType(kind), shape, self.numbers("Q")[0]

    def _kind(self) -> GGUFValueType:
        (kind,) = self.numbers("I")
        if kind not in GGUFValueType.__members__.values():
            raise self.error(f"expected a value of type 0 to {max(GGUFValueType)}, got type {kind}")
        return GGUFValueType(kind)


def open_gguf(path: AnyPlace) -> tuple[Fields, dict[str, Tensor]]:
    """(metadata, tensors by name). Raises InputError when it is not GGUF, of another version, damaged or cut short."""
    try:
        with open_regular(path) as file:
            return _read_header(path, file)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error


def _read_header(path: AnyPlace, file: BinaryIO) -> tuple[Fields, dict[str, Tensor]]:
    header = _Header(path, file)
    if header.take(4) != b"GGUF":
        raise InputError(f"{path}: not a GGUF file")
    (version,) = header.numbers("I")
    if version not in (2, 3):
        raise InputError(f"{path}: GGUF version {version} is not supported; supported: 2 and 3, little-endian")
    tensor_count, pair_count = header.count("tensors", _MOST_TENSORS), header.count("keys", _MOST_PAIRS)
    metadata: dict[str, Any] = {}
    for index in range(pair_count):
        header.place = f"key {index + 1} of {pair_count}"
        key = header.name(_MOST_KEY)
        header.place = f"key {key}"
        if key in metadata:
            raise header.error("expected each key once, got it twice")
        metadata[key] = header.value()
    entries: dict[str, tuple[GGMLQuantizationType, tuple[int, ...], int]] = {}
    for index in range(tensor_count):
        header.place = f"tensor {index + 1} of {tensor_count}"
        name, kind, shape, start = header.entry()
        if name in entries:
            raise header.error("expected each tensor once, got it twice")
        entries[name] = (kind, shape, start)
    fields = Fields(metadata, str(path))
    return fields, _tensors(path, fields, entries, file.tell(), file.seek(0, 2))


def _tensors(
    path: AnyPlace,
    metadata: Fields,
    entries: dict[str, tuple[GGMLQuantizationType, tuple[int, ...], int]],
    header_end: int,
    file_size: int,
) -> dict[str, Tensor]:
    """The tensors, which lie one behind the other in the order of the header, each at a multiple of the alignment."""
    alignment = metadata.whole("general.alignment", 32, least=1, most=1 << 20)
    if alignment & (alignment - 1):
        raise metadata.error("general.alignment", "a power of two")
    base, expected = -(-header_end // alignment) * alignment, 0
    tensors = {}
    for name, (kind, shape, start) in entries.items():
        tensor = tensors[name] = _tensor(path, name, kind, shape, base + start)
        if start != expected:
            raise InputError(f"{path}: {name} must begin at byte {expected} behind the header, got {start}")
        if (end := tensor.start + tensor.size) > file_size:
            raise InputError(f"{path}: cut short: {name} ends at byte {end}, the file at {file_size}")
        expected = -(-(start + tensor.size) // alignment) * alignment
    if file_size >= (end := base + expected) + alignment:  # a damaged last tensor would be read as a smaller one
        raise InputError(f"{path}: the tensors end at byte {end}, the file at {file_size}")
    return tensors


def _tensor(path: AnyPlace, name: str, kind: GGMLQuantizationType, shape: tuple[int, ...], start: int) -> Tensor:
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if not shape or math.prod(shape) == 0:
        raise InputError(f"{path}: {name} must have rows and columns, got shape {list(shape)}")
    if shape[-1] % block:
        raise InputError(f"{path}: {name} has rows of {shape[-1]}, not a multiple of {kind.name}'s block of {block}")
    return Tensor(path, name, kind, shape, start, math.prod(shape) // block * block_bytes)


def read(tensor: Tensor) -> np.ndarray:
    """The tensor in dense float32."""
    stored = np.empty(tensor.size, np.uint8)
    if read_into(tensor.file, tensor.start, stored.data) < tensor.size:
        raise InputError(f"{tensor.file}: {tensor.name} was cut short while the file was read")
    rows = math.prod(tensor.shape[:-1])
    # The package works on 16 rows at a time; quantised blocks do not care where a row ends, so join rows.
    joined = rows // math.gcd(rows, 64)
    return _dense(tensor, stored.reshape(joined, -1)).reshape(tensor.shape)


def check_readable(tensor: Tensor) -> None:
    """Raises InputError if numbers of the tensor's kind cannot be made dense."""
    _dense(tensor, np.zeros((1, GGML_QUANT_SIZES[tensor.kind][1]), np.uint8))


def _dense(tensor: Tensor, stored: np.ndarray) -> np.ndarray:
    try:
        return dequantize(stored, tensor.kind)
    except NotImplementedError as error:
        kind = tensor.kind.name
        raise InputError(f"{tensor.file}: {tensor.name} is stored as {kind}, which is not supported") from error
