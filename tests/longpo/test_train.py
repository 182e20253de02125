# SPDX-License-Identifier: Apache-2.0
"""Training that is killed, told to end, moved to other devices or shared out is the training of one run."""

import dataclasses
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from longpo_jax import train as module
from longpo_jax.checkpoint_files import newest
from longpo_jax.config import LongPOConfig, OptimizerConfig, PolicyConfig, TrainConfig
from longpo_jax.journal import Writer
from longpo_jax.metrics import read_metrics
from longpo_jax.records import Answer, Record, Turn
from longpo_jax.reference import run_reference
from longpo_jax.stages import mark_done, summary_of
from longpo_jax.train import run_train, steps_of
from rapid_jax.runtime import settings
from rapid_jax.runtime.distributed import INTERRUPTED, LOST_PEER
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.mesh_config import MeshConfig
from tests.tiny_models import save_decoder, words

ROOT = Path(__file__).resolve().parents[2]
STEPS, ROWS = 8, 2
WAIT_S = 240  # a busy machine compiles slowly
TIMES = ("seconds", "tokens_per_second", "mfu", "seconds_left")


def record(index: int) -> Record:
    text = words(30 + 5 * index, seed=index)
    said = [Answer(words(4, seed=100 + index), 4, True), Answer(words(6, seed=200 + index), 6, False)]
    turn = Turn((0, 60), (0, 20), "As the text says,", f"what about {words(2, seed=index)}?", *said)
    return Record(f"doc-{index}", "book", text, 30 + 5 * index, None, (turn,), index, "settings")


@pytest.fixture(scope="module")
def begun(tmp_path_factory) -> tuple[Path, LongPOConfig]:
    """(a run's folder with pairs and reference, its settings); eight updates of two documents."""
    folder = tmp_path_factory.mktemp("begun")
    config = LongPOConfig(
        run=str(folder / "run"),
        model=PolicyConfig(source=str(save_decoder(folder / "model"))),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        train=TrainConfig(
            lengths=(256, 512),
            tail=64,
            rows_per_step=ROWS,
            epochs=2,
            attention_block=64,
            logits_chunk=64,
            save_every=3,
            keep=1,
            keep_every=3,
        ),
    )
    config = dataclasses.replace(config, compute=dataclasses.replace(config.compute, programs=False))
    pairs = folder / "run" / "pairs"
    writer = Writer(pairs, {}, shard_pairs=3)
    for index in range(STEPS):
        writer.add(f"doc-{index}", record(index), {"pairs": 1})
    writer.finish({})
    run_reference(config, folder / "run", quiet=True)
    return folder, config


def copied(begun, tmp_path: Path, **train) -> LongPOConfig:
    """The same run in a folder of its own."""
    _, config = begun
    shutil.copytree(config.run, tmp_path / "run")
    train = dataclasses.replace(config.train, **train)
    return dataclasses.replace(config, run=str(tmp_path / "run"), train=train)


