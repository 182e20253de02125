# SPDX-License-Identifier: Apache-2.0
"""Reading a run's folder: what is kept, what is left out, what is refused."""

import json
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
    results = read(folder(tmp_path, {"sd-x": grid("sd-x", right, settings=said)}))
    changed = {"speculation.mode": "sd", "speculation.eta": 5, "retrieval.min_tokens": 2048}
    assert results.settings_of("sd-x") == {**results.settings, **changed}


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
        ({"score": "1"}, r"expected score to be int or float, got '1'"),
        ({"score": True}, r"expected score to be int or float, got True"),
        ({"score": 1.5}, r"expected a score from 0 to 1, got 1.5"),
        ({"score": float("nan")}, r"expected a score from 0 to 1, got nan"),
        ({"schema": 2}, r"expected schema 1, got 2"),
        ({"length": "4K"}, r"expected length to be int or null, got '4K'"),
        ({"answers": [1]}, r"expected answers to be texts, got \[1\]"),
        ({"prompt_ends": ["a"]}, r"expected prompt_ends to be 2 texts, got \['a'\]"),
        ({"draft_ends": ["a", 1]}, r"expected draft_ends to be 2 texts, got \['a', 1\]"),
        ({"prefix_reused": 1}, r"expected prefix_reused to be bool, got 1"),
        ({"suite": "ruler"}, r"expected suite 'qa', got 'ruler'"),
        ({"mode": "rapid"}, r"expected mode 'target', got 'rapid'"),
        ({"id": "task/4096/0"}, r"expected every sample once, got 'task/4096/0' again"),
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
    with pytest.raises(InputError, match=r"answers-target.jsonl:1: expected a line of a sample, got '"):
        read(run)


def test_a_missing_field_is_named(tmp_path: Path):
    one = line("task", 4096, 0, "target", 1.0)
    del one["prompt_tokens"]
    with pytest.raises(InputError, match=r"jsonl:1: expected prompt_tokens to be int, got nothing"):
        read(folder(tmp_path, {"target": [one]}))


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
    assert finished(run, "rapid") == {line["id"] for line in whole[:-1]}
    assert len(finished(run, "rapid-eta=5")) == 40 and finished(run, "target") == set()
    lines = torn.read_bytes().split(b"\n")
    for broken, said in ((b"{", "a line of a sample, got '{'"), (b'{"mode": "rapid", "id": 1}', "id to be str, got 1")):
        torn.write_bytes(b"\n".join([lines[0], broken, *lines[2:]]))
        with pytest.raises(InputError, match=rf"answers-rapid.1-of-2.jsonl:2: expected {said}"):
            finished(run, "rapid")


@pytest.mark.parametrize(
    ("content", "size"), [(b"", 0), (b"torn", 0), (b"a\n", 2), (b"a\nb\ntorn", 4), (b"a\n\xff", 2)]
)
def test_a_torn_line_is_cut_behind_the_last_whole_one(tmp_path: Path, content: bytes, size: int):
    (tmp_path / "lines").write_bytes(content)
    assert torn_at(tmp_path / "lines") == size


def test_a_folder_without_an_evaluation_is_refused(tmp_path: Path):
    with pytest.raises(InputError, match=r"expected the folder of an evaluation, got no suite.json there"):
        read(tmp_path)
    folder(tmp_path, {})
    with pytest.raises(InputError, match=r"expected the answers of an evaluation, got no finished sample"):
        read(tmp_path)
    for content in ("[]", "{", '{"suite": 1}', '{"suite": "qa", "options": []}', '{"suite": "qa", "settings": 1}'):
        (tmp_path / "suite.json").write_text(content)
        with pytest.raises(InputError, match=r"suite.json: expected "):
            read_suite(tmp_path / "suite.json")


@pytest.mark.parametrize(
    ("length", "name"), [(4096, "4K"), (131072, "128K"), (1048576, "1M"), (1536, "1.5K"), (500, "500"), (None, "own")]
)
def test_lengths_are_shown_in_words_of_two_letters_or_so(length: int | None, name: str):
    assert named(length) == name
