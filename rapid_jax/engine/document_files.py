# SPDX-License-Identifier: Apache-2.0
"""Documents on disk, a file each: a SHA-256 of all that follows, a line of JSON, the text.

No byte can change unnoticed. A file is written whole or not at all, and only its owner may read it.
"""

import json
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.files import digest, remove_leftovers, replace_file
from rapid_jax.runtime.json_input import Fields, parse_object

_log = logging.getLogger(__name__)
_FORMAT = 1
_FILE = re.compile(r"(doc-[0-9a-f]{24})\.txt")


@dataclass(frozen=True)
class Claim:
    """What one owner has said about a document."""

    name: str
    pinned: bool
    created: float  # seconds since 1970
    expires: float | None

    def is_over(self, now: float) -> bool:
        """Whether it has expired."""
        return self.expires is not None and self.expires <= now


@dataclass(frozen=True)
class Document:
    """A text and whose it is."""

    id: str
    text: str
    bytes: int  # of the text in UTF-8
    tokens: int | None
    public: bool
    claims: Mapping[str, Claim]  # of each owner; never none of a document that is kept

    @property
    def pinned(self) -> bool:
        """Whether any owner has pinned it."""
        return any(claim.pinned for claim in self.claims.values())


class DocumentFiles:
    """The documents of a folder. What is damaged is dropped with one warning; a full disk is one warning."""

    def __init__(self, folder: Path):
        self._folder = folder

    def read(self) -> dict[str, Document]:
        """All that are whole, by id."""
        remove_leftovers(self._folder)
        found = {}
        for path in sorted(self._folder.glob("doc-*.txt")):
            match = _FILE.fullmatch(path.name)
            if match is None:
                continue
            try:
                found[match[1]] = _parse(path.read_bytes(), match[1], str(path))
            except OSError as error:
                _log.warning("document in %s cannot be read and is left out: %s", path, error)
            except ValueError as error:  # InputError, or text that is no UTF-8
                _log.warning("document is damaged and is dropped: %s", error)
                path.unlink(missing_ok=True)
        return found

    def write(self, document: Document) -> None:
        """Puts it in the place of what was there; it lies safe when this returns."""
        path = self._path(document.id)
        try:
            with replace_file(path) as temporary:
                os.chmod(temporary, 0o600)
                temporary.write_bytes(_bytes_of(document))
        except OSError as error:
            _log.warning("document could not be kept in %s, only until this process ends: %s", path, error.strerror)

    def remove(self, document: Document) -> None:
        """Deletes its file, if there is one."""
        try:
            self._path(document.id).unlink(missing_ok=True)
        except OSError as error:
            _log.warning("document could not be deleted from %s: %s", self._path(document.id), error.strerror)

    def _path(self, id: str) -> Path:
        return self._folder / f"{id}.txt"


def _bytes_of(document: Document) -> bytes:
    claims = [
        {"owner": owner, "name": claim.name, "pinned": claim.pinned, "created": claim.created, "expires": claim.expires}
        for owner, claim in document.claims.items()
    ]
    note = {"format": _FORMAT, "id": document.id, "tokens": document.tokens, "public": document.public}
    note["claims"] = claims
    body = json.dumps(note).encode() + b"\n" + document.text.encode()
    return digest(body).encode() + b"\n" + body


def _parse(data: bytes, id: str, source: str) -> Document:
    """The document of a file's bytes. Raises InputError for what `_bytes_of` did not write."""
    checksum, _, body = data.partition(b"\n")
    if checksum != digest(body).encode():
        raise InputError(f"{source}: its checksum does not match")
    line, _, text = body.partition(b"\n")
    note = parse_object(line, source)
    if note.whole("format") != _FORMAT or note.text("id") != id:
        raise InputError(f"{source}: expected document {id} in format {_FORMAT}, got another")
    claims = {item.text("owner"): _claim(item) for item in note.each("claims")}
    if not claims:
        raise InputError(f"{source}: it is nobody's")
    return Document(id, text.decode(), len(text), note.whole("tokens", None), note.truth("public"), claims)


def _claim(item: Fields) -> Claim:
    return Claim(item.text("name"), item.truth("pinned"), item.number("created"), item.number("expires", None))
