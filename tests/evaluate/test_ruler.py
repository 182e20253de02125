# SPDX-License-Identifier: Apache-2.0
"""RULER's tasks: lengths, counts of the definitions, and a perfect reader that scores all of every task."""

import itertools
import re
from collections import Counter
from pathlib import Path

import pytest

from rapid_jax.evaluate import ruler, ruler_hidden
from rapid_jax.evaluate.haystack import NOISE, running_text
from rapid_jax.evaluate.samples import Sample, SuiteOptions
from rapid_jax.evaluate.scoring import METRICS
from rapid_jax.model.load import open_checkpoint
from rapid_jax.runtime.errors import InputError
from tests.evaluate.measuring import Counting

MADE = ruler.TASKS[:11]
NEEDLE = re.compile(r"One of the secret (?:number|identifier)s of (\S+) is (\S+)\.")
EXACT = (*MADE[:4], "niah_multivalue", "niah_multiquery", "vt")
NEEDLES = {"niah_multikey_1": 4, "niah_multivalue": 4, "niah_multiquery": 4}


def made(measure: Counting, **options) -> list[Sample]:
    return list(ruler.samples(SuiteOptions(**options), measure))


def read(sample: Sample) -> str:
    """What a reader answers who sees the document and the question, and misses nothing."""
    if sample.task.startswith("niah"):
        (keys,) = re.findall(r"secret \w+ of (.*) that the text gives\?", sample.question)
        wanted = re.split(r", | and ", keys)
        return " ".join(value for key, value in NEEDLE.findall(sample.document) if key in wanted)
    if sample.task == "vt":
        (value,) = re.findall(r"the value (\d+),", sample.question)
        rules = re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\n?", sample.document)
        known = {value}
        for _ in rules:
            known |= {name for name, source in rules if source in known}
        return " ".join(known - {value})
    if sample.task == "cwe":
        return " ".join(most(re.findall(r"\d+\. (\S+)", sample.document), 10))
    if sample.task == "fwe":
        return " ".join(most([word for word in sample.document.split() if word != "..."], 3))
    raise AssertionError(sample.task)


def most(entries: list[str], count: int) -> list[str]:
    """The most frequent, of which there must be no more than `count`."""
    ranked = Counter(entries).most_common(count + 1)
    assert ranked[count - 1][1] > ranked[count][1]
    return [entry for entry, _ in ranked[:count]]


def unit(measure: Counting, sample: Sample) -> int:
    """Tokens of the largest unit that the sample could have been longer by."""
    if sample.task.startswith("niah"):
        return max(measure.tokens(line + "\n") for line in sample.document.splitlines())
    if sample.task == "cwe":
        return 3 * max(measure.tokens(entry) for entry in re.findall(r"\d+\. \S+ ", sample.document + " 99999. x "))
    return 10 * measure.tokens(" abcdef")  # fwe: one more drawing adds a word or a few


def check(measure: Counting, sample: Sample) -> None:
    assert sample.length is not None
    short = sample.length - measure(sample)
    assert short == 0 if sample.task in EXACT else 0 <= short < unit(measure, sample), sample.id
    answer = read(sample)
    assert METRICS[sample.metric](answer, sample.answers) == 1
    # No more is read than is asked for: every word of the reader's answer is one of the answers.
    assert sorted(answer.split()) == sorted(sample.answers)
    if sample.task in EXACT[:6]:
        assert all(sample.document.count(value) == 1 for value in sample.answers)


@pytest.mark.parametrize("task", MADE)
def test_samples_are_exact_and_readable(task: str):
    measure = Counting()
    samples = made(measure, tasks=(task,), lengths=(7000, 8001), samples=2)
    assert [sample.id for sample in samples] == [f"{task}/{length}/{n}" for length in (7000, 8001) for n in (0, 1)]
    assert max(measure.counted.values()) <= 25
    for sample in samples:
        check(measure, sample)
    assert len({sample.answers for sample in samples}) == 4


@pytest.mark.parametrize("length", range(2201, 2240, 3))
def test_every_length_is_met(length: int):
    measure = Counting()
    for sample in made(measure, tasks=EXACT, lengths=(length,), samples=1):
        check(measure, sample)


def test_with_the_real_tokenizer(smollm2_path: Path):
    measure = Counting(open_checkpoint(smollm2_path)[1])
    samples = made(measure, lengths=(3000, 4096), samples=1)
    assert [sample.task for sample in samples] == [task for task in MADE for _ in range(2)]
    for sample in samples:
        check(measure, sample)


