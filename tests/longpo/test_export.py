# SPDX-License-Identifier: Apache-2.0
"""The exported folder: what transformers reads there is what was trained, rope and context size included."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from longpo_jax.checkpoints import Checkpoints
from longpo_jax.config import ExportConfig, LongPOConfig, PolicyConfig, TrainConfig
from longpo_jax.export import run_export
from longpo_jax.optimizer import transform_of
from longpo_jax.stages import mark_done, summary_of
from longpo_jax.step import Step
from longpo_jax.train import policy_of
from rapid_jax.attention.attend import attend_self
from rapid_jax.attention.strategy import Strategy
from rapid_jax.model.decoder import Decoder
from rapid_jax.model.load import load_model
from rapid_jax.runtime import settings
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.mesh_config import MeshConfig
from tests.test_processes import environment, finished, free_port, spawn
from tests.tiny_models import MAX_POSITIONS, save_decoder

THETA, LONGEST = 50000.0, 2 * MAX_POSITIONS


def settings_in(folder: Path, source: Path, **more) -> LongPOConfig:
    return LongPOConfig(
        run=str(folder),
        model=PolicyConfig(source=str(source), rope_theta=THETA),
        train=TrainConfig(lengths=(512, LONGEST), tail=64),
        **more,
    )


def noise(state: nnx.State, seed: int) -> nnx.State:
    keys = iter(jax.random.split(jax.random.key(seed), len(jax.tree.leaves(state))))
    return jax.tree.map(lambda x: x + 0.05 * jax.random.normal(next(keys), x.shape, x.dtype), state)


def save_trained(config: LongPOConfig, step: int) -> Decoder:
    """A checkpoint of weights that are not the source's; the weights."""
    decoder = policy_of(config, quiet=True).decoder
    nnx.update(decoder, noise(nnx.state(decoder, nnx.Param), seed=step))
    state = Step(config, decoder, transform_of(config.optimizer, 10)).start(decoder)
    state = dataclasses.replace(state, step=jnp.int32(step))
    with Checkpoints(Path(config.run) / "train" / "checkpoints", start=step - 2, keep=2) as checkpoints:
        checkpoints.save(state, {})
    return decoder


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[LongPOConfig, Decoder]:
    """(settings of a run that has been trained, its newest weights)."""
    folder = tmp_path_factory.mktemp("trained")
    source = save_decoder(folder / "model")
    described = json.loads((source / "tokenizer_config.json").read_text()) | {"model_max_length": MAX_POSITIONS}
    (source / "tokenizer_config.json").write_text(json.dumps(described))
    (source / "generation_config.json").write_text('{"eos_token_id": 2, "temperature": 0.6}')
    config = settings_in(folder / "run", source)
    save_trained(config, 3)
    newest = save_trained(config, 5)
    mark_done(folder / "run" / "train", {}, {"steps": 5})
    return config, newest


@pytest.fixture(scope="module")
def exported(trained) -> Path:
    config, _ = trained
    run_export(config, Path(config.run), quiet=True)
    return Path(config.run) / "export"


def logits(decoder: Decoder, tokens: np.ndarray) -> np.ndarray:
    pos_BT = jnp.arange(tokens.size, dtype=jnp.int32)[None]
    hidden_BTD, _ = decoder.hidden(jnp.asarray(tokens)[None], pos_BT, attend_self(pos_BT, Strategy(block=512)))
    return np.asarray(decoder.logits(hidden_BTD))[0]


