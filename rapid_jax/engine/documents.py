# SPDX-License-Identifier: Apache-2.0
"""Texts by id: handed in once, asked about often.

A document belongs to who handed it in, and nobody else learns that it is there; a public one anybody may read, and it
belongs to all who handed it in.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from rapid_jax.engine.document_files import Claim, Document, DocumentFiles
from rapid_jax.engine.errors import TooLarge, UnknownDocument
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.files import digest
from rapid_jax.runtime.json_input import shown

_ID_DIGITS = 24
_LONGEST_S = 1e9  # until a document expires
_STATES = {"device": "prefilled", "host": "on host", "disk": "on disk"}


@dataclass(frozen=True)
class DocumentInfo:
    """What is known about a document, its text apart."""

    id: str
    name: str
    bytes: int  # of the text in UTF-8
    characters: int
    tokens: int | None  # of the target; None where nobody counts
    state: str  # uploaded, chunked, prefilled, on host, on disk
    pinned: bool
    public: bool
    created: float  # seconds since 1970
    expires: float | None


@dataclass(frozen=True)
class Watch:
    """What a library asks and tells about the document of an id, in whichever thread it is called."""

    tier: Callable[[str], str | None] = lambda id: None  # where keys and values are: device, host, disk
    chunked: Callable[[str], bool] = lambda id: False
    pinned: Callable[[str, bool], None] = lambda id, pinned: None  # by anybody, or no longer
    removed: Callable[[str], None] = lambda id: None


def document_id(text: str, owner: str = "", public: bool = False) -> str:
    """The id of a text: another owner's is another, unless both are public."""
    whose = ("public",) if public else ("owner", owner)
    return f"doc-{digest('document-1', *whose, text)[:_ID_DIGITS]}"


