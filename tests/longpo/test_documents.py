# SPDX-License-Identifier: Apache-2.0
"""Every document of the files is read or counted, and their order depends on the seed and the files alone."""

import gzip
import hashlib
import json
import os
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest
import zstandard
from tokenizers import Tokenizer as Backend
from tokenizers import models, normalizers, pre_tokenizers

from longpo_jax.config import CorpusConfig
from longpo_jax.documents import Document, read_corpus
from rapid_jax.model.tokenizer import Tokenizer
from rapid_jax.runtime.errors import InputError


def tokenizer_of_words(prefix: str | None = None) -> Tokenizer:
    """A token a word, and one more before each text if there is a prefix (as SentencePiece's)."""
    backend = Backend(models.WordLevel({"?": 0}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    if prefix is not None:
        backend.normalizer = normalizers.Prepend(prefix)  # pyright: ignore[reportAttributeAccessIssue]
    return Tokenizer({"tokenizer.json": backend.to_str().encode()})


@pytest.fixture(scope="module")
def words() -> Tokenizer:
    return tokenizer_of_words()


def config(*sources: str, **changed) -> CorpusConfig:
    return CorpusConfig(**{"sources": sources, "min_tokens": 1, "max_tokens": 100, **changed})


def by_id(settings: CorpusConfig, tokenizer: Tokenizer, seed: int = 0) -> dict[str, str]:
    return {document.id: document.text for document in read_corpus(settings, tokenizer, seed, quiet=True).documents}


def json_lines(*values: object) -> bytes:
    return "".join(json.dumps(value) + "\n" for value in values).encode()


def write(path: Path, data: bytes | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)


def zstd(data: bytes) -> bytes:
    return zstandard.compress(data)


@pytest.fixture
def library(tmp_path) -> Path:
    """Nine documents in every kind of file."""
    folder = tmp_path / "library"
    write(folder / "a.txt", "one caf\u00e9")
    write(folder / "deep/er/b.md", "\ufefftwo\r\n\r\nlines\rand a third")
    write(folder / "deep/c.TEX", "three words here")
    write(folder / "d.txt.gz", gzip.compress(b"four ") + gzip.compress(b"in two members"))
    write(folder / "e.md.zst", zstd(b"five ") + zstd(b"in two frames"))
    write(folder / "f.jsonl", json_lines({"text": "six\r\n6", "n": 1}, "seven") + b" \n" + json_lines("eight")[:-1])
    write(folder / "g.jsonl.gz", gzip.compress(json_lines("nine")))
    return folder


TEXTS = {
    "book/a.txt#0": "one caf\u00e9",
    "book/deep/er/b.md#0": "two\n\nlines\nand a third",
    "book/deep/c.TEX#0": "three words here",
    "book/d.txt.gz#0": "four in two members",
    "book/e.md.zst#0": "five in two frames",
    "book/f.jsonl#0": "six\n6",
    "book/f.jsonl#1": "seven",
    "book/f.jsonl#3": "eight",
    "book/g.jsonl.gz#0": "nine",
}


def test_every_kind_of_file_is_read_and_the_ids_name_them(library, words):
    write(library / "picture.png", b"\x89PNG")
    write(library / ".hidden/x.txt", "hidden")
    write(library / ".y.txt", "hidden")
    corpus = read_corpus(config(f"book={library}"), words, 0, quiet=True)
    assert {document.id: document.text for document in corpus.documents} == TEXTS
    assert all(document.domain == "book" for document in corpus.documents)
    assert all(document.tokens == len(document.text.split()) for document in corpus.documents)
    assert corpus.dropped == {"file of another kind": 1}


def test_documents_are_read_by_index_slice_and_repeatedly(library, words):
    documents = read_corpus(config(f"book={library}"), words, 0, quiet=True).documents
    every = list(documents)
    assert len(documents) == 9 and isinstance(every[0], Document)
    assert [documents[index] for index in range(9)] == every == list(documents)
    assert documents[-1] == every[-1]
    assert list(documents[1::3]) == every[1::3] and len(documents[1::3]) == 3
    with pytest.raises(IndexError):
        documents[9]


def test_globs_files_and_folders_name_documents_alike(library, words):
    assert set(by_id(config(f"x={library}/*.txt"), words)) == {"x/a.txt#0"}
    assert set(by_id(config(f"x={library}/a.txt"), words)) == {"x/a.txt#0"}
    assert by_id(config(f"book={library}/**"), words) == TEXTS
    assert set(by_id(config(f"x={library}/d*"), words)) == {"x/d.txt.gz#0", "x/deep/er/b.md#0", "x/deep/c.TEX#0"}
    assert by_id(config(f"book={library}", f"book={library}/*.txt"), words) == TEXTS


def test_a_folder_that_is_a_link_to_its_own_parent_is_read_once(library, words):
    (library / "deep/loop").symlink_to(library)
    (library / "elsewhere").symlink_to(library / "deep/er")
    texts = list(by_id(config(f"book={library}"), words).values())
    assert Counter(texts) == Counter(TEXTS.values())


def test_two_domains_and_one_name_for_two_files(library, tmp_path, words):
    write(tmp_path / "other/a.txt", "another")
    found = by_id(config(f"book={library}", f"web={tmp_path}/other"), words)
    assert found == TEXTS | {"web/a.txt#0": "another"}
    with pytest.raises(InputError, match=r"a\.txt and .*a\.txt are both book/a\.txt"):
        read_corpus(config(f"book={library}", f"book={tmp_path}/other"), words, 0, quiet=True)


def order(settings: CorpusConfig, tokenizer: Tokenizer, seed: int) -> list[tuple[str, str]]:
    return [(document.id, document.text) for document in read_corpus(settings, tokenizer, seed, quiet=True).documents]


def test_the_order_follows_from_the_seed_and_the_files_not_from_where_they_lie(library, tmp_path, words, monkeypatch):
    first = order(config(f"book={library}"), words, 7)
    shutil.copytree(library, tmp_path / "elsewhere/copy")
    walk = os.walk

    def backwards(*args, **kwargs):
        for path, folders, names in walk(*args, **kwargs):
            yield path, folders, names[::-1]

    monkeypatch.setattr("os.walk", backwards)
    assert order(config(f"book={tmp_path}/elsewhere/copy"), words, 7) == first
    assert order(config(f"book={library}"), words, 8) != first
    assert sorted(order(config(f"book={library}"), words, 8)) == sorted(first)
    # Nothing that differs between processes, machines or versions of Python goes into it.
    assert [id for id, _ in first] == sorted(TEXTS, key=lambda id: hashlib.sha256(f"7 {id}".encode()).digest())


def test_every_document_is_as_often_first(tmp_path, words):
    write(tmp_path / "x.jsonl", json_lines(*(f"w{index}" for index in range(5))))
    first = Counter(order(config(f"x={tmp_path}", documents=1), words, seed)[0][1] for seed in range(500))
    assert len(first) == 5 and all(65 < count < 140 for count in first.values())  # 100 expected, deviation 9


@pytest.mark.parametrize("limit", [1, 4, 8, 9, 50])
def test_a_limit_keeps_the_first_of_the_order_and_counts_the_others(limit, library, words):
    every = order(config(f"book={library}"), words, 3)
    corpus = read_corpus(config(f"book={library}", documents=limit), words, 3, quiet=True)
    assert [(document.id, document.text) for document in corpus.documents] == every[:limit]
    assert sum(corpus.dropped.values()) == max(0, 9 - limit)


def test_the_limit_counts_documents_in_the_window_only(tmp_path, words):
    write(tmp_path / "x.jsonl", json_lines(*(f"{'w ' * (index % 3 + 1)}{index}" for index in range(30))))
    every = order(config(f"x={tmp_path}", min_tokens=3, max_tokens=3), words, 1)
    corpus = read_corpus(config(f"x={tmp_path}", min_tokens=3, max_tokens=3, documents=4), words, 1, quiet=True)
    assert len(every) == 10 and [(document.id, document.text) for document in corpus.documents] == every[:4]
    assert sum(corpus.dropped.values()) == 26


def test_what_is_left_out_is_counted_by_reason(tmp_path, words):
    write(tmp_path / "a.txt", b"caf\xe9 au lait")
    write(tmp_path / "b.txt", " \n\t")
    write(tmp_path / "c.txt", b"\x7fELF\0\xff")
    write(
        tmp_path / "d.jsonl",
        json_lines("", "\ud800 half", "nul \0", "one", "1 2 3 4 5 6", "1 2 3", {"text": "4 5 6 7"}),
    )
    corpus = read_corpus(config(f"x={tmp_path}", min_tokens=3, max_tokens=5), words, 0, quiet=True)
    assert sorted(document.text for document in corpus.documents) == ["1 2 3", "4 5 6 7"]
    assert corpus.dropped == {
        "not UTF-8": 2,
        "empty": 2,
        "binary": 2,
        "document too short": 1,
        "document too long": 1,
    }


def test_a_document_that_is_too_long_is_split_at_paragraphs(tmp_path, words, monkeypatch):
    text = "a b c\n\nd e\nf\n\n\ng h i j\n\nk\n\nl m n o p q r s\n\nt u"
    write(tmp_path / "x.txt", text)
    write(tmp_path / "y.txt", "1 2 3 4 5 6")
    settings = config(f"x={tmp_path}", min_tokens=3, max_tokens=6, longer="split")
    corpus = read_corpus(settings, words, 0, quiet=True)
    assert {document.id: (document.text, document.tokens) for document in corpus.documents} == {
        "x/x.txt#0.0": ("a b c\n\nd e\nf", 6),
        "x/x.txt#0.1": ("g h i j\n\nk", 5),
        "x/x.txt#0.2": ("l m n o p q", 6),
        "x/y.txt#0": ("1 2 3 4 5 6", 6),
    }
    assert corpus.dropped == {"part too short": 2}
    monkeypatch.setattr("longpo_jax.documents._APIECE", 7)  # characters: processors share a text
    assert list(read_corpus(settings, words, 0, quiet=True).documents) == list(corpus.documents)
    few = read_corpus(
        config(f"x={tmp_path}", min_tokens=3, max_tokens=6, longer="split", documents=3), words, 0, quiet=True
    )
    assert list(few.documents) == list(corpus.documents)[:3]
    assert few.dropped == {"part too short": 2, "beyond corpus.documents": 1}


def test_parts_fit_where_a_part_alone_has_more_tokens_than_in_the_document(tmp_path):
    tokenizer = tokenizer_of_words("_ ")
    text = "\n\n".join(" ".join("w" * size) for size in [3, 1, 2, 4, 1, 1, 5, 2])
    write(tmp_path / "x.txt", text)
    corpus = read_corpus(config(f"x={tmp_path}", max_tokens=5, longer="split"), tokenizer, 0, quiet=True)
    parts = sorted(corpus.documents, key=lambda document: document.id)
    assert all(document.tokens == len(document.text.split()) + 1 <= 5 for document in parts)
    assert " ".join(document.text for document in parts).split() == text.split()
    assert not corpus.dropped


def test_large_files_are_read_in_blocks_without_losing_a_line(tmp_path, words):
    generator = random.Random(0)
    lines = ["".join(generator.choices("abc\u00e9", k=generator.choice([10, 90_000]))) for _ in range(60)]
    data = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()
    assert len(data) > 2 << 20
    for name, packed in {"a.jsonl": data, "b.jsonl.gz": gzip.compress(data, 1), "c.jsonl.zst": zstd(data)}.items():
        write(tmp_path / name / name, packed)
        found = by_id(config(f"x={tmp_path / name}"), words)
        assert [found[f"x/{name}#{index}"] for index in range(60)] == lines


@pytest.mark.parametrize("pack", [gzip.compress, zstd])
def test_a_packed_file_that_is_cut_or_damaged_is_refused(pack, tmp_path, words):
    name = "x.txt.gz" if pack is gzip.compress else "x.txt.zst"
    whole = pack(random.Random(0).randbytes(5000).hex().encode())
    for damaged in (whole[:-5], whole[: len(whole) // 2], b"plain text", whole + b"rest"):
        write(tmp_path / name, damaged)
        with pytest.raises(InputError, match=rf"{name}: cannot be unpacked"):
            read_corpus(config(f"x={tmp_path}"), words, 0, quiet=True)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "cut', "not JSON"),
        (b"plain words", "not JSON"),
        (b'{"text": "caf\xe9"}', "not JSON"),
        (b"[" * 100_000, "expected JSON nested at most 64 deep"),
        (b'{"title": "a", "body": "b"}', r"expected the key 'text' \(corpus.text_key\), got 'title', 'body'"),
        (b'{"text": 3}', "got int"),
        (b'["a"]', "got list"),
        (b"null", "got NoneType"),
    ],
)
def test_a_broken_line_is_named(line, message, tmp_path, words):
    write(tmp_path / "x.jsonl", json_lines("fine") + b"\n" + line + b"\n" + json_lines("fine"))
    with pytest.raises(InputError, match=rf"x\.jsonl, line 3: .*{message}") as caught:
        read_corpus(config(f"x={tmp_path}"), words, 0, quiet=True)
    assert len(str(caught.value).splitlines()) == 1


def test_the_text_key_is_the_config_s(tmp_path, words):
    write(tmp_path / "x.jsonl", json_lines({"body": "yes", "text": "no"}))
    assert by_id(config(f"x={tmp_path}", text_key="body"), words) == {"x/x.jsonl#0": "yes"}


def test_no_source_no_file_no_document_and_none_in_the_window(tmp_path, words):
    def refused(*sources: str, **changed) -> str:
        with pytest.raises(InputError) as caught:
            read_corpus(config(*sources, **changed), words, 0, quiet=True)
        assert len(str(caught.value).splitlines()) == 1
        return str(caught.value)

    assert "expected DOMAIN=FOLDER or DOMAIN=GLOB, got none" in refused()
    assert f"x={tmp_path}/absent*: expected a .txt" in refused(f"x={tmp_path}/absent*")
    write(tmp_path / "page.html", "text")
    assert "found none" in refused(f"x={tmp_path}")
    write(tmp_path / "empty.jsonl", "\n\n")
    assert "got none with text in it (1 x file of another kind)" in refused(f"x={tmp_path}")
    write(tmp_path / "empty.txt", " ")
    assert "1 x empty" in refused(f"x={tmp_path}")
    write(tmp_path / "x.jsonl", json_lines("1", "1 2", "1 2 3 4 5 6"))
    message = refused(f"x={tmp_path}", min_tokens=3, max_tokens=5, documents=1)
    assert "of 3 to 5 tokens" in message and "have 1 to 6 tokens" in message
    assert "2 x document too short" in message and "1 x document too long" in message


def test_a_name_that_is_not_utf8_is_one_line(tmp_path, words):
    (tmp_path / os.fsdecode(b"caf\xe9.txt")).write_text("w1 w2")
    with pytest.raises(InputError, match=r"expected names in UTF-8, got 'caf\\udce9.txt'"):
        read_corpus(CorpusConfig(sources=(f"a={tmp_path}",)), words, 0, quiet=True)


def test_a_file_that_is_gone_or_closed_to_us_is_refused(tmp_path, words, monkeypatch):
    write(tmp_path / "x.txt", "text")
    (tmp_path / "y.txt").symlink_to(tmp_path / "gone")
    with pytest.raises(InputError, match=r"y\.txt: cannot be read: No such file"):
        read_corpus(config(f"x={tmp_path}"), words, 0, quiet=True)
    (tmp_path / "y.txt").unlink()

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)  # the superuser may read any file
    with pytest.raises(InputError, match=r"x\.txt: cannot be read: Permission denied"):
        read_corpus(config(f"x={tmp_path}"), words, 0, quiet=True)


def test_a_full_disk_is_told_in_one_line(library, words, monkeypatch):
    monkeypatch.setattr("tempfile.TemporaryFile", lambda buffering: open("/dev/full", "wb", buffering))  # noqa: SIM115
    with pytest.raises(InputError, match=r"expected room for the documents \(\$TMPDIR\), got: No space left"):
        read_corpus(config(f"book={library}"), words, 0, quiet=True)