def test_transformers_and_we_read_the_trained_weights_with_their_rope_beyond_the_old_context(trained, exported):
    _, newest = trained
    rounded = nnx.clone(newest)
    nnx.update(rounded, jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(x.dtype), nnx.state(newest, nnx.Param)))
    tokens = np.random.default_rng(0).integers(3, 320, MAX_POSITIONS + 300)
    expected = logits(rounded, tokens)
    ours = logits(load_model(exported, layout="stacked", dtype="float32", quiet=True).decoder, tokens)
    np.testing.assert_array_equal(ours, expected)
    theirs = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    with torch.no_grad():
        got = theirs(torch.from_numpy(tokens)[None]).logits[0].numpy()
    np.testing.assert_allclose(got, expected, atol=2e-3 * np.abs(expected).max())
    np.testing.assert_array_equal(got.argmax(-1)[-300:], expected.argmax(-1)[-300:])
    other = dataclasses.replace(rounded.config, rope=dataclasses.replace(rounded.config.rope, theta=10000.0))
    rounded.config = other
    assert np.abs(logits(rounded, tokens) - expected).max() > 0.1 * np.abs(expected).max()  # theta decides


def test_the_folder_says_what_a_user_of_it_must_know(trained, exported):
    config, _ = trained
    described = json.loads((exported / "config.json").read_text())
    assert (described["rope_theta"], described["max_position_embeddings"]) == (THETA, LONGEST)
    assert described["torch_dtype"] == "bfloat16"
    source = Path(config.model.source)
    assert "arXiv:2502.13922" in (exported / "README.md").read_text()
    for name in ("tokenizer.json", "generation_config.json"):
        assert (exported / name).read_bytes() == (source / name).read_bytes()
    messages = [{"role": "user", "content": "the text and the question"}]
    ours, theirs = (AutoTokenizer.from_pretrained(folder) for folder in (source, exported))
    assert (ours.model_max_length, theirs.model_max_length) == (MAX_POSITIONS, LONGEST)
    said = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert said == ours.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert theirs(said).input_ids == ours(said).input_ids
    assert summary_of(exported) == {"context_size": LONGEST, "theta": THETA, "step": 5}


def test_without_a_theta_and_with_shorter_rows_the_checkpoints_own_stay(tmp_path, trained):
    source = Path(shutil.copytree(trained[0].model.source, tmp_path / "model"))
    described = json.loads((source / "tokenizer_config.json").read_text()) | {"model_max_length": None}
    (source / "tokenizer_config.json").write_text(json.dumps(described))
    config = settings_in(tmp_path / "run", source)
    model, train = dataclasses.replace(config.model, rope_theta=None), dataclasses.replace(config.train, lengths=(512,))
    config = dataclasses.replace(config, model=model, train=train)
    save_trained(config, 1)
    mark_done(tmp_path / "run" / "train", {}, {"steps": 1})
    run_export(config, tmp_path / "run", quiet=True)
    described = json.loads((tmp_path / "run" / "export" / "config.json").read_text())
    assert (described["rope_theta"], described["max_position_embeddings"]) == (10000.0, MAX_POSITIONS)


def test_a_mesh_writes_the_same_bytes(trained, exported, tmp_path):
    config, _ = trained
    shutil.copytree(Path(config.run) / "train", tmp_path / "run" / "train")
    meshed = dataclasses.replace(config, run=str(tmp_path / "run"), mesh=MeshConfig(fsdp=2, context=2, model=2))
    run_export(meshed, tmp_path / "run", quiet=True)
    assert weights_in(tmp_path / "run" / "export") == weights_in(exported)


