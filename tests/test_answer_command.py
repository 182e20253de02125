# SPDX-License-Identifier: Apache-2.0
"""`rapid answer` with many questions, through the command line: results as they come, and bad input in one line."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import rapid_jax
from rapid_jax.cli import main
from rapid_jax.config import RapidConfig
from rapid_jax.questions import Asked, joined, read_questions
from rapid_jax.runtime import settings
from rapid_jax.runtime.errors import InputError
from tests.retrieval import encoders
from tests.tiny_models import save_decoder, words

pytestmark = pytest.mark.usefixtures("own_environment")
Rapid = Callable[..., tuple[int, str, str]]
FIRST, SECOND = "w12 w34 w56?", "w7 and w8?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny model, an encoder, documents, and settings that use them."""
    folder = tmp_path_factory.mktemp("tiny")
    save_decoder(folder / "model")
    encoders.save(folder / "encoder", "bert")
    for name, count in (("a.txt", 200), ("b.txt", 190), ("long.txt", 1500)):
        (folder / name).write_text(words(count, seed=count))
    overrides = [
        f"models.target={folder / 'model'}",
        f"models.encoder={folder / 'encoder'}",
        "retrieval.chunk_tokens=64",
        "retrieval.min_tokens=128",
        "sampling.max_new_tokens=12",
        "sampling.temperature=0",
        "speculation.mode=target",
        "speculation.lookup=off",
        "compute.prefill_chunk=128",
        f"cache.folder={folder / 'cache'}",
        "cache.disk_gib=0",
        "cache.programs=false",
    ]
    settings.save(settings.defaults(RapidConfig, overrides), folder / "run.yaml")
    return folder


@pytest.fixture
def own_environment(monkeypatch):
    """What main sets for jax where the user has not is undone after the test."""
    for name in ("TF_CPP_MIN_LOG_LEVEL", "TPU_MIN_LOG_LEVEL"):
        monkeypatch.setenv(name, os.environ.get(name, "2"))


@pytest.fixture
def rapid(folder, capfd, monkeypatch) -> Rapid:
    """`rapid(*arguments)`: (status, stdout, stderr) of `rapid answer` in the folder of the documents."""
    monkeypatch.chdir(folder)

    def run(*arguments: str | Path):
        capfd.readouterr()
        status = main(["answer", "--config", "run.yaml", *map(str, arguments)])
        return status, *capfd.readouterr()

    return run


def asked(*questions: str) -> list[str]:
    return [word for question in questions for word in ("--question", question)]


def about(*documents: str) -> list[str]:
    return [word for document in documents for word in ("--document", document)]


def refused(outcome: tuple[int, str, str], *expected: str) -> None:
    status, out, err = outcome
    assert (status, out, len(err.splitlines())) == (2, "", 1) and err.startswith("rapid: "), err
    for text in expected:
        assert text in err


def alone(rapid: Rapid, document: str, question: str) -> str:
    """The answer to one question, by itself."""
    status, out, err = rapid("--quiet", *about(document), *asked(question))
    assert (status, err) == (0, "")
    return out.removesuffix("\n")


def test_each_question_about_each_document_is_answered_as_it_is_alone(rapid):
    given = (*about("a.txt", "b.txt"), *asked(FIRST, SECOND))
    status, out, err = rapid("--json", *given)
    lines = [json.loads(line) for line in out.splitlines()]
    assert status == 0 and len(lines) == 4
    found = {(line["id"], line["question"], line["document"]): line for line in lines}
    expected = {
        (number, question, name): alone(rapid, name, question)
        for number, question in ((1, FIRST), (2, SECOND))
        for name in ("a.txt", "b.txt")
    }
    assert {key: line["answer"] for key, line in found.items()} == expected and len(set(expected.values())) == 4
    prefilled = [line["document"] for line in lines if not line["prefix_reused"]]
    assert sorted(prefilled) == ["a.txt", "b.txt"]  # once each
    assert "question 2 about b.txt: target, eta 0" in err
    assert "answered 4 of 4 about 2 documents: " in err.splitlines()[-1]
    status, out, err = rapid("--quiet", *given)
    assert (status, err) == (0, "")
    texts = [f"[{number}, {name}] {question}\n{text}\n" for (number, question, name), text in expected.items()]
    assert all(text in out for text in texts) and len(out) == sum(len(text) + 1 for text in texts)


def test_answers_come_in_the_order_in_which_they_are_complete(folder):
    from rapid_jax.rapid import Rapid as Facade

    config = settings.load(RapidConfig, folder / "run.yaml")
    facade = Facade(config, quiet=True)
    prompts = [((folder / "a.txt").read_text(), question) for question in (FIRST, SECOND, "w1?")]
    whole = [answer.text for answer in facade.answers(prompts)]
    spans = [(at, whole[at][start : start + 4]) for at in range(3) for start in range(1, 5)]
    first, stop = next((at, text) for at, text in spans if sum(text in answer for answer in whole) == 1)
    told: list[tuple[int, str]] = []
    stopped = replace(config, stop=(stop,))
    found = facade.answers(prompts, settings=stopped, on_answer=lambda at, answer: told.append((at, answer.text)))
    assert [answer.text for answer in found] == [text.partition(stop)[0] for text in whole]
    assert told[0] == (first, found[first].text) and {at for at, _ in told} == {0, 1, 2}


