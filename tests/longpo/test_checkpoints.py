# SPDX-License-Identifier: Apache-2.0
"""Training states are read back exactly, on any mesh; what was not written whole is never taken for a checkpoint."""

import dataclasses
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longpo_jax.checkpoint_files import newest, of_step, write_list
from longpo_jax.checkpoints import Checkpoints, restore, restore_weights
from longpo_jax.config import LongPOConfig, OptimizerConfig
from longpo_jax.optimizer import transform_of
from longpo_jax.round import run_round
from longpo_jax.step import TrainState
from longpo_jax.train import run_train
from rapid_jax.model.config import ModelConfig, Rope
from rapid_jax.model.hf_names import weights
from rapid_jax.model.placement import abstract, build
from rapid_jax.runtime import settings
from rapid_jax.runtime.axes import TRAINED
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.mesh import make_mesh
from rapid_jax.runtime.mesh_config import MeshConfig
from rapid_jax.runtime.storage import working_place

ROOT = Path(__file__).resolve().parents[2]
NOTE = {"position": 12, "inputs": {"seed": 3, "lengths": [8, 16]}}
MODEL = ModelConfig(
    family="llama",
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    norm_eps=1e-5,
    rope=Rope(1e4),
    max_positions=64,
    tie_embeddings=False,
)


def mesh_of(**sizes):
    return make_mesh(MeshConfig(**sizes)) if sizes else None


def state_of(step: int, mesh=None, *, dtype="float32", model: ModelConfig = MODEL, **optimizer) -> TrainState:
    """Random weights and moments, which lie as training has them."""
    rng = np.random.default_rng(step)
    shapes = {weight.key: weight.stored_shape for weight in weights(model)}

    def read(key):
        return rng.normal(size=shapes[key]).astype(np.float32)

    decoder = build(model, read, layout="stacked", dtype=jnp.dtype(dtype), mesh=mesh, table=TRAINED, quiet=True)
    moments = transform_of(OptimizerConfig(**optimizer), 10).init(nnx.state(decoder, nnx.Param))

    def filled(x):
        values = rng.normal(size=x.shape).astype(x.dtype) if x.ndim else np.asarray(step, x.dtype)
        where = x.sharding if x.ndim or mesh is None else jax.NamedSharding(mesh, jax.P())
        return jax.device_put(values, where)

    return TrainState(jnp.int32(step), decoder, jax.tree.map(filled, moments))


def arrays_of(state: TrainState) -> list[np.ndarray]:
    return [np.asarray(x) for x in jax.tree.leaves((nnx.state(state.weights), state.moments))]


def same(one: TrainState, other: TrainState) -> bool:
    pairs = list(zip(arrays_of(one), arrays_of(other), strict=True))
    return int(one.step) == int(other.step) and all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in pairs)


def saved(folder: Path, *steps: int, keep: int = 9, **how) -> None:
    with Checkpoints(folder, keep=keep, **how) as checkpoints:
        for step in steps:
            assert checkpoints.save(state_of(step), NOTE) == folder / str(step)


def steps_in(folder: Path) -> list[str]:
    return sorted((path.name for path in folder.iterdir()), key=lambda name: (len(name), name))


@pytest.mark.parametrize("optimizer", [{}, {"name": "rmsprop", "moments_dtype": "bfloat16"}])
@pytest.mark.parametrize("other", [{"data": 2, "context": 4}, {"fsdp": 2, "context": 2, "model": 2}, {}])
def test_a_state_saved_on_one_mesh_is_the_same_on_another(tmp_path, other, optimizer):
    """From 1 x 8 devices to 2 x 4, 2 x 2 x 2, and one."""
    dtype = "bfloat16" if optimizer else "float32"
    state = state_of(7, mesh_of(context=8), dtype=dtype, **optimizer)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(state, NOTE)
    found = newest(tmp_path)
    assert found is not None and found.step == 7 and {key: found.note[key] for key in NOTE} == NOTE
    target = state_of(0, mesh_of(**other), dtype=dtype, **optimizer)
    places = [x.sharding for x in jax.tree.leaves((nnx.state(target.weights), target.moments))]
    got = restore(found, target)
    assert same(got, state)
    assert [x.sharding for x in jax.tree.leaves((nnx.state(got.weights), got.moments))] == places


def test_the_weights_alone_need_no_array_to_lie_like(tmp_path):
    saved(tmp_path, 4)
    found = newest(tmp_path)
    assert found is not None
    for mesh in (None, mesh_of(fsdp=2, context=4)):
        target = abstract(MODEL, layout="stacked", dtype=jnp.dtype("float32"), mesh=mesh, table=TRAINED)
        got, expected = restore_weights(found, target), state_of(4).weights
        chex.assert_trees_all_equal(nnx.state(got), nnx.state(expected))
        assert got.mesh is mesh


