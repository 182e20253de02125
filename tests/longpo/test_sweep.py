# SPDX-License-Identifier: Apache-2.0
"""Sweeps of rounds: what is shared, what is skipped, and that a killed one goes on."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from longpo_jax.cli import main
from longpo_jax.config import LongPOConfig
from longpo_jax.round import folder_of
from longpo_jax.stages import STAGES, has_ended, inputs_of, mark_done, stage_in
from rapid_jax.runtime import settings, sweep
from rapid_jax.runtime.append_log import log_at
from rapid_jax.runtime.jobs import alone_in
from rapid_jax.runtime.storage import working_place
from rapid_jax.runtime.sweep_file import read_sweep, settings_of
from tests.longpo.sweep_program import words
from tests.tiny_models import save_decoder

ROOT = Path(__file__).resolve().parents[2]
BASE = """\
base: {base}
model: {{source: {model}}}
corpus: {{sources: [book={corpus}], min_tokens: 1, max_tokens: 400}}
train: {{lengths: [512], tail: 64, epochs: 1, logits_chunk: 64, attention_block: 64}}
compute: {{programs: false}}
"""


@pytest.fixture
def file(tmp_path):
    """`file(text)`: a sweep, in a file beside its base."""
    (tmp_path / "corpus").mkdir()
    for seed in range(2):
        (tmp_path / "corpus" / f"{seed}.txt").write_text(words(200, seed))
    base = BASE.format(
        base=ROOT / "configs/longpo/smollm2_cpu.yaml", model=tmp_path / "model", corpus=tmp_path / "corpus"
    )
    (tmp_path / "base.yaml").write_text(base)

    def write(text: str, run: object = tmp_path / "run") -> str:
        (tmp_path / "sweep.yaml").write_text(f"base: base.yaml\nrun: {run}\n{text}\n")
        return str(tmp_path / "sweep.yaml")

    return write


@pytest.fixture
def stages(monkeypatch):
    """Commands that run here, and of which each only says that it is done; `stages` has their words."""
    made: list[tuple[str, str]] = []

    def run_jobs(jobs, module, shares, held, tell):
        assert module == "longpo_jax" and shares == [{}]
        for job in jobs:
            command, file = job.words[0], job.words[-1]
            made.append((command, job.name.rpartition("-")[0] or job.name))
            if command == "check":
                continue
            config = settings.load(LongPOConfig, file)
            for stage in STAGES if command == "round" else (command,):
                place = stage_in(folder_of(config), stage)
                if has_ended(place):
                    continue
                made.append(("", stage))
                mark_done(place, inputs_of(config, stage), {})
                if stage == "train":
                    line = {"step": 1, "loss": 2.0, "nll": 1.0, "tokens_per_second": None, "mfu": None}
                    log_at(place / "metrics.jsonl").append(f"{json.dumps(line)}\n".encode())
        return {job.name: "" for job in jobs}

    monkeypatch.setattr(sweep, "run_jobs", run_jobs)
    return made


def test_what_the_points_have_in_common_is_made_once(file, stages, tmp_path, capfd):
    sweep = file("lists: {optimizer.learning_rate: [1.0e-5, 2.0e-5], objective.name: [longpo, dpo, sft]}")
    assert main(["sweep", sweep, "--quiet"]) == 0
    made = [stage for command, stage in stages if not command]
    assert {stage: made.count(stage) for stage in STAGES} == {"pairs": 1, "reference": 3, "train": 6, "export": 6}
    assert [command for command, _ in stages if command] == ["check", "pairs", *["reference"] * 3, *["round"] * 6]
    one, other = (tmp_path / "run" / f"learning_rate={rate}_name=dpo" for rate in ("1e-05", "2e-05"))
    assert (one / "reference").resolve() == (other / "reference").resolve() != (one / "pairs").resolve()
    assert settings.load(LongPOConfig, tmp_path / "run/settings" / f"{one.name}.yaml").run == str(one)
    found = json.loads((tmp_path / "run" / "sweep.json").read_text())
    assert found["keys"] == ["optimizer.learning_rate", "objective.name"] and len(found["points"]) == 6
    assert found["points"][0]["settings"] == {"optimizer.learning_rate": 1e-5, "objective.name": "longpo"}
    assert found["points"][0]["loss"] == 2.0
    lines = capfd.readouterr().out.splitlines()
    assert lines[0].split()[1:6:2] == ["optimizer.learning_rate", "objective.name", "updates"]
    assert lines[2].split()[1:8:2] == ["1e-05", "longpo", "1", "2"]
    assert (tmp_path / "run" / "sweep.png").read_bytes().startswith(b"\x89PNG")
    stages.clear()
    assert main(["sweep", sweep, "--quiet"]) == 0 and not stages  # all is done: the table alone


def test_a_sweep_in_a_bucket_is_that_on_a_disk(file, stages, tmp_path, bucket, monkeypatch, capfd):
    monkeypatch.setenv("RAPID_JAX_CACHE", str(tmp_path / "cache"))
    swept = "lists: {optimizer.learning_rate: [1.0e-5, 2.0e-5], objective.name: [longpo, sft]}"
    assert main(["sweep", file(swept), "--quiet"]) == 0
    made = list(stages)
    stages.clear()
    run = working_place("gs://models/swept", "run")
    sweep = file(swept, run)
    capfd.readouterr()
    assert main(["sweep", sweep, "--print"]) == 0
    lines = [shlex.split(line) for line in capfd.readouterr().out.splitlines()]
    command = next(line for line in lines if line[1] == "round")
    assert main(command[1:]) == 2
    said = f"longpo: {run}/learning_rate=1e-05_name=longpo/pairs: expected the stage that the sweep shares in {run}/sha"
    assert capfd.readouterr().err.startswith(said)
    assert main(["sweep", sweep, "--quiet"]) == 0 and stages == made
    for name in ("sweep.json", "sweep.md", "sweep.png"):
        assert (run / name).read_bytes() == (tmp_path / "run" / name).read_bytes()
    one, other = (run / f"learning_rate={rate}_name=sft" for rate in ("1e-05", "2e-05"))
    assert stage_in(one, "pairs") == stage_in(other, "pairs") != one / "pairs" and not (one / "pairs").exists()
    assert sorted(place.name for place in one.iterdir()) == ["export", "pairs.link", "reference.link", "train"]
    stages.clear()
    assert main(["sweep", sweep, "--quiet"]) == 0 and not stages
    assert "lease.json" not in {place.name for place in run.iterdir()}


def test_a_sweep_in_s3_is_refused_before_anything_starts(file, stages, s3_bucket, capfd):
    sweep = file("lists: {optimizer.learning_rate: [1.0e-5, 2.0e-5]}", "s3://models/a refused sweep")
    for more in ([], ["--print"]):
        assert main(["sweep", sweep, *more]) == 2
        said = capfd.readouterr().err.splitlines()
        assert len(said) == 1 and said[0].startswith(
            "longpo: run: expected a folder here or in gs:// to train in, got s3://models/a refused sweep: "
        )
    assert not stages and s3_bucket.list_objects_v2(Bucket="models", Prefix="a refused sweep")["KeyCount"] == 0


def test_settings_of_the_pairs_make_pairs_of_their_own(file, stages):
    assert main(["sweep", file("points: [{seed: 1}, {seed: 2, train.epochs: 2}, {seed: 2}]"), "--quiet"]) == 0
    made = [stage for command, stage in stages if not command]
    assert (made.count("pairs"), made.count("reference"), made.count("train")) == (2, 2, 3)


def test_points_may_be_added_and_what_is_there_stays(file, stages, tmp_path):
    assert main(["sweep", file("lists: {seed: [1], train.epochs: [1]}"), "--quiet"]) == 0
    stages.clear()
    assert main(["sweep", file("lists: {seed: [1], train.epochs: [3, 1]}"), "--quiet"]) == 0
    assert [stage for command, stage in stages if not command] == ["train", "export"]


def test_another_base_in_the_same_folder_is_refused(file, stages, tmp_path, capfd):
    sweep = file("lists: {train.epochs: [1, 2]}")
    assert main(["sweep", sweep, "--quiet"]) == 0
    text = (tmp_path / "base.yaml").read_text()
    (tmp_path / "base.yaml").write_text(text + "seed: 7\n")
    capfd.readouterr()
    assert main(["sweep", sweep]) == 2
    said = capfd.readouterr().err
    assert "run was begun with seed = 42, expected 7: choose another run" in said and len(said.splitlines()) == 1
    (tmp_path / "base.yaml").write_text(text + "generation: {prefill_chunk: 64}\n")  # speed is no other sweep
    assert main(["sweep", sweep, "--quiet"]) == 0


def test_print_has_the_commands_in_their_order(file, stages, tmp_path, capfd):
    sweep = file("lists: {train.epochs: [1, 2]}")
    assert main(["sweep", sweep, "--print"]) == 0
    lines = [shlex.split(line) for line in capfd.readouterr().out.splitlines()]
    assert [line[1] for line in lines] == ["check", "pairs", "reference", "round", "round", "sweep"]
    assert all(line[0] == "longpo" for line in lines) and not stages
    for line in lines[1:-1]:
        settings.load(LongPOConfig, line[3])
    for command in lines[3:5]:  # on its own it says what is missing, and makes nothing
        assert main(command[1:]) == 2
        said = capfd.readouterr().err
        assert "pairs: expected the stage that the sweep shares" in said and len(said.splitlines()) == 1


def test_one_that_is_at_work_is_left_alone(file, stages, tmp_path, capfd):
    sweep = file("lists: {train.epochs: [1, 2]}")
    with alone_in(tmp_path / "run"):
        for more in ((), ("--print",)):
            assert main(["sweep", sweep, *more]) == 2
            said = capfd.readouterr().err
            assert "expected no other sweep there, got one that is at work" in said and len(said.splitlines()) == 1
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["logs"] and not stages


def test_the_sweep_in_configs_is_one():
    found = read_sweep(ROOT / "configs/sweeps/smollm2_cpu_rates.yaml")
    rates = [config.optimizer.learning_rate for config in settings_of(found, LongPOConfig, ("run",)).values()]
    assert rates == [1e-5, 2e-5, 4e-5]


def test_bad_sweeps_are_one_line(file, capfd, monkeypatch):
    for text, message in (
        ("lists: {run: [a]}", "run is set by the sweep"),
        ("lists: {rounds: [[a]]}", "rounds is set by the sweep"),
        ("lists: {train.lengths: [[3, 1]]}", "lengths: expected to rise from at least 1, got [3, 1]"),
    ):
        assert main(["sweep", file(text)]) == 2
        said = capfd.readouterr().err
        assert message in said and len(said.splitlines()) == 1
    assert main(["sweep", file("lists: {seed: [1]}"), "--jobs", "0"]) == 2
    assert "--jobs: expected at least 1, got 0" in capfd.readouterr().err
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    assert main(["sweep", file("lists: {seed: [1]}")]) == 2
    assert "sweep: expected one process, got several: --print has the commands" in capfd.readouterr().err


def test_three_rates_on_a_tiny_model_killed_and_resumed(file, tmp_path):
    """The real stages but for the pairs, which random weights cannot make. The second is killed in its round."""
    save_decoder(tmp_path / "model")
    with open(tmp_path / "base.yaml", "a") as base:
        base.write("objective: {name: sft}\n")  # the smallest program
    command = [sys.executable, "-m", "tests.longpo.sweep_program", "sweep"]
    command.append(file("lists: {optimizer.learning_rate: [1.0e-3, 2.0e-3, 4.0e-3]}"))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": "1"}
    run = tmp_path / "run"
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 300
    while not (run / "made.txt").exists() or "round learning_rate=0.002" not in (run / "made.txt").read_text():
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    first = {path: path.stat().st_mtime_ns for path in (run / "learning_rate=0.001").rglob("*")}
    assert (run / "learning_rate=0.001/export/done.json") in first
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert {path: path.stat().st_mtime_ns for path in (run / "learning_rate=0.001").rglob("*")} == first
    made = (run / "made.txt").read_text().splitlines()
    assert sum(line.startswith("reference ") for line in made) == 1
    assert sum(line == f"pairs {line.split()[1]}" for line in made) == 2  # the command, and the stage that it runs
    assert sum(line == "round learning_rate=0.001" for line in made) == 1
    points = json.loads((run / "sweep.json").read_text())["points"]
    assert [point["settings"]["optimizer.learning_rate"] for point in points] == [1e-3, 2e-3, 4e-3]
    assert len({point["nll"] for point in points}) == 3 and {point["updates"] for point in points} == {2}
    assert (run / "sweep.png").is_file() and "done already" in done.stderr