def test_tasks_are_as_the_benchmark_defines_them():
    samples = made(Counting(), lengths=(7000,), samples=1)
    by_task = {sample.task: sample for sample in samples}
    for task, kind in ruler_hidden.NIAH.items():
        sample = by_task[task]
        found = NEEDLE.findall(sample.document)
        assert len(sample.answers) == kind.asked * kind.values
        assert len(set(found)) == len(found)
        if kind.filler != "needles":
            assert len(found) == NEEDLES.get(task, 1)
        else:
            assert len(found) == len(sample.document.splitlines()) > 20
            assert len(dict(found)) == len(set(dict(found).values())) == len(found)
        assert sample.max_new_tokens == 128 and sample.metric == "ruler_all"
    noise = by_task["niah_single_1"].document
    assert noise.count(NOISE) > 10
    pattern = {"number": r"[1-9]\d{6}", "identifier": r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[0-9a-f-]{17}"}
    for task in ("niah_single_1", "niah_single_2", "niah_multikey_2"):
        assert re.fullmatch(pattern["number"], by_task[task].answers[0])
    for task in ("niah_single_3", "niah_multikey_3"):
        assert re.fullmatch(pattern["identifier"], by_task[task].answers[0])
    assert re.search(pattern["identifier"], by_task["niah_multikey_3"].question)
    assert len(by_task["vt"].answers) == 5
    assert len(re.findall(r"^.*VAR \w+ = ", by_task["vt"].document, re.MULTILINE)) == 5
    limits = {task: by_task[task].max_new_tokens for task in ("vt", "cwe", "fwe")}
    assert limits == {"vt": 30, "cwe": 120, "fwe": 50}


@pytest.mark.parametrize(("length", "times", "others"), [(3000, 6, 1), (7000, 30, 3)])
def test_common_words_stand_as_often_as_the_benchmark_has_it(length: int, times: int, others: int):
    (sample,) = made(Counting(), tasks=("cwe",), lengths=(length,), samples=1)
    numbers, entries = zip(*re.findall(r"(\d+)\. (\S+)", sample.document), strict=True)
    assert [int(number) for number in numbers] == list(range(1, len(entries) + 1))
    counts = Counter(entries)
    assert {counts[word] for word in sample.answers} == {times}
    assert {count for word, count in counts.items() if word not in sample.answers} == {others}
    assert sample.template is not None
    example = sample.template.partition("The next list:")[0]
    assert not {word for word in sample.answers if re.search(rf"\b{word}\b", example)}


def test_coded_words_follow_the_distribution():
    (sample,) = made(Counting(), tasks=("fwe",), lengths=(20_000,), samples=1)
    counts = [count for _, count in Counter(sample.document.split()).most_common(6)]
    assert sample.document.split().count("...") == counts[0]
    for rank, count in enumerate(counts, 1):
        assert abs(count - counts[0] / rank**2) < 1.5


def test_the_examples_are_right():
    vt, cwe = (made(Counting(), tasks=(task,), lengths=(7000,), samples=1)[0] for task in ("vt", "cwe"))
    for sample in (vt, cwe):
        assert sample.template is not None
        shown, _, rest = sample.template.partition("\n\nThe next")
        _, document = shown.split("\n\n", 1)
        ((document, question, answer),) = re.findall(r"\A(.*)\n\n(.*)\n(.*)\Z", document, re.DOTALL)
        assert rest.endswith("{document}\n\n{question}")
        answers = answer.partition(" are ")[2].rstrip(".").split(", ")
        example = Sample("", "", sample.task, document, question, tuple(answers), "ruler_all", 1)
        assert sorted(read(example).split()) == sorted(answers)
        assert len(answers) == len(sample.answers)


def test_depth_is_where_the_first_needle_that_is_asked_for_lies():
    measure = Counting()
    tasks = ("niah_single_1", "niah_single_2", "niah_multikey_1", "niah_multikey_2", "niah_multivalue", "vt")
    for sample in made(measure, tasks=tasks, lengths=(6000,), samples=3):
        assert sample.depth is not None
        wanted = min(sample.document.index(value) for value in sample.answers)
        place = sample.document.rfind("One of" if sample.task != "vt" else "VAR", 0, wanted)
        share = measure.tokens(sample.document[:place]) / measure.tokens(sample.document)
        assert abs(share - sample.depth) < 0.06


def test_equal_arguments_give_equal_samples():
    options = {"lengths": (7000,), "samples": 2}
    one = made(Counting(), **options)
    assert made(Counting(), **options) == one
    assert made(Counting(), **options | {"samples": 1}) == one[::2]
    assert made(Counting(), **options, tasks=("vt",)) == [sample for sample in one if sample.task == "vt"]
    other = made(Counting(), **options, seed=7)
    assert all(a.document != b.document for a, b in zip(one, other, strict=True))


def test_haystacks_are_of_the_given_text(tmp_path: Path):
    (tmp_path / "text.txt").write_text("Nothing but this stands here. And this as well.", encoding="utf-8")
    (sample,) = made(Counting(), tasks=("niah_single_2",), lengths=(1500,), samples=1, text=tmp_path)
    words = set(re.findall(r"\w+", NEEDLE.sub("", sample.document)[:-10]))
    assert words == {"Nothing", "but", "this", "stands", "here", "And", "as", "well"}
    (own,) = made(Counting(), tasks=("niah_single_2",), lengths=(1500,), samples=1)
    assert own.document[:200] in running_text(None)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tasks": ("vt", "niah")}, "suite ruler: expected tasks of niah_single_1, "),
        ({"lengths": (4096, -1)}, "lengths: expected 1 or more, got -1"),
        ({"samples": 0}, "samples: expected 1 or more, got 0"),
        ({"text": Path("nowhere.txt")}, "text nowhere.txt: cannot be read"),
        ({"tasks": ("qa_1",)}, "qa_1: expected data, the benchmark's file or a folder with squad.json, got none"),
        ({"data": Path("nowhere.json")}, "data nowhere.json: cannot be read"),
    ],
)
def test_wrong_options_are_refused_at_once(options: dict, said: str):
    with pytest.raises(InputError, match=said):
        ruler.samples(SuiteOptions(**options), Counting())


@pytest.mark.parametrize("task", MADE)
def test_a_length_without_room_names_both_numbers(task: str):
    said = rf"^ruler {task}: a length of 150 tokens is too short: prompt and answer need (\d+) without any filler$"
    with pytest.raises(InputError, match=said) as error:
        made(Counting(), tasks=(task,), lengths=(150,))
    needed = int(re.findall(r"need (\d+)", str(error.value))[0])
    assert needed > 150


def test_groups():
    assert len(ruler.TASKS) == 13
    assert {name: len(tasks) for name, tasks in ruler.GROUPS.items()} == {"NIAH": 8, "VT": 1, "QA": 2}
    grouped = {*itertools.chain(*ruler.GROUPS.values()), *ruler.AGGREGATION}
    assert grouped == set(ruler.TASKS)
