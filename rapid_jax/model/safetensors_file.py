# SPDX-License-Identifier: Apache-2.0
"""Safetensors files, one tensor or some of its rows in memory at a time in either direction.

The format: eight bytes of header length, a JSON header of name -> dtype, shape, byte range, then the bytes, which the
ranges cover without a gap. The safetensors package writes only whole dicts of arrays and memory-maps what it reads; a
checkpoint larger than the host's memory needs neither.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

import ml_dtypes
import numpy as np

from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.json_input import Fields, parse_object, refuse_lfs_pointer, shown
from rapid_jax.runtime.storage import AnyPlace, open_file, read_into

_DTYPES: Final = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F64": np.dtype(np.float64),
}
_NAMES: Final = {dtype: name for name, dtype in _DTYPES.items()}
# Bits of an element, of every type that the format has.
_BITS: Final = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
    **{"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6},
}
_LONGEST_HEADER: Final = 100_000_000  # bytes, the format's own limit
_AHEAD: Final = 1 << 16  # bytes that a store is asked for first: the header, if it is no longer
_MOST_AXIS: Final = 2**40


@dataclass(frozen=True)
class Tensor:
    """Where one tensor lies."""

    file: AnyPlace
    name: str
    dtype_name: str  # as in the header: F32, BF16, F16, F64, or one that `read` refuses
    shape: tuple[int, ...]
    start: int  # of its bytes, from the beginning of the file
    size: int  # in bytes


def tensors_in(path: AnyPlace) -> dict[str, Tensor]:
    """The tensors of one file, by name.

    A name that the file's metadata gives to a tensor of another name is that tensor too: safetensors' `save_model`
    stores what modules share once, and says so there. Raises InputError when the file is not safetensors, is cut short,
    or has bytes that belong to no tensor or to two.
    """
    try:
        with open_file(path, ahead=_AHEAD) as file:
            fields, base, actual = _header(path, file)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    metadata: Fields = fields.fields("__metadata__", Fields({}, fields.source))
    found = {name: _tensor(path, name, fields.fields(name), base) for name in fields if name != "__metadata__"}
    end = base
    for tensor in sorted(found.values(), key=lambda tensor: (tensor.start, tensor.size)):
        if tensor.start != end:
            raise InputError(f"{path}: {shown(tensor.name)} begins at byte {tensor.start}, expected {end}")
        end += tensor.size
    if end != actual:
        cut = "cut short" if end > actual else "not a safetensors file"
        raise InputError(f"{path}: {cut}: its tensors end at byte {end}, the file at {actual}")
    aliases = {name: metadata.text(name) for name in metadata}
    return found | {name: found[kept] for name, kept in aliases.items() if kept in found and name not in found}


def _header(path: AnyPlace, file: BinaryIO) -> tuple[Fields, int, int]:
    """(the header, where the tensors' bytes begin, where the file ends)."""
    actual = file.seek(0, 2)
    file.seek(0)
    first = file.read(64)
    refuse_lfs_pointer(first, str(path))
    length = int.from_bytes(first[:8], "little")
    if len(first) < 10 or first[8:9] != b"{" or length > _LONGEST_HEADER:
        raise InputError(f"{path}: not a safetensors file: it begins with {shown(first[:16])}")
    if 8 + length > actual:
        raise InputError(f"{path}: cut short: its header ends at byte {8 + length}, the file at {actual}")
    file.seek(8)
    return parse_object(file.read(length), f"{path}: header"), 8 + length, actual


def _tensor(path: AnyPlace, name: str, entry: Fields, base: int) -> Tensor:
    dtype_name, shape = entry.text("dtype"), tuple(entry.wholes("shape", most=_MOST_AXIS))
    if dtype_name not in _BITS:
        raise entry.error("dtype", f"one of {', '.join(_BITS)}")
    offsets = entry.wholes("data_offsets")
    if len(offsets) != 2 or offsets[1] < offsets[0]:
        raise entry.error("data_offsets", "where its bytes begin and end")
    size = offsets[1] - offsets[0]
    if math.prod(shape) * _BITS[dtype_name] != size * 8:
        raise InputError(
            f"{path}: {shown(name)} is {size} bytes, which its shape {shown(list(shape))} of {dtype_name} is not"
        )
    return Tensor(path, name, dtype_name, shape, base + offsets[0], size)


def check_dtype(tensor: Tensor) -> None:
    """Raises InputError for a tensor of a type that is not read."""
    if tensor.dtype_name not in _DTYPES:
        supported = ", ".join(_DTYPES)
        raise InputError(f"{tensor.file}: {shown(tensor.name)} has dtype {tensor.dtype_name}; supported: {supported}")


def read(tensor: Tensor, rows: range | None = None) -> np.ndarray:
    """The tensor, or these neighbouring rows of its first axis, as an array of its own in memory.

    No other byte is read. What is stored in float64 comes in float32.
    """
    check_dtype(tensor)
    dtype, shape, start = _DTYPES[tensor.dtype_name], tensor.shape, tensor.start
    if rows is not None:
        if not shape or rows.step != 1 or not 0 <= rows.start <= rows.stop <= shape[0]:
            raise ValueError(f"{tensor.name} of shape {shape} has no {rows}")
        start += tensor.size // max(shape[0], 1) * rows.start
        shape = (len(rows), *shape[1:])
    array = np.empty(shape, dtype)
    try:
        into = array.reshape(-1).view(np.uint8).data
        if read_into(tensor.file, start, into) < into.nbytes:
            raise InputError(f"{tensor.file}: cut short while {shown(tensor.name)} was read")
    except OSError as error:
        raise InputError(f"{tensor.file}: cannot be read: {error.strerror}") from error
    if dtype != np.float64:
        return array
    with np.errstate(over="ignore"):  # infinity, as in any other file
        return array.astype(np.float32)


def write(path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: np.dtype, arrays: Iterable[np.ndarray]) -> None:
    """Writes `arrays`, which come in the order of `shapes` and are taken one at a time."""
    header: dict = {"__metadata__": {"format": "pt"}}  # transformers asks for it
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the first tensor
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (name, shape), array in zip(shapes.items(), arrays, strict=True):
            if array.shape != shape or array.dtype != dtype:
                raise ValueError(f"{name}: expected {dtype} {shape}, got {array.dtype} {array.shape}")
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
