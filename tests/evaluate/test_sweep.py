# SPDX-License-Identifier: Apache-2.0
"""Sweeps of evaluations: points, what is skipped, the table with intervals, and refusals."""

import json
import shlex
from pathlib import Path

import pytest

from rapid_jax.cli import main
from rapid_jax.config import RapidConfig
from rapid_jax.evaluate.sweep import _words
from rapid_jax.runtime import settings, sweep
from rapid_jax.runtime.jobs import alone_in
from rapid_jax.runtime.storage import working_place
from rapid_jax.runtime.sweep_file import read_sweep, settings_of
from tests.evaluate.test_command import tiny  # noqa: F401 - a fixture

ROOT = Path(__file__).resolve().parents[2]
RUN = "lists: {speculation.eta: [0.0, 10.0]}"


@pytest.fixture
def file(tiny, tmp_path):  # noqa: F811
    """`file(text)`: a sweep over the tiny model's settings."""
    given = [tiny[at + 1] for at, word in enumerate(tiny) if word == "--set"]
    settings.save(settings.defaults(RapidConfig, given), tmp_path / "base.yaml")
    data = tiny[tiny.index("--data") + 1]

    def write(text: str, evaluate: str = "modes: [rapid]", run: object = tmp_path / "run") -> str:
        head = f"base: base.yaml\nrun: {run}\nevaluate: {{suite: qa, data: {data}, {evaluate}}}\n"
        (tmp_path / "sweep.yaml").write_text(head + text + "\n")
        return str(tmp_path / "sweep.yaml")

    return write


@pytest.fixture
def commands(monkeypatch):
    """The jobs run in this process; their words."""
    made: list[tuple[str, ...]] = []

    def run_jobs(jobs, module, shares, held, tell):
        assert module == "rapid_jax"
        made.extend(job.words for job in jobs)
        return {job.name: "" if main(job.words) == 0 else "failed" for job in jobs}

    monkeypatch.setattr(sweep, "run_jobs", run_jobs)
    return made


def test_points_are_evaluated_once_and_make_one_table(file, commands, tmp_path, capfd):
    assert main(["sweep", file(RUN), "--quiet"]) == 0
    found = json.loads((tmp_path / "run/sweep.json").read_text())
    named = [(point["point"], point["mode"]) for point in found["points"]]
    assert named == [("eta=0", "rapid"), ("eta=10", "rapid")]
    assert all(0 <= point["score"] <= 100 and "low" in point for point in found["points"])
    assert all(0 <= point["acceptance"] <= 100 and point["tokens/s"] > 0 for point in found["points"])
    text = (tmp_path / "run/sweep.md").read_text()
    assert text.startswith("# Sweep over speculation.eta\n") and "![the points](sweep.png)" in text
    assert (tmp_path / "run/sweep.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "run/sweep.csv").read_text().startswith("point,mode,score,low,high,")
    assert settings.load(RapidConfig, tmp_path / "run/eta=10/settings.yaml").speculation.eta == 10
    assert [words[0] for words in commands] == ["evaluate"] * 2
    commands.clear()
    answers = tmp_path / "run/eta=10/answers-rapid.jsonl"
    lines = answers.read_text().splitlines(keepends=True)
    answers.write_text("".join(lines[:2]) + lines[2][:10])  # as a run that is killed leaves it
    assert main(["sweep", file(RUN), "--quiet"]) == 0
    assert [words[words.index("--out") + 1] for words in commands] == [str(tmp_path / "run/eta=10")]
    again = json.loads((tmp_path / "run/sweep.json").read_text())
    assert [point["score"] for point in again["points"]] == [point["score"] for point in found["points"]]
    commands.clear()
    capfd.readouterr()
    assert main(["sweep", file(RUN, "modes: target")]) == 2
    assert "run was begun with evaluate --suite qa" in capfd.readouterr().err and not commands


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_a_sweep_in_a_bucket_goes_on_where_its_points_have_ended(
    file, commands, tmp_path, request, monkeypatch, capfd, scheme
):
    request.getfixturevalue({"gs": "bucket", "s3": "s3_bucket"}[scheme])
    monkeypatch.setenv("RAPID_JAX_CACHE", str(tmp_path / "cache"))
    run = working_place(f"{scheme}://models/swept evaluations", "run")
    written = file("lists: {speculation.eta: [10.0]}", "modes: [target]", run)
    assert main(["sweep", written, "--quiet"]) == 0
    assert json.loads((run / "sweep.json").read_bytes())["points"][0]["point"] == "eta=10"
    assert (run / "sweep.md").is_file() and (run / "eta=10/report.html").is_file() and len(commands) == 1
    assert capfd.readouterr().out.endswith(f"\n{run}/sweep.md\n")
    commands.clear()
    assert main(["sweep", written, "--quiet"]) == 0 and not commands
    assert main(["sweep", file(RUN, "modes: rapid", run)]) == 2
    assert f"{run} was begun with evaluate --suite qa" in capfd.readouterr().err


def test_one_that_is_at_work_is_left_alone(file, commands, tmp_path, capfd):
    with alone_in(tmp_path / "run"):
        assert main(["sweep", file(RUN), "--print"]) == 2
    assert "expected no other sweep there, got one that is at work" in capfd.readouterr().err
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["logs"] and not commands


def test_print_has_the_commands(file, commands, capfd):
    assert main(["sweep", file(RUN), "--print"]) == 0
    lines = [shlex.split(line) for line in capfd.readouterr().out.splitlines()]
    assert [line[:2] for line in lines] == [["rapid", "evaluate"]] * 2 + [["rapid", "sweep"]]
    assert all(Path(line[line.index("--config") + 1]).is_file() for line in lines[:2]) and not commands


@pytest.mark.parametrize(
    ("evaluate", "message"),
    [
        ("modes: target, out: x", "sweep.yaml: evaluate: --out is set by the sweep"),
        ("mode: target", "sweep.yaml: evaluate: unrecognized arguments: --mode target"),
        ("samples: 0", "sweep.yaml: evaluate: argument --samples: expected a whole number of at least 1, got '0'"),
        ("data: gs://bucket/x", "duplicate key"),
    ],
)
def test_bad_options_are_one_line(file, commands, capfd, tmp_path, evaluate, message):
    assert main(["sweep", file(RUN, evaluate)]) == 2
    said = capfd.readouterr().err
    assert message in said and len(said.splitlines()) == 1 and not (tmp_path / "run").exists()


def test_the_sweep_in_configs_is_one():
    found = read_sweep(ROOT / "configs/sweeps/quickstart_eta.yaml", ("evaluate",))
    assert [config.speculation.eta for config in settings_of(found, RapidConfig, ()).values()] == [0, 10, 40]
    assert _words(found)[:2] == ["--suite", "needle"]


def test_bad_points_are_one_line(file, commands, capfd):
    assert main(["sweep", file("lists: {speculation.etta: [1]}")]) == 2
    assert "etta=1: unknown setting 'etta' in 'speculation'; did you mean 'eta'?" in capfd.readouterr().err
