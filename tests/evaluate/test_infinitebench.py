# SPDX-License-Identifier: Apache-2.0
"""InfiniteBench's English tasks from files made by hand."""

import gzip
import json
import sys
import types

import pytest

from rapid_jax.evaluate.infinitebench import samples
from rapid_jax.evaluate.samples import SuiteOptions
from rapid_jax.evaluate.scoring import score
from rapid_jax.runtime.errors import InputError

BOOK = "Once upon a time. " * 20
OPTIONS = ["a fox", "a bear", "two cats", "a dog"]


def line(number, **changes):
    return {"id": number, "context": BOOK, "input": "Who?", "answer": ["a bear", "bears"], "options": [], **changes}


def files(folder, **changes):
    rows = {
        "longbook_qa_eng": [line(0), line(1, input="Where? ", answer=["here"])],
        "longbook_choice_eng": [line(n, options=OPTIONS, answer=[OPTIONS[n]]) for n in range(4)],
        "longbook_sum_eng": [line(7, input="", answer=["All is well.\nThe end."])],
    }
    for name, found in (rows | changes).items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, found)))


def unmeasured(sample):
    raise AssertionError("its lengths are what they are")


@pytest.fixture
def rouge(monkeypatch):
    module = types.ModuleType("rouge_score.rouge_scorer")
    monkeypatch.setitem(sys.modules, "rouge_score", types.ModuleType("rouge_score"))
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", module)


@pytest.mark.usefixtures("rouge")
def test_each_task_has_its_metric_and_its_tokens(tmp_path):
    files(tmp_path)
    found = samples(SuiteOptions(data=tmp_path), unmeasured)
    assert [(s.id, s.metric, s.max_new_tokens) for s in found] == [
        ("En.QA/0", "infinitebench_qa", 40),
        ("En.QA/1", "infinitebench_qa", 40),
        *((f"En.MC/{number}", "infinitebench_choice", 40) for number in range(4)),
        ("En.Sum/7", "rouge_l_sum", 1200),
    ]
    assert found[0].question == "Who?" and found[1].question == "Where?"
    assert found[0].answers == ("a bear", "bears")
    assert found[-1].answers == ("All is well.\nThe end.",) and found[-1].question
    for sample in found:
        assert sample.document == BOOK and sample.document is found[0].document  # one text for all
        assert sample.suite == "infinitebench" and sample.id.startswith(f"{sample.task}/") and sample.length is None
        assert sample.template is not None
        assert sample.template.index("{document}") < sample.template.index("{question}")


def test_the_right_letter_and_the_right_text_score(tmp_path):
    files(tmp_path)
    found = samples(SuiteOptions(data=tmp_path, tasks=("En.MC",)), unmeasured)
    for number, sample in enumerate(found):
        assert sample.question == "Who?\nA. a fox\nB. a bear\nC. two cats\nD. a dog"
        assert sample.answers == (OPTIONS[number], "ABCD"[number])
        for other, letter in enumerate("ABCD"):
            assert score(sample.metric, letter, sample.answers) == (other == number)
            assert score(sample.metric, f"it must be {letter}.", sample.answers) == (other == number)


def test_packed_files_and_a_choice_by_the_seed(tmp_path):
    files(tmp_path)
    path = tmp_path / "longbook_choice_eng.jsonl"
    rows = path.read_bytes()
    (tmp_path / "longbook_choice_eng.jsonl.gz").write_bytes(gzip.compress(rows))
    whole = samples(SuiteOptions(data=tmp_path, tasks=("En.MC",)), unmeasured)
    path.unlink()
    assert samples(SuiteOptions(data=tmp_path, tasks=("En.MC",)), unmeasured) == whole
    picks = [samples(SuiteOptions(data=tmp_path, tasks=("En.MC",), samples=2, seed=n), unmeasured) for n in range(8)]
    assert all(len(pick) == 2 and all(sample in whole for sample in pick) for pick in picks)
    assert len({tuple(sample.id for sample in pick) for pick in picks}) > 1


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"answer": ["a cow"]}, "line 2: expected 'answer' to be one of 'options', got 'a cow'"),
        ({"options": OPTIONS[:3]}, "line 2: expected 'options' to be 4 texts, got 3"),
        ({"options": None}, "line 2: expected 'options' to be a text or a list of texts"),
        ({"context": ""}, "line 2: expected 'context' to be a text that is not empty"),
        ({"id": 0}, "line 2: expected ids to differ, got 'En.MC/0' again"),
        ({"id": None}, "line 2: expected 'id' to be a text"),
    ],
)
def test_a_line_that_is_not_the_benchmarks_is_named(tmp_path, changes, message):
    good = line(0, options=OPTIONS, answer=[OPTIONS[0]])
    files(tmp_path, longbook_choice_eng=[good, good | {"id": 1} | changes])
    with pytest.raises(InputError, match=rf"longbook_choice_eng\.jsonl: {message}"):
        samples(SuiteOptions(data=tmp_path, tasks=("En.MC",)), unmeasured)


def test_what_is_missing_is_said_before_anything_is_read(tmp_path, monkeypatch):
    files(tmp_path)
    (tmp_path / "longbook_qa_eng.jsonl").write_text("no JSON")
    monkeypatch.setitem(sys.modules, "rouge_score", None)
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(InputError, match="pip install rouge-score"):
        samples(SuiteOptions(data=tmp_path), unmeasured)
    (tmp_path / "longbook_sum_eng.jsonl").unlink()
    with pytest.raises(InputError, match=r"expected longbook_sum_eng\.jsonl there for the task En\.Sum"):
        samples(SuiteOptions(data=tmp_path), unmeasured)
    with pytest.raises(InputError, match=r"expected tasks of En\.QA, En\.MC, En\.Sum, got 'En\.Dia'"):
        samples(SuiteOptions(data=tmp_path, tasks=("En.Dia",)), unmeasured)
    with pytest.raises(InputError, match="expected --data, a folder with"):
        samples(SuiteOptions(), unmeasured)
