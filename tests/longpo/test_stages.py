# SPDX-License-Identifier: Apache-2.0
"""When a stage counts as done, and which settings decide what it makes."""

import dataclasses
import errno
import fcntl
import json
import os
from pathlib import Path

import pytest

from longpo_jax.config import LongPOConfig
from longpo_jax.stages import STAGES, identity_of, inputs_of, is_done, mark_done, summary_of
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.run_folder import working_in
from rapid_jax.runtime.sealed import sealed
from rapid_jax.runtime.settings import defaults

INPUTS = {"seed": 1, "train.lengths": (8, 16), "optimizer.learning_rate": 5e-7, "model": "abc"}


def test_a_stage_is_done_once_it_is_marked_and_keeps_what_came_of_it(tmp_path: Path):
    folder = tmp_path / "train"
    assert not is_done(folder, INPUTS)
    with pytest.raises(InputError, match=r"train: expected a stage that is done, got none: run `longpo train` first"):
        summary_of(folder)
    mark_done(folder, INPUTS, {"steps": 3, "loss": 0.25})
    assert is_done(folder, INPUTS) and is_done(folder, INPUTS | {"train.lengths": [8, 16]})
    assert summary_of(folder) == {"steps": 3, "loss": 0.25}
    assert [path.name for path in folder.iterdir()] == ["done.json"]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (INPUTS | {"seed": 2, "model": "abd"}, r"train was made with seed = 1, expected seed = 2: choose another run"),
        (INPUTS | {"train.lengths": (8,)}, r"made with train.lengths = \[8, 16\], expected train.lengths = \[8\]"),
        (INPUTS | {"pairs": "x"}, r'made with pairs = none, expected pairs = "x"'),
        ({"seed": 1}, r"made with train.lengths = \[8, 16\], expected train.lengths = none"),
    ],
)
def test_other_inputs_are_refused_by_the_first_that_differs(tmp_path: Path, other, message):
    folder = tmp_path / "train"
    mark_done(folder, INPUTS, {})
    with pytest.raises(InputError, match=message) as raised:
        is_done(folder, other)
    assert f"or delete {folder} to make it again" in str(raised.value)


def test_settings_of_self_distillation_decide_nothing_of_other_objectives():
    for stage, keys in (
        ("reference", {"objective.top_k"}),
        ("train", {"objective.top_k", "objective.distillation_weight"}),
    ):
        plain, distilled = (inputs_of(defaults(LongPOConfig, [f"objective.name={n}"]), stage) for n in ("dpo", "opsd"))
        assert distilled.keys() - plain.keys() == keys and not plain.keys() - distilled.keys()


def test_a_setting_that_came_later_decides_nothing_at_the_value_that_was_in_force_before():
    plain, begun = (inputs_of(defaults(LongPOConfig, given), "pairs") for given in ([], ["instruct.begins='1:'"]))
    assert "instruct.begins" not in plain and begun == plain | {"instruct.begins": "1:"}


def test_a_file_that_is_no_note_of_ours_is_refused(tmp_path: Path):
    (tmp_path / "done.json").write_text('{"schema": 1')
    with pytest.raises(InputError, match=r"done.json: expected a whole line, got one that is cut off: delete it"):
        is_done(tmp_path, INPUTS)
    for text in ("[1]\n", "{}\n", '{\n "schema": 1,\n "inputs": {},\n "summary": {}\n}\n'):  # the last: as it was once
        (tmp_path / "done.json").write_text(text)
        with pytest.raises(
            InputError, match=r"done.json: expected a checksum at its end, .* earlier version: delete it"
        ):
            is_done(tmp_path, INPUTS)
    for values, message in (
        ({"schema": 99}, "schema must be 2, that of this version, got 99"),
        ({"schema": 2}, "inputs must be an object, got no such key"),
        ({"schema": 2, "inputs": {}, "summary": 3}, "summary must be an object, got 3"),
    ):
        (tmp_path / "done.json").write_bytes(sealed(values, "done.json"))
        for asked in (lambda: is_done(tmp_path, INPUTS), lambda: summary_of(tmp_path)):
            with pytest.raises(InputError, match=f"done.json: {message}"):
                asked()
    mark_done(tmp_path, INPUTS, {"pairs": 3})
    marked = (tmp_path / "done.json").read_bytes()
    for index in range(len(marked)):
        (tmp_path / "done.json").write_bytes(marked[:index] + bytes([marked[index] ^ 1]) + marked[index + 1 :])
        with pytest.raises(InputError, match=r"done.json: "):
            is_done(tmp_path, INPUTS)


def test_one_run_at_a_time_works_in_a_folder(tmp_path: Path):
    folder = tmp_path / "run"
    with working_in(folder, "train"):
        (folder / "train").mkdir()
        for stage in ("train", "export"):
            with pytest.raises(InputError, match=r"run: expected no other run there, got one that is at work"):
                working_in(folder, stage).__enter__()
        with working_in(tmp_path / "other", "train"):
            pass
    with working_in(folder, "train"):
        pass
    assert [path.name for path in folder.iterdir()] == ["train"]


