# SPDX-License-Identifier: Apache-2.0
"""API keys: who may ask, and whose a document is."""

import hmac
from collections.abc import Mapping, Sequence
from pathlib import Path

from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.files import digest
from rapid_jax.runtime.input_files import blocks, open_regular

VARIABLE = "RAPID_API_KEY"  # keys in the environment, separated by commas
LEAST = 16  # characters of a key
_MOST, _MOST_BYTES = 1024, 1 << 20


class Keys:
    """The keys that open the server; without any it is open to whoever reaches it, and all are one owner."""

    def __init__(self, keys: Sequence[str] = (), source: str = "API keys"):
        if len(keys) > _MOST:
            raise InputError(f"{source}: expected at most {_MOST} keys, got {len(keys)}")
        for number, key in enumerate(keys, 1):
            if len(key) < LEAST or not key.isascii() or not key.isprintable() or " " in key:
                raise InputError(
                    f"{source}: key {number}: expected at least {LEAST} printable ASCII characters without spaces, "
                    f"got {len(key)} characters"
                )
        if len(set(keys)) < len(keys):
            raise InputError(f"{source}: expected keys that differ, got one twice")
        # An owner's name says nothing about the key.
        self._owners = {key.encode(): digest("owner of a key", key)[:24] for key in keys}

    def __bool__(self) -> bool:
        return bool(self._owners)

    def owner_of(self, authorization: str | None) -> str | None:
        """Whose the request with this Authorization header is; None where it has no key that opens the server.

        Every key is compared, each in a time that does not tell how much of it agrees.
        """
        if not self._owners:
            return ""
        scheme, _, given = (authorization or "").partition(" ")
        if scheme.lower() != "bearer":
            return None
        found, offered = None, given.strip().encode("utf-8", "surrogatepass")
        for key, owner in self._owners.items():
            if hmac.compare_digest(key, offered):
                found = owner
        return found


def read_keys(path: Path | None, environment: Mapping[str, str]) -> Keys:
    """The keys in a file, one a line (# begins a comment), and those in $RAPID_API_KEY.

    Raises InputError for a file that cannot be read or has no key, and for keys that are too short to keep anyone out.
    """
    keys = [key for part in environment.get(VARIABLE, "").split(",") if (key := part.strip())]
    if path is None:
        return Keys(keys, f"${VARIABLE}")
    try:
        with open_regular(path) as file:
            text = b"".join(blocks(file, _MOST_BYTES, str(path))).decode("ascii")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: expected keys in ASCII, got another byte at offset {error.start}") from error
    except OSError as error:
        raise InputError(f"{path}: the keys cannot be read: {error.strerror}") from error
    lines = [line.strip() for line in text.splitlines()]
    found = [line for line in lines if line and not line.startswith("#")]
    if not found:
        raise InputError(f"{path}: expected a key a line, got none")
    return Keys([*found, *keys], str(path))