def test_arrays_may_change_as_soon_as_save_returns(tmp_path):
    """As donation does it: an update writes over the old weights while they are on their way to the disk."""
    state = state_of(1)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(state, NOTE)
        change = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0, tree), donate_argnums=0)
        jax.block_until_ready(change((nnx.state(state.weights), state.moments)))
    found = newest(tmp_path)
    assert found is not None and same(restore(found, state_of(0)), state_of(1))


def test_the_newest_are_kept_and_those_of_a_period(tmp_path):
    saved(tmp_path / "a", 1, 2, 3, 4, 5, keep=2)
    assert steps_in(tmp_path / "a") == ["4", "5"]
    saved(tmp_path / "b", 1, 2, 3, 4, 5, 6, 7, keep=1, keep_every=3)
    assert steps_in(tmp_path / "b") == ["3", "6", "7"]


def test_training_in_s3_is_refused_before_anything_is_made(s3_bucket):
    config = settings.defaults(LongPOConfig, ["model.source=nowhere"])
    for refused in (run_round, lambda config, folder: run_train(config, folder)):
        with pytest.raises(
            InputError, match=r"^run: expected a folder here or in gs:// to train in, got s3://models/run"
        ):
            refused(config, working_place("s3://models/run", "run"))
    assert s3_bucket.list_objects_v2(Bucket="models", Prefix="run/")["KeyCount"] == 0


def test_nothing_saved_is_none(tmp_path):
    assert newest(tmp_path / "nowhere") is None
    (tmp_path / "3.orbax-checkpoint-tmp").mkdir()
    assert newest(tmp_path) is None


def cut_array(folder: Path) -> None:
    path = max((path for path in (folder / "moments").rglob("d/*") if path.is_file()), key=lambda p: p.stat().st_size)
    os.truncate(path, path.stat().st_size - 1)


def lose_item(folder: Path) -> None:
    shutil.rmtree(folder / "weights")


def lose_list(folder: Path) -> None:
    (folder / "files.json").unlink()


