# SPDX-License-Identifier: Apache-2.0
"""Questions of the user's own: as they are, and among passages to an exact length."""

import gzip
import json
import random
import re

import pytest

from rapid_jax.evaluate import qa
from rapid_jax.evaluate.samples import SuiteOptions
from rapid_jax.evaluate.scoring import normalised, score
from rapid_jax.model.tokenizer import Tokenizer
from rapid_jax.runtime.errors import InputError
from tests.retrieval.encoders import WORDS
from tests.tiny_models import tokenizer_files

NAMES = ("Anna Bell", "Ben Fox", "Cid Mar", "Dora Lind", "Ed Horn")
HEADER = re.compile(r"Document \[(\d+)\] \(Title: ([^\n]+)\)\n([^\n]+)")


def samples(options: SuiteOptions, measure) -> list:
    return list(qa.samples(options, measure))


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(tokenizer_files([" ".join(WORDS), "Document Title number"]))


@pytest.fixture(scope="module")
def measure(tokenizer):
    """Prompt and answer, the parts of the message encoded apart as a prompt is."""

    def count(sample):
        before, after = sample.template.replace("{question}", sample.question).split("{document}")
        return sum(tokenizer.counts([before, sample.document, after])) + sample.max_new_tokens

    return count


def gold(number, **changes):
    """The five names come again and again: a fifth of the passages has the answer to any question."""
    generator = random.Random(number)
    text = generator.choices(WORDS, k=generator.randint(20, 60))
    text.insert(generator.randrange(len(text)), f"{NAMES[number % 5].upper()},")
    return {
        "question": f"who found {number}",
        "answers": [NAMES[number % 5], "Nobody at All"],
        "title": f"Find {number}",
        "passage": " \n".join(text),
        **changes,
    }


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("qa") / "gold.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(json.dumps(gold(number)) for number in range(60)).encode()))
    return path


def write(folder, rows):
    path = folder / "x.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.mark.parametrize("length", [700, 1500, 2001])
def test_passages_make_the_exact_length(file, measure, length):
    found = samples(SuiteOptions(data=file, lengths=(length,), samples=12), measure)
    assert [measure(sample) for sample in found] == [length] * 12
    assert all(sample.length == length and sample.id.startswith(f"passages/{length}/") for sample in found)


def test_only_the_questions_own_passage_has_an_answer(file, measure):
    rows = [gold(number) for number in range(60)]
    for sample in samples(SuiteOptions(data=file, lengths=(1500,), samples=20), measure):
        row = rows[int(sample.id.split("/")[-1])]
        assert sample.question == row["question"] and sample.answers == tuple(row["answers"])
        parts = sample.document.split("\n\n")
        found = [HEADER.findall(part)[0] for part in parts]
        assert [int(number) for number, _, _ in found] == list(range(1, len(parts) + 1)) and len(parts) > 3
        assert len({title for _, title, _ in found}) == len(parts)  # no passage twice
        holding = [at for at, part in enumerate(parts) if normalised(row["answers"][0]) in normalised(part)]
        assert [found[at][1] for at in holding] == [row["title"]]
        assert found[holding[0]][2] == " ".join(row["passage"].split())
        # The others are whole, but one that is cut between words.
        sources = {row["title"]: " ".join(row["passage"].split()) for row in rows}
        cut = [(text, sources[title]) for _, title, text in found if text != sources[title]]
        assert len(cut) <= 1 and all(whole.startswith(f"{text} ") for text, whole in cut)
        before = sample.document.index(parts[holding[0]])
        assert sample.depth == before / (len(sample.document) - len(parts[holding[0]]))
        assert score(sample.metric, f"I think {row['answers'][0]}", sample.answers) == 1
        assert sample.metric == "contains" and sample.max_new_tokens == 32


def test_depths_are_spread_or_those_asked_for(file, measure):
    found = samples(SuiteOptions(data=file, lengths=(1500,), samples=30), measure)
    depths = sorted(sample.depth or 0.0 for sample in found)
    assert depths[0] < 0.2 and depths[-1] > 0.8 and len(set(depths)) > 15
    for sample in samples(SuiteOptions(data=file, lengths=(1500,), samples=8, depths=(0.0, 1.0)), measure):
        assert sample.depth == int(sample.id.split("/")[-1]) % 2


def test_equal_arguments_give_equal_samples_and_lengths_share_questions(file, measure):
    options = SuiteOptions(data=file, lengths=(700, 1200), samples=5)
    found = samples(options, measure)
    assert found == samples(options, measure)
    numbers = [sample.id.split("/")[-1] for sample in found]
    assert numbers[:5] == numbers[5:]
    # Fewer questions or lengths change nothing about the others; another seed does.
    assert all(s in found for s in samples(SuiteOptions(data=file, lengths=(1200,), samples=2), measure))
    assert samples(SuiteOptions(data=file, lengths=(700,), samples=5, seed=1), measure) != found[:5]


