# SPDX-License-Identifier: Apache-2.0
"""JSON objects with a checksum as their last key: what was changed since it was written is never used.

    {"id": "a", "n": 3, "sha256": "..."}

The checksum is over the bytes before it and over the place that the object was written for (a file's name and the
line): a line that was moved, copied or left out is seen as well as a flipped bit. It is no signature: who writes
another checksum is stopped by the types of the values alone.
"""

import json
import re
from collections.abc import Mapping
from typing import Any, Final

from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.files import digest
from rapid_jax.runtime.json_input import Fields, parse_object
from rapid_jax.runtime.storage import AnyPlace

_KEY: Final = "sha256"
_END: Final = re.compile(rb', "sha256": "([0-9a-f]{64})"}\n\Z')
_END_BYTES: Final = len(', "sha256": ""}\n') + 64


def sealed(value: Mapping[str, Any], place: str, *, indent: int | None = None) -> bytes:
    """The object as JSON with its checksum, one line unless it is indented; it must have a key."""
    body = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False).encode()[:-1].rstrip()
    return body + f', "{_KEY}": "{digest(place, body)}"}}\n'.encode()


def seal_of(data: bytes, place: str, source: str) -> str:
    """The checksum of what `sealed` wrote for `place`. Raises InputError, naming `source`, if it is not that."""
    if not data.endswith(b"\n"):
        raise InputError(f"{source}: expected a whole line, got one that is cut off")
    end = _END.search(data, max(len(data) - _END_BYTES, 0))
    if end is None:
        raise InputError(
            f"{source}: expected a checksum at its end, got {data[-20:]!r}: it is damaged, or of an earlier version"
        )
    if digest(place, data[: end.start()]) != end[1].decode():
        raise InputError(f"{source}: expected what was written there, got other bytes: the checksum does not match")
    return end[1].decode()


def stated_seal(data: bytes) -> str:
    """The checksum in what `sealed` wrote, which has been checked before."""
    return data[-len('"}\n') - 64 : -len('"}\n')].decode()


def unsealed(data: bytes, place: str, source: str) -> Fields:
    """What `sealed` wrote for `place`, without the checksum. Raises InputError, naming `source`, if it is not that."""
    seal_of(data, place, source)
    body = data[:-_END_BYTES] + b"}"
    return parse_object(body, source)


def place_of(path: AnyPlace, number: int) -> str:
    """Where line `number`, counted from 1, of a file lies, in whatever folder."""
    return f"{path.name}:{number}"
