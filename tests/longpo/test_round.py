# SPDX-License-Identifier: Apache-2.0
"""Stages chained to rounds, and rounds to a run: order, folders, models, settings, and going on after a stop."""

import contextlib
import dataclasses
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from longpo_jax.config import GenerationConfig, LongPOConfig, OptimizerConfig, PolicyConfig, TrainConfig
from longpo_jax.journal import Writer
from longpo_jax.records import Answer, Record, Turn, read_records
from longpo_jax.round import SETTINGS, rounds_of, run_round, run_rounds, run_stage
from longpo_jax.stages import STAGES, inputs_of, is_done, mark_done, summary_of
from rapid_jax.runtime import settings
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.mesh_config import MeshConfig
from tests.test_processes import WAIT_S, environment, free_port, spawn
from tests.tiny_models import save_decoder, words

TWO = ("corpus.max_tokens=70000 model.rope_theta=200000", "corpus.max_tokens=140000 train.lengths=[2304,4096] seed=7")


def config_in(folder: Path, *rounds: str, **more) -> LongPOConfig:
    return LongPOConfig(run=str(folder), rounds=rounds, **more)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    """A model of 4 heads, 2 of them of keys."""
    return str(save_decoder(tmp_path_factory.mktemp("model")))


@pytest.fixture
def calls(monkeypatch):
    """Stages that only say that they were asked, with (stage, folder, model, setting), and are done or fail."""
    made: list[tuple] = []

    def stage_of(name: str):
        def stage(config, folder, *, leads=True, quiet=False):
            if is_done(folder / name, inputs_of(config, name)):
                return
            made.append((name, folder, config.model.source, config.corpus.max_tokens, leads, quiet))
            if len(made) == made_until[0]:
                raise KeyboardInterrupt
            mark_done(folder / name, inputs_of(config, name), {})

        return stage

    made_until = [0]
    for name in STAGES:
        module = ModuleType(f"longpo_jax.{name}")
        setattr(module, f"run_{name}", stage_of(name))
        monkeypatch.setitem(sys.modules, module.__name__, module)
    checked = ModuleType("longpo_jax.checks")
    checked.__dict__["check_round"] = lambda config, source: None
    monkeypatch.setitem(sys.modules, checked.__name__, checked)
    made.clear()
    return made, made_until


def test_a_round_is_its_stages_in_order_and_done_ones_are_skipped(calls, tmp_path):
    made, _ = calls
    config = config_in(tmp_path, model=PolicyConfig(source="taught"))
    run_round(config, tmp_path, quiet=True)
    assert [call[0] for call in made] == ["pairs", "reference", "train", "export"]
    assert {call[1:] for call in made} == {(tmp_path, "taught", 131072, True, True)}
    assert settings.load(LongPOConfig, tmp_path / SETTINGS) == config
    run_round(config, tmp_path)
    assert len(made) == 4


def test_each_round_has_its_folder_its_settings_and_the_last_ones_model(calls, tmp_path):
    made, _ = calls
    config = config_in(tmp_path, *TWO)
    run_rounds(config)
    first, second = tmp_path / "round-1", tmp_path / "round-2"
    assert [call[:4] for call in made] == [
        *((stage, first, "smollm2", 70000) for stage in STAGES),
        *((stage, second, str(first / "export"), 140000) for stage in STAGES),
    ]
    ran = [settings.load(LongPOConfig, folder / SETTINGS) for folder in (first, second)]
    assert ran == rounds_of(config)
    assert [(one.seed, one.model.rope_theta, one.train.lengths) for one in ran] == [
        (42, 200000.0, LongPOConfig().train.lengths),
        (7, None, (2304, 4096)),
    ]
    run_rounds(config)
    assert len(made) == 8
    run_round(ran[1], Path(ran[1].run))  # what is saved is that round alone
    assert len(made) == 8


@pytest.mark.parametrize("stopped", range(1, 9))
def test_an_interrupted_chain_goes_on_where_it_stopped(calls, tmp_path, stopped):
    made, until = calls
    config = config_in(tmp_path, *TWO)
    until[0] = stopped
    with pytest.raises(KeyboardInterrupt):
        run_rounds(config)
    assert len(made) == stopped
    run_rounds(config)
    assert made[stopped][:3] == made[stopped - 1][:3] and len(made) == 9


