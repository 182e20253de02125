# SPDX-License-Identifier: Apache-2.0
"""Chunks tile the document, fit the limit, tear no token, and are those of a plain recursion."""

import random
import time

import pytest

from rapid_jax.retrieval.chunk import split
from rapid_jax.runtime.errors import InputError

DOCUMENT = (
    "Alpha beta gamma. Delta epsilon zeta eta theta.\n\nIota kappa, lambda mu nu xi omicron pi rho "
    "sigma.\nTau upsilon.\n\nPhi chi psi omega."
)


def test_cuts_at_the_strongest_separator_that_fits(word_spans):
    chunks = split(DOCUMENT, word_spans, 8)
    assert [(chunk.start, chunk.text, chunk.tokens) for chunk in chunks] == [
        (0, "Alpha beta gamma. ", 4),
        (18, "Delta epsilon zeta eta theta.\n\n", 6),
        (49, "Iota kappa, ", 3),
        (61, "lambda mu nu xi omicron pi rho ", 7),
        (92, "sigma.\nTau upsilon.\n\n", 5),
        (113, "Phi chi psi omega.", 5),
    ]


def test_whole_paragraphs_are_packed_together(word_spans):
    chunks = split("one two three.\n\nfour five.\n\nsix seven eight nine ten.\n\neleven.", word_spans, 8)
    assert [chunk.text for chunk in chunks] == [
        "one two three.\n\nfour five.\n\n",
        "six seven eight nine ten.\n\neleven.",
    ]


def reference_ends(document: str, spans: list[tuple[int, int]], limit: int) -> list[int]:
    """The same rule by counting and searching anew at every step; quadratic, with the plain separators only."""
    levels = ["\n\n", "\n", ". ", ", ", " ", ""]

    def tokens(start, end):
        return sum(start <= first < end for first, _ in spans)

    def snapped(place):
        while any(first < place < last for first, last in spans):
            place -= 1
        return place

    def ends(start, end, level):
        if tokens(start, end) <= limit:
            return [end]
        if level == len(levels):
            return [end]
        mark = levels[level]
        cuts = {snapped(i) for i in range(start + 1, end) if document[:i].endswith(mark)} - {start}
        result, begin = [], start
        pieces = [*sorted(cut for cut in cuts if start < cut < end), end]
        for piece, following in zip(pieces, [*pieces[1:], None], strict=True):
            if following is not None and tokens(begin, following) <= limit:
                continue
            result += ends(begin, piece, level + 1)
            begin = piece
        return result

    merged, begin = [], 0
    for end in ends(0, len(document), 0):
        if merged and tokens(begin, end) <= limit:
            merged[-1] = end
        else:
            begin = merged[-1] if merged else 0
            merged.append(end)
    return merged


@pytest.mark.parametrize("seed", range(12))
def test_bisection_gives_the_chunks_of_the_plain_recursion(seed, word_spans, byte_spans):
    generator = random.Random(seed)
    words = generator.choices(["the", "chunk", "of", "document", "ends"], k=150)
    marks = generator.choices([" ", ", ", ". ", ".\n", ".\n\n"], weights=[8, 2, 2, 1, 1], k=150)
    document = "".join(word + mark for word, mark in zip(words, marks, strict=True))
    for spans in (word_spans, byte_spans):
        for limit in (8, 13, 40):
            ends = [chunk.end for chunk in split(document, spans, limit)]
            assert ends == reference_ends(document, spans(document), limit)


@pytest.mark.parametrize("seed", range(40))
def test_chunks_tile_fit_and_tear_no_token(seed, random_document, word_spans, byte_spans):
    document = random_document(seed)
    for spans in (word_spans, byte_spans):
        for limit in (8, 24, 512):
            chunks = split(document, spans, limit)
            assert "".join(chunk.text for chunk in chunks) == document
            assert all(document[chunk.start : chunk.end] == chunk.text != "" for chunk in chunks)
            assert all(chunk.tokens <= limit for chunk in chunks)
            assert sum(chunk.tokens for chunk in chunks) == len(spans(document))
            places = {chunk.start for chunk in chunks}
            assert not any(first < place < last for first, last in spans(document) for place in places)


def test_a_chunk_read_alone_has_the_tokens_it_had_in_the_document(byte_tokenizer, byte_spans):
    """Why cuts move in front of a token's space: behind it the target would read other, and more, tokens."""
    document = "the chunk of a document. it ends, and another begins! " * 40
    ids = byte_tokenizer.encode(document).ids
    chunks = split(document, byte_spans, 32)
    assert len(chunks) > 10
    assert [token for chunk in chunks for token in byte_tokenizer.encode(chunk.text).ids] == ids


def test_text_without_any_separator(byte_spans):
    document = "x" * 1000 + "\U0001f600" * 100
    chunks = split(document, byte_spans, 16)
    assert "".join(chunk.text for chunk in chunks) == document
    assert max(chunk.tokens for chunk in chunks) <= 16
    assert len(chunks) < 1.2 * len(byte_spans(document)) / 16


def test_tokens_that_share_characters_are_never_parted():
    """Bytes of two characters in one token: [0, 2) and [1, 3) leave no place between 0 and 3."""
    spans = [(0, 2), (1, 3), (3, 4), (4, 5)] * 1
    chunks = split("abcde" + "fghij", lambda text: [*spans, *((i, i + 1) for i in range(5, 10))], 2)
    assert [chunk.text for chunk in chunks] == ["abc", "de", "fg", "hi", "j"]
    crowded = split("abcdef", lambda text: [(0, 3), (1, 4), (2, 5), (3, 6)], 2)
    assert [(chunk.text, chunk.tokens) for chunk in crowded] == [("abcdef", 4)]


def test_windows_line_ends_and_blank_lines_with_spaces(word_spans):
    text = "a b c d e f.\r\n\r\ng h i.\r\n  \r\nj k l m n o p.\r\n"
    assert [chunk.text for chunk in split(text, word_spans, 8)] == [
        "a b c d e f.\r\n\r\n",
        "g h i.\r\n  \r\n",
        "j k l m n o p.\r\n",
    ]


@pytest.mark.parametrize("document", ["", " \n\t "])
def test_an_empty_document_is_refused(document, word_spans):
    with pytest.raises(InputError, match="document with text"):
        split(document, word_spans, 512)


def test_spans_outside_the_document_are_refused():
    with pytest.raises(ValueError, match="token spans"):
        split("abc", lambda text: [(0, 4)], 512)


def test_two_megabytes_take_seconds(word_spans):
    sentence = "It was the best of times, it was the worst of times; nobody could say which. "
    document = "\n\n".join([sentence * 7] * 3700)
    spans = word_spans(document)
    assert len(document) > 2_000_000
    start = time.perf_counter()
    chunks = split(document, lambda text: spans, 512)
    assert time.perf_counter() - start < 10
    assert sum(len(chunk.text) for chunk in chunks) == len(document)
    # Three paragraphs of 133 tokens fit.
    assert {chunk.tokens for chunk in chunks[:-1]} == {399}
