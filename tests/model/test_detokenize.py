# SPDX-License-Identifier: Apache-2.0
"""Text of answers that are cut inside a character: what is complete stays, and streaming gives the same text."""

import random

import pytest

from rapid_jax.model.tokenizer import Tokenizer
from tests.model.test_tokenizer import byte_level_files, sentencepiece_files

BROKEN = "\N{REPLACEMENT CHARACTER}"


def streamed(tokenizer: Tokenizer, ids: list[int], rng: random.Random) -> str:
    stream, text, rest = tokenizer.stream(), "", list(ids)
    while rest:
        count = rng.randint(1, 3)
        text += stream.push(rest[:count])
        rest = rest[count:]
    return text + stream.finish()


@pytest.fixture(params=["byte-level", "byte fallback"])
def tokenizer(request) -> Tokenizer:
    return Tokenizer(byte_level_files() if request.param == "byte-level" else sentencepiece_files())


@pytest.mark.parametrize("text", ["the \u65e5\u672c\u8a9e", "\U0001f600\U0001f468 cat", "cat \u65e5 the \U0001f600"])
def test_an_answer_cut_anywhere_keeps_its_whole_characters(text, tokenizer):
    ids, rng = tokenizer.encode(text), random.Random(0)
    for size in range(len(ids) + 1):
        cut = tokenizer.decode(ids[:size])
        whole = cut.rstrip(BROKEN)
        assert text.startswith(whole) and len(cut) - len(whole) <= 3
        left = len(tokenizer.encode(whole)) if whole else 0
        assert size - left <= 4  # a character's bytes but one, and the space before a text
        assert streamed(tokenizer, ids[:size], rng) == cut


def test_bytes_that_are_no_text_leave_the_characters_beside_them(tokenizer):
    rng, ids = random.Random(1), tokenizer.encode("\u65e5\u672c \u00e9")
    for _ in range(40):
        mixed = rng.choices(ids, k=8)
        assert streamed(tokenizer, mixed, rng) == tokenizer.decode(mixed)
    broken = [*ids[:-1], *ids]
    assert "\u65e5\u672c" in tokenizer.decode(broken) and tokenizer.decode(broken).count("\u65e5\u672c") == 2


def test_what_is_no_text_at_all_is_one_mark_a_byte():
    ours = Tokenizer(sentencepiece_files())
    spelt = (f"<0x{byte:02X}>" for byte in (0xE6, 0x97, 0xA5, 0xFF, 0xE6, 0x97, 0x41))
    ids = [id for token in spelt if (id := ours.id_of(token)) is not None]
    assert ours.decode(ids) == f"\u65e5{BROKEN * 3}A"
    assert ours.decode([*ids, 2], skip_special_tokens=False).endswith("A</s>")
    assert ours.decode([*ids, 2]).endswith("A")