def test_the_settings_beside_a_round_are_those_of_what_is_done(calls, tmp_path):
    """A run that is refused leaves them as they were."""
    run_stage("pairs", config_in(tmp_path), tmp_path)
    with pytest.raises(InputError, match=r"pairs was made with seed = 42, expected seed = 1"):
        run_stage("pairs", config_in(tmp_path, seed=1), tmp_path)
    assert settings.load(LongPOConfig, tmp_path / SETTINGS).seed == 42


def test_only_the_first_process_writes_the_settings(calls, tmp_path):
    made, _ = calls
    run_stage("pairs", config_in(tmp_path), tmp_path, leads=False)
    assert made[0][4] is False and not (tmp_path / SETTINGS).exists()


@pytest.mark.parametrize(
    ("rounds", "message"),
    [
        ((), "rounds: expected the settings of one round or more, got none"),
        ((TWO[0], "corpus.max_token=5"), r"--set corpus.max_token=5: unknown setting 'max_token'.*'max_tokens'"),
        ((TWO[0], "seed=x"), r"--set seed=x: seed: expected a whole number, got 'x'"),
        ((TWO[0], "corpus.max_tokens=5"), r"rounds: round 2 with .*: corpus: expected 1 <= min_tokens <= max_tokens"),
        (("run=other",), "rounds: round 1: run is the same for all rounds, got 'run=other'"),
        (("rounds=[]",), "rounds: round 1: rounds is the same for all rounds"),
        (("faster",), "--set faster: expected section.key=value"),
    ],
)
def test_a_mistake_in_any_round_is_told_before_the_first_starts(calls, tmp_path, rounds, message):
    made, _ = calls
    with pytest.raises(InputError, match=message):
        run_rounds(config_in(tmp_path, *rounds))
    assert not made and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"train": TrainConfig(wandb="x")}, "train.wandb: expected the package wandb, it is not installed"),
        (
            {"train": TrainConfig(lengths=(512,))},
            r"train.lengths: .* hold documents of 65536 tokens .* got at most 512",
        ),
        ({"mesh": MeshConfig(fsdp=16), "train": TrainConfig(rows_per_step=16)}, "mesh: .*: expected 16 devices, got 8"),
        ({"mesh": MeshConfig(model=8)}, r"mesh: .* of size 4 cannot be split over model = 8"),
        ({"generation": GenerationConfig(mesh=MeshConfig(model=4))}, r"generation.mesh: .* of size 2 cannot be split"),
        ({"model": PolicyConfig(source="nowhere")}, "nowhere: expected a checkpoint folder, a .gguf file or the name"),
    ],
)
def test_what_a_later_stage_would_refuse_is_told_before_the_first_starts(tiny, tmp_path, monkeypatch, more, message):
    made = []
    monkeypatch.setattr("longpo_jax.round.run_stage", lambda stage, *_, **__: made.append(stage))
    config = config_in(tmp_path / "run", **{"model": PolicyConfig(source=tiny), **more})
    with pytest.raises(InputError, match=message):
        run_round(config, tmp_path / "run")
    with pytest.raises(InputError, match=message):
        run_rounds(dataclasses.replace(config, rounds=TWO[:1]))
    assert not made and not (tmp_path / "run").exists()
    mark_done(tmp_path / "run" / "export", {}, {})
    run_round(config, tmp_path / "run")  # which stages are done, and with what, they say themselves
    assert made == list(STAGES)


def test_the_second_round_is_checked_before_the_first_starts(tiny, tmp_path, monkeypatch):
    """Its model, which is not there yet, has the shape of the first one's."""
    made = []
    monkeypatch.setattr("longpo_jax.round.run_round", lambda config, *_, **__: made.append(config))
    for line, message in (("mesh.model=8", "of size 4 cannot be split"), ("train.wandb=x", "wandb"), ("seed=3", None)):
        config = config_in(tmp_path, "seed=2", line, model=PolicyConfig(source=tiny))
        with pytest.raises(InputError, match=message) if message else contextlib.nullcontext():
            run_rounds(config)
    assert [single.seed for single in made] == [2, 3]


def write_pairs(config, folder, *, leads=True, quiet=False):
    """Four documents of the round's length with answers made up: what random weights say is no question."""
    place, inputs = folder / "pairs", inputs_of(config, "pairs")
    if is_done(place, inputs):
        return
    writer = Writer(place, inputs, shard_pairs=3)
    for index in range(4):
        text = words(config.corpus.max_tokens, seed=index)
        chosen, rejected = (Answer(words(5, seed=index + add), 5, True) for add in (100, 200))
        turn = Turn((0, 60), (0, 20), "As the text says,", "what of w1?", chosen, rejected)
        record = Record(f"doc-{index}", "book", text, config.corpus.max_tokens, None, (turn,), index, "settings")
        writer.add(record.id, record, {"pairs": 1})
    writer.finish({})