def test_what_killed_runs_left_behind_is_removed_under_the_lock(tmp_path: Path):
    for name in (".export.0123456789abcdef", "reference"):
        (tmp_path / name).mkdir()
    (tmp_path / ".export.0123456789abcdef" / "model.safetensors").write_bytes(bytes(100))
    scores = "reference/.scores-00000.jsonl.0123456789abcdef"
    for name in (".settings.yaml.0123456789abcdef", scores, "reference/inputs.txt"):
        (tmp_path / name).write_text("x")
    with working_in(tmp_path, "reference"):
        left = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*"))
    assert left == ["reference", "reference/inputs.txt"]


def test_folders_that_stay_empty_are_taken_away_again(tmp_path: Path):
    (tmp_path / "runs").mkdir()
    with pytest.raises(InputError, match="no"), working_in(tmp_path / "runs" / "a" / "round-1", "pairs"):
        raise InputError("no")
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_file_in_the_way_is_one_line_and_stays(tmp_path: Path):
    (tmp_path / "run").mkdir()
    for name, folder, message in (
        ("file", "file", r"file: expected a folder to write to, got: "),
        ("file", "file/run", r"file/run: expected a folder to write to, got: Not a directory"),
        ("run/train", "run", r"run/train: expected a folder or nothing there, got a file"),
    ):
        (tmp_path / name).write_text("mine")
        with pytest.raises(InputError, match=message):
            working_in(tmp_path / folder, "train").__enter__()
        assert (tmp_path / name).read_text() == "mine"


def test_a_folder_without_the_permission_and_a_file_system_without_locks(tmp_path: Path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    with monkeypatch.context() as patch, pytest.raises(InputError, match="got one without the permission"):
        patch.setattr(os, "access", lambda *_: False)  # root may everything
        working_in(tmp_path, "train").__enter__()
    monkeypatch.setattr(fcntl, "flock", no_locks)
    with working_in(tmp_path, "train"), working_in(tmp_path, "train"):
        pass


def test_a_stage_that_was_made_anew_with_other_results_has_another_identity(tmp_path: Path):
    mark_done(tmp_path, INPUTS, {"pairs": 3})
    first = identity_of(tmp_path)
    mark_done(tmp_path, INPUTS, {"pairs": 3})
    assert identity_of(tmp_path) == first
    mark_done(tmp_path, INPUTS, {"pairs": 4})
    second = identity_of(tmp_path)
    mark_done(tmp_path, INPUTS | {"seed": 2}, {"pairs": 3})
    assert len({first, second, identity_of(tmp_path)}) == 3


def test_weights_of_domains_follow_the_domains():
    def inputs(sources: str, weights: str) -> dict:
        return inputs_of(defaults(LongPOConfig, [f"corpus.sources={sources}", f"corpus.weights={weights}"]), "train")

    assert inputs("[a=x, b=y]", "[1, 2]") == inputs("[b=y, a=x]", "[2, 1]") != inputs("[b=y, a=x]", "[1, 2]")


def stale(setting: str) -> list[str]:
    """The stages that another value of a setting makes anew."""
    plain, other = LongPOConfig(), defaults(LongPOConfig, [setting])
    assert plain != other
    return [stage for stage in STAGES if inputs_of(plain, stage) != inputs_of(other, stage)]


@pytest.mark.parametrize(
    ("setting", "stages"),
    [
        ("seed=1", ["pairs", "train"]),
        ("model.dtype=float32", ["pairs", "reference", "train"]),
        ("model.rope_theta=1e6", ["pairs", "train", "export"]),
        ("model.reference_rope_theta=1e6", ["reference"]),
        ("corpus.sources=[a=b]", ["pairs"]),
        ("excerpts.per_document=2", ["pairs"]),
        ("instruct.temperature=0.5", ["pairs"]),
        ("pairs.max_new_tokens=7", ["pairs"]),
        ("objective.name=dpo", ["reference", "train"]),
        ("objective.beta=0.01", ["train"]),
        ("optimizer.learning_rate=1e-6", ["train"]),
        ("train.max_steps=3", ["train"]),
        ("train.lengths=[64]", ["train", "export"]),
    ],
)
def test_a_setting_makes_those_stages_stale_whose_results_it_decides(setting: str, stages: list[str]):
    assert stale(setting) == stages


@pytest.mark.parametrize(
    "setting",
    [
        "run=elsewhere",
        "model.source=other",  # known by what is in it, which the stages add
        "pairs.batch=1",
        "generation.layout=stacked",
        "generation.prefill_chunk=64",
        "mesh.context=2",
        "compute.kernel=xla",
        "train.remat=layer",
        "train.logits_chunk=64",
        "train.save_every=7",
        "train.tensorboard=true",
        "rounds=['seed=1']",
    ],
)
def test_what_changes_speed_or_place_makes_nothing_stale(setting: str):
    assert stale(setting) == []


def test_weights_of_domains_matter_to_training_alone():
    plain = LongPOConfig()
    sources = dataclasses.replace(plain.corpus, sources=("a=x", "b=y"))
    weighted = dataclasses.replace(sources, weights=(1.0, 3.0))
    before, after = (dataclasses.replace(plain, corpus=corpus) for corpus in (sources, weighted))
    assert [stage for stage in STAGES if inputs_of(before, stage) != inputs_of(after, stage)] == ["train"]


def test_inputs_are_flat_and_plain():
    for stage in STAGES:
        inputs = inputs_of(LongPOConfig(), stage)
        assert json.loads(json.dumps(inputs)).keys() == inputs.keys()
        assert not any(isinstance(value, dict) for value in inputs.values())