def test_a_file_of_lines_is_numbered_behind_the_options(rapid, tmp_path):
    (tmp_path / "questions.txt").write_text(f"\ufeff{SECOND}\r\n\n  w1 w2?  \n", encoding="utf-8")
    status, out, err = rapid("--quiet", *about("a.txt"), *asked(FIRST), "--questions", tmp_path / "questions.txt")
    assert (status, err) == (0, "")
    heads = [line for line in out.splitlines() if line.startswith("[")]
    assert sorted(heads) == [f"[1] {FIRST}", f"[2] {SECOND}", "[3] w1 w2?"]


def test_json_lines_bring_ids_and_documents(rapid, tmp_path):
    lines = [{"id": "x", "question": FIRST, "document": "b.txt"}, {"question": SECOND}, {"id": 9, "question": FIRST}]
    file = tmp_path / "questions"
    file.write_text("\n".join(map(json.dumps, lines)))
    status, out, _ = rapid("--json", *about("a.txt"), "--questions", file)
    found = [json.loads(line) for line in out.splitlines()]
    assert status == 0
    assert {(line["id"], line["document"], line["question"]) for line in found} == {
        ("x", "b.txt", FIRST),
        (2, "a.txt", SECOND),
        (9, "a.txt", FIRST),
    }
    file.write_text(json.dumps(lines[0]))  # one alone is printed as many are: the form follows from the options
    status, out, _ = rapid("--json", "--questions", file)
    assert (status, json.loads(out)["id"], json.loads(out)["answer"]) == (0, "x", alone(rapid, "b.txt", FIRST))


def test_documents_together_are_one_text_with_a_line_for_each(rapid, folder, tmp_path):
    names = ("a.txt", "b.txt")
    texts = [(folder / name).read_text() for name in names]
    (tmp_path / "both.txt").write_text(joined(names, texts))
    assert joined(names, texts) == f"File: a.txt\n{texts[0]}\n\nFile: b.txt\n{texts[1]}"
    status, out, _ = rapid("--quiet", "--together", *about(*names), *asked(FIRST))
    assert (status, out) == (0, alone(rapid, str(tmp_path / "both.txt"), FIRST) + "\n")
    status, out, _ = rapid("--json", "--together", *about(*names), *asked(FIRST, SECOND))
    assert status == 0
    assert [json.loads(line)["document"] for line in out.splitlines()] == [list(names)] * 2


def test_what_cannot_be_answered_is_a_line_and_does_not_end_the_others(rapid):
    status, out, err = rapid("--quiet", *about("long.txt", "a.txt"), *asked(FIRST))
    assert (status, out) == (1, f"[1, a.txt] {FIRST}\n{alone(rapid, 'a.txt', FIRST)}\n\n")
    assert err.startswith("rapid: question 1 about long.txt: the document is too long: ") and err.count("\n") == 1
    status, out, err = rapid("--quiet", *about("long.txt"), *asked(FIRST, SECOND))
    assert (status, out, err.count("\n"), err.count("is too long")) == (2, "", 2, 2)


def test_an_error_ends_all_where_nobody_hears_of_it(folder):
    from rapid_jax.rapid import Rapid as Facade

    facade = Facade(settings.load(RapidConfig, folder / "run.yaml"), quiet=True)
    document = (folder / "a.txt").read_text()
    prompts = [(document, FIRST), (document, " "), (document, SECOND)]
    with pytest.raises(InputError, match="expected a question, got an empty one"):
        facade.answers(prompts)
    assert facade.engine.is_idle
    failed: list[tuple[int, str]] = []
    found = facade.answers(prompts, on_error=lambda place, error: failed.append((place, str(error))))
    assert failed == [(1, "expected a question, got an empty one")]
    assert [answer.text for answer in found] == [facade.answer(document, asked).text for asked in (FIRST, SECOND)]

    def gone(place: int, answer: object) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):  # of who is told: no row is left behind
        facade.answers(prompts[::2], on_answer=gone)
    assert facade.engine.is_idle


def test_a_document_that_was_read_before_is_not_read_again(folder):
    from rapid_jax.rapid import Rapid as Facade

    facade = Facade(settings.load(RapidConfig, folder / "run.yaml"), quiet=True)
    document = (folder / "b.txt").read_text()
    reading = facade.prefill(document)
    assert (reading.document_tokens > 190, reading.truncated, facade.engine.is_idle) == (True, False, True)
    answer = facade.answer(document, FIRST)
    assert answer.prefix_reused and answer.document_tokens == reading.document_tokens
    with pytest.raises(InputError, match="the document is too long"):
        facade.prefill((folder / "long.txt").read_text())


