# SPDX-License-Identifier: Apache-2.0
"""Corpora that somebody hostile made: nothing hangs, fills the memory, or leads out of the folder."""

import codecs
import gzip
import json
import os
import random
import re
import socket
import zlib
from collections import Counter
from pathlib import Path

import pytest
import zstandard

from longpo_jax.config import CorpusConfig
from longpo_jax.documents import read_corpus
from longpo_jax.sources import files_of
from longpo_jax.texts import texts_of
from rapid_jax.runtime.errors import InputError
from tests.longpo.test_documents import tokenizer_of_words

LINK = "link that leads out of its source's folder (corpus.follow_links)"


def read(folder: Path, *, max_mib: int = 1, follow_links: bool = False) -> tuple[dict[str, str], Counter[str]]:
    """(texts by id, what was left out) of all files in the folder."""
    dropped: Counter[str] = Counter()
    files = files_of((f"x={folder}",), dropped, follow_links=follow_links)
    return {id[2:]: text for id, _, text in texts_of(files, "text", max_mib, dropped, quiet=True)}, dropped


def gzip_of(mib: int, block: bytes) -> bytes:
    packer = zlib.compressobj(9, wbits=31)
    return b"".join(packer.compress(block * (2**20 // len(block))) for _ in range(mib)) + packer.flush()


def zstd_of(mib: int, block: bytes) -> bytes:
    packer = zstandard.ZstdCompressor().compressobj()
    return b"".join(packer.compress(block * (2**20 // len(block))) for _ in range(mib)) + packer.flush()


@pytest.mark.parametrize("name", ["x.txt.gz", "x.jsonl.gz", "x.txt.zst", "x.jsonl.zst"])
@pytest.mark.parametrize("block", [b"a", b"\n", b'"a b" '])
def test_a_file_that_unpacks_to_far_more_is_left(name, block, tmp_path):
    (tmp_path / name).write_bytes((gzip_of if name.endswith(".gz") else zstd_of)(64, block))
    try:
        outcome = read(tmp_path)
    except InputError as error:
        assert re.search(rf"{name}: expected at most 200 bytes for each packed one, got \d+ for \d+", str(error))
    else:  # of one document no more is unpacked once it is too large
        assert name.startswith("x.txt") and outcome == ({}, {"larger than 1 MiB (corpus.max_mib)": 1})


def test_a_window_of_any_size_is_not_filled_before_there_is_text(tmp_path):
    # A frame that declares a window of 2 GiB, and one of 3.75 TiB, with an empty block.
    (tmp_path / "a.txt.zst").write_bytes(bytes.fromhex("28b52ffd 00 a8 090000 78".replace(" ", "")))
    assert read(tmp_path)[0] == {"a.txt.zst#0": "x"}
    (tmp_path / "a.txt.zst").write_bytes(bytes.fromhex("28b52ffd 00 ff 090000 78".replace(" ", "")))
    with pytest.raises(InputError, match=r"a\.txt\.zst: cannot be unpacked: "):
        read(tmp_path)


@pytest.mark.parametrize("name", ["x.txt", "x.jsonl", "x.jsonl.gz"])
def test_a_document_that_is_too_large_is_counted_and_the_others_are_read(name, tmp_path):
    large = "".join(random.Random(0).choices("abc \n", k=3 * 2**20))
    data = large.encode()
    if name != "x.txt":
        data = "\n".join(json.dumps(text) for text in ("one", large, "two", "", large)).encode()
    (tmp_path / name).write_bytes(gzip.compress(data, 1) if name.endswith(".gz") else data)
    (tmp_path / "y.txt").write_text("other")
    texts, dropped = read(tmp_path)
    kept = {} if name == "x.txt" else {f"{name}#0": "one", f"{name}#2": "two", f"{name}#3": ""}
    assert texts == kept | {"y.txt#0": "other"}
    assert dropped == {"larger than 1 MiB (corpus.max_mib)": 1 if name == "x.txt" else 2}
    assert len(read(tmp_path, max_mib=8)[0]) == (2 if name == "x.txt" else 6)


def test_a_corpus_of_documents_that_are_too_large_says_so(tmp_path):
    (tmp_path / "x.txt").write_text("a " * 2**20)
    with pytest.raises(InputError, match=r"got none .*1 x larger than 1 MiB \(corpus\.max_mib\)"):
        read_corpus(CorpusConfig((f"x={tmp_path}",), max_mib=1), tokenizer_of_words(), 0, quiet=True)


def test_what_is_no_regular_file_is_counted_and_not_opened(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "folder.txt").mkdir()
    (tmp_path / "folder.txt/b.md").write_text("within")
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(tmp_path / "socket.jsonl"))
    listening.close()
    texts, dropped = read(tmp_path)
    assert texts == {"a.txt#0": "text", "folder.txt/b.md#0": "within"}
    assert dropped == {"pipe, device or socket": 2}
    for source in (tmp_path / "pipe.txt", tmp_path / "pipe*", "/dev/zero"):
        with pytest.raises(InputError, match=r"expected a \.txt, .*found none, 1 x "):
            files_of((f"x={source}",), Counter())


@pytest.mark.parametrize("pattern", ["", "/*", "/**", "/**/*.txt", "/*/*.txt", "/*.txt"])
def test_links_that_lead_out_of_the_folder_are_followed_only_if_asked(pattern, tmp_path):
    outside, inside = tmp_path / "outside", tmp_path / "corpus"
    (outside / "deep").mkdir(parents=True)
    (outside / "secret.txt").write_text("secret")
    (outside / "deep/other.txt").write_text("secret, too")
    (inside / "sub").mkdir(parents=True)
    (inside / "a.txt").write_text("text")
    (inside / "sub/b.txt").write_text("text")
    (inside / "sub/same.txt").symlink_to("../a.txt")
    (inside / "link.txt").symlink_to(outside / "secret.txt")
    (inside / "folder").symlink_to(outside / "deep")
    for follow in (False, True):
        dropped: Counter[str] = Counter()
        files = files_of((f"x={inside}{pattern}",), dropped, follow_links=follow)
        targets = {os.path.realpath(file.path) for file in files}
        assert any("outside" in target for target in targets) == follow
        assert (dropped[LINK] > 0) != follow
        assert str(inside / "a.txt") in targets or pattern == "/*/*.txt"


def test_a_file_or_folder_that_is_named_may_be_a_link(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/a.txt").write_text("text")
    (tmp_path / "folder").symlink_to(tmp_path / "data")
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus/a.txt").symlink_to(tmp_path / "data/a.txt")
    for source in ("folder", "folder/*.txt", "folder/**", "corpus/a.txt"):
        assert [file.name for file in files_of((f"x={tmp_path}/{source}",), Counter())] == ["x/a.txt"]
    with pytest.raises(InputError, match=r"found none, 1 x link that leads out of its source's folder"):
        files_of((f"x={tmp_path}/corpus",), Counter())


@pytest.mark.parametrize("pattern", ["", "/**", "/**/*.txt", "/**/**/b*/**"])
def test_links_in_circles_are_walked_once(pattern, tmp_path):
    for name in ("b", "b/c", "b/c/d"):
        (tmp_path / name).mkdir()
        for link in ("one", "two", "three"):
            (tmp_path / name / link).symlink_to(tmp_path)
    (tmp_path / "b/c/d/a.txt").write_text("text")
    for follow in (False, True):
        files = files_of((f"x={tmp_path}{pattern}",), Counter(), follow_links=follow)
        assert {os.path.realpath(file.path) for file in files} == {str(tmp_path / "b/c/d/a.txt")}
        assert len(files) == 1


def test_a_link_to_itself_is_one_line(tmp_path):
    (tmp_path / "a.txt").symlink_to("a.txt")
    with pytest.raises(InputError, match=r"a\.txt: cannot be read: Too many levels"):
        read(tmp_path)
    with pytest.raises(InputError, match=r"corpus\.sources: expected a path"):
        files_of(("x=~nobody-of-this-name/y",), Counter())


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("pack", [bytes, gzip.compress, zstandard.compress])
def test_files_are_read_in_the_encoding_of_their_mark(encoding, pack, tmp_path):
    ending = {bytes: "", gzip.compress: ".gz"}.get(pack, ".zst")
    text = "caf\u00e9 \u65e5\u672c \U0001f600\u0a0a\n" * 20_000  # has a newline's byte in its characters
    mark = codecs.BOM_UTF8 if encoding == "utf-8" else "\ufeff".encode(encoding)
    (tmp_path / f"a.txt{ending}").write_bytes(pack(mark + text.encode(encoding)))
    lines = json.dumps({"text": text}, ensure_ascii=False) + "\n" + json.dumps("two")
    (tmp_path / f"b.jsonl{ending}").write_bytes(pack(mark + lines.encode(encoding)))
    texts, _ = read(tmp_path)
    assert texts == {f"a.txt{ending}#0": text, f"b.jsonl{ending}#0": text, f"b.jsonl{ending}#1": "two"}


@pytest.mark.parametrize(
    "data", [codecs.BOM_UTF16_LE + b"a\0b", codecs.BOM_UTF16_LE + b"\0\xd8a\0", codecs.BOM_UTF32_BE + b"\xff" * 4]
)
def test_damaged_text_with_a_mark_is_left_out(data, tmp_path):
    (tmp_path / "a.txt").write_bytes(data)
    (tmp_path / "b.txt").write_text("text")
    corpus = read_corpus(CorpusConfig((f"x={tmp_path}",), min_tokens=1), tokenizer_of_words(), 0, quiet=True)
    assert [document.text for document in corpus.documents] == ["text"] and corpus.dropped == {"not UTF-8": 1}
    (tmp_path / "a.txt").rename(tmp_path / "a.jsonl")
    with pytest.raises(InputError, match=r"a\.jsonl, line 1: not JSON"):
        read(tmp_path)


def test_zeros_behind_a_gzip_are_padding(tmp_path):
    packed = gzip.compress(b"one ") + gzip.compress(b"two")
    for zeros in (1, 1000, 2**19):
        (tmp_path / "a.txt.gz").write_bytes(packed + bytes(zeros))
        assert read(tmp_path)[0] == {"a.txt.gz#0": "one two"}
    for rest in (b"x", bytes(1000) + b"x", packed[:12]):
        (tmp_path / "a.txt.gz").write_bytes(packed + rest)
        with pytest.raises(InputError, match=r"a\.txt\.gz: cannot be unpacked"):
            read(tmp_path)


def test_the_rest_of_a_text_that_is_too_long_is_not_tokenised(tmp_path, monkeypatch):
    tokenizer, counted = tokenizer_of_words(), []
    counts = tokenizer.counts
    monkeypatch.setattr(tokenizer, "counts", lambda texts: counted.append(sum(map(len, texts))) or counts(texts))
    (tmp_path / "a.txt").write_text("a " * 500_000)
    (tmp_path / "b.txt").write_text("b " * 90 + " " * 500_000)
    corpus = read_corpus(CorpusConfig((f"x={tmp_path}",), min_tokens=1, max_tokens=100), tokenizer, 0, quiet=True)
    assert [document.tokens for document in corpus.documents] == [90] and corpus.dropped == {"document too long": 1}
    assert sum(counted) < 600_000


def test_a_text_of_any_length_is_split_piece_by_piece(tmp_path, monkeypatch):
    monkeypatch.setattr("longpo_jax.documents._TOGETHER", 3_000)
    paragraphs = [" ".join(f"w{index}.{word}" for word in range(index % 30 + 1)) for index in range(400)]
    text = "\n\n".join(paragraphs)
    (tmp_path / "a.txt").write_text(text)
    settings = CorpusConfig((f"x={tmp_path}",), min_tokens=1, max_tokens=100, longer="split")
    parts = {document.id: document for document in read_corpus(settings, tokenizer_of_words(), 0, quiet=True).documents}
    ordered = [parts[f"x/a.txt#0.{index}"] for index in range(len(parts))]
    assert " ".join(part.text for part in ordered).split() == text.split()
    assert all(part.tokens == len(part.text.split()) <= 100 for part in ordered)
