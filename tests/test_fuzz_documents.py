# SPDX-License-Identifier: Apache-2.0
"""Documents of every kind with something wrong: text, or one line that names the file, soon."""

import codecs
import gzip
import itertools
import json
import random
import time
from collections import Counter
from collections.abc import Iterator

import pytest
import zstandard

from longpo_jax.sources import files_of
from longpo_jax.texts import texts_of
from rapid_jax.documents import read_document
from rapid_jax.html_text import html_text
from rapid_jax.runtime.errors import InputError
from tests.test_documents import PAGE, pdf

SECONDS = 10.0  # of one case, most of them take a thousandth
TAGS = ("p", "div", "b", "a", "li", "ul", "table", "tr", "td", "pre", "br", "title", "script", "style", "template")
TAGS += ("textarea", "xmp", "plaintext", "svg", "x-y")
SCRAPS = ["<", ">", "</", "/>", "<!", "<!--", "-->", "--!>", "<![CDATA[", "]]>", "<?", "?>", "<![[x", "<!doctype html>"]
SCRAPS += ["&", "&#", "&#x", "&amp;", "&#0;", "&#xD800;", f"&#{'9' * 5000};", "&nosuch;", "&notit;", "=", "'", '"']
SCRAPS += [" ", "\n", "\r\n", "\t", "\f", "\xa0", "text", "caf\xe9", "\u65e5", "\U0001f600", "\ufeff", "\x1b[31m"]


def soup(cases: random.Random) -> str:
    """Tags, pieces of tags and text in any order."""
    parts = []
    for _ in range(cases.randrange(1, 60)):
        tag = cases.choice(TAGS)
        made = f"<{tag}>", f"</{tag}>", f"<{tag} a='b' c=d>", f"<{tag.upper()}/>", f'<{tag} a="', f"</{tag} "
        parts.append(cases.choice([*made, *cases.choices(SCRAPS, k=6)]) * cases.choice((1, 1, 1, 2, 50)))
    return "".join(parts)


def damaged(data: bytes, cases: random.Random) -> bytes:
    """The bytes cut short, or with some changed, taken out or put in."""
    changed = bytearray(data)
    for _ in range(cases.randrange(1, 4)):
        at = cases.randrange(len(changed) + 1)
        kind = cases.randrange(4)
        if kind == 0:
            del changed[at:]
        elif kind == 1:
            changed[at : at + 1] = bytes([cases.randrange(256)])
        elif kind == 2:
            del changed[at : at + cases.randrange(20)]
        else:
            changed[at:at] = cases.choice((bytes(5), b"\xff\xfe", cases.randbytes(8), changed[at : at + 50]))
    return bytes(changed)


@pytest.fixture
def tried(tmp_path, caplog):
    """Reads a document of these bytes; gives its text, or None if it was refused as it should be."""
    count = itertools.count()

    def read(name: str, data: bytes) -> str | None:
        path = tmp_path / f"{next(count)}" / name
        path.parent.mkdir()
        path.write_bytes(data)
        begin = time.perf_counter()
        try:
            text = read_document(str(path))
        except InputError as error:
            assert str(path) in str(error) and len(str(error).splitlines()) == 1
            return None
        finally:
            assert time.perf_counter() - begin < SECONDS
            path.unlink()
        text.encode()  # no halves of pairs
        assert text.strip() and "\0" not in text and "\r" not in text
        return text

    return read


def test_soup_of_html(tried, request):
    cases, read = random.Random(1), 0
    for _ in range(400 * request.config.getoption("--fuzz")):
        page = soup(cases)
        assert html_text(page) == html_text(page).strip()
        text = tried("page.html", page.encode(cases.choice(("utf-8", "utf-16", "cp1252")), "replace"))
        read += text is not None
    assert read > 200


def test_damaged_pages(tried, request):
    cases = random.Random(2)
    for _ in range(150 * request.config.getoption("--fuzz")):
        tried(cases.choice(("page", "page.html")), damaged(PAGE.encode(), cases))


def test_damaged_pdfs(tried, request, capfd):
    whole, cases, refused = pdf("First page.", "Second page."), random.Random(3), 0
    cut = [whole[:size] for size in range(5, len(whole), 97)]
    for data in (*cut, *(damaged(whole, cases) for _ in range(150 * request.config.getoption("--fuzz")))):
        refused += tried("paper.pdf", data) is None
    assert refused > 20
    assert capfd.readouterr() == ("", "")


ENCODINGS = (
    "utf-8",
    "utf-16",
    "utf-16-le",
    "utf-16-be",
    "utf-32",
    "utf-32-be",
    "utf-7",
    "cp1252",
    "shift_jis",
    "cp037",
)


@pytest.mark.parametrize("name", ["a.txt", "a", "a.html"])
def test_encodings_with_and_without_marks(name, tried, request):
    cases = random.Random(4)
    marks = b"", codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE
    text = "caf\xe9 \u65e5\u672c \U0001f600 1 < 2\r\n"
    for mark in marks:
        for encoding in ENCODINGS:
            data = mark + text.encode(encoding, "replace")
            tried(name, data)
            for _ in range(2 * request.config.getoption("--fuzz")):
                tried(name, damaged(data, cases))
        for data in (b"", b"\0", b"\xff", b"\xed\xa0\x80", b"\xf8\x88\x80\x80\x80", b"\0\xd8", b"\xd8\0", b"\x80" * 99):
            tried(name, mark + data)


def test_damaged_corpora(tmp_path, request):
    lines = b"".join(json.dumps({"text": f"text {index} caf\u00e9"}).encode() + b"\n" for index in range(30))
    kinds = {
        "a.txt": lines,
        "a.jsonl": lines,
        "b.jsonl": "\ufeff".encode("utf-16-le") + lines.decode().encode("utf-16-le"),
        "a.txt.gz": gzip.compress(lines),
        "a.jsonl.gz": gzip.compress(lines[:700]) + gzip.compress(lines[700:]) + bytes(100),
        "a.txt.zst": zstandard.compress(lines),
        "a.jsonl.zst": zstandard.compress(lines[:700]) + zstandard.compress(lines[700:]),
    }
    cases, outcomes = random.Random(5), Counter()
    for name, whole in kinds.items():
        path = tmp_path / name
        path.write_bytes(whole)
        right = list(texts(path))
        assert "".join(right).count("caf") == 30
        for data in itertools.chain(
            (whole[: size * len(whole) // 20] for size in range(20)),
            (damaged(whole, cases) for _ in range(40 * request.config.getoption("--fuzz"))),
        ):
            path.write_bytes(data)
            begin = time.perf_counter()
            try:
                found = list(texts(path))
                outcomes["read"] += 1
                # The format has a check of its contents: what is read is right, or whole members of it.
                assert not name.endswith(".gz") or found in (right, right[:15], [""], []) or data[:4] != whole[:4]
            except InputError as error:
                assert str(path) in str(error) and len(str(error).splitlines()) == 1
                outcomes["refused"] += 1
            assert time.perf_counter() - begin < SECONDS
        path.unlink()
    assert min(outcomes.values()) > 50


def texts(path) -> Iterator[str]:
    return (text for *_, text in texts_of(files_of((f"x={path}",), Counter()), "text", 1, Counter(), quiet=True))


def test_names_and_contents_of_nothing(tried):
    for name in ("a.pdf", "a.html", "a.txt", "a"):
        for data in (b"", b" ", b"\n" * 1000, b"%PDF-", b"%PDF-1.7", b"<html>", b"<!--", b"\xff\xfe", b"\0" * 1000):
            assert tried(name, data) is None or data == b"<!--"  # text, where nothing else says that it is a page
