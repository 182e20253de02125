# SPDX-License-Identifier: Apache-2.0
"""The files of questions that benchmarks publish and users have: JSON lists and JSON lines, read strictly."""

import gzip
import random
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from rapid_jax.evaluate.samples import SuiteOptions
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.json_input import parse_json, shown
from rapid_jax.runtime.storage import AnyPlace, open_file

Record = dict[str, Any]
MOST_BYTES = 2**30  # of a file, unpacked: the largest that a benchmark publishes has some 500 MB
_BOM = b"\xef\xbb\xbf"


def records(path: AnyPlace) -> Iterator[tuple[str, Record]]:
    """(where it stands, the object) of every object in the file, for messages: "FILE: line 3" or "FILE: item 3".

    The file is one JSON list of objects or has an object a line (blank lines are passed over), in UTF-8, packed by gzip
    if its name ends in .gz. Raises InputError for a file that cannot be read, has more than MOST_BYTES (unpacked), has
    no object, or has anything else.
    """
    found, size, number = False, 0, 0
    try:
        if path.exists() and not path.is_file():
            raise InputError(f"{path}: expected a file, got something else")
        with ExitStack() as stack:
            file = stack.enter_context(open_file(path))
            file = stack.enter_context(gzip.open(file, "rb")) if path.suffix == ".gz" else file
            while line := file.readline(MOST_BYTES + 1 - size):
                number += 1
                whole = not found and line.removeprefix(_BOM).lstrip().startswith(b"[")
                data = line + file.read(MOST_BYTES + 1 - size - len(line)) if whole else line
                size += len(data)
                if size > MOST_BYTES:
                    raise InputError(f"{path}: expected at most {MOST_BYTES} bytes of JSON, got more")
                for place, item in _items(data.removeprefix(_BOM), path, number, whole=whole):
                    found = True
                    yield place, item
    except (OSError, EOFError, zlib.error) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise InputError(f"{path}: cannot be read: {reason}") from error
    if not found:
        raise InputError(f"{path}: expected JSON objects, one a line or in a list, got none")


def _items(data: bytes, path: AnyPlace, number: int, *, whole: bool) -> Iterator[tuple[str, Record]]:
    """(where it stands, the object) of line `number`, or of a list that is the `whole` file from there on."""
    if not data.strip():
        return
    if whole:
        values = parse_json(b"\n" * (number - 1) + data, str(path), most_bytes=2 * MOST_BYTES)
        items = [(f"{path}: item {at}", value) for at, value in enumerate(values, 1)]
    else:
        place = f"{path}: line {number}"
        items = [(place, parse_json(data, place))]
    for place, item in items:
        if not isinstance(item, dict):
            raise InputError(f"{place}: expected a JSON object, got {shown(item)}")
        yield place, item


def text_of(record: Mapping[str, Any], key: str, place: str) -> str:
    """The text of a field; halves of surrogate pairs, which no tokenizer takes, are U+FFFD in it.

    Raises InputError if the field is missing, is no text or has nothing but white space in it.
    """
    value = record.get(key)
    if not isinstance(value, str) or not value.strip():
        got = shown(value) if key in record else "no such field"
        raise InputError(f"{place}: expected {key!r} to be a text that is not empty, got {got}")
    return whole_text(value)


def texts_of(record: Mapping[str, Any], key: str, place: str) -> tuple[str, ...]:
    """The texts of a field that is a text or a list of them, at least one, none of them empty; else InputError."""
    value = record.get(key)
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        got = shown(value) if key in record else "no such field"
        raise InputError(f"{place}: expected {key!r} to be a text or a list of texts that are not empty, got {got}")
    return tuple(whole_text(text) for text in texts)


def whole_text(text: str) -> str:
    """The text with U+FFFD for halves of surrogate pairs."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def id_of(record: Mapping[str, Any], key: str, place: str) -> str:
    """A field that is a text or a whole number, as text; else InputError."""
    value = record.get(key)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return text_of(record, key, place)


def data_of(options: SuiteOptions, suite: str, expected: str) -> AnyPlace:
    """`options.data`; InputError, saying what is expected there, if it is not given or does not exist."""
    if options.data is None:
        raise InputError(f"suite {suite}: expected --data, {expected}, got none")
    if not options.data.exists():
        raise InputError(f"suite {suite}: expected --data, {expected}, got {options.data}, which does not exist")
    return options.data


def tasks_of(options: SuiteOptions, suite: str, known: Sequence[str]) -> tuple[str, ...]:
    """The tasks that are asked for in the suite's order, all if none is named; InputError for one that it lacks."""
    unknown = [task for task in options.tasks if task not in known]
    if unknown:
        raise InputError(f"suite {suite}: expected tasks of {', '.join(known)}, got {unknown[0]!r}")
    return tuple(task for task in known if not options.tasks or task in options.tasks)


def chosen(count: int, wanted: int | None, key: str) -> list[int]:
    """`wanted` of range(count) in rising order, all for None or where there are no more; `key` is the seed.

    A larger `wanted` gives a superset.
    """
    if wanted is not None and wanted < 1:
        raise InputError(f"expected at least 1 sample, got {wanted}")
    order = list(range(count))
    random.Random(key).shuffle(order)
    return sorted(order[:wanted])