def environment(devices: int = 1, seat: tuple[int, int, int] | None = None) -> dict[str, str]:
    names = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices)}
    if seat is not None:
        port, count, index = map(str, seat)
        names |= {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": count, "JAX_PROCESS_ID": index}
    return names


def started(config: LongPOConfig, names: dict[str, str]) -> subprocess.Popen:
    path = Path(config.run) / "given.yaml"
    settings.save(config, path)
    command = [sys.executable, "-m", "longpo_jax", "train", "--config", str(path)]
    return subprocess.Popen(command, env=names, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def ended(process: subprocess.Popen) -> tuple[int, str]:
    out, err = process.communicate(timeout=WAIT_S)
    assert out == ""
    return process.returncode, err


def told(config: LongPOConfig, process: subprocess.Popen, updates: int, number: int) -> tuple[int, str]:
    """Sends a signal when so many updates are in the metrics, the last of them by this process."""
    path = Path(config.run) / "train" / "metrics.jsonl"
    found = path.read_bytes() if path.exists() else b""  # by one before it, that may have come further than it was to
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline and process.poll() is None:
        if path.exists() and (now := path.read_bytes()) != found and now.count(b"\n") >= updates:
            process.send_signal(number)
            break
        time.sleep(0.005)
    return ended(process)


def lines_of(config: LongPOConfig) -> list[dict]:
    """The metrics without times."""
    lines = read_metrics(Path(config.run) / "train")
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def weights_of(config: LongPOConfig, step: int = STEPS) -> dict[str, np.ndarray]:
    """Every array of a checkpoint, as Orbax itself reads it."""
    found = {}
    for item in ("weights", "moments"):
        folder = Path(config.run) / "train" / "checkpoints" / str(step) / item
        with ocp.PyTreeCheckpointer() as checkpointer:
            names = checkpointer.metadata(folder).item_metadata.tree
            as_numpy = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in names}
            arrays = checkpointer.restore(folder, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
        found |= {f"{item}.{name}": array for name, array in arrays.items()}
    return found


def close(lines: list[dict], others: list[dict]) -> None:
    """The same steps, and every number to float tolerance."""
    for one, other in zip(lines, others, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            assert one[name] == pytest.approx(other[name], rel=2e-4, abs=2e-4), (one["step"], name)


@pytest.fixture(scope="module")
def whole(begun, tmp_path_factory) -> LongPOConfig:
    """A run that nothing disturbs, in a process of its own."""
    config = copied(begun, tmp_path_factory.mktemp("whole"))
    code, err = ended(started(config, environment()))
    assert code == 0, err
    return config


def test_a_run_undisturbed(whole):
    place = Path(whole.run) / "train"
    lines = read_metrics(place)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["rows"] for line in lines] == [ROWS * step for step in range(1, STEPS + 1)]
    assert sorted(path.name for path in (place / "checkpoints").iterdir()) == ["3", "6", "8"]
    summary = summary_of(place)
    assert (summary["steps"], summary["rows"], summary["last"]) == (STEPS, STEPS * ROWS, lines[-1])
    found = newest(place / "checkpoints")
    assert found is not None and (found.note["position"], found.note["inputs"]["seed"]) == (STEPS * ROWS, whole.seed)
    assert lines[0]["learning_rate"] == pytest.approx(1e-3) and lines[-1]["learning_rate"] > 1e-6
    assert lines[0]["loss"] != lines[1]["loss"]
    assert np.mean([line["nll"] for line in lines[-2:]]) < np.mean([line["nll"] for line in lines[:2]]) - 0.3
    for line in lines:
        assert line["rewards/margins"] == pytest.approx(line["rewards/chosen"] - line["rewards/rejected"], abs=1e-5)
        assert line["loss"] == pytest.approx(line["nll"] + 0.01 * line["preference"], abs=1e-5)
        assert line["mfu"] is None and line["tokens"] > 100  # of this machine's CPU no peak is known
    first, second = lines[:2]
    assert first["tokens_per_second"] is None and second["tokens_per_second"] == second["tokens"] / second["seconds"]


def test_killed_and_told_to_end_and_started_again_is_one_run(begun, whole, tmp_path):
    """SIGKILL between two checkpoints, then SIGTERM; then to the end. Bit for bit the undisturbed run."""
    spare = tmp_path / "spare"  # what is saved when changes nothing
    copies = {"emergency_every": 1, "emergency_folder": str(spare)}
    config = copied(begun, tmp_path, save_every=6, keep_every=None, keep=2, **copies)
    names, place = environment(), Path(config.run) / "train"
    draw = random.Random(os.getpid())
    code, err = told(config, started(config, names), 3, signal.SIGKILL)
    assert code == -signal.SIGKILL and newest(place / "checkpoints") is None, err
    code, err = told(config, started(config, names), draw.randint(4, 5), signal.SIGTERM)
    assert code == LOST_PEER and "train: going on from the copies of update" in err, err
    found = newest(place / "checkpoints")
    assert found is not None and found.step == lines_of(config)[-1]["step"]
    assert err.endswith(f"longpo: told to end: saved after update {found.step} of {STEPS}\n")
    assert not (place / "done.json").exists()
    code, err = ended(started(config, names))
    assert code == 0 and "copies" not in err and not any(spare.iterdir()), err
    assert lines_of(config) == lines_of(whole)
    expected, got = weights_of(whole), weights_of(config)
    assert got.keys() == expected.keys() and len(got) > 30
    for name, array in expected.items():
        assert np.array_equal(got[name], array), name
    summaries = [summary_of(Path(which.run) / "train") for which in (config, whole)]
    for summary in summaries:
        summary["last"] = {key: value for key, value in summary["last"].items() if key not in TIMES}
    assert summaries[0] == summaries[1]


def test_two_processes_train_as_one_and_another_mesh_goes_on(begun, whole, tmp_path):
    """Each of two has a row of an update; when one is told to end both save the same update. Four devices end it."""
    config = dataclasses.replace(copied(begun, tmp_path), mesh=MeshConfig(fsdp=2))
    place, port = Path(config.run) / "train", free_port()
    first, second = (started(config, environment(1, (port, 2, index))) for index in (0, 1))
    results = [told(config, second, 2, signal.SIGTERM), ended(first)]
    assert [code for code, _ in results] == [LOST_PEER] * 2, results
    found, lines = newest(place / "checkpoints"), lines_of(config)
    assert found is not None and 2 <= found.step == len(lines) < STEPS
    assert results[1][1].count("train: ") == len(lines) and "train: " not in results[0][1]  # one of them tells
    close(lines, lines_of(whole)[: len(lines)])
    run_train(dataclasses.replace(config, mesh=MeshConfig(fsdp=2, context=2)), Path(config.run), quiet=True)
    assert lines_of(config)[: len(lines)] == lines
    close(lines_of(config), lines_of(whole))
    got = weights_of(config)
    for name, array in weights_of(whole).items():
        np.testing.assert_allclose(got[name], array, atol=2e-4, err_msg=name)


def test_self_distillation_goes_on_bit_for_bit(begun, tmp_path):
    """Teachers of the frozen model, two updates; what goes on behind the first of them makes the same second one."""
    config = copied(begun, tmp_path, save_every=1, keep=2, keep_every=None, max_steps=2)
    objective = dataclasses.replace(config.objective, name="opsd", top_k=8, nll="response", distillation_weight=2.0)
    config, folder = dataclasses.replace(config, objective=objective), Path(config.run)
    shutil.rmtree(folder / "reference")
    run_reference(config, folder, quiet=True)
    run_train(config, folder, quiet=True)
    lines, weights = lines_of(config), weights_of(config, 2)
    for line in lines:
        assert line["loss"] == pytest.approx(line["nll"] + 2 * line["kl"], rel=1e-5) and line["kl"] > 1e-4
        assert 0 < line["teacher_rest"] < 1 and "rewards/margins" not in line
    (folder / "train" / "done.json").unlink()
    shutil.rmtree(folder / "train" / "checkpoints" / "2")
    run_train(config, folder, quiet=True)
    assert lines_of(config) == lines
    for name, array in weights_of(config, 2).items():
        assert np.array_equal(array, weights[name]), name


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_an_interruption_and_a_loss_that_is_not_finite_leave_good_weights(begun, whole, tmp_path, monkeypatch, capfd):
    config = copied(begun, tmp_path)
    folder, place = Path(config.run), Path(config.run) / "train"
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    add = module.Metrics.add

    def interrupted(self, line):
        add(self, line)
        if line["step"] == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(module.Metrics, "add", interrupted)
        with pytest.raises(SystemExit) as left:
            run_train(config, folder, quiet=True)
    assert left.value.code == INTERRUPTED
    found = newest(place / "checkpoints")
    assert found is not None and found.step == lines_of(config)[-1]["step"] in (2, 3)
    assert capfd.readouterr().err.endswith(f"longpo: told to end: saved after update {found.step} of {STEPS}\n")
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    read = module.read_references

    def poisoned(*given):
        return read(*given) | {f"doc-{index}": {"chosen": [np.inf], "rejected": [0.0]} for index in (1, 4)}

    with monkeypatch.context() as patch:
        patch.setattr(module, "read_references", poisoned)
        with pytest.raises(InputError, match=r"^update \d: expected a finite loss, got the loss inf .*doc-") as caught:
            run_train(config, folder, quiet=True)
    found = newest(place / "checkpoints")
    assert found is not None and str(caught.value).startswith(f"update {found.step + 1}: ")
    assert "doc-1" in str(caught.value) or "doc-4" in str(caught.value)
    assert str(caught.value).endswith(f"no weight was touched, they are in {found.folder}")
    assert len(lines_of(config)) == found.step
    close(lines_of(config), lines_of(whole)[: found.step])
    assert all(np.all(np.isfinite(array)) for array in weights_of(config, found.step).values())


def test_a_run_that_is_done_stays_so_and_another_is_refused(whole, tmp_path, monkeypatch, capfd):
    config = dataclasses.replace(whole, run=str(tmp_path / "run"))
    shutil.copytree(whole.run, config.run)
    folder, done = tmp_path / "run", tmp_path / "run" / "train" / "done.json"
    before = done.stat().st_mtime_ns
    run_train(config, folder, quiet=True)
    assert done.stat().st_mtime_ns == before
    other = dataclasses.replace(config, seed=7)
    with pytest.raises(InputError, match=r"train was made with seed = 42, expected seed = 7"):
        run_train(other, folder, quiet=True)
    content = done.read_text()
    done.unlink()  # killed between the last checkpoint and the mark
    with pytest.raises(InputError, match=r"train was begun with seed = 42, expected 7: choose another run folder"):
        run_train(other, folder, quiet=True)
    metrics = (folder / "train" / "metrics.jsonl").read_text()
    capfd.readouterr()
    close = module.Metrics.close

    def late(self):
        close(self)
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as left:
        patch.setattr(module.Metrics, "close", late)
        run_train(config, folder, quiet=True)
    assert left.value.code == LOST_PEER  # what comes after training does not start
    assert done.read_text() == content and (folder / "train" / "metrics.jsonl").read_text() == metrics
    assert capfd.readouterr().err.endswith("\nlongpo: told to end: training is done\n")


def test_what_is_missing_is_said_before_anything_starts(tmp_path):
    config = LongPOConfig(train=TrainConfig(wandb="project"))
    with pytest.raises(InputError, match=r"train.wandb: expected the package wandb, it is not installed"):
        run_train(config, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_rows_that_do_not_do_are_said_before_the_model_is_loaded(begun, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "load_model", None)
    for given, message in (
        ({"lengths": (16,)}, r"expected rows of at most 16 \+ 64 places .*, got none: 8 are longer"),
        ({"rows_per_step": 64}, r"rows_per_step: expected at most the 16 rows there are, got 64"),
    ):
        config = copied(begun, tmp_path, **given)
        with pytest.raises(InputError, match=message):
            run_train(config, Path(config.run), quiet=True)
        assert not (Path(config.run) / "train").exists()
        shutil.rmtree(config.run)


def test_weights_that_are_not_finite_are_neither_trained_nor_saved_and_none_changed_is_no_success(
    begun, tmp_path, monkeypatch, capsys
):
    config = copied(begun, tmp_path, max_steps=1)
    folder, place = Path(config.run), Path(config.run) / "train"
    load = module.policy_of

    def spoilt(*given, **how):
        model = load(*given, **how)
        model.decoder.norm_D[...] = model.decoder.norm_D[...].at[3].set(np.nan)
        return model

    with monkeypatch.context() as patch:
        patch.setattr(module, "policy_of", spoilt)
        with pytest.raises(InputError, match=r"model: expected finite weights to train, got NaN .* ones in norm_D"):
            run_train(config, folder, quiet=True)
    assert not (place / "checkpoints").exists()
    for scale, message in (
        (
            np.inf,
            r"^update 1: expected finite weights, got NaN .*: they were not saved, .* the model's own$",
        ),
        (0.0, r"train: expected training to change a weight, got none changed by 1 updates: optimizer.learning_rate"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(
                module, "transform_of", lambda *_, scale=scale: optax.chain(optax.trace(0.9), optax.scale(scale))
            )
            with pytest.raises(InputError, match=message):
                run_train(config, folder, quiet=True)
        assert not (place / "done.json").exists()
        assert [path.name for path in (place / "checkpoints").iterdir()] == ([] if scale else ["1"])
    assert "give 8 updates, of which train.max_steps makes 1: too few to learn much" in capsys.readouterr().err


def test_without_tensorflow_training_is_refused_and_pairs_of_another_model_are(begun, tmp_path, monkeypatch):
    config = copied(begun, tmp_path)
    folder = Path(config.run)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "longpo_jax.tasks", None)  # as if an import in it failed
        with pytest.raises(InputError, match=r"^training .* seqio and TensorFlow, which cannot be imported: "):
            run_train(config, folder, quiet=True)
        patch.setitem(sys.modules, "clu", None)
        with pytest.raises(InputError, match=r"expected clu, not installed here: pip install '.\[longpo\]'"):
            run_train(config, folder, quiet=True)
    mark_done(folder / "pairs", {"model.weights": "of another"}, summary_of(folder / "pairs"))
    for stage in (run_train, run_reference):
        with pytest.raises(InputError, match=r"pairs was made with another model, with model.weights = of another"):
            stage(config, folder, quiet=True)


def test_how_many_updates():
    config = LongPOConfig(train=TrainConfig(rows_per_step=8))
    assert steps_of(config, 45007) == 5625
    assert steps_of(dataclasses.replace(config, train=TrainConfig(max_steps=10)), 45000) == 10
    assert steps_of(dataclasses.replace(config, train=TrainConfig(max_steps=10)), 16) == 2
    with pytest.raises(InputError, match=r"train.rows_per_step: expected at most the 7 rows there are, got 8"):
        steps_of(config, 7)
