# SPDX-License-Identifier: Apache-2.0
"""A document as text: plain text in the usual encodings, PDF and HTML."""

import codecs
import io
import logging
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rapid_jax.html_text import begins_as_html, html_text
from rapid_jax.runtime.errors import InputError, extra
from rapid_jax.runtime.input_files import blocks, byte_order_mark, open_regular
from rapid_jax.runtime.storage import place_of

if TYPE_CHECKING:
    import pypdf

STDIN = "-"

_log = logging.getLogger(__name__)
_EXTRA = extra("documents")
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_CHARSET = re.compile(rb"<meta[^>]+charset\s*=\s*[\"']?([\w:.-]+)", re.IGNORECASE)
_ENCODINGS = re.compile(
    r"utf-8|ascii|iso8859-\d+|cp(125\d|866|874|932|949)|koi8-[ru]|mac-(roman|cyrillic)|gb\w+|big5\w*|euc_\w+|"
    r"shift_jis|iso2022_jp|tis-620"
)
_TAKEN_AS = {"ascii": "cp1252", "iso8859-1": "cp1252", "iso8859-9": "cp1254", "iso8859-11": "cp874", "tis-620": "cp874"}
_TAKEN_AS |= {"gb2312": "gb18030", "gbk": "gb18030", "euc_kr": "cp949", "shift_jis": "cp932"}
_MOST_BYTES = 1 << 28  # of a file
_MOST_CHARACTERS = 1 << 26  # of the text in it: some 16 million tokens
_PAGE_SECONDS = 60.0  # of reading a page of a PDF: most take a hundredth of a second
_PDF_SECONDS = 600.0  # of reading all of them
_HEAD = 1 << 16  # bytes in which a page must have begun as one


def read_document(source: str) -> str:
    """The text of the file `source`, or of standard input for "-"; never empty, at most 2^26 characters.

    A PDF is known by its first bytes or the file's name (.pdf), HTML by the name (.html, .htm, .xhtml) or by beginning
    with a doctype or the element html, head or body; all else is text: UTF-8, or what a byte order mark says. Bytes
    that do not fit the encoding become U+FFFD, with a warning that counts them. Line ends are made "\\n" where there
    are others, since blank lines are what a document is first cut at: offsets into a document are offsets into this
    text. Raises InputError for whatever cannot be read, is no regular file (pipes that a shell opened, /dev/stdin and
    /dev/fd/N, are read), has more than 256 MiB, or has no text in it.
    """
    name = "standard input" if source == STDIN else source
    return text_of(_bytes_of(source, name), name, Path(source).suffix)


def text_of(data: bytes, name: str, suffix: str) -> str:
    """The text of a file's bytes, as `read_document` reads it; `name` is what errors call it, `suffix` ends its name.

    Raises InputError where there is no text in it.
    """
    suffix = suffix.lower()
    if data[:64].lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"%PDF-") or suffix == ".pdf":
        text = _pdf_text(data, name)
    elif suffix in (".html", ".htm", ".xhtml") or begins_as_html(_head(data)):
        text = html_text(_decode(data, name, _html_encoding(_CHARSET.search(data[:4096]))))
    else:
        text = _decode(data, name, "utf-8")
    if "\0" in text:
        raise InputError(f"{name}: expected text, got a binary file (byte 0 at character {text.index(chr(0))})")
    if len(text) > _MOST_CHARACTERS:
        raise InputError(f"{name}: expected at most {_MOST_CHARACTERS} characters of text, got {len(text)}")
    if "\r" in text:
        text = re.sub("\r\n?", "\n", text)
    if not text.strip():
        raise InputError(f"{name}: expected a document with text in it, got an empty one")
    return text