class DocumentLibrary:
    """Documents in memory and, with a folder, on disk, from where the next process has them too. Of any thread.

    None goes by itself before it expires: one that does not fit is refused.
    """

    def __init__(
        self,
        folder: Path | None = None,
        *,
        most_bytes: int = 4 << 30,
        most_bytes_of_owner: int = 1 << 30,
        count_tokens: Callable[[str], int] | None = None,
        watch: Watch | None = None,
        clock: Callable[[], float] = time.time,
    ):
        """Bounds are of the texts in UTF-8, of all and of each owner; `clock` gives seconds since 1970."""
        self._most, self._most_of_owner = most_bytes, most_bytes_of_owner
        self._count, self._watch, self._clock = count_tokens, watch or Watch(), clock
        self._files = None if folder is None else DocumentFiles(folder)
        self._documents: dict[str, Document] = {} if self._files is None else self._files.read()
        self._lock = threading.Lock()  # of the table
        self._changing = threading.Lock()  # of who changes it, files too: readers do not wait for the disk

    def add(
        self,
        text: str,
        *,
        owner: str = "",
        name: str = "",
        public: bool = False,
        pinned: bool = False,
        expires_in: float | None = None,
    ) -> DocumentInfo:
        """Keeps a text; it has the id that it had before, if it was there.

        Then a name that is given replaces the old one, a pin stays, and it expires as is said now. Raises InputError
        for a text that cannot be used or a bound that is reached, TooLarge for one that it alone is beyond.
        """
        size = _check(text)
        if expires_in is not None and not 0 < expires_in <= _LONGEST_S:
            raise InputError(f"expires_in: expected a number of seconds > 0 and <= 1e9, got {shown(expires_in)}")
        id = document_id(text, owner, public)
        tokens = self._known_tokens(id, text)
        with self._changing:
            self._sweep()
            now, old = self._clock(), self._documents.get(id)
            document = old or Document(id, text, size, tokens, public, {})
            claim = document.claims.get(owner) or Claim("", pinned=False, created=now, expires=None)
            if owner not in document.claims:
                self._check_room(owner, size, new=old is None)
            expires = None if expires_in is None else now + expires_in
            claim = replace(claim, name=name or claim.name, pinned=claim.pinned or pinned, expires=expires)
            return self._changed(document, owner, claim)

    def get(self, id: str, *, owner: str = "") -> str:
        """The text. Raises UnknownDocument."""
        return self._found(id, owner).text

    def info(self, id: str, *, owner: str = "") -> DocumentInfo:
        """What is known about it. Raises UnknownDocument."""
        return self._info(self._found(id, owner), owner)

    def all(self, *, owner: str = "") -> list[DocumentInfo]:
        """What the owner handed in, the oldest first."""
        with self._lock:
            own = [document for document in self._documents.values() if owner in document.claims]
        now = self._clock()
        own = [document for document in own if not document.claims[owner].is_over(now)]
        return [self._info(item, owner) for item in sorted(own, key=lambda item: (item.claims[owner].created, item.id))]

    def remove(self, id: str, *, owner: str = "") -> None:
        """Forgets it, unless it is public and others handed it in too. Raises UnknownDocument, also for one of theirs
        alone.
        """
        with self._changing:
            self._without(self._own(id, owner), owner)

    def pin(self, id: str, pinned: bool, *, owner: str = "") -> DocumentInfo:
        """Says that what is kept of it in memory stays there, or no longer. Raises UnknownDocument."""
        with self._changing:
            document = self._own(id, owner)
            return self._changed(document, owner, replace(document.claims[owner], pinned=pinned))

    def is_pinned(self, id: str) -> bool:
        """Whether anybody has pinned it."""
        with self._lock:
            document = self._documents.get(id)
        return document is not None and document.pinned

    def sweep(self) -> None:
        """Removes what has expired; it is unknown from that moment on, and this frees its memory."""
        with self._changing:
            self._sweep()

    def _found(self, id: str, owner: str) -> Document:
        """What the owner may read."""
        with self._lock:
            document = self._documents.get(id)
        if document is not None:
            now = self._clock()
            mine = document.claims.get(owner)
            if mine is not None and not mine.is_over(now):
                return document
            if document.public and any(not claim.is_over(now) for claim in document.claims.values()):
                return document
        raise UnknownDocument(f"document {shown(id)}: expected the id of a document of yours, got one of none")

    def _own(self, id: str, owner: str) -> Document:
        """What the owner may change."""
        document = self._found(id, owner)
        if owner not in document.claims or document.claims[owner].is_over(self._clock()):
            raise UnknownDocument(f"document {shown(id)}: expected one that you handed in, got a public one of another")
        return document

    def _known_tokens(self, id: str, text: str) -> int | None:
        with self._lock:
            old = self._documents.get(id)
        if old is not None and old.tokens is not None:
            return old.tokens
        return None if self._count is None else self._count(text)

    def _check_room(self, owner: str, size: int, *, new: bool) -> None:
        if size > min(self._most, self._most_of_owner):
            most = min(self._most, self._most_of_owner)
            raise TooLarge(f"document: expected a text of at most {most} bytes, got {size}")
        own = sum(item.bytes for item in self._documents.values() if owner in item.claims)
        if own + size > self._most_of_owner:
            raise InputError(
                f"document: expected texts of at most {self._most_of_owner} bytes in all, got {size} beside the {own} "
                "that are kept: remove some first"
            )
        kept = sum(item.bytes for item in self._documents.values())
        if new and kept + size > self._most:
            raise InputError(f"document: expected a text of at most {max(self._most - kept, 0)} bytes now, got {size}")

    def _changed(self, document: Document, owner: str, claim: Claim) -> DocumentInfo:
        before = document.pinned
        document = replace(document, claims={**document.claims, owner: claim})
        if self._files is not None:
            self._files.write(document)
        with self._lock:
            self._documents[document.id] = document
        if document.pinned != before:
            self._watch.pinned(document.id, document.pinned)
        return self._info(document, owner)

    def _without(self, document: Document, owner: str) -> None:
        before = document.pinned
        document = replace(document, claims={who: claim for who, claim in document.claims.items() if who != owner})
        if self._files is not None:
            (self._files.write if document.claims else self._files.remove)(document)
        with self._lock:
            if document.claims:
                self._documents[document.id] = document
            else:
                del self._documents[document.id]
        if not document.claims:
            self._watch.removed(document.id)
        elif document.pinned != before:
            self._watch.pinned(document.id, document.pinned)

    def _sweep(self) -> None:
        now = self._clock()
        for document in list(self._documents.values()):
            for owner in [who for who, claim in document.claims.items() if claim.is_over(now)]:
                self._without(self._documents[document.id], owner)

    def _info(self, document: Document, owner: str) -> DocumentInfo:
        claim = document.claims.get(owner) or next(iter(document.claims.values()))
        state = _STATES.get(self._watch.tier(document.id) or "")
        return DocumentInfo(
            id=document.id,
            name=claim.name,
            bytes=document.bytes,
            characters=len(document.text),
            tokens=document.tokens,
            state=state or ("chunked" if self._watch.chunked(document.id) else "uploaded"),
            pinned=claim.pinned,
            public=document.public,
            created=claim.created,
            expires=claim.expires,
        )


def _check(text: str) -> int:
    """The text's size in UTF-8. Raises InputError for one that is empty or no Unicode."""
    if not text.strip():
        raise InputError("document: expected a text with something in it, got an empty one")
    try:
        return len(text.encode())
    except UnicodeEncodeError as error:
        raise InputError(f"document: expected valid Unicode, got half a character at {error.start}") from None
