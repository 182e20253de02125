# SPDX-License-Identifier: Apache-2.0
"""Arrays in a folder or a bucket, through TensorStore: each process writes and reads those parts that it needs.

    PLACE/zarr.json        Zarr 3: kind, shape and the size of a piece, for whoever else reads it
    PLACE/c/0/0/1/0        a piece, as it lies in memory

A piece that is missing or too short is damage, never zeros. Whether values are those that were written is for who
writes them to know, by sums of theirs (value_sums.py): a checksum of a piece would not say whose it is.
Nothing is compressed: keys, values and weights do not compress (7 % measured with zstd, at a third of the speed).
TensorStore is imported when an array is first opened.
"""

import contextlib
import importlib
import math
import os
import re
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import ml_dtypes  # noqa: F401  # NumPy knows bfloat16 by it
import numpy as np

from rapid_jax.runtime.buckets import prepare_libraries
from rapid_jax.runtime.errors import InputError, Unavailable, legible
from rapid_jax.runtime.json_input import Fields
from rapid_jax.runtime.storage import AnyPlace

_MOST_BYTES: Final = 1 << 29  # under way at once
_POOLED_BYTES: Final = 1 << 28  # of pieces that several parts need
_RETRIES: Final = {"max_retries": 5, "initial_delay": "1s", "max_delay": "16s"}  # as gcsfs waits
# What TensorStore says of pieces that are not what was written; NOT_FOUND of arrays that were removed meanwhile, too.
_DAMAGE: Final = ("DATA_LOSS", "NOT_FOUND")
# And of a piece that was cut off, by the code of preconditions too: those are no damage.
_CUT_OFF: Final = "Not enough data"
_DRIVERS: Final = {"gs": "gcs", "s3": "s3"}
_MOST_ELEMENTS: Final = 2**48


class Damaged(Exception):
    """What is stored is not what was written; the message is one line."""