def _bytes_of(source: str, name: str) -> bytes:
    try:
        if source != STDIN:
            with open_regular(place_of(source, "document"), or_open_already=True) as file:
                return b"".join(blocks(file, _MOST_BYTES, name))
        if sys.stdin is None:
            raise InputError("standard input: expected a document, but it is closed")
        return b"".join(blocks(sys.stdin.buffer, _MOST_BYTES, name))
    except InputError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise InputError(f"document {name}: cannot be read: {reason}") from error


def _head(data: bytes) -> str:
    mark, encoding = byte_order_mark(data)
    return data[len(mark) : _HEAD].decode(encoding or "utf-8", "replace")


def _decode(data: bytes, name: str, otherwise: str) -> str:
    """The text of the bytes in the encoding of their byte order mark, or in `otherwise` if they have none."""
    mark, marked = byte_order_mark(data)
    body, encoding = data[len(mark) :], marked or otherwise
    try:
        return body.decode(encoding)
    except UnicodeDecodeError:
        text = body.decode(encoding, "replace")
    bad = text.count(_REPLACEMENT) - body.decode(encoding, "ignore").count(_REPLACEMENT)
    if "\0" not in text:  # else it is refused anyway
        _log.warning(
            "%s: %d byte %s not %s and read as %s",
            name,
            bad,
            "sequence is" if bad == 1 else "sequences are",
            encoding.upper(),
            _REPLACEMENT,
        )
    return text


def _pdf_text(data: bytes, name: str) -> str:
    """The text of the pages, a blank line between two."""
    try:
        import pypdf
    except ImportError as error:
        raise InputError(f"{name}: reading PDF needs pypdf: {_EXTRA}") from error
    # What pypdf reports is about the file's inner structure, page after page.
    logging.getLogger("pypdf").setLevel(logging.CRITICAL)
    try:
        reader = pypdf.PdfReader(io.BytesIO(data))
        # Many files are encrypted with the empty password: anyone may read them.
        locked = reader.is_encrypted and not reader.decrypt("")
        text = "" if locked else "\n\n".join(_pages(reader))
    except Exception as error:  # a damaged file raises anything, from KeyError to RecursionError
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{name}: the PDF cannot be read: {reason}") from error
    if locked:
        raise InputError(f"{name}: the PDF is encrypted: expected one that opens without a password")
    if not text.strip():
        raise InputError(f"{name}: the PDF has no text in it (scanned pages need text recognition first)")
    # Fonts without a proper table of characters give NULs and halves of UTF-16 pairs.
    return text.replace("\0", _REPLACEMENT).encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _pages(reader: "pypdf.PdfReader") -> Iterator[str]:
    """The text of each page, until there is more than is read anyway."""
    characters, end, last = 0, 0.0, time.monotonic() + _PDF_SECONDS

    def in_time(*_: object) -> None:
        # Forms that show each other twice would be read 2^depth times; pypdf goes on behind a form that fails.
        if time.monotonic() > min(end, last):
            which, limit = ("its pages take", _PDF_SECONDS) if last < end else ("a page takes", _PAGE_SECONDS)
            raise TimeoutError(f"{which} longer than {limit:g} s")

    for page in reader.pages:
        end = time.monotonic() + _PAGE_SECONDS
        text = page.extract_text(visitor_operand_before=in_time).strip()
        in_time()
        characters += len(text)
        yield text
        if characters > _MOST_CHARACTERS:
            return


def _html_encoding(declared: re.Match[bytes] | None) -> str:
    """What the page says its encoding is, if browsers know it, as they take it: Latin-1 is Windows' extension of it.

    Others of Python's codecs are no encodings of pages: some are slow, warn, or decode to halves of UTF-16 pairs. The
    declaration itself was read as single bytes, so UTF-16 and UTF-32 cannot be true.
    """
    try:
        encoding = codecs.lookup(declared[1].decode().lower() if declared else "utf-8").name
    except LookupError:
        return "utf-8"
    return _TAKEN_AS.get(encoding, encoding) if _ENCODINGS.fullmatch(encoding) else "utf-8"