def test_a_hundred_questions_unless_fewer_are_there(tmp_path, measure):
    rows = [gold(number) for number in range(104)]
    rows[3] = gold(3, passage="nothing of the kind")
    found = samples(SuiteOptions(data=write(tmp_path, rows), lengths=(500,)), measure)
    assert len(found) == qa.SAMPLES == 100
    whole = samples(SuiteOptions(data=tmp_path / "x.jsonl", lengths=(500,), samples=1000), measure)
    assert len(whole) == 103 and "passages/500/3" not in {sample.id for sample in whole}


def test_a_length_that_cannot_be_made_is_an_input_error(file, tmp_path, measure):
    with pytest.raises(InputError, match="too short: prompt and answer need"):
        samples(SuiteOptions(data=file, lengths=(90,), samples=1), measure)
    with pytest.raises(InputError, match=r"expected passages for 90000 tokens, got \d+ of those without the answer"):
        samples(SuiteOptions(data=file, lengths=(90000,), samples=1), measure)
    with pytest.raises(InputError, match="expected --lengths"):
        samples(SuiteOptions(data=file), measure)
    with pytest.raises(InputError, match="lengths: expected 1 or more, got 0"):
        samples(SuiteOptions(data=file, lengths=(0,)), measure)
    path = write(tmp_path, [gold(0, passage="nothing of the kind")])
    with pytest.raises(InputError, match="expected passages that hold an answer"):
        samples(SuiteOptions(data=path, lengths=(500,)), measure)


def document(number, **changes):
    return {"document": f" Text {number}.\n", "question": " Who? ", "answers": "me", **changes}


def test_documents_are_taken_as_they_are(tmp_path, measure):
    rows = [
        document(0),
        document(1, id="mine", answers=["a", "b"], metric="ruler_all", max_new_tokens=5),
        document(2, id=17),
    ]
    found = samples(SuiteOptions(data=write(tmp_path, rows)), measure)
    assert [(s.id, s.answers, s.metric, s.max_new_tokens) for s in found] == [
        ("documents/0", ("me",), "qa_f1", 64),
        ("documents/mine", ("a", "b"), "ruler_all", 5),
        ("documents/17", ("me",), "qa_f1", 64),
    ]
    assert found[0].document == " Text 0.\n" and found[0].question == "Who?" and found[0].length is None
    assert found[0].suite == "qa" and found[0].task == "documents"
    few = samples(SuiteOptions(data=tmp_path / "x.jsonl", samples=2, seed=3), measure)
    assert len(few) == 2 and all(sample in found for sample in few)
    with pytest.raises(InputError, match="expected tasks of documents, got 'passages'"):
        samples(SuiteOptions(data=tmp_path / "x.jsonl", tasks=("passages",)), measure)


@pytest.mark.parametrize(
    "row, message",
    [
        (document(1, metric="bleu"), "expected 'metric' of ruler_all, .*, got 'bleu'"),
        (document(1, metric=["qa_f1"]), "expected 'metric' of"),
        (document(1, max_new_tokens=0), "expected 'max_new_tokens' to be 1 or more, got 0"),
        (document(1, answers=[]), "expected 'answers' to be a text or a list of texts"),
        (document(1, question=""), "expected 'question' to be a text"),
        (document(1, id="0"), "expected ids to differ, got 'documents/0' again"),
        (gold(1), "expected 'document' to be a text that is not empty, got no such field"),
    ],
)
def test_a_line_that_is_no_question_is_named(tmp_path, measure, row, message):
    path = write(tmp_path, [document(0), row])
    with pytest.raises(InputError, match=f"x.jsonl: line 2: {message}"):
        samples(SuiteOptions(data=path), measure)


@pytest.mark.parametrize(
    "keys, missing",
    [
        (("context", "question", "answers"), ("document", "title, passage")),
        (("text", "query"), ("document, question, answers", "question, answers, title, passage")),
    ],
)
def test_a_file_of_other_keys_is_told_which_are_missing(tmp_path, measure, keys, missing):
    path = write(tmp_path, [dict.fromkeys(keys, "words")])
    said = (
        f"line 1: expected the keys .* .missing: {missing[0]}. or .* .missing: {missing[1]}., got the keys '{keys[0]}'"
    )
    for lengths in ((), (500,)):
        with pytest.raises(InputError, match=said):
            samples(SuiteOptions(data=path, lengths=lengths), measure)
    # What lacks a key of passages hears of it before it hears of lengths.
    path = write(tmp_path, [{"question": "Who?", "answers": "me", "passage": "It is me."}])
    with pytest.raises(InputError, match="line 1: expected 'title' to be a text that is not empty, got no such field"):
        samples(SuiteOptions(data=path), measure)


def test_passages_need_their_fields(tmp_path, measure):
    for key in ("question", "answers", "title", "passage"):
        path = write(tmp_path, [gold(0), gold(1, **{key: None})])
        with pytest.raises(InputError, match=f"line 2: expected '{key}' to be"):
            samples(SuiteOptions(data=path, lengths=(500,)), measure)
