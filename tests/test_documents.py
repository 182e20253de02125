# SPDX-License-Identifier: Apache-2.0
"""Documents as text: encodings, line ends, PDF, HTML, and everything that cannot be read."""

import builtins
import codecs
import io
import logging
import os
import socket
import time
from types import SimpleNamespace

import pypdf
import pytest
from pypdf.generic import DecodedStreamObject, DictionaryObject, NameObject

from rapid_jax.documents import read_document
from rapid_jax.runtime.errors import InputError

TEXT = "Größe: 5 µm\n\n\u65e5\u672c\u8a9e \U0001f600\n"


def given_stdin(monkeypatch, data: bytes):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))


@pytest.mark.parametrize(
    ("mark", "encoding"),
    [
        (b"", "utf-8"),
        (codecs.BOM_UTF8, "utf-8"),
        (codecs.BOM_UTF16_LE, "utf-16-le"),
        (codecs.BOM_UTF16_BE, "utf-16-be"),
        (codecs.BOM_UTF32_LE, "utf-32-le"),
        (codecs.BOM_UTF32_BE, "utf-32-be"),
    ],
)
def test_text_comes_back_without_its_byte_order_mark(mark, encoding, tmp_path, monkeypatch, caplog):
    data = mark + TEXT.encode(encoding)
    (tmp_path / "document.txt").write_bytes(data)
    assert read_document(str(tmp_path / "document.txt")) == TEXT
    given_stdin(monkeypatch, data)
    assert read_document("-") == TEXT
    assert not caplog.records


def test_bytes_that_are_not_utf8_are_replaced_and_counted(tmp_path, caplog):
    path = tmp_path / "latin1.txt"
    path.write_bytes("naïve café \N{REPLACEMENT CHARACTER}".encode() + b" caf\xe9 na\xefve")
    text = read_document(str(path))
    assert text == "naïve café \ufffd caf\ufffd na\ufffdve"
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert f"{path}: 2 byte sequences are not UTF-8" in caplog.text


def test_a_damaged_utf16_file_is_read_as_far_as_it_goes(tmp_path, caplog):
    path = tmp_path / "cut.txt"
    path.write_bytes(codecs.BOM_UTF16_LE + "whole".encode("utf-16-le") + b"h")
    assert read_document(str(path)) == "whole\ufffd"
    assert "1 byte sequence is not UTF-16-LE" in caplog.text


def test_line_ends_become_newlines_and_nothing_else_changes(tmp_path):
    path = tmp_path / "windows.txt"
    path.write_bytes(b"  one \r\n\r\ntwo\rthree\n\tfour  ")
    assert read_document(str(path)) == "  one \n\ntwo\nthree\n\tfour  "


@pytest.mark.parametrize("content", [b"", b" \n\t\r\n", codecs.BOM_UTF8])
def test_an_empty_document_is_refused(content, tmp_path, monkeypatch):
    (tmp_path / "empty.txt").write_bytes(content)
    with pytest.raises(InputError, match="with text in it"):
        read_document(str(tmp_path / "empty.txt"))
    given_stdin(monkeypatch, content)
    with pytest.raises(InputError, match=r"standard input: .*with text in it"):
        read_document("-")


@pytest.mark.parametrize("content", [b"text\0more", b"\x7fELF\x02\x01\x01\0\0\xff\xfe\xfa"])
def test_a_binary_file_is_refused_without_a_warning(content, tmp_path, caplog):
    (tmp_path / "program").write_bytes(content)
    with pytest.raises(InputError, match=r"program: expected text, got a binary file"):
        read_document(str(tmp_path / "program"))
    assert not caplog.records


def test_what_is_not_there_or_no_file_is_refused(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"absent\.txt: cannot be read: No such file"):
        read_document(str(tmp_path / "absent.txt"))
    with pytest.raises(InputError, match="cannot be read: Is a directory"):
        read_document(str(tmp_path))
    with pytest.raises(InputError, match=r"expected a path, got"):
        read_document("a\0b")
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(InputError, match=r"standard input: .*closed"):
        read_document("-")


def test_a_file_without_permission_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "secret.txt"
    path.write_text("text")

    def refuse(*args, **kwargs):
        raise PermissionError(13, os.strerror(13), str(path))

    # The superuser may read any file, so the refusal is the operating system's in name only.
    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(InputError, match="cannot be read: Permission denied"):
        read_document(str(path))


@pytest.mark.parametrize("kind", ["pipe", "device", "socket"])
def test_what_may_never_end_is_not_opened(kind, tmp_path):
    path = tmp_path / "document.txt"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        listening = socket.socket(socket.AF_UNIX)
        listening.bind(str(path))
        listening.close()
    with pytest.raises(InputError, match=rf"document\.txt: .*expected a regular file, got a {kind}"):
        read_document(str(path))


