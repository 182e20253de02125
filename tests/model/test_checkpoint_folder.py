# SPDX-License-Identifier: Apache-2.0
"""What is opened as a checkpoint and what is not: what the folder is, is said in one line."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import transformers

from rapid_jax.model.checkpoint_folder import INDEX, SINGLE
from rapid_jax.model.hf_io import HfCheckpoint, write_checkpoint
from rapid_jax.model.hf_names import EMBEDDING, HEAD, weights
from rapid_jax.model.load import open_checkpoint
from rapid_jax.plan.architectures import architecture_of
from rapid_jax.runtime.errors import InputError

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 5368709120\n"


@pytest.fixture
def folder(checkpoint, tmp_path) -> Path:
    return shutil.copytree(checkpoint("llama")[1], tmp_path / "model")


@pytest.fixture
def tied(checkpoint, tmp_path) -> tuple[Any, Path]:
    model, saved = checkpoint("llama3")
    return model, shutil.copytree(saved, tmp_path / "tied")


def adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")


def adapter_alone(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    adapter(folder)


def gguf_alone(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    (folder / "Model.Q4_1.GGUF").write_bytes(b"GGUF")


def inside(folder: Path) -> None:
    shutil.copytree(folder, folder / "checkpoint-500")
    (folder / "config.json").unlink()


def unreadable(folder: Path) -> None:
    (folder / SINGLE).unlink()
    (folder / SINGLE).symlink_to(SINGLE)


def deep(folder: Path) -> None:
    (folder / "config.json").write_text('{"a":' * 100_000 + "1" + "}" * 100_000)


def pipe(folder: Path) -> None:
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")


def renamed(name: str):
    return lambda folder: (folder / SINGLE).rename(folder / name)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (adapter, "holds a PEFT adapter"),
        (adapter_alone, "holds a PEFT adapter"),
        (gguf_alone, r"name the GGUF file itself: .*/model/Model.Q4_1.GGUF"),
        (inside, r"name the checkpoint inside: .*/model/checkpoint-500"),
        (renamed("model-00002-of-00003.safetensors"), "found model-00002-of-00003.safetensors"),
        (renamed("consolidated.safetensors"), "found consolidated.safetensors"),
        (renamed("weights.npz"), "expected model.safetensors .*the folder holds config.json.*weights.npz"),
        (lambda folder: (folder / SINGLE).write_bytes(POINTER), "model.safetensors: a Git LFS pointer"),
        (lambda folder: (folder / "config.json").write_bytes(POINTER), "config.json: a Git LFS pointer"),
        (lambda folder: (folder / SINGLE).write_bytes(b"<!DOCTYPE html><html>"), "it begins with b'<!DOCTYPE html>"),
        (lambda folder: (folder / "config.json").unlink(), "config.json: no such file; the folder holds generation_"),
        (unreadable, "expected model.safetensors"),
        (pipe, "config.json: no such file"),
        (deep, "config.json: expected JSON nested at most"),
    ],
)
def test_what_a_folder_is_instead_is_said(change, words, folder):
    change(folder)
    with pytest.raises(InputError, match=words) as caught:
        open_checkpoint(folder)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("~nobody-of-this-name/model", "model: expected a path, got"),
        ("x" * 5000, "cannot be read: File name too long"),
        ("no/such/folder", "got no file or folder of that name"),
        ("hdfs://bucket/model", "model: expected a path on this machine"),
    ],
)
def test_a_name_that_leads_nowhere_is_one_line(source, words):
    with pytest.raises(InputError, match=words):
        open_checkpoint(source)


def test_a_file_of_weights_is_answered_with_its_folder(folder):
    with pytest.raises(InputError, match=r"name the folder that holds config\.json"):
        open_checkpoint(folder / SINGLE)


def test_weights_in_one_file_come_before_an_index_as_in_transformers(folder):
    expected = HfCheckpoint(folder).read(EMBEDDING)
    (folder / INDEX).write_text(json.dumps({"weight_map": {EMBEDDING: "old.safetensors"}}))
    np.testing.assert_array_equal(HfCheckpoint(folder).read(EMBEDDING), expected)
    assert transformers.AutoModelForCausalLM.from_pretrained(folder)


def test_a_tied_model_may_store_its_head_alone(tied):
    model, folder = tied
    expected = HfCheckpoint(folder).read(EMBEDDING)
    safetensors.torch.save_model(model, str(folder / SINGLE))
    stored = safetensors.numpy.load_file(folder / SINGLE)
    assert HEAD in stored and EMBEDDING not in stored
    np.testing.assert_array_equal(HfCheckpoint(folder).read(EMBEDDING), expected)
    safetensors.numpy.save_file(stored, folder / SINGLE)  # without the metadata that says what is shared
    np.testing.assert_array_equal(HfCheckpoint(folder).read(EMBEDDING), expected)
    np.testing.assert_array_equal(HfCheckpoint(folder).read(EMBEDDING, range(3, 7)), expected[3:7])


def test_a_model_that_is_not_tied_needs_both(tied):
    _, folder = tied
    given = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(given | {"tie_word_embeddings": False}))
    with pytest.raises(InputError, match=f"tensor {HEAD} is missing"):
        HfCheckpoint(folder)


def test_a_tied_head_of_another_shape_is_refused(tied):
    _, folder = tied
    stored = safetensors.numpy.load_file(folder / SINGLE)
    safetensors.numpy.save_file(stored | {HEAD: np.zeros((3, 32), np.float32)}, folder / SINGLE)
    with pytest.raises(InputError, match=r"lm_head.weight has shape \[3, 32\], expected \[101, 32\]"):
        HfCheckpoint(folder)


def test_float64_is_read_as_float32_and_whole_numbers_are_refused(folder):
    expected = HfCheckpoint(folder).read(EMBEDDING)
    stored = safetensors.numpy.load_file(folder / SINGLE)
    safetensors.numpy.save_file(stored | {EMBEDDING: expected.astype(np.float64)}, folder / SINGLE)
    read = HfCheckpoint(folder).read(EMBEDDING)
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, expected)
    safetensors.numpy.save_file(stored | {EMBEDDING: expected.astype(np.int8)}, folder / SINGLE)
    with pytest.raises(InputError, match="has dtype I8; supported: F32, BF16, F16, F64"):
        HfCheckpoint(folder)


def test_a_plan_reads_a_config_as_a_load_does(folder):
    (folder / SINGLE).unlink()
    assert architecture_of(str(folder)).config.vocab_size == 101
    deep(folder)
    with pytest.raises(InputError, match="nested at most"):
        architecture_of(str(folder))


def test_whatever_a_config_carries_is_written_back(folder, tmp_path):
    given = json.loads((folder / "config.json").read_text())
    carried = {"note": "half a character: \ud800", "deep": [[{"a": None}]], "large": 10**30}
    (folder / "config.json").write_text(json.dumps(given | carried))
    opened = HfCheckpoint(folder)
    arrays = ((weight, opened.read(weight.key)) for weight in weights(opened.config))
    write_checkpoint(tmp_path / "out", opened.config, arrays, dtype="float32", files={})
    assert HfCheckpoint(tmp_path / "out").config == opened.config
