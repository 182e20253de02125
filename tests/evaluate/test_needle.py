# SPDX-License-Identifier: Apache-2.0
"""The needle suite: exact lengths, depths of tokens, one needle, the answer readable."""

import re
from pathlib import Path

import pytest

from rapid_jax.evaluate import haystack, needle
from rapid_jax.evaluate.samples import Sample, SuiteOptions
from rapid_jax.evaluate.scoring import METRICS
from rapid_jax.model.load import open_checkpoint
from rapid_jax.runtime.errors import InputError
from tests.evaluate.measuring import Counting

FACT = re.compile(r"The number of the house (\S+) is (\d{7})\.")


def made(measure: Counting, **options) -> list[Sample]:
    return list(needle.samples(SuiteOptions(**options), measure))


def longest_sentence(measure: Counting, text: str) -> int:
    return max(measure.tokens(sentence) for sentence in re.split(r"(?<=[.!?])\s+|\n", text))


def check(measure: Counting, samples: list[Sample]) -> None:
    for sample in samples:
        assert measure(sample) == sample.length
        assert FACT.findall(sample.document) == [(sample.question.split()[-1].rstrip("?"), *sample.answers)]
        assert sample.document.count(sample.answers[0]) == 1
        fact = FACT.search(sample.document)
        assert fact is not None and sample.depth is not None
        assert METRICS[sample.metric](fact[2], sample.answers) == 1
        tokens = measure.tokens(sample.document)
        off = abs(measure.share_before(sample, fact[0]) - sample.depth) * tokens
        assert off <= longest_sentence(measure, sample.document)
        # Nothing but whole sentences before it.
        before = sample.document[: fact.start()].rstrip()
        assert not before or before[-1] in ".:!?)\"'\u201d\u2019*" or sample.document[fact.start() - 1] == "\n"


def test_the_grid_is_lengths_by_depths_by_samples():
    measure = Counting()
    samples = made(measure, lengths=(1500, 700), samples=2)
    ids = [
        f"needle/{length}/{depth}/{n}"
        for length in (1500, 700)
        for depth in ("0", "0.25", "0.5", "0.75", "1")
        for n in (0, 1)
    ]
    assert [sample.id for sample in samples] == ids
    assert max(measure.counted.values()) <= 25
    assert {(sample.suite, sample.task, sample.max_new_tokens) for sample in samples} == {("needle", "needle", 32)}
    check(measure, samples)
    assert len({sample.answers for sample in samples}) == len(samples)


def test_the_defaults():
    samples = needle.samples(SuiteOptions(), lambda sample: len(sample.document.split()))
    first = next(samples)
    assert (first.length, first.depth) == (4096, 0)
    assert (needle.LENGTHS, needle.DEPTHS, needle.SAMPLES) == ((4096, 8192), (0, 0.25, 0.5, 0.75, 1), 5)


@pytest.mark.parametrize("depth", [0.0, 0.1, 0.37, 0.5, 0.9, 1.0])
def test_depth_is_of_tokens_where_the_text_is_dense_in_places(tmp_path: Path, depth: float):
    plain = "The value of the number is that of the text. " * 40
    dense = "Zq7 Xk3 Jv9 Wy2 Qx8 Zj4. " * 40
    (tmp_path / "text.txt").write_text(plain + "\n\n" + dense, encoding="utf-8")
    measure = Counting()
    samples = made(measure, lengths=(3000,), depths=(depth,), samples=4, text=tmp_path / "text.txt")
    assert max(measure.counted.values()) <= 25
    check(measure, samples)


def test_text_without_sentences_will_do(tmp_path: Path):
    (tmp_path / "text.txt").write_text("one two three four five six seven", encoding="utf-8")
    measure = Counting()
    for sample in made(measure, lengths=(900,), samples=1, text=tmp_path / "text.txt"):
        assert measure(sample) == 900
        assert FACT.search(sample.document)


def test_equal_arguments_give_equal_samples():
    options = {"lengths": (800,), "samples": 2, "depths": (0.5,)}
    one, again = made(Counting(), **options), made(Counting(), **options)
    assert one == again
    assert made(Counting(), **options | {"samples": 1}) == one[:1]
    other = made(Counting(), **options, seed=1)
    assert all(a.document != b.document for a, b in zip(one, other, strict=True))


def test_a_number_that_the_text_has_is_drawn_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "text.txt").write_text("The number 1234567 is in the text. ", encoding="utf-8")
    drawn = iter(["1234567", "7654321"])
    monkeypatch.setattr("rapid_jax.evaluate.word_lists.number", lambda rng: next(drawn))
    (sample,) = made(Counting(), lengths=(800,), samples=1, depths=(0.5,), text=tmp_path / "text.txt")
    assert sample.answers == ("7654321",)
    monkeypatch.setattr("rapid_jax.evaluate.word_lists.number", lambda rng: "1234567")
    with pytest.raises(
        InputError, match=f"needle/800/0.5/0: no text of exactly 800 tokens .* {haystack.ATTEMPTS} were"
    ):
        made(Counting(), lengths=(800,), samples=1, depths=(0.5,), text=tmp_path / "text.txt")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tasks": ("niah",)}, "suite needle: expected tasks of needle, got 'niah'"),
        ({"depths": (0.5, 1.5)}, r"depths: expected 0 \(the start\) to 1 \(the end\), got 1.5"),
        ({"lengths": (0,)}, "lengths: expected 1 or more, got 0"),
        ({"samples": 0}, "samples: expected 1 or more, got 0"),
        ({"text": Path("nowhere.txt")}, "text nowhere.txt: cannot be read"),
    ],
)
def test_wrong_options_are_refused_at_once(options: dict, said: str):
    with pytest.raises(InputError, match=said):
        needle.samples(SuiteOptions(**options), Counting())


def test_a_length_without_room_names_both_numbers():
    with pytest.raises(InputError, match=r"needle needle: a length of 60 tokens is too short: .* need \d+ without any"):
        made(Counting(), lengths=(60,))


def test_with_the_real_tokenizer(smollm2_path: Path):
    measure = Counting(open_checkpoint(smollm2_path)[1])
    check(measure, made(measure, lengths=(2048, 4096), samples=1))