def test_a_pipe_that_a_shell_opened_is_read():
    read, write = os.pipe()
    os.write(write, b"from a command")
    os.close(write)
    assert read_document(f"/dev/fd/{read}") == "from a command"
    os.close(read)


def test_more_than_the_limit_is_refused_without_reading_it_all(tmp_path, monkeypatch):
    path = tmp_path / "huge.txt"
    with open(path, "wb") as file:
        file.truncate(1 << 40)
    for source in (str(path), "-"):
        with open(path, "rb", buffering=0) as endless:
            monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BufferedReader(endless)))
            with pytest.raises(InputError, match="expected at most 256 MiB, got more"):
                read_document(source)
    path.write_text("x" * (2**26 + 1))
    with pytest.raises(InputError, match="expected at most 67108864 characters of text, got 67108865"):
        read_document(str(path))


def test_standard_input_that_is_a_folder_is_one_line(tmp_path, monkeypatch):
    folder = os.open(tmp_path, os.O_RDONLY)
    buffer = SimpleNamespace(read=lambda size: os.read(folder, size))
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=buffer))
    with pytest.raises(InputError, match="standard input: cannot be read: Is a directory"):
        read_document("-")
    os.close(folder)


@pytest.mark.parametrize("source", ["~nobody-of-this-name/x.txt", "x" * 5000, "caf\udce9"])
def test_names_that_cannot_be_are_one_line(source):
    with pytest.raises(InputError, match=r"cannot be read|document: expected a path, got"):
        read_document(source)


def pdf(*pages: str, password: str | None = None) -> bytes:
    """A PDF with a line of text a page, its font one of the fourteen that need no file."""
    writer = pypdf.PdfWriter()
    font = {"/Type": "/Font", "/Subtype": "/Type1", "/BaseFont": "/Helvetica"}
    named = DictionaryObject({NameObject(key): NameObject(value) for key, value in font.items()})
    for text in pages:
        page = writer.add_blank_page(300, 300)
        fonts = DictionaryObject({NameObject("/F1"): named})
        page[NameObject("/Resources")] = DictionaryObject({NameObject("/Font"): fonts})
        stream = DecodedStreamObject()
        stream.set_data(f"BT /F1 12 Tf 20 200 Td ({text}) Tj ET".encode())
        page[NameObject("/Contents")] = writer._add_object(stream)
    if password is not None:
        writer.encrypt(password, "owner", algorithm="RC4-128")
    written = io.BytesIO()
    writer.write(written)
    return written.getvalue()


def test_a_pdf_is_read_page_by_page_by_name_or_by_its_first_bytes(tmp_path, monkeypatch):
    data = pdf("First page.", "Second page.")
    (tmp_path / "paper.pdf").write_bytes(data)
    (tmp_path / "paper.txt").write_bytes(b"\n" + data)
    assert read_document(str(tmp_path / "paper.pdf")) == "First page.\n\nSecond page."
    assert read_document(str(tmp_path / "paper.txt")) == "First page.\n\nSecond page."
    given_stdin(monkeypatch, data)
    assert read_document("-") == "First page.\n\nSecond page."


def test_a_pdf_that_only_its_owner_may_change_is_read(tmp_path):
    (tmp_path / "paper.pdf").write_bytes(pdf("Anyone may read.", password=""))
    assert read_document(str(tmp_path / "paper.pdf")) == "Anyone may read."


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (pdf("Secret.", password="word"), "is encrypted"),
        (pdf("First page.")[:300], "cannot be read"),
        (b"%PDF-1.7\nnothing of the kind", "cannot be read"),
        (b"a text with the wrong name", "cannot be read"),
        (pdf("", ""), "has no text in it"),
    ],
)
def test_a_pdf_that_gives_no_text_is_refused_in_one_line(data, message, tmp_path, capfd):
    (tmp_path / "paper.pdf").write_bytes(data)
    with pytest.raises(InputError, match=f"paper.pdf: the PDF {message}") as caught:
        read_document(str(tmp_path / "paper.pdf"))
    assert len(str(caught.value).splitlines()) == 1
    assert capfd.readouterr().err == ""


