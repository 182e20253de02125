# SPDX-License-Identifier: Apache-2.0
"""Jobs: their order, their devices, what a failure stops, and that none outlives who started it."""

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from rapid_jax.runtime import bucket_writes
from rapid_jax.runtime.device_shares import shares_of
from rapid_jax.runtime.errors import Again, InputError, Unavailable
from rapid_jax.runtime.files import replace_file
from rapid_jax.runtime.jobs import Job, alone_in, keep_log, logs_here, run_jobs
from rapid_jax.runtime.lease import Lease
from rapid_jax.runtime.links import follow_link, make_link, target_of
from rapid_jax.runtime.run_folder import LEASE
from rapid_jax.runtime.storage import working_place
from rapid_jax.runtime.sweep import Task, perform
from tests.bucket_server import Killed

PROGRAM = "tests.runtime.job_program"
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """`run(jobs, shares)`: (what came of each, what was told)."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    told = []

    def go(*jobs: Job, shares=({},)):
        with alone_in(tmp_path / "run") as held:
            return run_jobs(jobs, PROGRAM, shares, held, lambda job, said: told.append((job.name, said)))

    go.told = told  # pyright: ignore[reportFunctionMemberAccess]
    return go


def job(folder: Path, name: str, *words: str, after: tuple[str, ...] = ()) -> Job:
    return Job(name, tuple(words) or ("write", str(folder / name)), folder / "logs" / name, after)


def test_jobs_run_in_their_order_each_with_its_share(run, tmp_path):
    jobs = [job(tmp_path, "b", after=("a", "done long ago")), job(tmp_path, "a"), job(tmp_path, "c")]
    assert run(*jobs, shares=({"SHARE": "0"}, {"SHARE": "1"})) == {"a": "", "b": "", "c": ""}
    begun = [name for name, said in run.told if said == "begun"]
    assert begun[:2] == ["a", "c"] and begun[2] == "b"
    assert sorted((tmp_path / name).read_text() for name in "ac") == ["0", "1"]
    assert (tmp_path / "b").read_text() in "01"


def test_a_failure_stops_what_needs_it_and_nothing_else(run, tmp_path):
    jobs = [job(tmp_path, "a", "fail"), job(tmp_path, "b", after=("a",)), job(tmp_path, "c")]
    found = run(*jobs)
    assert found == {"a": "status 2: the reason", "b": "not run, a failed", "c": ""}
    assert (tmp_path / "c").exists() and not (tmp_path / "b").exists()


def test_one_that_asks_to_be_started_again_ends_all_with_the_same(run, tmp_path):
    with pytest.raises(SystemExit) as raised:
        run(job(tmp_path, "a", "again"), job(tmp_path, "b"))
    assert raised.value.code == 75 and not (tmp_path / "b").exists()


def test_a_folder_in_a_bucket_has_one_starter_and_keeps_what_jobs_print(bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("RAPID_JAX_CACHE", str(tmp_path))
    folder = working_place("gs://models/jobs", "run")
    with Lease(folder / LEASE), pytest.raises(InputError, match=f"^{folder}: expected no other run there, got that of"):
        alone_in(folder).__enter__()
    one = Job("a", ("fail",), logs_here(folder) / "a.log", keep=lambda: keep_log(folder, "a"))
    printed = []
    for _ in range(2):
        with alone_in(folder) as held:
            assert run_jobs([one], PROGRAM, [{}], held, lambda job, said: None) == {"a": "status 2: the reason"}
            with pytest.raises(InputError, match=f"^{folder}: expected no other sweep there, got one that is at work"):
                alone_in(folder).__enter__()
        printed.append((folder / "logs" / "a.log").read_bytes())
    assert printed[0].endswith(b"the reason\n") and printed[1] == 2 * printed[0]
    assert bucket.names(f"{folder.key}/") == [f"{folder.key}/logs/a.log"] and not one.log.exists()
    with pytest.raises(Again, match="75"), alone_in(folder):
        raise Unavailable("gs://models/x: the store failed")


def test_a_log_is_kept_once_whenever_its_keeper_is_killed(bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("RAPID_JAX_CACHE", str(tmp_path))
    calls = [(bucket_writes, "write"), (bucket_writes, "delete_all"), (Path, "rename"), (Path, "unlink")]
    for moment in itertools.count():
        folder, left = working_place(f"gs://models/kept-{moment}", "run"), itertools.count()
        here = logs_here(folder) / "a.log"
        here.parent.mkdir(parents=True)
        here.write_text("first\n")
        keep_log(folder, "a")
        here.write_text("second\n")

        def dying(do, left=left, moment=moment):
            def call(*given, **asked):
                if next(left) >= moment:
                    raise Killed
                return do(*given, **asked)

            return call

        with monkeypatch.context() as patch:
            for where, name in calls:
                patch.setattr(where, name, dying(getattr(where, name)))
            with contextlib.suppress(Killed):
                keep_log(folder, "a")
        with open(here, "a") as log:  # started again
            log.write("third\n")
        keep_log(folder, "a")
        assert bucket.get(f"{folder.key}/logs/a.log") == b"first\nsecond\nthird\n"
        assert list(here.parent.iterdir()) == [] and bucket.names(f"{folder.key}/") == [f"{folder.key}/logs/a.log"]
        if next(left) <= moment:  # nothing was left to end
            break
    assert moment == 5, "rename, append, join, its parts, unlink"


def test_a_log_that_is_refused_ends_no_job_and_comes_later(bucket, tmp_path, monkeypatch, run, capsys):
    monkeypatch.setenv("RAPID_JAX_CACHE", str(tmp_path / "cache"))
    folder = working_place("gs://models/refused-logs", "run")
    logs = logs_here(folder)
    jobs = [Job(name, ("fail",), logs / f"{name}.log", keep=partial(keep_log, folder, name)) for name in "abc"]
    bucket.fault = lambda asked: "403" if asked.startswith("POST") and "logs" in asked else None
    assert list(run(*jobs).values()) == ["status 2: the reason"] * 3
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"logs that cannot be kept stay in {logs} for now: {folder}/logs/") and "permission" in line
    bucket.heal()
    tasks = [Task(name, (), lambda: True) for name in "abc"]  # done: none is run again
    options = SimpleNamespace(jobs=1, print=False, quiet=True)
    assert perform("rapid", SimpleNamespace(run=folder), tasks, options, each=1, held=0) == 0  # pyright: ignore
    for name in "abc":
        assert bucket.get(f"{folder.key}/logs/{name}.log").count(b"the reason\n") == 1
    assert list(logs.iterdir()) == []


def test_a_link_leads_where_it_says(bucket, tmp_path):
    for root in (tmp_path, working_place("gs://models/links", "run")):
        name, target = root / "point" / "pairs", root / "shared" / "x" / "pairs"
        assert follow_link(name) == name and target_of(name) is None
        for _ in range(2):
            make_link(name, target)
        assert target_of(name) == target and not target.exists()
        with replace_file(target / "done.json") as file:
            file.write_text("{}")
        assert (follow_link(name) / "done.json").is_file()
        with replace_file(root / "other" / "pairs" / "x") as file:
            file.write_text("x")
        for there in (name, root / "other" / "pairs"):
            with pytest.raises(InputError, match=r"expected a link to .*/y, got something else"):
                make_link(there, root / "y")


@pytest.mark.parametrize(
    "words", ["../../../x", "", ".", "./", "../point", "..", "../..", "odd", "../../links", "a\nb"]
)
def test_a_link_leads_into_its_bucket_and_to_no_folder_that_it_is_in(bucket, words):
    bucket.put("links/point/odd.link", words)
    with pytest.raises(InputError, match=r"odd\.link: expected the name of another folder of this bucket, got b'"):
        target_of(working_place("gs://models/links/point/odd", "run"))
    bucket.put("odd.link", ".")
    with pytest.raises(InputError, match=r"odd\.link: expected the name of another folder of this bucket, got b'\.'"):
        target_of(working_place("gs://models/odd", "run"))
    bucket.put("links/point/odd.link", "../pointed")
    assert str(target_of(working_place("gs://models/links/point/odd", "run"))) == "gs://models/links/pointed"


STARTER = """
import signal, sys
from pathlib import Path
from rapid_jax.runtime.jobs import Job, alone_in, run_jobs
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has its background jobs ignore it
run = Path(sys.argv[1])
with alone_in(run) as held:
    run_jobs([Job("a", ("sleep", str(run / "pid")), run / "log")], "tests.runtime.job_program", [{}], held, print)
