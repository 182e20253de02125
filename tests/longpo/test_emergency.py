# SPDX-License-Identifier: Apache-2.0
"""Copies of a state on each process's disk: used where all processes have the same one whole, and never else."""

import sys
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen

import jax
import pytest

from longpo_jax import emergency
from longpo_jax.checkpoints import named
from longpo_jax.config import TrainConfig
from longpo_jax.emergency import EmergencyCopies
from longpo_jax.metrics import FILE
from longpo_jax.step import TrainState
from rapid_jax.runtime.errors import InputError
from tests.longpo.test_checkpoints import NOTE, arrays_of, mesh_of, same, state_of
from tests.longpo.tiny_round import ended
from tests.test_processes import ROOT, environment, free_port


def copies_in(tmp_path: Path, *, inputs=NOTE["inputs"]) -> EmergencyCopies:
    (run := tmp_path / "run" / "train").mkdir(parents=True, exist_ok=True)
    (run / FILE).touch()
    return EmergencyCopies(TrainConfig(emergency_every=2, emergency_folder=str(tmp_path / "copies")), run, inputs)


def files_of(tmp_path: Path) -> list[Path]:
    return sorted(path for path in (tmp_path / "copies").rglob("*") if path.is_file())


@pytest.mark.parametrize("mesh", [{}, {"fsdp": 2, "context": 2, "model": 2}])
def test_a_state_comes_back_as_it_was_on_the_same_devices_alone(tmp_path, mesh, capfd):
    copies = copies_in(tmp_path)
    assert [step for step in range(1, 5) if copies.are_due(step)] == [2, 4]
    how = {"name": "rmsprop", "moments_dtype": "bfloat16"} if mesh else {}
    for step in (2, 4, 6):
        copies.save(state_of(step, mesh_of(**mesh), **how), NOTE)
    copies.drop(2)
    assert sorted({path.parent.name for path in files_of(tmp_path)}) == ["4", "6"]
    target = state_of(0, mesh_of(**mesh), **how)
    lie = [x.sharding for x in (target.step, *leaves_of(target))]
    got = copies_in(tmp_path).restore(target, after=4)
    assert got is not None and got[1]["position"] == NOTE["position"]
    assert same(got[0], state_of(6, mesh_of(**mesh), **how))
    assert [x.sharding for x in leaves_of(got[0])] == lie[1:]
    assert copies.restore(state_of(0, mesh_of(**mesh), **how), after=6) is None, "a checkpoint is as new"
    assert "going on from the copies of update 6" in capfd.readouterr().err
    assert copies.restore(state_of(0, mesh_of(context=8), **how), after=5) is None
    assert "of other devices" in capfd.readouterr().err
    copies.close()
    assert not any((tmp_path / "copies").iterdir())


def leaves_of(state: TrainState) -> list[jax.Array]:
    return [x for tree in emergency._trees(state).values() for x in named(tree).values()]


def test_what_is_damaged_is_passed_over_for_the_one_before(tmp_path, capfd):
    copies, target = copies_in(tmp_path), state_of(0)
    for step in (2, 4):
        copies.save(state_of(step), NOTE)
    copies.drop(0)
    before = arrays_of(target)
    assert copies_in(tmp_path, inputs={"seed": 4}).restore(target, after=0) is None
    assert capfd.readouterr().err.count("with other settings or data") == 2
    note, values = [path for path in files_of(tmp_path) if path.parent.name == "4"]
    for path in (note, values):
        data = path.read_bytes()
        for damaged in (
            data[:-3],
            data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 64]) + data[len(data) // 2 + 1 :],
        ):
            path.write_bytes(damaged)
            assert copies.restore(target, after=2) is None, "the checkpoint of update 2 is as new as what is left"
            assert "a copy is not used: " in capfd.readouterr().err
        path.write_bytes(data)
    assert all((one == other).all() for one, other in zip(arrays_of(target), before, strict=True)), "still there"
    values.unlink()
    got = copies.restore(target, after=0)
    assert got is not None and same(got[0], state_of(2))
    (tmp_path / "run" / "train" / FILE).unlink()
    assert copies.restore(state_of(0), after=0) is None, "the run was deleted, to begin anew"


def test_a_disk_that_refuses_a_copy_ends_nothing(tmp_path, capfd):
    (tmp_path / "copies").touch()
    copies = copies_in(tmp_path)
    copies.save(state_of(2), NOTE)
    assert copies.restore(state_of(0), after=0) is None
    copies.close()
    assert capfd.readouterr().err.startswith("train: no copy of update 2 in ")


def test_settings_that_make_no_sense():
    for wrong in ({"emergency_every": 2}, {"emergency_folder": "here"}):
        with pytest.raises(InputError, match="emergency_every: expected with emergency_folder"):
            TrainConfig(**wrong)
    with pytest.raises(InputError, match="emergency_folder: expected a path on this machine, got 'gs://bucket/x'"):
        TrainConfig(emergency_every=2, emergency_folder="gs://bucket/x")


TWO = """
import sys
from pathlib import Path
from rapid_jax.runtime.distributed import meet
with meet(name="longpo") as run:
    run.start_jax()
    import jax
    from longpo_jax.config import TrainConfig
    from longpo_jax.emergency import EmergencyCopies
    from tests.longpo.test_checkpoints import NOTE, mesh_of, state_of
    train = TrainConfig(emergency_every=1, emergency_folder="copies")  # in a working folder of each
    def found():
        copies = EmergencyCopies(train, Path(sys.argv[1]), NOTE["inputs"])
        got = copies.restore(state_of(0, mesh_of(fsdp=2)), after=0)
        if got is None:
            return None
        want = state_of(int(got[0].step), mesh_of(fsdp=2))
        for one, other in zip(*(jax.tree.leaves((x.weights, x.moments)) for x in (got[0], want)), strict=True):
            assert (one.addressable_shards[0].data == other.addressable_shards[0].data).all()
        return int(got[0].step)
    copies = EmergencyCopies(train, Path(sys.argv[1]), NOTE["inputs"])
    for step in (1, 2):
        copies.save(state_of(step, mesh_of(fsdp=2)), NOTE)
    copies.drop(0)
    told = [found()]
    for step in (2, 1):
        if not run.leads:  # damaged on one process alone, then missing there
            (path,) = Path("copies").rglob(f"{step}/values.safetensors")
            if step == 2:
                data = path.read_bytes()
                path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
            else:
                path.unlink()
        told.append(found())
    print(told, file=sys.stderr)
"""


def test_two_processes_use_what_both_have_whole(tmp_path):
    (tmp_path / FILE).touch()
    port, processes = free_port(), []
    for index in (0, 1):
        (here := tmp_path / str(index)).mkdir()
        names = environment(1, (port, 2, index)) | {"PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", TWO, str(tmp_path)]
        processes.append(Popen(command, env=names, cwd=here, text=True, stdout=DEVNULL, stderr=PIPE))
    codes, said = ended(processes)
    assert codes == [0, 0] and said.endswith("[2, 1, None]\n"), said