@dataclass(frozen=True)
class Array:
    """What an array in a store is: it is opened by this alone."""

    dtype: str
    shape: tuple[int, ...]
    piece: tuple[int, ...]  # what is one file, which only one process should write

    @property
    def bytes(self) -> int:
        """Of its files, whose last pieces are whole, too."""
        pieces = math.prod(-(-size // part) for size, part in zip(self.shape, self.piece, strict=True))
        return pieces * math.prod(self.piece) * np.dtype(self.dtype).itemsize

    def as_json(self) -> list[Any]:
        """What `of_json` reads."""
        return [self.dtype, list(self.shape), list(self.piece)]

    @classmethod
    def of_json(cls, fields: Fields, name: str) -> "Array":
        """The array that the field describes. Raises InputError for one that is none."""
        match fields[name]:
            case [str() as dtype, [*shape], [*piece]] if len(shape) == len(piece) and all(
                type(size) is int and 0 < size < _MOST_ELEMENTS for size in (*shape, *piece)
            ):
                with contextlib.suppress(TypeError):
                    np.dtype(dtype)
                    return cls(dtype, tuple(shape), tuple(piece))
        raise fields.error(name, "the type, shape and piece of an array")


def create(place: AnyPlace, array: Array) -> Any:
    """A new array, to be written; `place` is a folder of its own. Returns a TensorStore."""
    with refusals(place):
        return _tensorstore().open(_spec(place, array), context=_context(0), create=True).result()


def opened(place: AnyPlace, array: Array, *, shares: bool = False) -> Any:
    """The array that `create` made of the same description, whichever process did. Nothing is asked of the place yet.

    Returns a TensorStore; where several of its parts that are read may `share` pieces, it reads those once.
    """
    with refusals(place):
        context = _context(_POOLED_BYTES if shares else 0)
        return _tensorstore().open(_spec(place, array), context=context, open=True, assume_metadata=True).result()


class Moves:
    """Reads and writes under way, of about half a GiB at most; a context, left when all have ended.

    Raises as `refusals` does. What one has failed of is waited for, too: its arrays may then go.
    """

    def __init__(self, place: AnyPlace):
        self._place, self._bytes = place, 0
        self._pending: deque[tuple[Any, int]] = deque()

    def __enter__(self) -> "Moves":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        failed = kind is not None
        while self._pending:
            if failed:
                with contextlib.suppress(ValueError):
                    self._pending.popleft()[0].result()
                continue
            try:
                self._end_one()
            except BaseException:
                self.__exit__(ValueError)
                raise

    def write(self, target: Any, block: np.ndarray) -> None:
        """Begins to write a part of a TensorStore; the array must not change until the context is left."""
        self._add(target.write(block, can_reference_source_data_indefinitely=True), block.nbytes)

    def read(self, source: Any, into: np.ndarray) -> Any:
        """Begins to read a part of a TensorStore; what is returned is waited for with `await_`, or by the context."""
        future = _tensorstore().array(into).write(source)
        self._add(future, into.nbytes)
        return future

    def await_(self, future: Any) -> None:
        """Until one of them has ended."""
        with refusals(self._place):
            future.result()

    def _add(self, future: Any, size: int) -> None:
        self._pending.append((future, size))
        self._bytes += size
        while self._bytes > _MOST_BYTES and len(self._pending) > 1:
            self._end_one()

    def _end_one(self) -> None:
        future, size = self._pending.popleft()
        self._bytes -= size
        self.await_(future)


@contextlib.contextmanager
def refusals(place: AnyPlace) -> Iterator[None]:
    """Makes Damaged, OSError or, of a bucket, InputError of one line of what TensorStore raises for everything."""
    try:
        yield
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        code, told = str(error).partition(":")[0], _one_line(error)
    else:
        return
    if code in _DAMAGE or (code == "FAILED_PRECONDITION" and _CUT_OFF in told):
        raise Damaged(told)
    if isinstance(place, Path):
        raise OSError(told)
    raise (Unavailable if code in ("ABORTED", "UNAVAILABLE", "DEADLINE_EXCEEDED") else InputError)(f"{place}: {told}")


def _one_line(error: Exception) -> str:
    """What TensorStore says, without its specifications and answers; it puts the cause last."""
    text = legible(re.split(r"\s*\[(?:tensorstore_spec|http_response|source locations)", str(error))[0])
    return text if len(text) <= 300 else f"{text[:120]} ... {text[-175:]}"


def _spec(place: AnyPlace, array: Array) -> dict[str, Any]:
    if isinstance(place, Path):
        kept: dict[str, Any] = {"driver": "file", "path": f"{place.absolute()}/"}
    else:
        prepare_libraries()
        kept = {"driver": _DRIVERS[place.scheme], "bucket": place.bucket, "path": place.prefix}
        if place.scheme == "s3" and (endpoint := os.environ.get("AWS_ENDPOINT_URL_S3")):
            kept |= {"endpoint": endpoint, "aws_region": os.environ.get("AWS_DEFAULT_REGION", "us-east-1")}
    grid = {"name": "regular", "configuration": {"chunk_shape": array.piece}}
    codecs = [{"name": "bytes", "configuration": {"endian": "little"}}]
    metadata = {"shape": array.shape, "data_type": array.dtype, "chunk_grid": grid, "codecs": codecs}
    return {
        "driver": "zarr3",
        "kvstore": kept,
        "metadata": metadata,
        "fill_missing_data_reads": False,
        "store_data_equal_to_fill_value": True,
        "recheck_cached_data": False,
    }


def _context(pooled: int) -> Any:
    retries = {"gcs_request_retries": _RETRIES, "s3_request_retries": _RETRIES}
    return _tensorstore().Context({"cache_pool": {"total_bytes_limit": pooled}, **retries})


def _tensorstore() -> Any:
    return importlib.import_module("tensorstore")
