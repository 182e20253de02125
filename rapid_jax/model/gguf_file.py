# SPDX-License-Identifier: Apache-2.0
"""GGUF files: metadata and where each tensor lies, and one tensor at a time as dense float32.

The format is llama.cpp's, version 2 or 3. The gguf package's own reader makes two numpy views for every string of the
vocabulary and the merges: 3.4 s for SmolLM2, where this takes a tenth. Its dequantisation is used as it is.
"""

import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from gguf.quants import dequantize

from rapid_jax.runtime.errors import InputError

_SCALARS = {
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

    file: Path
    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]  # outermost axis first, as in Hugging Face checkpoints
    start: int  # of its bytes, from the beginning of the file
    size: int  # in bytes


class _Header:
    """Reads the parts of a header in order; any that reaches past the end of the file is an InputError."""

    def __init__(self, path: Path, file: BinaryIO):
        self._path, self._file = path, file
        self._left = os.fstat(file.fileno()).st_size

    def take(self, size: int) -> bytes:
        self._left -= size
        if self._left < 0:
            raise InputError(f"{self._path}: cut short: the file ends inside its header")
        return self._file.read(size)

    def numbers(self, code: str, count: int = 1) -> tuple[Any, ...]:
        return struct.unpack(f"<{count}{code}", self.take(count * struct.calcsize(f"<{code}")))

    def text(self) -> str:
        (length,) = self.numbers("Q")
        return self.take(length).decode()

    def value(self, kind: GGUFValueType) -> Any:
        if kind == GGUFValueType.STRING:
            return self.text()
        if kind != GGUFValueType.ARRAY:
            return self.numbers(_SCALARS[kind])[0]
        inner, count = self.numbers("I")[0], self.numbers("Q")[0]
        inner = GGUFValueType(inner)
        if inner in _SCALARS:
            return list(self.numbers(_SCALARS[inner], count))
        return [self.value(inner) for _ in range(count)]


def open_gguf(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(metadata, tensors by name). Raises InputError when it is not GGUF, of another version, or cut short."""
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    with open(path, "rb") as file:
        header = _Header(path, file)
        if header.take(4) != b"GGUF":
            raise InputError(f"{path}: not a GGUF file")
        (version,) = header.numbers("I")
        if version not in (2, 3):
            raise InputError(f"{path}: GGUF version {version} is not supported; supported: 2 and 3, little-endian")
        tensor_count, pair_count = header.numbers("Q", 2)
        try:
            metadata = {}
            for _ in range(pair_count):
                key = header.text()
                metadata[key] = header.value(GGUFValueType(header.numbers("I")[0]))
            entries = [_entry(header) for _ in range(tensor_count)]
        except ValueError as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{path}: not a valid GGUF header: {error}") from error
        alignment = metadata.get("general.alignment", 32)
        base = -(-file.tell() // alignment) * alignment
        actual = os.fstat(file.fileno()).st_size
    tensors = {name: _tensor(path, name, kind, shape, base + start) for name, kind, shape, start in entries}
    for tensor in tensors.values():
        if tensor.start + tensor.size > actual:
            end = tensor.start + tensor.size
            raise InputError(f"{path}: cut short: {tensor.name} ends at byte {end}, the file at {actual}")
    return metadata, tensors


def _entry(header: _Header) -> tuple[str, GGMLQuantizationType, tuple[int, ...], int]:
    name = header.text()
    (axes,) = header.numbers("I")
    shape = tuple(reversed(header.numbers("Q", axes)))
    return name, GGMLQuantizationType(header.numbers("I")[0]), shape, header.numbers("Q")[0]


def _tensor(path: Path, name: str, kind: GGMLQuantizationType, shape: tuple[int, ...], start: int) -> Tensor:
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if shape and shape[-1] % block:
        raise InputError(f"{path}: {name} has rows of {shape[-1]}, not a multiple of {kind.name}'s block of {block}")
    return Tensor(path, name, kind, shape, start, math.prod(shape) // block * block_bytes)


def read(tensor: Tensor) -> np.ndarray:
    """The tensor in dense float32."""
    stored = np.fromfile(tensor.file, np.uint8, tensor.size, offset=tensor.start)
    rows = math.prod(tensor.shape[:-1])
    # The package works on 16 rows at a time; quantised blocks do not care where a row ends, so join rows.
    joined = rows // math.gcd(rows, 64)
    try:
        return dequantize(stored.reshape(joined, -1), tensor.kind).reshape(tensor.shape)
    except NotImplementedError as error:
        kind = tensor.kind.name
        raise InputError(f"{tensor.file}: {tensor.name} is stored as {kind}, which is not supported") from error
