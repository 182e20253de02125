# SPDX-License-Identifier: Apache-2.0
"""Two processes that share nothing but a bucket write checkpoints together, and go on when they were killed.

The whole round, from documents on and killed at random moments: python -m tests.benchmarks.bucket_kills
"""

import signal
import sys
from subprocess import DEVNULL, PIPE, Popen

import pytest

from longpo_jax.checkpoint_files import newest
from longpo_jax.checkpoints import restore
from rapid_jax.runtime.storage import working_place
from tests.bucket_server import BUCKET
from tests.longpo.test_checkpoints import mesh_of, same, state_of
from tests.longpo.tiny_round import KillAt, ended
from tests.test_processes import ROOT, environment, free_port

TRAINING = """
import contextlib, sys
from rapid_jax.runtime.distributed import meet
with meet(name="longpo") as run:
    run.start_jax()
    from longpo_jax.checkpoint_files import newest
    from longpo_jax.checkpoints import Checkpoints
    from rapid_jax.runtime.agreement import check_shared
    from rapid_jax.runtime.run_folder import working_in
    from rapid_jax.runtime.storage import working_place
    from tests.longpo.test_checkpoints import NOTE, mesh_of, state_of
    folder = working_place(sys.argv[1], "run")
    with working_in(folder, "train") if run.leads else contextlib.nullcontext():
        check_shared(folder, "run folder")
        found = newest(folder / "train")
        start = 0 if found is None else found.step
        with Checkpoints(folder / "train", start=start, keep=1) as checkpoints:
            for step in range(start + 1, 3):
                checkpoints.save(state_of(step, mesh_of(fsdp=2)), NOTE)
                checkpoints.wait()
    print("from", start, file=sys.stderr)
"""


class KillWhen(KillAt):
    """The moment is the first request that has `name` in it."""

    def __init__(self, name: str, *given):
        super().__init__(0, *given)
        self._name = name

    def __call__(self, asked: str) -> str | None:
        self._left = 1 if self._name in asked and not self.at else 0
        return super().__call__(asked)


@pytest.fixture
def start(bucket, tmp_path):
    def started() -> list[Popen[str]]:
        port, found = free_port(), []
        for index in (0, 1):
            (here := tmp_path / f"{port}-{index}").mkdir()
            names = environment(1, (port, 2, index)) | {"PYTHONPATH": str(ROOT)}
            command = [sys.executable, "-c", TRAINING, f"gs://{BUCKET}/together"]
            found.append(Popen(command, env=names, cwd=here, text=True, stdout=DEVNULL, stderr=PIPE))
        return found

    return started


def test_two_processes_go_on_from_the_last_whole_checkpoint_after_a_kill(start, bucket):
    folder = working_place(f"gs://{BUCKET}/together", "run")
    processes = start()
    bucket.fault = killed = KillWhen("together/train/2/commit_success.txt", processes, signal.SIGKILL, "hang up")
    codes, said = ended(processes)
    assert killed.at and codes == [-9, -9], said
    bucket.heal()
    codes, said = ended(start())
    assert codes == [0, 0] and "from 1" in said, said
    found = newest(folder / "train")  # one process reads, on another mesh, what two have written
    assert found is not None and found.step == 2
    assert same(restore(found, state_of(0, mesh_of(data=2, context=4))), state_of(2))
    assert {name.split("/")[2] for name in bucket.names("together/")} == {"2"}