def cut_note(folder: Path) -> None:
    path = folder / "note" / "metadata"
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (cut_array, "bytes, .* were written"),
        (lose_item, "weights/.* has no bytes, "),
        (lose_list, "No such file or directory: .*files.json"),
        (cut_note, "note/metadata has .* bytes, .* were written"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over(tmp_path, capfd, damage, said):
    saved(tmp_path, 10, 20, 30)
    damage(tmp_path / "30")
    found = newest(tmp_path)
    assert found is not None and found.step == 20 and same(restore(found, state_of(0)), state_of(20))
    err = capfd.readouterr().err
    assert err.count("\n") == 1
    assert re.search(said, err)
    assert f"{tmp_path / '30'} is not whole: " in err and err.endswith("; going on from step 20\n")
    with Checkpoints(tmp_path, start=20, keep=2) as checkpoints:  # it is not kept in the place of good ones
        checkpoints.save(state_of(25), NOTE)
    assert steps_in(tmp_path) == ["20", "25"]
    damage(tmp_path / "20")
    damage(tmp_path / "25")
    with pytest.raises(InputError, match=r"expected a checkpoint that is whole, got none: .*25 is not whole.*; .*/20 "):
        newest(tmp_path)


def test_a_checkpoint_of_something_else_is_refused_by_name(tmp_path):
    saved(tmp_path, 1)
    found = newest(tmp_path)
    assert found is not None
    wide = dataclasses.replace(MODEL, intermediate_size=56)
    with pytest.raises(
        InputError, match=r"down_FD.* in weights: expected float32\[2, 56, 32\], got float32\[2, 48, 32\]"
    ):
        restore(found, state_of(0, model=wide))
    with pytest.raises(InputError, match=r"1.count in moments: expected no such array, got int32\[\]"):
        restore(found, state_of(0, name="rmsprop"))
    with pytest.raises(InputError, match=r"in moments: expected bfloat16\[.*\], got float32"):
        restore(found, state_of(0, moments_dtype="bfloat16"))
    path = tmp_path / "1" / "note" / "metadata"
    text = path.read_text()
    path.write_text(text.replace('"schema": 3', '"schema": 2'))
    assert path.read_text() != text
    with pytest.raises(InputError, match="note/metadata has other bytes than were written"):
        newest(tmp_path)
    write_list(tmp_path / "1")
    with pytest.raises(InputError, match="expected a checkpoint of schema 3, got 2"):
        newest(tmp_path)


def test_a_bit_flipped_in_any_file_is_found_or_is_of_no_value(tmp_path):
    """Bookkeeping by the list, values by their sums; of OCDBT's own nodes there are some that it no longer reads."""
    saved(tmp_path, 1)
    unread = [tmp_path / "1" / name for name in ("_CHECKPOINT_METADATA", "commit_success.txt")]  # when it was written
    files = [path for path in sorted((tmp_path / "1").rglob("*")) if path.is_file() and path not in unread]
    values, refused = [path for path in files if path.parent.name == "d"], []
    assert len(files) > len(values) + 8
    for number, path in enumerate(files):
        data = path.read_bytes()
        at = int(np.random.default_rng(number).integers(8 * len(data)))
        path.write_bytes(data[: at // 8] + bytes([data[at // 8] ^ 1 << at % 8]) + data[at // 8 + 1 :])
        if path not in values:
            with pytest.raises(InputError, match=f"expected a checkpoint that is whole, got none: .*{path.name}"):
                newest(tmp_path)
        else:
            found, got = newest(tmp_path), None
            assert found is not None
            try:
                got = restore(found, state_of(0))
            except InputError as error:
                refused.append(path)
                assert re.search(r"1: (weights|moments) cannot be read: .*delete it to go on", str(error))
                assert "\n" not in str(error)
            assert got is None or same(got, state_of(1))
        path.write_bytes(data)
    largest = sorted(values, key=lambda path: path.stat().st_size)[-2:]
    assert set(largest) <= set(refused), "they have the values of both items"


def test_values_in_the_place_of_others_are_found_by_name(tmp_path):
    """Two norms of one shape, whose files hold the same number of bytes."""
    state = state_of(2)
    with Checkpoints(tmp_path, keep=9) as checkpoints:
        checkpoints.save(state, NOTE)
    found = of_step(tmp_path, 2)
    sums = found.note.fields("sums").fields("weights")
    one, other = (next(name for name in sums if part in name) for part in ("attention_norm", "mlp_norm"))
    exchanged = {**sums, one: sums[other], other: sums[one]}
    note = tmp_path / "2" / "note" / "metadata"
    said = json.loads(note.read_text())
    said["sums"]["weights"] = exchanged
    note.write_text(json.dumps(said))
    write_list(tmp_path / "2")
    found = newest(tmp_path)
    assert found is not None
    with pytest.raises(InputError, match=f"2: weights cannot be read: {one} has other values than were written"):
        restore(found, state_of(0))


def test_no_room_is_said_before_anything_is_written(tmp_path, monkeypatch):
    saved(tmp_path, 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=4096))
    with (
        pytest.raises(InputError, match=r"step 2 could not be saved, .*: it needs \d+ bytes, 4096 are free"),
        Checkpoints(tmp_path, start=1, keep=1) as checkpoints,
    ):
        checkpoints.save(state_of(2), NOTE)
    assert steps_in(tmp_path) == ["1"]


def test_a_full_disk_is_one_line_and_earlier_checkpoints_stay(tmp_path, capfd, caplog):
    saved(tmp_path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with (
            pytest.raises(InputError, match=r"step 2 could not be saved, earlier checkpoints stay: .*File too large"),
            Checkpoints(tmp_path, start=1, keep=1) as checkpoints,
        ):
            state = state_of(2)
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
            checkpoints.save(state, NOTE)
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert capfd.readouterr() == ("", "") and caplog.records == []
    found = newest(tmp_path)
    assert found is not None and found.step == 1 and same(restore(found, state_of(0)), state_of(1))
    with Checkpoints(tmp_path, start=1, keep=1) as checkpoints:  # what was left half-written is cleared away
        checkpoints.save(state_of(2), NOTE)
    assert steps_in(tmp_path) == ["2"]


KILLED = """
import sys, time
from pathlib import Path
from longpo_jax.checkpoints import Checkpoints
from tests.longpo.test_checkpoints import NOTE, state_of
with Checkpoints(Path(sys.argv[1]), keep=9) as checkpoints:
    checkpoints.save(state_of(1), NOTE)
    checkpoints.wait()
    listed = checkpoints._list
    def stop():  # all is written, and the folder still has a temporary name
        listed()
        print("there", flush=True)
        time.sleep(100)
    checkpoints._manager._checkpointer._post_finalization_callback = stop
    checkpoints.save(state_of(2), NOTE)
    checkpoints.wait()
"""


def test_a_save_that_is_killed_leaves_the_one_before(tmp_path, capfd):
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"there\n"
        process.send_signal(signal.SIGKILL)
    assert [name[:8] for name in steps_in(tmp_path)] == ["1", "2.orbax-"]
    found = newest(tmp_path)
    assert found is not None and same(restore(found, state_of(0)), state_of(1))
    assert capfd.readouterr().err == ""
    saved(tmp_path, 3, start=1)
    assert steps_in(tmp_path) == ["1", "3"]
    assert json.loads((tmp_path / "3" / "note" / "metadata").read_text())["step"] == 3
