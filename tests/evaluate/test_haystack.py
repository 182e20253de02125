# SPDX-License-Identifier: Apache-2.0
"""Running text, where sentences begin, and searches for sizes against trying every size."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from rapid_jax.evaluate import haystack
from rapid_jax.evaluate.samples import Sample
from rapid_jax.runtime.errors import InputError


def sample(size: int) -> Sample:
    return Sample("task/1/0", "suite", "task", str(size), "?", ("a",), "ruler_all", 1)


def measured(law: Callable[[int], int], counts: list[int]) -> Callable[[Sample], int]:
    """A measure of `sample(size)` by a law; what it was asked is appended to `counts`."""

    def measure(given: Sample) -> int:
        counts.append(int(given.document))
        return law(int(given.document))

    return measure


def test_the_own_text_is_prose_with_every_paragraph_once():
    text = haystack.running_text(None)
    assert len(text) > 150_000
    paragraphs = text.removesuffix("\n\n").split("\n\n")
    assert len(set(paragraphs)) == len(paragraphs)
    assert not re.search(r"[^\S\n ]|  |\n\n\n|[^\n]\n[^\n]", text)
    assert not re.search(r"::=|\+---|^>>>", text, re.MULTILINE)


def test_a_file_and_a_folder_are_read_in_the_order_of_names(tmp_path: Path):
    (tmp_path / "b.txt").write_text("Second text.\n", encoding="utf-8")
    (tmp_path / "a.txt").write_text("\ufeffA  first\nline.\r\n\r\n\n\tAnother\xa0paragraph. ", encoding="utf-8")
    (tmp_path / "c.md").write_text("Not a text.", encoding="utf-8")
    assert haystack.running_text(tmp_path / "b.txt") == "Second text.\n\n"
    assert haystack.running_text(tmp_path) == "A first line.\n\nAnother paragraph.\n\nSecond text.\n\n"


def test_text_that_cannot_be_used_is_refused(tmp_path: Path):
    with pytest.raises(InputError, match=r"nowhere\.txt: cannot be read"):
        haystack.running_text(tmp_path / "nowhere.txt")
    with pytest.raises(InputError, match=r"expected \.txt files in the folder, got none"):
        haystack.running_text(tmp_path)
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    with pytest.raises(InputError, match="expected UTF-8, got byte 0xe9"):
        haystack.running_text(tmp_path / "latin.txt")
    (tmp_path / "latin.txt").write_text(" \n\n ", encoding="utf-8")
    with pytest.raises(InputError, match="expected text for haystacks, got none"):
        haystack.running_text(tmp_path)


def test_a_stretch_repeats_the_text_in_both_directions():
    assert haystack.stretch("abcd", 1, 2) == "bc"
    assert haystack.stretch("abcd", 3, 6) == "dabcda"
    assert haystack.stretch("abcd", 9, 4) == "bcda"
    assert haystack.stretch("abcd", -3, 7) == "bcdabcd"
    assert haystack.stretch("abcd", 2, 0) == ""


@pytest.mark.parametrize(
    ("text", "near", "start"),
    [
        ("One is here. Two is there. Three", 0, 0),
        ("One is here. Two is there. Three", 5, 13),
        ("One is here. Two is there. Three", 21, 27),
        ("One is here. Two is there. Three", 32, 32),
        ("Signs, e.g. these. (Then) more", 9, 19),  # no sentence begins with a small letter
        ("He said so.\u201d Then she", 2, 13),
        ("A heading\n\nand text", 3, 11),
        ("\u4e00\u4e8c\u3002\u4e09\u56db\u3002\u4e94", 2, 3),
        ("words without any end of theirs", 16, 14),
        ("xxxxxxxxxxxx", 7, 7),
    ],
)
def test_needles_go_where_sentences_start(text: str, near: int, start: int):
    assert haystack.sentence_start(text, near) == start


def test_needles_are_inserted_in_order_with_blanks_around_them():
    assert haystack.insert("One. Two.", [0, 5, 9], ["X. ", "Y. ", "Z. "]) == "X. One. Y. Two. Z."
    assert haystack.insert("One. Two.", [5, 5], ["X. ", "Y. "]) == "One. X. Y. Two."
    assert haystack.insert("", [0], ["X. "]) == "X."
    assert haystack.insert("One. ", [0], ["X. "]) == "X. One. "


def bends(size: int) -> int:
    return 30 + 3 * size + size**2 // 400


def steps(size: int) -> int:
    return 10 + size // 50 * 90


LAWS = [lambda size: 20 + 7 * size, bends, steps, lambda size: 5 + size // 3, lambda size: 12 + 40 * min(size, 80)]


@pytest.mark.parametrize("length", [100, 999, 4096, 20_000])
@pytest.mark.parametrize("law", LAWS)
def test_fitted_is_the_largest_size_that_fits(law: Callable[[int], int], length: int):
    counts: list[int] = []
    found = haystack.fitted(sample, measured(law, counts), length, most=5000)
    assert int(found.document) == max(size for size in range(5001) if law(size) <= length)
    assert len(counts) <= 25


def test_fitted_takes_at_most_most():
    assert haystack.fitted(sample, measured(lambda size: 20 + size, []), 1000, most=30).document == "30"
    assert haystack.fitted(sample, measured(lambda size: 20 + size, []), 1000, most=0).document == "0"


def test_exact_finds_a_size_where_counts_go_up_and_down():
    def law(size: int) -> int:
        return 40 + size // 4 + (0, 1, 1, 0, 2)[size % 5]

    for length in range(60, 3000, 97):
        counts: list[int] = []
        found = haystack.exact(sample, measured(law, counts), length)
        assert found is not None
        assert law(found[0]) == length
        assert found[1] == sample(found[0])
        assert len(counts) < 12


def test_exact_gives_up_where_no_size_is_right():
    counts: list[int] = []
    assert haystack.exact(sample, measured(lambda size: 20 + 2 * (size // 8), counts), 101, tries=15) is None
    assert len(counts) == 16
    found = haystack.exact(sample, measured(lambda size: 20 + 2 * (size // 8), counts), 101, within=1)
    assert found is not None and found[0] // 8 in (40, 41)


def test_a_length_that_is_too_short_names_both_numbers():
    said = "suite task: a length of 99 tokens is too short: prompt and answer need 100 without any filler"
    with pytest.raises(InputError, match=f"^{said}$"):
        haystack.fitted(sample, lambda given: 100, 99, most=10)
    with pytest.raises(InputError, match=f"^{said}$"):
        haystack.exact(sample, lambda given: 100, 99)
    found = haystack.exact(sample, lambda given: 100, 100)
    assert found is not None and found[0] == 0
