# SPDX-License-Identifier: Apache-2.0
"""The command line: each command does its stage, and every way to end is one line and a status."""

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from longpo_jax.cli import main
from longpo_jax.config import LongPOConfig
from longpo_jax.stages import STAGES
from rapid_jax import __version__
from rapid_jax.runtime import settings
from rapid_jax.runtime.errors import InputError
from tests.test_processes import environment, finished, free_port, spawn

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def own_environment(monkeypatch, tmp_path):
    """What main sets for jax where the user has not is undone after the test."""
    for name in ("TF_CPP_MIN_LOG_LEVEL", "TPU_MIN_LOG_LEVEL"):
        monkeypatch.setenv(name, os.environ.get(name, "2"))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "programs"))


@pytest.fixture
def file(tmp_path) -> Path:
    """Settings of two rounds."""
    rounds = "rounds=[corpus.max_tokens=70000, corpus.max_tokens=80000]"
    settings.save(settings.defaults(LongPOConfig, [f"run={tmp_path / 'run'}", rounds]), tmp_path / "run.yaml")
    return tmp_path / "run.yaml"


@pytest.fixture
def calls(monkeypatch):
    """What the stages were called with; `calls.failure` is raised by the stage train."""

    class Calls(list):
        failure: BaseException | None = None

    made = Calls()

    def stage_of(name: str):
        def stage(config, folder, *, leads=True, quiet=False):
            made.append((name, folder.name, config.corpus.max_tokens, leads, quiet))
            if name == "train" and made.failure is not None:
                raise made.failure

        return stage

    for name in STAGES:
        module = ModuleType(f"longpo_jax.{name}")
        setattr(module, f"run_{name}", stage_of(name))
        monkeypatch.setitem(sys.modules, module.__name__, module)
    checked = ModuleType("longpo_jax.checks")
    checked.__dict__["check_round"] = lambda config, source: None
    monkeypatch.setitem(sys.modules, checked.__name__, checked)
    return made


@pytest.fixture
def longpo(file, capfd):
    """`longpo(command, *arguments)`: (status, stdout, stderr) with the settings file."""

    def run(command: str, *arguments: str | Path):
        capfd.readouterr()
        status = main([command, "--config", str(file), *map(str, arguments)])
        return status, *capfd.readouterr()

    return run


def refused(outcome, *expected: str) -> None:
    """The outcome is status 2, nothing on stdout and one line on stderr that says all of `expected`."""
    status, out, err = outcome
    assert (status, out) == (2, "")
    assert len(err.splitlines()) == 1 and err.startswith("longpo: ")
    for text in expected:
        assert text in err


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_by_its_name(longpo, calls, stage):
    assert longpo(stage) == (0, "", "")
    assert calls == [(stage, "run", 131072, True, False)]


def test_a_round_is_all_stages_and_rounds_are_all_rounds(longpo, calls):
    assert longpo("round", "--quiet", "--set", "corpus.max_tokens=90000") == (0, "", "")
    assert calls == [(stage, "run", 90000, True, True) for stage in STAGES]
    calls.clear()
    assert longpo("rounds") == (0, "", "")
    assert [call[1:3] for call in calls] == [("round-1", 70000)] * 4 + [("round-2", 80000)] * 4


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["round", "--set", "train.tial=1"], ["unknown setting 'tial'", "did you mean 'tail'"]),
        (["round", "--set", "garbage"], ["--set garbage: expected section.key=value"]),
        (["train", "--set", "train.lengths=[4,2]"], ["run.yaml with --set", "lengths: expected to rise"]),
        (["rounds", "--set", "rounds=[]"], ["rounds: expected the settings of one round or more, got none"]),
        (["rounds", "--set", "rounds=[seed=1, seed=x]"], ["seed: expected a whole number, got 'x'"]),
        (["pairs", "--config", "absent.yaml"], ["absent.yaml: cannot be read"]),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, expected, longpo, calls, tmp_path):
    before = sorted(tmp_path.iterdir())
    refused(longpo(*arguments), *expected)
    assert not calls and sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("failure", "status", "said"),
    [
        (InputError("no pairs\nhere"), 2, "longpo: no pairs here\n"),
        (KeyboardInterrupt(), 130, "longpo: interrupted\n"),
        (OSError(28, "No space left on device", "/disk/x"), 2, "longpo: /disk/x: No space left on device\n"),
        (MemoryError(), 2, "longpo: out of memory: "),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 byte"), 2, "longpo: out of memory: "),
    ],
)
def test_what_goes_wrong_is_one_line_and_a_status(longpo, calls, failure, status, said):
    calls.failure = failure
    outcome = longpo("round")
    assert outcome[:2] == (status, "") and outcome[2].startswith(said) and len(outcome[2].splitlines()) == 1
    assert [call[0] for call in calls] == ["pairs", "reference", "train"]


def test_an_error_of_the_programs_own_is_not_hidden(longpo, calls):
    calls.failure = RuntimeError("a fault")
    with pytest.raises(RuntimeError, match="a fault"):
        longpo("round")


def test_report_and_plan_are_passed_on(monkeypatch, capfd, tmp_path):
    made = []
    module = ModuleType("longpo_jax.report")
    module.__dict__["report"] = lambda runs, out: made.append((runs, out))
    monkeypatch.setitem(sys.modules, "longpo_jax.report", module)
    assert main(["report", "a", "b"]) == main(["report", "a", "--out", "c"]) == 0
    assert made == [([Path("a"), Path("b")], None), ([Path("a")], Path("c"))]
    monkeypatch.setattr("longpo_jax.plan.run", lambda options: 3)
    assert main(["plan", "--config", "x.yaml", "--topology", "v5p:2x2x4"]) == 3


def test_wrong_usage_leaves_with_status_2_and_version_with_0(capfd):
    for arguments in ([], ["train"], ["train", "--conf", "x"], ["unknown"], ["report"]):
        with pytest.raises(SystemExit) as left:
            main(arguments)
        assert left.value.code == 2
    with pytest.raises(SystemExit) as left:
        main(["--version"])
    assert left.value.code == 0
    assert capfd.readouterr().out == f"longpo {__version__}\n"


PROGRAM = "import sys; from longpo_jax.cli import main; sys.exit(main(sys.argv[1:]) + 10 * ('jax' in sys.modules))"


def test_bad_settings_need_no_jax(file):
    given = ["rounds", "--config", str(file), "--set", "rounds=[seed=1, seed=x]"]
    done = subprocess.run([sys.executable, "-c", PROGRAM, *given], cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == 2


def test_what_is_wrong_in_one_process_ends_the_others_with_its_line(file):
    """Two processes, of which one cannot read its settings."""
    port = free_port()
    pair = [
        spawn(["-m", "longpo_jax", "train", "--config", name], environment(1, (port, 2, index)))
        for index, name in enumerate((str(file), "absent.yaml"))
    ]
    (first, _, told), (second, _, said) = map(finished, pair)
    assert (first, second) == (2, 2)
    assert "longpo: process 1 of 2 has ended: absent.yaml: cannot be read" in told
    assert said.startswith("longpo: absent.yaml: cannot be read")