"""


def started(folder: Path) -> tuple[subprocess.Popen, int]:
    """A starter and the process of its one job."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    starter = subprocess.Popen([sys.executable, "-c", STARTER, str(folder)], env=environment, stdout=subprocess.DEVNULL)
    until = time.monotonic() + 30
    while not (folder / "pid").exists() or not (folder / "pid").read_text():
        assert time.monotonic() < until
        time.sleep(0.05)
    return starter, int((folder / "pid").read_text())


def is_gone(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_job_outlives_its_starter_and_the_folder_is_free_again(tmp_path, how):
    starter, process = started(tmp_path)
    with (
        pytest.raises(InputError, match="expected no other sweep there, got one that is at work"),
        alone_in(tmp_path),
    ):
        pass
    starter.send_signal(how)
    starter.wait(20)
    assert starter.returncode == {signal.SIGTERM: 75, signal.SIGKILL: -9}.get(how, starter.returncode) != 0
    with alone_in(tmp_path):  # the job held the lock, too
        assert is_gone(process)


def devices(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / "dev" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "dev" / name).touch()
    return folder


def test_gpus_and_chips_are_shared_out_by_environment(tmp_path):
    gpus = devices(tmp_path / "gpus", "nvidia0", "nvidia1", "nvidia2", "nvidia3", "nvidiactl")
    assert shares_of(2, 2, {}, gpus) == [{"CUDA_VISIBLE_DEVICES": "0,1"}, {"CUDA_VISIBLE_DEVICES": "2,3"}]
    assert shares_of(2, 1, {"CUDA_VISIBLE_DEVICES": "5,7"}, gpus) == [
        {"CUDA_VISIBLE_DEVICES": "5"},
        {"CUDA_VISIBLE_DEVICES": "7"},
    ]
    chips = devices(tmp_path / "chips", "vfio/0", "vfio/1", "vfio/2", "vfio/3", "vfio/vfio")
    assert shares_of(4, 1, {}, chips)[3] == {
        "TPU_VISIBLE_CHIPS": "3",
        "TPU_PROCESS_BOUNDS": "1,1,1",
        "TPU_CHIPS_PER_PROCESS_BOUNDS": "1,1,1",
    }
    assert shares_of(1, 8, {}, gpus) == [{}] and shares_of(3, 8, {"JAX_PLATFORMS": "cpu"}, gpus) == [{}] * 3
    assert shares_of(2, 8, {}, tmp_path) == [{}, {}]  # a CPU
    with pytest.raises(InputError, match="--jobs: expected at most 2, 2 a command of the 4 GPUs here, got 3"):
        shares_of(3, 2, {}, gpus)
    six = devices(tmp_path / "six", *(f"accel{number}" for number in range(6)))
    with pytest.raises(InputError, match="--jobs: expected meshes of 1, 2, 4 TPU chips, got one of 3"):
        shares_of(2, 3, {}, six)
