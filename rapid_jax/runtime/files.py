# SPDX-License-Identifier: Apache-2.0
"""Files that are written whole or not at all, content hashes, and the cache folder."""

import contextlib
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from rapid_jax.runtime.errors import InputError


@contextlib.contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on a clean exit it replaces `path` at once, else it is removed.

    The file gets the permissions that the process gives to any new file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path)
    temporary.touch(exist_ok=False)
    try:
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replace_folder(path: Path) -> Iterator[Path]:
    """Yields an empty temporary folder beside `path`; on a clean exit it takes the place of `path`, else it is removed.

    What was at `path` is moved aside first, put back if the new folder cannot be moved in, and deleted last: a reader
    never finds a half-written folder, and for the instant between the two moves finds none. Raises InputError if
    `path` is a file.
    """
    if path.is_file():
        raise InputError(f"{path}: expected a folder or nothing there, got a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = _beside(path), _beside(path)
    temporary.mkdir()
    try:
        yield temporary
        if path.exists():
            path.rename(old)
        try:
            temporary.rename(path)
        except OSError:
            if old.exists():
                old.rename(path)
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}")


def digest(*parts: bytes | str) -> str:
    """SHA-256 of the parts in hexadecimal; each part is length-prefixed: no two lists of parts collide by joining."""
    state = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        state.update(len(data).to_bytes(8, "little"))
        state.update(data)
    return state.hexdigest()


def digest_file(path: Path) -> str:
    """SHA-256 of a file's bytes in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def user_path(name: str | Path) -> Path:
    """The path that a user names, `~` and `~name` read as shells do. Raises InputError for an unknown `~name`."""
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise InputError(f"{name}: no such user's home folder") from error


def default_cache_dir() -> Path:
    """`$RAPID_JAX_CACHE`, else `$XDG_CACHE_HOME/rapid_jax`, else `~/.cache/rapid_jax`; read when called."""
    chosen = os.environ.get("RAPID_JAX_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "rapid_jax"
