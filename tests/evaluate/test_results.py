# SPDX-License-Identifier: Apache-2.0
"""Reading a run's folder: what is kept, what is left out, what is refused."""

import json
import os
from pathlib import Path

import pytest

from rapid_jax.evaluate.results import finished, mode_of, named, read, read_suite, torn_at
from rapid_jax.runtime.errors import InputError
from tests.evaluate.synthetic import folder, grid, line


def right(task: str, length: int, number: int) -> bool:
    return number % 2 == 0


def test_lines_come_back_by_label_in_the_order_of_the_modes(tmp_path: Path):
    labels = ["rapid-eta=20", "zero", "rapid-eta=5", "rapid", "target", "retrieval-min_tokens=2048"]
    run = folder(tmp_path, {label: grid(label, right, lengths=[8192, 4096, None]) for label in labels}, samples=20)
    results = read(run)
    modes = ("target", "retrieval-min_tokens=2048", "rapid", "rapid-eta=5", "rapid-eta=20", "zero")
    assert results.labels == modes and [mode_of(label) for label in modes[1:4]] == ["retrieval", "rapid", "rapid"]
    assert results.lengths == [4096, 8192, None] and results.tasks == ("task",) and results.torn == ()
    assert results.options == {"seed": 0, "samples": 20} and results.templates == "our own"
    assert results.settings["speculation.eta"] == 10.0 and results.settings["stop"] == ["\n"] and results.samples == 40
    found = results.at("rapid", 8192)
    assert [outcome.id for outcome in found] == [f"task/8192/{number}" for number in range(20)]
    assert [outcome.score for outcome in found[:3]] == [1, 0, 1]
    assert found[0].answers == ("blue",) and found[0].acceptance == 0.75 and found[0].seconds["prefill"] == 2
    assert found[0].prompt_ends == ("<s>user", "word 0?</s>") and found[0].draft_ends == ("<s>chunks", "word 0?</s>")
    assert results.at("target", 4096)[0].draft_ends is None and not found[0].prefix_reused and found[0].thoughts == ""


def test_the_settings_of_a_label_are_the_runs_with_its_changes(tmp_path: Path):
    said = {"eta": 5, "retrieval.min_tokens": 2048}
    results = read(folder(tmp_path, {"phat-x": grid("phat-x", right, settings=said)}))
    changed = {"speculation.mode": "phat", "speculation.eta": 5, "retrieval.min_tokens": 2048}
    assert results.settings_of("phat-x") == {**results.settings, **changed}