def test_two_rounds_on_a_tiny_model_each_taught_on_from_the_last(monkeypatch, tmp_path):
    """The stages themselves, but for the pairs."""
    monkeypatch.setattr("longpo_jax.pairs.run_pairs", write_pairs)
    config = config_in(
        tmp_path / "run",
        "corpus.min_tokens=1 corpus.max_tokens=40",
        "corpus.min_tokens=1 corpus.max_tokens=90 model.rope_theta=40000 train.lengths=[2560] seed=3",
        model=PolicyConfig(source=str(save_decoder(tmp_path / "model"))),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        train=TrainConfig(lengths=(512,), tail=64, rows_per_step=2, attention_block=64, logits_chunk=64),
    )
    run_rounds(config, quiet=True)
    described, folders = (
        [],
        [tmp_path / "model", *(tmp_path / "run" / f"round-{number}" / "export" for number in (1, 2))],
    )
    for folder in folders:
        values = json.loads((folder / "config.json").read_text())
        theta = values.get("rope_theta") or values["rope_parameters"]["rope_theta"]
        described.append((theta, values["max_position_embeddings"]))
    assert described == [(10000.0, 2048), (10000.0, 2048), (40000.0, 2560)]
    assert len({(folder / "model.safetensors").read_bytes() for folder in folders}) == 3
    for number, seed in ((1, 42), (2, 3)):
        folder = tmp_path / "run" / f"round-{number}"
        assert len(list(read_records(folder / "pairs"))) == summary_of(folder / "reference")["records"] == 4
        assert summary_of(folder / "train")["steps"] == 2
        assert settings.load(LongPOConfig, folder / SETTINGS).seed == seed
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.name != SETTINGS}
    run_rounds(config, quiet=True)
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.name != SETTINGS}
    assert {path for path in before if path.is_file()} == {path for path in after if path.is_file()}
    assert all(after[path] == before[path] for path in before if path.is_file())
    (tmp_path / "run" / "round-1" / "export" / "model.safetensors").write_bytes(
        (tmp_path / "model" / "model.safetensors").read_bytes()
    )
    with pytest.raises(InputError, match="round-2"):  # the model that made round 2 is not the one that is there
        run_rounds(config, quiet=True)


TOGETHER = """
import sys, time
from pathlib import Path
from longpo_jax import round as module
from longpo_jax.config import LongPOConfig
from rapid_jax.runtime.distributed import meet

def slow(config, folder, *, leads, quiet):
    if leads:
        time.sleep(1)
        (folder / "made").write_text("whole")

def checked(*given, check=module.check_shared):
    try:
        check(*given)
    except Exception:
        time.sleep(0.5 * run.leads)  # the other is gone before this one has taken away what it made
        raise

module._stage = lambda name: slow
module.check_shared = checked
with meet(name="longpo") as run:
    run.start_jax()
    folder = Path(sys.argv[1])
    module.run_stage("train", LongPOConfig(), folder, leads=run.leads)
    print((folder / "made").read_text())
"""


def test_processes_with_a_run_folder_each_end_with_both_named(tmp_path):
    """They would write each into its own, and wait for each other's files for ever."""
    port, folders = free_port(), [tmp_path / "one", tmp_path / "other"]
    pair = [spawn(["-c", TOGETHER, str(folders[index])], environment(1, (port, 2, index))) for index in (0, 1)]
    results = [process.communicate(timeout=WAIT_S) for process in pair]
    assert [process.returncode for process in pair] == [2, 2], results
    for out, err in results:
        assert out == "" and err.startswith("longpo: run folder: expected one folder that all 2 processes share, got ")
        assert len(err.splitlines()) == 1 and all(str(folder) in err for folder in folders)
    assert not list(tmp_path.iterdir())


def test_no_process_leaves_a_stage_before_what_it_makes_is_there(tmp_path):
    port = free_port()
    pair = [spawn(["-c", TOGETHER, str(tmp_path)], environment(1, (port, 2, index))) for index in (0, 1)]
    results = [process.communicate(timeout=WAIT_S) for process in pair]
    assert [process.returncode for process in pair] == [0, 0], results
    assert [out for out, _ in results] == ["whole\n", ""] or [out for out, _ in results] == ["whole\n"] * 2
