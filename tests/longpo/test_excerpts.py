# SPDX-License-Identifier: Apache-2.0
"""Excerpts are whole pieces of the document, as many as fit, at exact characters and tokens."""

import random
from collections import Counter
from itertools import pairwise

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers

from longpo_jax.config import ExcerptsConfig
from longpo_jax.excerpts import Excerpt, excerpts_of, groups
from rapid_jax.model.load import open_checkpoint
from rapid_jax.model.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def words() -> Tokenizer:
    """A token a word; white space is in no token."""
    backend = Backend(models.WordLevel({"?": 0}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    return Tokenizer({"tokenizer.json": backend.to_str().encode()})


@pytest.fixture(scope="module")
def bytelevel() -> Tokenizer:
    """A real one: the space belongs to the word behind it, a rare character is several tokens."""
    return open_checkpoint("smollm2")[1]


def texts(text: str, found: list[Excerpt]) -> list[str]:
    return [text[group.start : group.end] for group in found]


def test_the_oracle_s_grouping_comes_out(words):
    """Specification O10; the piece of 40000, which the official code drops, makes groups of its own."""
    sizes = [10000, 10000, 9000, 5000, 26000, 40000, 9000, 8000, 1000, 3000]
    paragraphs = [" ".join([str(index)] * size) for index, size in enumerate(sizes)]
    text = "\n\n".join(paragraphs)
    config = ExcerptsConfig(min_tokens=16384, max_tokens=30000, per_document=9)
    found, dropped = excerpts_of(text, words, config, seed=0)
    assert texts(text, found) == [
        "\n\n".join(paragraphs[:3]),
        paragraphs[4],
        " ".join(["5"] * 30000),
        "\n\n".join(paragraphs[6:]),
    ]
    assert [(group.first, group.last) for group in found] == [
        (0, 29000),
        (34000, 60000),
        (60000, 90000),
        (100000, 121000),
    ]
    assert dropped == {"excerpt too short": 2}  # paragraph 3, and the rest of 5


def greedy(sizes: list[int], limit: int) -> list[list[int]]:
    """The official rule, all groups kept."""
    found, total = [[]], 0
    for index, size in enumerate(sizes):
        if found[-1] and total + size > limit:
            found.append([])
            total = 0
        found[-1].append(index)
        total += size
    return found


@pytest.mark.parametrize("seed", range(20))
def test_pieces_that_fit_are_grouped_by_the_plain_rule(seed, words):
    generator = random.Random(seed)
    sizes = [generator.randint(1, 12) for _ in range(30)]
    paragraphs = [" ".join(f"w{index}" for _ in range(size)) for index, size in enumerate(sizes)]
    text = "".join(paragraph + generator.choice(["\n\n", "\n\n\n", "\n \t\n"]) for paragraph in paragraphs)
    found = groups(text, words.spans(text), "paragraphs", 20)
    assert [group.split() for group in texts(text, found)] == [
        " ".join(paragraphs[index] for index in group).split() for group in greedy(sizes, 20)
    ]


@pytest.mark.parametrize("seed", range(30))
def test_groups_lose_and_repeat_nothing_and_their_tokens_are_the_document_s(seed, bytelevel):
    generator = random.Random(seed)
    parts = [
        "a word ",
        "of the text. ",
        "Yes!\n",
        "\n\n",
        "\n \n",
        "    indented",
        "\u65e5\u672c\u8a9e\u3002",
        "\U0001f600",
    ]
    parts += ["\\section{One}", "\\subsection*{Two}\n", "x" * 30, "  ", "\t", '."\n', "\u2026 "]
    text = "".join(generator.choices(parts, k=120))
    spans = bytelevel.spans(text)
    config = ExcerptsConfig(split=generator.choice(["auto", "paragraphs", "sections"]))
    found = groups(text, spans, config.split, 25)
    at = 0
    for group in found:
        assert not text[at : group.start].strip() and group.start >= at
        assert text[group.start : group.end].strip()
        covering = [index for index, (start, end) in enumerate(spans) if start < group.end and end > group.start]
        assert list(range(group.first, group.last)) == covering
        assert group.tokens <= 25
        at = group.end
    assert not text[at:].strip()
    full = [a for a, b in pairwise(found) if b.last - a.first <= 25]
    assert len(full) < len(found) / 3  # only around pieces that were cut may neighbours have fitted together


def test_lines_and_indentation_stay_as_they_are(words):
    text = "\n\n  def f():\n      return 1\n\n\n  def g():\n      return 2  \n"
    assert texts(text, groups(text, words.spans(text), "auto", 100)) == [
        "  def f():\n      return 1\n\n\n  def g():\n      return 2"
    ]
    assert texts(text, groups(text, words.spans(text), "auto", 5)) == [
        "  def f():\n      return 1",
        "  def g():\n      return 2",
    ]


PAPER = (
    "Title. Words before.\n\n\\section{A} one\n\ntwo\n\\SubSection*{B} three\n"
    "\\subsubsection{C} four\n\\sectionmark five"
)


def test_sections_are_cut_where_they_begin_and_the_text_before_the_first_is_kept(words):
    pieces = [
        "Title. Words before.",
        "\\section{A} one\n\ntwo",
        "\\SubSection*{B} three",
        "\\subsubsection{C} four\n\\sectionmark five",
    ]
    spans = words.spans(PAPER)
    assert texts(PAPER, groups(PAPER, spans, "auto", 4)) == pieces
    assert texts(PAPER, groups(PAPER, spans, "sections", 5)) == [*pieces[:1], "\n".join(pieces[1:3]), *pieces[3:]]
    assert texts(PAPER, groups(PAPER, spans, "paragraphs", 4))[:2] == [pieces[0], "\\section{A} one"]


def test_without_a_section_auto_means_paragraphs(words):
    text = "one two\n\nthree four\n\nfive"
    assert texts(text, groups(text, words.spans(text), "auto", 2)) == ["one two", "three four", "five"]
    assert texts(text, groups(text, words.spans(text), "sections", 2)) == ["one two", "three four", "five"]


def test_a_piece_that_is_too_long_is_cut_at_lines_then_sentences_then_tokens(words):
    text = "a b c\nd e. f g? (h i.) j j\nk l m n o p q r"
    assert texts(text, groups(text, words.spans(text), "auto", 5)) == [
        "a b c\nd e.",
        "f g? (h i.)",
        "j j\nk l m",
        "n o p q r",
    ]


def test_a_character_of_more_tokens_than_fit_is_never_torn(bytelevel):
    text = "\U0001faa9 \U0001faa9"
    assert len(bytelevel.encode_quoted("\U0001faa9")) > 2
    assert texts(text, groups(text, bytelevel.spans(text), "auto", 2)) == ["\U0001faa9", "\U0001faa9"]
    config = ExcerptsConfig(min_tokens=1, max_tokens=2)
    assert excerpts_of(text, bytelevel, config, 0) == ([], Counter({"excerpt too long": 2}))


def test_excerpts_are_drawn_by_the_seed_and_kept_in_order(words):
    text = "\n\n".join(f"w{index} w w" for index in range(10)) + "\n\nshort"
    config = ExcerptsConfig(min_tokens=2, max_tokens=3, per_document=4)
    drawn = [excerpts_of(text, words, config, seed) for seed in range(200)]
    assert drawn[7] == excerpts_of(text, words, config, 7)
    for found, dropped in drawn:
        assert dropped == {"excerpt too short": 1, "excerpt not drawn": 6}
        assert len(found) == 4 and [group.start for group in found] == sorted({group.start for group in found})
    times = Counter(group.first // 3 for found, _ in drawn for group in found)
    assert len(times) == 10 and all(50 < count < 110 for count in times.values())  # 80 expected, deviation 7


def test_a_document_of_nothing_gives_nothing(words):
    assert excerpts_of(" \n\n ", words, ExcerptsConfig(), 0) == ([], Counter())