BAD_LINES = [
    ('{"question": "w1?"', "line 1: not JSON"),
    ("[1]", "line 2: expected a JSON object"),
    ('{"question": " "}', "line 2: question must be a question, got ' '"),
    ('{"id": 3}', "line 2: question must be a string, got no such key"),
    ('{"question": "w1?", "documnet": "a.txt"}', "line 2: expected the keys id, question, document, got 'documnet'"),
    ('{"question": "w1?", "id": "1"}', "line 2: expected an id that no other question has, got '1' again"),
    ('{"question": "w1?", "id": true}', "line 2: id must be a text or a whole number, got True"),
    ('{"question": "w1?", "id": 1.5}', "line 2: id must be a text or a whole number, got 1.5"),
    ('{"question": "w1?", "document": "-"}', "line 2: document must be a file, got '-'"),
    ('{"question": "w1?", "document": 3}', "line 2: document must be a string, got 3"),
    ('{"question": "w1?", "document": "hdfs://b/x"}', "line 2: document: expected a path on this machine"),
    ('{"question": "w1?", "document": "absent.txt"}', "document absent.txt: cannot be read: No such file"),
]


@pytest.mark.parametrize(("line", "expected"), BAD_LINES)
def test_a_bad_line_is_named_before_a_model_is_loaded(line, expected, rapid, tmp_path, monkeypatch):
    monkeypatch.setattr("rapid_jax.rapid.Rapid.__init__", None)
    file = tmp_path / "questions.jsonl"
    file.write_text(line if "line 1" in expected else '{"question": "w2?"}\n' + line)
    refused(rapid(*about("a.txt"), "--questions", file), expected)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (about("a.txt"), "expected a question, by --question or --questions, got none"),
        (asked(FIRST), "--document: expected a file, got none"),
        (["--together", *asked(FIRST)], "--document: expected a file, got none"),
        ([*about("a.txt", "a.txt"), *asked(FIRST)], "--document: expected each file once, got a.txt again"),
        ([*about("a.txt"), *asked(FIRST, " ")], "--question: expected a question, got an empty one"),
        ([*about("a.txt"), "--questions", "absent"], "--questions absent: cannot be read: No such file"),
        ([*about("a.txt"), "--questions", "."], "--questions .: cannot be read: Is a directory"),
        ([*about("a.txt"), "--questions", "empty"], "empty: expected questions, one a line, got none"),
        ([*about("a.txt"), "--questions", "latin"], "latin: line 2: expected UTF-8, got other bytes"),
        ([*about("a.txt"), "--questions", "s3://b/x"], "--questions: expected s3://BUCKET/NAME"),
        (
            [*about("a.txt"), *asked(FIRST, SECOND), "--compare"],
            "--compare: expected one --question about one",
        ),
        ([*about("a.txt", "b.txt"), *asked(FIRST), "--trace", "t.html"], "--trace: expected one --question about one"),
        ([*about("a.txt"), "--questions", "one", "--trace", "t.html"], "got several, or a file of them"),
        ([*about("a.txt"), "--questions", "one", "--save-config", "one"], "--save-config: would write over one, which"),
    ],
)
def test_bad_options_are_refused_before_a_model_is_loaded(arguments, expected, rapid, folder, monkeypatch):
    monkeypatch.setattr("rapid_jax.rapid.Rapid.__init__", None)
    (folder / "empty").write_text("\n \n")
    (folder / "latin").write_bytes(b"w1?\nw2 \xe9?\n")
    (folder / "one").write_text("w1?\n")
    refused(rapid(*arguments), expected)


def test_questions_are_read_from_what_a_shell_opens(tmp_path):
    command = f"{sys.executable} -c 'import sys; from rapid_jax.questions import read_questions as r;"
    command += " print(r([], sys.argv[1]))' <(printf 'w1?\\nw2?\\n')"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout == f"{[Asked(1, 'w1?'), Asked(2, 'w2?')]}\n"
    with pytest.raises(InputError, match="expected an id that no other question has"):
        (tmp_path / "q.jsonl").write_text('{"question": "w1?", "id": 1}')
        read_questions(["w2?"], str(tmp_path / "q.jsonl"))


def test_the_facade_is_imported_from_the_package_when_it_is_asked_for():
    program = (
        "import sys, rapid_jax; before = 'jax' in sys.modules; from rapid_jax import Rapid, RapidConfig, Question;"
    )
    program += " print(before, Rapid.__module__, RapidConfig.__module__, Question.__module__)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "rapid_jax.rapid", "rapid_jax.config", "rapid_jax.engine.request"]
    with pytest.raises(AttributeError, match="module 'rapid_jax' has no attribute 'Rapidly'"):
        _ = rapid_jax.Rapidly
    assert (Path(rapid_jax.__file__).parent / "py.typed").is_file()