def pdf_of_forms(depth: int) -> bytes:
    """A page with a form that shows another one twice, and so on."""
    objects = [b"<</Type/Catalog/Pages 2 0 R>>", b"<</Type/Pages/Count 1/Kids[3 0 R]>>"]
    objects += [b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 9 9]/Resources<</XObject<</X 5 0 R>>>>/Contents 4 0 R>>"]
    objects += [b"<</Length 5>>stream\n/X Do\nendstream"]
    for number in range(depth):
        inner = b"/Resources<</XObject<</X %d 0 R>>>>/Length 11>>stream\n/X Do /X Do\nendstream" % (6 + number)
        objects.append(b"<</Type/XObject/Subtype/Form/BBox[0 0 9 9]" + inner)
    data, table = b"%PDF-1.7\n", b"0000000000 65535 f \n"
    for number, body in enumerate(objects, 1):
        table += b"%010d 00000 n \n" % len(data)
        data += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    end = b"trailer\n<</Size %d/Root 1 0 R>>\nstartxref\n%d\n%%%%EOF" % (len(objects) + 1, len(data))
    return data + b"xref\n0 %d\n" % (len(objects) + 1) + table + end


def test_a_page_that_takes_for_ever_is_refused_in_time(tmp_path, monkeypatch):
    (tmp_path / "a.pdf").write_bytes(pdf_of_forms(40))
    monkeypatch.setattr("rapid_jax.documents._PAGE_SECONDS", 0.3)
    begin = time.monotonic()
    with pytest.raises(InputError, match=r"a\.pdf: the PDF cannot be read: a page takes longer than 0\.3 s"):
        read_document(str(tmp_path / "a.pdf"))
    assert time.monotonic() - begin < 10


PAGE = """<!DOCTYPE html><html><head><title>Cats &amp; dogs</title><style>p { color: red }</style>
<script>if (1 < 2) alert("no");</script></head><body><!-- not shown --><h1>On <em>cats</em></h1>
<p>A cat has
   four   legs.<br>And a tail.</p><ul><li>one</li><li>two</li></ul>
<table><tr><td>1</td><td>2</td></tr><tr><td>3</td><td>4</td></tr></table>
<pre>def f():
    return 1</pre></body></html>"""
SHOWN = """Cats & dogs

On cats

A cat has four legs.
And a tail.

one

two

1 2
3 4

def f():
    return 1"""


def test_html_is_the_text_that_is_shown(tmp_path, monkeypatch):
    for name in ("page.html", "page.HTM", "page.xhtml", "page", "page.txt"):
        (tmp_path / name).write_text(PAGE)
        assert read_document(str(tmp_path / name)) == SHOWN
    given_stdin(monkeypatch, PAGE.encode())
    assert read_document("-") == SHOWN
    (tmp_path / "page").write_bytes(codecs.BOM_UTF16_BE + PAGE.encode("utf-16-be"))
    assert read_document(str(tmp_path / "page")) == SHOWN


@pytest.mark.parametrize(
    ("data", "text", "warning"),
    [
        ("<meta charset=utf-8><p>caf\u00e9</p>".encode(), "caf\u00e9", ""),
        (b'<meta charset="iso-8859-1"><p>caf\xe9 \x80</p>', "caf\u00e9 \u20ac", ""),
        (b'<META HTTP-EQUIV="Content-Type" CONTENT="text/html; charset=shift_jis"><p>\x93\xfa</p>', "\u65e5", ""),
        (codecs.BOM_UTF16_LE + "<meta charset=utf-8>caf\u00e9".encode("utf-16-le"), "caf\u00e9", ""),
        (b"<p>caf\xe9</p>", "caf\ufffd", "1 byte sequence is not UTF-8"),
        (b"<meta charset=utf-16>caf\xc3\xa9", "caf\u00e9", ""),
        (b"<meta charset=rot13>caf\xc3\xa9", "caf\u00e9", ""),
        (b"<meta charset=unicode_escape>\\ud800", "\\ud800", ""),
        (b"<meta charset=utf-7>+ADw-", "+ADw-", ""),
        (b"<meta charset=gb2312>\x81\x30\x81\x30", "\x80", ""),
        (b"<meta charset=nonsense><p>caf\xe9</p>", "caf\ufffd", "1 byte sequence is not UTF-8"),
    ],
)
def test_html_is_in_the_encoding_that_it_declares(data, text, warning, tmp_path, caplog):
    (tmp_path / "page.html").write_bytes(data)
    assert read_document(str(tmp_path / "page.html")) == text
    assert bool(caplog.records) == bool(warning) and warning in caplog.text


def test_html_that_shows_nothing_is_refused(tmp_path):
    (tmp_path / "page.html").write_text("<html><script>x</script></html>")
    with pytest.raises(InputError, match="with text in it"):
        read_document(str(tmp_path / "page.html"))


def test_without_the_extra_the_command_that_installs_it_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.pdf").write_bytes(b"x")
    original = builtins.__import__

    def without(wanted, *args, **kwargs):
        if wanted == "pypdf":
            raise ImportError(f"No module named {wanted!r}")
        return original(wanted, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match=r"pip install '\.\[documents\]'"):
        read_document(str(tmp_path / "a.pdf"))