def test_the_former_name_of_a_mode_is_read_as_todays(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    run = folder(tmp_path, {"sd": grid("sd", right), "sd-gamma=5": grid("sd-gamma=5", right)})
    results = read(run)
    assert results.labels == ("lossless", "lossless-gamma=5")
    assert results.settings_of("lossless")["speculation.mode"] == "lossless"
    assert finished(run, "qa")["lossless"] == {line["id"] for line in grid("sd", right)}
    assert "answers-sd.jsonl: mode sd is called lossless now" in caplog.text and caplog.text.count("\n") == 4
    # A run that went on under the new name, and samples answered under both.
    folder(run, {"lossless": grid("lossless", right, count=3)})
    caplog.clear()
    assert len(read(run).by_label["lossless"]) == 40
    assert "; 6 samples that another file of lossless has are left out" in caplog.text


@pytest.mark.parametrize("cut", [1, 10, 400])
def test_a_torn_last_line_is_left_out_and_noted(tmp_path: Path, cut: int):
    run = folder(tmp_path, {"target": grid("target", right), "rapid": grid("rapid", right)})
    path = run / "answers-rapid.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    results = read(run)
    assert results.torn == ("rapid",) and len(results.by_label["rapid"]) == 39 and len(results.by_label["target"]) == 40


def test_a_mode_without_a_finished_sample_is_no_mode(tmp_path: Path):
    run = folder(tmp_path, {"target": grid("target", right), "rapid": []})
    (run / "answers-sd.jsonl").write_bytes(b'{"schema": 1, "id"')
    assert read(run).labels == ("target",)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"score": "1"}, r"score must be a number, got '1'"),
        ({"score": True}, r"score must be a number, got True"),
        ({"score": None}, r"score must be a number from 0 to 1, got null"),
        ({"score": 1.5}, r"score must be a number from 0 to 1, got 1.5"),
        ({"score": float("nan")}, r"score must be a number, got nan"),
        ({"schema": 2}, r"schema must be 1, got 2"),
        ({"length": "4K"}, r"length must be a whole number from 1 to 1099511627776, got '4K'"),
        ({"length": 10**30}, r"length must be a whole number from 1 to .*, got 1000000000000000000000000000000"),
        ({"length": -1}, r"length must be a whole number from 1 to .*, got -1"),
        ({"depth": 2}, r"depth must be a number from 0 to 1, got 2"),
        ({"tags": {"a": {"b": 1}}}, r"tags.a must be a string, got {'b': 1}"),
        ({"seconds": {"decode": "1"}}, r"seconds.decode must be a number of at least 0, got '1'"),
        ({"settings": {"eta": {}}}, r"settings.eta must be a text, a number, .*, got {}"),
        ({"tokens_per_second": -1}, r"tokens_per_second must be a number of at least 0, got -1"),
        ({"answers": [1]}, r"answers must be a list of strings, got \[1\]"),
        ({"prompt_ends": ["a"]}, r"prompt_ends must be a list of 2 strings, got \['a'\]"),
        ({"draft_ends": ["a", 1]}, r"draft_ends must be a list of strings, got \['a', 1\]"),
        ({"prefix_reused": 1}, r"prefix_reused must be true or false, got 1"),
        ({"suite": "ruler"}, r"suite must be 'qa', got 'ruler'"),
        ({"mode": "rapid"}, r"mode must be 'target', got 'rapid'"),
        ({"id": "task/4096/0"}, r"expected every sample once, got id 'task/4096/0' again"),
    ],
)
def test_a_line_that_is_no_samples_is_one_line_with_its_place(tmp_path: Path, changed: dict, said: str):
    lines = [line("task", 4096, number, "target", 1.0) for number in range(3)]
    run = folder(tmp_path, {"target": lines})
    lines[1] |= changed
    (run / "answers-target.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    with pytest.raises(InputError, match=rf"answers-target.jsonl:2: {said}"):
        read(run)


@pytest.mark.parametrize("content", [b"[1]", b'{"id": ', b"\xff\xfe", b""])
def test_a_damaged_line_before_the_last_is_refused(tmp_path: Path, content: bytes):
    run = folder(tmp_path, {"target": grid("target", right)})
    path = run / "answers-target.jsonl"
    path.write_bytes(content + b"\n" + path.read_bytes())
    with pytest.raises(InputError, match=r"answers-target.jsonl:1: (not JSON|expected a JSON object)"):
        read(run)


def test_a_missing_field_is_named(tmp_path: Path):
    one = line("task", 4096, 0, "target", 1.0)
    del one["prompt_tokens"]
    with pytest.raises(InputError, match=r"jsonl:1: prompt_tokens must be a whole number .*, got no such key"):
        read(folder(tmp_path, {"target": [one]}))


def test_a_line_may_lack_what_may_be_null(tmp_path: Path):
    nullable = ("depth", "length", "draft_ends", "draft_tokens", "acceptance", "tokens_per_round", "tokens_per_second")
    one = {key: value for key, value in line("task", 4096, 0, "rapid", 1.0).items() if key not in nullable}
    (found,) = read(folder(tmp_path, {"rapid": [one]})).by_label["rapid"]
    assert [getattr(found, name) for name in nullable] == [None] * len(nullable)


def test_shares_of_a_run_are_one_and_a_sample_is_not_in_two_of_them(tmp_path: Path):
    whole = grid("target", right)
    run = folder(tmp_path, {"target.0-of-2": whole[:5], "target.1-of-2": whole[5:]})
    assert [outcome.id for outcome in read(run).by_label["target"]] == [line["id"] for line in whole]
    folder(tmp_path, {"target.1-of-2": whole[4:]})
    with pytest.raises(
        InputError, match=r"answers-target.1-of-2.jsonl: expected every sample of target once, got '.*'"
    ):
        read(run)


def test_finished_samples_are_those_of_whole_lines_in_all_shares(tmp_path: Path):
    whole = grid("rapid", right)
    shares = {"rapid.0-of-2": whole[:5], "rapid.1-of-2": whole[5:]}
    run = folder(tmp_path, shares | {"rapid-eta=5": grid("rapid-eta=5", right, ["other"])})
    torn = run / "answers-rapid.1-of-2.jsonl"
    torn.write_bytes(torn.read_bytes()[:-10])
    found = finished(run, "qa")
    assert found["rapid"] == {line["id"] for line in whole[:-1]}
    assert len(found["rapid-eta=5"]) == 40 and "target" not in found
    lines = torn.read_bytes().split(b"\n")
    for broken, said in (
        (b"{", "not JSON"),
        (b'{"schema": 1, "mode": "rapid", "id": 1}', "id must be a string, got 1"),
    ):
        torn.write_bytes(b"\n".join([lines[0], broken, *lines[2:]]))
        with pytest.raises(InputError, match=rf"answers-rapid.1-of-2.jsonl:2: {said}"):
            finished(run, "qa")


@pytest.mark.parametrize(
    ("content", "size"), [(b"", 0), (b"torn", 0), (b"a\n", 2), (b"a\nb\ntorn", 4), (b"a\n\xff", 2)]
)
def test_a_torn_line_is_cut_behind_the_last_whole_one(content: bytes, size: int):
    assert torn_at(content) == size


def test_a_folder_without_an_evaluation_is_refused(tmp_path: Path):
    with pytest.raises(InputError, match=r"expected the folder of an evaluation, got no suite.json there"):
        read(tmp_path)
    folder(tmp_path, {})
    with pytest.raises(InputError, match=r"expected the answers of an evaluation, got no finished sample"):
        read(tmp_path)
    for content, said in {
        "[]": r"expected a JSON object, got \[\]",
        "{": "not JSON",
        '{"suite": 1}': "suite must be a string, got 1",
        '{"suite": "qa", "options": []}': r"options must be an object, got \[\]",
        '{"suite": "qa", "settings": 1}': "settings must be an object, got 1",
        '{"suite": "qa", "settings": {"models": {"max_context": 1e999}}}': "settings.models.max_context must be",
        '{"suite": "qa", "samples": true}': "samples must be a whole number",
        '{"suite": "qa", "templates": []}': "templates must be a string",
    }.items():
        (tmp_path / "suite.json").write_text(content)
        with pytest.raises(InputError, match=rf"suite.json: {said}"):
            read_suite(tmp_path / "suite.json")


def test_what_is_no_file_is_not_opened(tmp_path: Path):
    run = folder(tmp_path, {"target": grid("target", right)})
    os.mkfifo(run / "answers-rapid.jsonl")
    with pytest.raises(InputError, match=r"answers-rapid.jsonl: expected a file, got something else"):
        read(run)


@pytest.mark.parametrize(
    ("length", "name"), [(4096, "4K"), (131072, "128K"), (1048576, "1M"), (1536, "1.5K"), (500, "500"), (None, "own")]
)
def test_lengths_are_shown_in_words_of_two_letters_or_so(length: int | None, name: str):
    assert named(length) == name
