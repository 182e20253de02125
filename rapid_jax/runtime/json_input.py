# SPDX-License-Identifier: Apache-2.0
"""JSON that somebody else wrote: parsed within limits, and every value read with its type checked.

A checkpoint's configs, an index, a header, a corpus line: whatever is wrong with one is an `InputError` of one line
that names the file, the key, what was expected and what was got.
"""

import json
import math
import reprlib
from collections.abc import Iterator, Mapping
from typing import Any, Final

from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.storage import AnyPlace, size_of

MOST_BYTES: Final = 2**28  # of one file; the largest that belongs to a model, a tokenizer.json, has some 40 MB
MOST_VALUES: Final = 2**23  # in one text: each takes some hundred bytes of memory, "{}," three of a file
MOST_DEPTH: Final = 64  # of lists and objects in each other; what walks a value recursively stays within Python's stack
MOST_WHOLE: Final = 2**53  # beyond it JSON readers disagree about a number
_REQUIRED: Final = object()  # default of a key that must be there
_LFS_POINTER: Final = b"version https://git-lfs.github.com/spec/"
_LONGEST_PATH: Final = 200  # of keys, as an error names it


def parse_json(data: bytes | str, source: str, most_bytes: int = MOST_BYTES) -> Any:
    """The value of a JSON text in UTF-8. Raises InputError naming `source` for anything else, and beyond the limits."""
    if len(data) > most_bytes:
        raise InputError(f"{source}: expected JSON of at most {most_bytes} bytes, got {len(data)}")
    if isinstance(data, bytes):
        refuse_lfs_pointer(data, source)
    try:
        text = data.decode("utf-8-sig") if isinstance(data, bytes) else data
    except UnicodeDecodeError as error:
        raise InputError(f"{source}: not JSON: {error}") from error
    if len(text) > MOST_VALUES and text.count(",") + text.count("{") + text.count("[") > MOST_VALUES:
        raise InputError(f"{source}: expected JSON of at most {MOST_VALUES} values, got more")
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise InputError(f"{source}: expected JSON nested at most {MOST_DEPTH} deep, got more") from error
    except ValueError as error:  # json.JSONDecodeError, and whole numbers of too many digits
        raise InputError(f"{source}: not JSON: {error}") from error
    if _deeper_than(value, MOST_DEPTH):
        raise InputError(f"{source}: expected JSON nested at most {MOST_DEPTH} deep, got more")
    return value


def parse_object(data: bytes | str, source: str, most_bytes: int = MOST_BYTES) -> "Fields":
    """The object of a JSON text. Raises InputError as `parse_json` does, and for another kind of value."""
    return _as_object(parse_json(data, source, most_bytes), source)


def _as_object(value: Any, source: str) -> "Fields":
    if not isinstance(value, dict):
        raise InputError(f"{source}: expected a JSON object, got {shown(value)}")
    return Fields(value, source)


def read_json(path: AnyPlace, most_bytes: int = MOST_BYTES) -> Any:
    """The value in a JSON file. Raises InputError as `parse_json` does, and where there is no such file to be read."""
    try:
        if not path.is_file():
            raise InputError(f"{path}: no such file")
        if (size := size_of(path)) > most_bytes:
            raise InputError(f"{path}: expected JSON of at most {most_bytes} bytes, got {size}")
        return parse_json(path.read_bytes(), str(path), most_bytes)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error


def read_object(path: AnyPlace, most_bytes: int = MOST_BYTES) -> "Fields":
    """The object in a JSON file. Raises InputError as `read_json` does, and for another kind of value."""
    return _as_object(read_json(path, most_bytes), str(path))


def refuse_lfs_pointer(first: bytes, source: str) -> None:
    """Raises InputError if a file that begins so stands for one that Git LFS has not fetched yet."""
    if first.startswith(_LFS_POINTER):
        raise InputError(f"{source}: a Git LFS pointer and not the file itself; fetch it with git lfs pull")


def shown(value: Any) -> str:
    """The value as an error message shows it: cut to a few words, on one line."""
    short = reprlib.Repr()
    short.maxstring, short.maxlevel, short.maxlist = 60, 2, 4
    return short.repr(value)


