# SPDX-License-Identifier: Apache-2.0
"""Safetensors files, one tensor in memory at a time in either direction.

The format: eight bytes of header length, a JSON header of name -> dtype, shape, byte range, then the bytes. The
safetensors package writes only whole dicts of arrays and memory-maps what it reads; a checkpoint larger than the host's
memory needs neither.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from rapid_jax.runtime.errors import InputError

_DTYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16)}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class Tensor:
    """Where one tensor lies."""

    file: Path
    name: str
    dtype_name: str  # as in the header: F32, BF16, F16, or one that `read` refuses
    shape: tuple[int, ...]
    start: int  # of its bytes, from the beginning of the file
    size: int  # in bytes


def tensors_in(path: Path) -> dict[str, Tensor]:
    """The tensors of one file, by name. Raises InputError when it is not safetensors or is cut short."""
    actual = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if actual < 8 + length or length < 2:
            raise InputError(
                f"{path}: not a whole safetensors file: its header ends at {8 + length}, the file at {actual}"
            )
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise InputError(f"{path}: not a safetensors file: its header is not JSON") from error
    if not isinstance(header, dict):
        raise InputError(f"{path}: not a safetensors file: its header is not a JSON object")
    header.pop("__metadata__", None)
    return {name: _tensor(path, name, entry, 8 + length, actual) for name, entry in header.items()}


def _tensor(path: Path, name: str, entry: Mapping, base: int, actual: int) -> Tensor:
    try:
        (first, last), shape, dtype_name = entry["data_offsets"], tuple(entry["shape"]), entry["dtype"]
        tensor = Tensor(path, name, dtype_name, shape, base + first, last - first)
        right = dtype_name not in _DTYPES or tensor.size == math.prod(shape) * _DTYPES[dtype_name].itemsize
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: the header's entry for {name} is malformed") from error
    if not right or first < 0:
        raise InputError(f"{path}: {name} is {tensor.size} bytes, which its shape {list(shape)} of {dtype_name} is not")
    if base + last > actual:
        raise InputError(f"{path}: cut short: {name} ends at byte {base + last}, the file at {actual}")
    return tensor


def read(tensor: Tensor) -> np.ndarray:
    """The tensor as an array of its own in memory."""
    if tensor.dtype_name not in _DTYPES:
        supported = ", ".join(_DTYPES)
        raise InputError(f"{tensor.file}: {tensor.name} has dtype {tensor.dtype_name}; supported: {supported}")
    array = np.empty(tensor.shape, _DTYPES[tensor.dtype_name])
    with open(tensor.file, "rb", buffering=0) as file:
        file.seek(tensor.start)
        rest = array.reshape(-1).view(np.uint8).data
        while rest.nbytes:
            got = file.readinto(rest)
            if not got:
                raise InputError(f"{tensor.file}: cut short while {tensor.name} was read")
            rest = rest[got:]
    return array


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
