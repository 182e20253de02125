# SPDX-License-Identifier: Apache-2.0
"""A document as text: plain text in the usual encodings, PDF and HTML."""

import codecs
import io
import logging
import re
import sys
import warnings
from pathlib import Path

from rapid_jax.runtime.errors import InputError, extra

STDIN = "-"

_log = logging.getLogger(__name__)
_EXTRA = extra("documents")
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# The longer mark first: UTF-32 (little endian) starts with the mark of UTF-16.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
# HTML elements that stand on lines of their own; others run on in the line.
_BLOCKS = (
    *("address", "article", "aside", "blockquote", "body", "caption", "dd", "details", "div", "dl", "dt", "fieldset"),
    *("figcaption", "figure", "footer", "form", "h1", "h2", "h3", "h4", "h5", "h6", "header", "hr", "li", "main"),
    *("nav", "ol", "p", "pre", "section", "summary", "table", "title", "ul"),
)
_CHARSET = re.compile(rb"<meta[^>]+charset\s*=\s*[\"']?([\w:.-]+)", re.IGNORECASE)
_UNREAD = ("script", "style", "template", "noscript")


def read_document(source: str) -> str:
    """The text of the file `source`, or of standard input for "-"; never empty.

    A PDF is known by its first bytes, HTML by the file's name (.html, .htm), all else is text: UTF-8, or what a byte
    order mark says. Bytes that do not fit the encoding become U+FFFD, with a warning that counts them. Line ends are
    made "\\n" where there are others, since blank lines are what a document is first cut at: offsets into a document
    are offsets into this text. Raises InputError for whatever cannot be read or has no text in it.
    """
    name = "standard input" if source == STDIN else source
    data = _bytes_of(source)
    if data.startswith(b"%PDF-") or Path(source).suffix.lower() == ".pdf":
        text = _pdf_text(data, name)
    elif Path(source).suffix.lower() in (".html", ".htm"):
        text = _html_text(data, name)
    else:
        text = _decoded(data, name, "utf-8")
    if "\0" in text:
        raise InputError(f"{name}: expected text, got a binary file (byte 0 at character {text.index(chr(0))})")
    if "\r" in text:
        text = re.sub("\r\n?", "\n", text)
    if not text.strip():
        raise InputError(f"{name}: expected a document with text in it, got an empty one")
    return text


def _bytes_of(source: str) -> bytes:
    if source == STDIN:
        if sys.stdin is None:
            raise InputError("standard input: expected a document, but it is closed")
        return sys.stdin.buffer.read()
    try:
        return Path(source).expanduser().read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise InputError(f"document {source}: cannot be read: {reason}") from error


def _decoded(data: bytes, name: str, otherwise: str) -> str:
    """The text of the bytes in the encoding of their byte order mark, or in `otherwise` if they have none."""
    mark, encoding = next(((mark, encoding) for mark, encoding in _MARKS if data.startswith(mark)), (b"", otherwise))
    body = data[len(mark) :]
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
        text = "" if locked else "\n\n".join(page.extract_text().strip() for page in reader.pages)
    except Exception as error:  # a damaged file raises anything, from KeyError to RecursionError
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{name}: the PDF cannot be read: {reason}") from error
    if locked:
        raise InputError(f"{name}: the PDF is encrypted: expected one that opens without a password")
    if not text.strip():
        raise InputError(f"{name}: the PDF has no text in it (scanned pages need text recognition first)")
    # Fonts without a proper table of characters give NULs and halves of UTF-16 pairs.
    return text.replace("\0", _REPLACEMENT).encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _html_text(data: bytes, name: str) -> str:
    """The text that a browser shows, blocks apart by blank lines, and the title."""
    try:
        import bs4
        from bs4.element import NavigableString
    except ImportError as error:
        raise InputError(f"{name}: reading HTML needs beautifulsoup4: {_EXTRA}") from error
    declared = _CHARSET.search(data[:4096])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # guesses about the markup
        soup = bs4.BeautifulSoup(_decoded(data, name, _html_encoding(declared)), "html.parser")
    for tag in soup(_UNREAD):
        tag.decompose()
    for node in soup.find_all(string=True):
        if type(node) is NavigableString and node.find_parent("pre") is None:  # its subclasses are comments and such
            node.replace_with(re.sub(r"\s+", " ", node))
    for tag in soup.find_all("br"):
        tag.replace_with("\n")
    for tag in soup.find_all(("tr", "td", "th")):
        tag.append("\n" if tag.name == "tr" else " ")
    for tag in soup.find_all(_BLOCKS):
        tag.insert_before("\n\n")
        tag.insert_after("\n\n")
    text = "\n".join(line.rstrip() for line in soup.get_text().split("\n"))
    return re.sub(r"\n{3,}", "\n\n", re.sub(r"(?m)^ (?! )", "", text)).strip()


def _html_encoding(declared: re.Match[bytes] | None) -> str:
    """What the page says its encoding is, if it can be, as browsers take it: Latin-1 is Windows' extension of it."""
    name = declared[1].decode().lower() if declared else "utf-8"
    try:
        b"a".decode(name)
    except (LookupError, UnicodeError):  # no encoding, or none of text
        return "utf-8"
    encoding = codecs.lookup(name).name
    if encoding.startswith(("utf-16", "utf-32")):  # the declaration itself was read as single bytes
        return "utf-8"
    return "cp1252" if encoding in ("iso8859-1", "ascii") else encoding