class Fields(Mapping[str, Any]):
    """An object of a JSON file. As a mapping it gives raw values; its methods give values of one type.

    For the methods null is the same as no such key. `source` and the path of keys name the place in every error.
    """

    def __init__(self, values: Mapping[str, Any], source: str, path: str = ""):
        self._values, self.source, self._path = values, source, path

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def over(self, defaults: Mapping[str, Any]) -> "Fields":
        """The same place, where keys that it leaves out have these values."""
        return Fields({**defaults, **self._values}, self.source, self._path)

    def error(self, key: str, expected: str) -> InputError:
        """The error of a value at `key` that is not what was expected."""
        value = self._values.get(key, _REQUIRED)
        got = "no such key" if value is _REQUIRED else "null" if value is None else shown(value)
        place = f"{self._path}{key}"
        if len(place) > _LONGEST_PATH or not place.isprintable():  # keys are somebody else's words, too
            place = shown(place)
        return InputError(f"{self.source}: {place} must be {expected}, got {got}")

    def whole(self, key: str, default: Any = _REQUIRED, *, least: int = 0, most: int = MOST_WHOLE) -> Any:
        """A whole number from `least` to `most`; truth values and 2.0 are none."""
        limits = f"from {least} to {most}" if most < MOST_WHOLE else f"of at least {least}"
        return self._check(key, default, f"a whole number {limits}", lambda value: _is_whole(value, least, most))

    def number(
        self,
        key: str,
        default: Any = _REQUIRED,
        *,
        above: float = -math.inf,
        least: float = -1e30,
        most: float = 1e30,
    ) -> Any:
        """A finite number above `above`, of at least `least` and at most `most`, as a float."""
        limits = [f"above {above:g}"] if above > -math.inf else []
        limits += [f"of at least {least:g}"] if least > -1e30 else []
        limits += [f"of at most {most:g}"] if most < 1e30 else []

        def right(value: Any) -> bool:
            if not isinstance(value, int | float) or isinstance(value, bool):
                return False
            return value > above and least <= value <= most

        value = self._check(key, default, " ".join(["a number", " and ".join(limits)]).rstrip(), right)
        return float(value) if right(value) else value

    def truth(self, key: str, default: Any = _REQUIRED) -> Any:
        """true or false."""
        return self._check(key, default, "true or false", lambda value: isinstance(value, bool))

    def text(self, key: str, default: Any = _REQUIRED) -> Any:
        """A string."""
        return self._check(key, default, "a string", lambda value: isinstance(value, str))

    def texts(self, key: str, default: Any = _REQUIRED) -> Any:
        """A list of strings."""
        return self._check(key, default, "a list of strings", lambda value: _all(value, lambda x: isinstance(x, str)))

    def wholes(self, key: str, default: Any = _REQUIRED, *, least: int = 0, most: int = MOST_WHOLE) -> Any:
        """A list of whole numbers, each from `least` to `most`."""
        expected = f"a list of whole numbers of at least {least}"
        return self._check(key, default, expected, lambda value: _all(value, lambda x: _is_whole(x, least, most)))

    def numbers(self, key: str, default: Any = _REQUIRED, *, most: float = 1e30) -> Any:
        """A list of finite numbers from -most to most, as floats."""
        found = self._check(key, default, "a list of numbers", lambda value: _all(value, lambda x: _is_number(x, most)))
        return found if found is default else [float(value) for value in found]

    def fields(self, key: str, default: Any = _REQUIRED) -> Any:
        """An object, as `Fields` of its own."""
        value = self._check(key, default, "an object", lambda value: isinstance(value, dict))
        return Fields(value, self.source, f"{self._path}{key}.") if isinstance(value, dict) else value

    def each(self, key: str, default: Any = _REQUIRED) -> Any:
        """A list of objects, as a list of `Fields`."""
        values = self._check(
            key, default, "a list of objects", lambda value: _all(value, lambda x: isinstance(x, dict))
        )
        if values is default:
            return values
        return [Fields(value, self.source, f"{self._path}{key}[{index}].") for index, value in enumerate(values)]

    def _check(self, key: str, default: Any, expected: str, right: Any) -> Any:
        value = self._values.get(key)
        if value is None and default is not _REQUIRED:
            return default
        if not right(value):
            raise self.error(key, expected)
        return value


def _is_whole(value: Any, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _is_number(value: Any, most: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -most <= value <= most


def _all(value: Any, right: Any) -> bool:
    return isinstance(value, list) and all(map(right, value))


def _deeper_than(value: Any, most: int) -> bool:
    level = [value]
    for _ in range(most + 1):
        inner = [list(x.values()) if isinstance(x, dict) else x for x in level if isinstance(x, dict | list)]
        if not inner:
            return False
        level = [item for items in inner for item in items]
    return True
