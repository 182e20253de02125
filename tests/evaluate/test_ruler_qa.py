# SPDX-License-Identifier: Apache-2.0
"""RULER's question answering over files as SQuAD and HotpotQA publish them."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from rapid_jax.evaluate import ruler
from rapid_jax.evaluate.samples import Sample, SuiteOptions
from rapid_jax.evaluate.scoring import METRICS
from rapid_jax.runtime.errors import InputError
from tests.evaluate.measuring import Counting


def made(measure: Counting, **options) -> list[Sample]:
    return list(ruler.samples(SuiteOptions(**options), measure))


COLOURS = ("red", "blue", "green", "white", "black", "brown", "grey", "pink", "gold", "silver", "teal", "beige")


def squad(articles: int = 3) -> dict:
    found = []
    for article in range(articles):
        paragraphs = []
        for place in range(4):
            colour = COLOURS[(4 * article + place) % len(COLOURS)]
            context = f"House {article}-{place} stands by the river. Its door is {colour}, and " + "it is old. " * (
                7 + article + place
            )
            asked = {"question": f" What colour has the door of house {article}-{place}? ", "id": "x"}
            answers = [{"text": colour, "answer_start": 0}, {"text": f"{colour}", "answer_start": 0}]
            unanswered = {"question": "Who built it?", "id": "y", "is_impossible": True, "answers": []}
            paragraphs.append({"context": context, "qas": [asked | {"answers": answers}, unanswered]})
        found.append({"title": f"Article {article}", "paragraphs": paragraphs})
    return {"version": "v2.0", "data": found}


def hotpot() -> list:
    found = []
    for place, colour in enumerate(COLOURS[:5]):
        context = [
            [f"House {place}.{n}", [f"It is number {n}.", " It has a garden, and that is all."]] for n in range(6)
        ]
        context[2][1] = ["It is next to", f" house {place}.4."]
        context[4][1] = [f"Its door is {colour}."]
        asked = f"What colour has the door of the house next to house {place}.2?"
        facts = [[f"House {place}.4", 0], [f"House {place}.2", 1]]
        found.append({"_id": "x", "question": asked, "answer": colour, "supporting_facts": facts, "context": context})
    return found


def documents(sample: Sample) -> list[str]:
    parts = re.split(r"(?:^|\n\n)Document (\d+):\n", sample.document)
    assert [int(number) for number in parts[1::2]] == list(range(1, len(parts) // 2 + 1))
    return parts[2::2]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "squad.json").write_text(json.dumps(squad()), encoding="utf-8")
    (tmp_path / "hotpotqa.json").write_text(json.dumps(hotpot()), encoding="utf-8")
    return tmp_path


def test_qa_is_exact_and_holds_its_gold_paragraphs(data: Path):
    measure = Counting()
    samples = made(measure, tasks=ruler.QA, lengths=(900, 1500, 4000), samples=4, data=data)
    assert len(samples) == 2 * 3 * 4
    for sample in samples:
        assert measure(sample) == sample.length
        assert (sample.metric, sample.max_new_tokens, sample.begins) == ("ruler_part", 32, "Answer:")
        shown = documents(sample)
        if sample.task == "qa_1":
            (house,) = re.findall(r"house (\S+)\?", sample.question)
            (gold,) = (text for text in shown if text.startswith(f"House {house} "))
            first = gold
        else:
            (house,) = re.findall(r"house (\S+)\?", sample.question)
            (first,) = (text for text in shown if text.startswith(f"House {house}\n"))
            (following,) = re.findall(r"next to house (\S+)\.", first)
            (gold,) = (text for text in shown if text.startswith(f"House {following}\n"))
        (answer,) = re.findall(r"door is (\w+)", gold)
        assert METRICS[sample.metric](answer, sample.answers) == 1
        assert len(shown) > 3
        begin = min(sample.document.index(text) for text in (first, gold))
        assert sample.depth is not None and 0 <= begin / len(sample.document) - sample.depth < 0.03
    assert max(measure.counted.values()) <= 25
    questions = {(sample.task, sample.length): [] for sample in samples}
    for sample in samples:
        questions[sample.task, sample.length].append(sample.question)
    assert questions["qa_1", 900] == questions["qa_1", 4000]  # the same questions at every length
    assert len(set(questions["qa_1", 900])) == 4


def house(text: str) -> str:
    (found,) = re.findall(r"^House (\d+-\d+)", text)
    return found


def test_paragraphs_of_the_same_article_come_first_and_repeat_last(data: Path):
    lengths = (500, 900, 9000)
    small, middle, large = made(Counting(), tasks=("qa_1",), lengths=lengths, samples=1, data=data)
    (gold,) = re.findall(r"house (\S+)\?", small.question)
    article = gold[:2]
    assert 1 < len(documents(small)) <= 4
    assert all(house(text).startswith(article) for text in documents(small))
    assert sum(house(text).startswith(article) for text in documents(middle)) == 4 < len(documents(middle))
    counts = Counter(house(text) for text in documents(large))
    assert len(counts) == 12 and counts.pop(gold) == 1
    assert all(count > 1 for count in counts.values())


def test_qa_is_left_out_where_there_is_no_data_for_it(data: Path):
    made_of = {sample.task for sample in made(Counting(), lengths=(7000,), samples=1)}
    assert made_of == set(ruler.TASKS) - set(ruler.QA)
    (data / "squad.json").unlink()
    tasks = [sample.task for sample in made(Counting(), lengths=(7000,), samples=1, data=data)]
    assert tasks == [*(task for task in ruler.TASKS if task != "qa_1")]
    with pytest.raises(InputError, match=r"qa_1: expected data, .*squad\.json, got "):
        ruler.samples(SuiteOptions(tasks=("qa_2", "qa_1"), data=data), Counting())


def test_a_file_alone_is_known_by_its_content_and_gives_what_it_has(data: Path):
    (data / "squad.json").rename(data / "dev-v2.0.json")
    samples = made(Counting(), tasks=("qa_1",), lengths=(800,), data=data / "dev-v2.0.json")
    assert len(samples) == 12  # 25 are asked for
    assert len({sample.question for sample in samples}) == 12


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "not JSON"),
        ("[]", "expected the JSON of SQuAD"),
        ('{"data": []}', "expected questions with answers, got none"),
        ('{"data": [{"title": "x"}]}', r"data\[0\].paragraphs must be a list of objects, got no such key"),
        (
            json.dumps({"data": [{"paragraphs": squad(1)["data"][0]["paragraphs"][:1]}]}),
            "besides the gold ones, got none",
        ),
        (
            json.dumps([hotpot()[0] | {"supporting_facts": [["Nowhere", 0]]}]),
            r"list\[0\].supporting_facts must be of paragraphs that are in context, got \[\['Nowhere', 0\]\]",
        ),
        (json.dumps([{"context": []}]), r"list\[0\].supporting_facts must be a list of .*, got no such key"),
        (json.dumps([hotpot()[0] | {"context": [["a", ["b"], 1]]}]), r"list\[0\].context must be a list of \[title"),
        (json.dumps([hotpot()[0] | {"context": [["a", [1]]]}]), r"list\[0\].context must be a list of \[title"),
        (json.dumps([hotpot()[0] | {"answer": 3}]), r"list\[0\].answer must be a string, got 3"),
        ('{"data": 3}', "data must be a list of objects, got 3"),
        (
            json.dumps(
                {"data": [{"paragraphs": [{"context": "a", "qas": [{"question": 3, "answers": [{"text": "a"}]}]}]}]}
            ),
            r"data\[0\].paragraphs\[0\].qas\[0\].question must be a string, got 3",
        ),
    ],
)
def test_data_that_cannot_be_used_is_refused(tmp_path: Path, content: str, said: str):
    (tmp_path / "data.json").write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=said):
        ruler.samples(SuiteOptions(data=tmp_path / "data.json"), Counting())


def test_a_folder_without_data_is_refused(tmp_path: Path):
    with pytest.raises(InputError, match=r"expected squad.json or hotpotqa.json in the folder, got neither"):
        ruler.samples(SuiteOptions(data=tmp_path), Counting())
