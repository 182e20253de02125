# SPDX-License-Identifier: Apache-2.0
"""Tokens of documents that are asked about again."""

from typing import Any, cast

import numpy as np
import pytest

from rapid_jax.engine.encoded import EncodedTexts
from rapid_jax.prompts import visible_text

TEXT = "one two three four five six"


class Words:
    """A token a word; counts what it was asked for."""

    def __init__(self):
        self.made = 0

    def encode_quoted(self, text: str) -> list[int]:
        self.made += 1
        return [len(word) for word in text.split()]

    def spans(self, text: str) -> list[tuple[int, int]]:
        self.made += 1
        found, at = [], 0
        for word in text.split():
            at = text.index(word, at)
            found.append((at, at + len(word)))
            at += len(word)
        return found


@pytest.fixture
def words() -> Any:
    return cast("Any", Words())


def test_they_are_the_tokenizer_s_and_made_once(words):
    encoder = EncodedTexts().of("", words)
    for _ in range(3):
        assert encoder.encode_quoted(TEXT) == [3, 3, 5, 4, 4, 3] and encoder.counts([TEXT]) == [6]
        np.testing.assert_array_equal(encoder.spans(TEXT), Words().spans(TEXT))
    assert words.made == 2
    assert encoder.spans("").shape == (0, 2)


def test_a_document_is_cut_as_by_the_tokenizer(words):
    encoder = EncodedTexts().of("", words)
    for how in "head", "middle":
        for room in 2, 3, 6, 7:
            assert visible_text(TEXT, room, encoder, how, 3) == visible_text(TEXT, room, Words(), how, 3)


def test_owners_and_tokenizers_have_their_own(words):
    texts, other = EncodedTexts(), cast("Any", Words())
    for owner, tokenizer in (("a", words), ("b", words), ("a", words), ("a", other)):
        texts.of(owner, tokenizer).encode_quoted(TEXT)
    assert (words.made, other.made) == (2, 1)


def test_those_used_last_are_kept_within_the_bound(words):
    texts = EncodedTexts(most=3000)
    encoder = texts.of("", words)
    for number in range(40):
        encoder.encode_quoted(TEXT)
        encoder.encode_quoted(f"{number} {'x ' * 100}")
        assert texts._bytes <= 3000
    assert words.made == 41, "the one that is always asked for stays"
    encoder.encode_quoted("y " * 5000)
    assert texts._bytes == 0 and not texts._kept, "larger than the bound"