def weights_in(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_two_processes_write_one_folder(trained, exported, tmp_path):
    config, _ = trained
    shutil.copytree(Path(config.run) / "train", tmp_path / "run" / "train")
    compute = dataclasses.replace(config.compute, programs=False)
    config = dataclasses.replace(config, run=str(tmp_path / "run"), mesh=MeshConfig(fsdp=2, context=2), compute=compute)
    settings.save(config, tmp_path / "run.yaml")
    port = free_port()
    command = ["-m", "longpo_jax", "export", "--config", str(tmp_path / "run.yaml")]
    pair = [spawn(command, environment(2, (port, 2, index))) for index in (0, 1)]
    for code, _, err in map(finished, pair):
        assert code == 0, err[-3000:]
    assert weights_in(tmp_path / "run" / "export") == weights_in(exported)


def test_what_is_done_is_left_alone_and_another_training_is_refused(trained, exported, tmp_path):
    config, _ = trained
    shutil.copytree(Path(config.run), tmp_path / "run")
    (tmp_path / "run" / "train" / "checkpoints").rename(tmp_path / "away")  # not needed any more
    run_export(config, tmp_path / "run", quiet=True)
    mark_done(tmp_path / "run" / "train", {}, {"steps": 5, "rows": 6})
    with pytest.raises(InputError, match=r"export was made with train = .*: choose another run folder, or delete"):
        run_export(config, tmp_path / "run", quiet=True)


def test_export_before_training_is_one_clear_line(trained, tmp_path):
    config = settings_in(tmp_path, Path(trained[0].model.source))
    with pytest.raises(InputError, match=r"train: expected a stage that is done, got none: run `longpo train` first"):
        run_export(config, tmp_path, quiet=True)
    mark_done(tmp_path / "train", {}, {"steps": 8})
    with pytest.raises(InputError, match=r"checkpoints: expected the checkpoint of update 8, got only those of: none"):
        run_export(config, tmp_path, quiet=True)
    mark_done(tmp_path / "train", {}, {"steps": "8"})
    with pytest.raises(InputError, match=r"done.json: summary.steps must be a whole number .*, got '8'"):
        run_export(config, tmp_path, quiet=True)
    assert not (tmp_path / "export").exists()


def test_the_tokenizer_of_another_model_is_not_taken(trained, tmp_path):
    config = dataclasses.replace(trained[0], run=str(tmp_path / "run"))
    shutil.copytree(Path(trained[0].run) / "train", tmp_path / "run" / "train")
    mark_done(tmp_path / "run" / "train", {"model.tokenizer": "another's"}, {"steps": 5})
    with pytest.raises(InputError, match=r"train was made with another model, with model.tokenizer = another's"):
        run_export(config, tmp_path / "run", quiet=True)


def cut_last(folder: Path) -> None:
    path = max((folder / "weights").rglob("d/*"), key=lambda path: path.stat().st_size)
    os.truncate(path, path.stat().st_size - 1)


def flip_value(folder: Path) -> None:
    """Of the same size: a bit of one weight."""
    path = max((folder / "weights").rglob("d/*"), key=lambda path: path.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (cut_last, r"checkpoints/5 is not whole: weights/.* bytes, \d+ were written"),
        (flip_value, r"checkpoints/5: weights cannot be read: "),
        (shutil.rmtree, r"expected the checkpoint of update 5, got only those of: 3"),
    ],
)
def test_the_last_checkpoint_and_no_other_is_exported_unless_it_is_asked_for(trained, tmp_path, damage, said):
    config = dataclasses.replace(trained[0], run=str(tmp_path / "run"))
    shutil.copytree(Path(trained[0].run) / "train", tmp_path / "run" / "train")
    damage(tmp_path / "run" / "train" / "checkpoints" / "5")
    with pytest.raises(InputError, match=f"{said}.*: nothing was exported; export.step takes another checkpoint"):
        run_export(config, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run" / "export").exists()
    if damage is not shutil.rmtree:
        return
    third = dataclasses.replace(config, export=ExportConfig(step=3))
    run_export(third, tmp_path / "run", quiet=True)
    assert summary_of(tmp_path / "run" / "export")["step"] == 3
    with pytest.raises(InputError, match=r"export was made with step = 3, expected step = 5"):
        run_export(config, tmp_path / "run", quiet=True)


def test_weights_of_another_model_are_refused(trained, tmp_path):
    config, _ = trained
    shutil.copytree(Path(config.run) / "train", tmp_path / "run" / "train")
    other = save_decoder(tmp_path / "model")
    shape = LlamaConfig.from_pretrained(other)
    shape.num_hidden_layers = 1
    LlamaForCausalLM(shape).save_pretrained(other)
    with pytest.raises(InputError, match=r"checkpoints/5 is of another model or optimizer: .*: expected .*, got "):
        run_export(settings_in(tmp_path / "run", other), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run" / "export").exists()
