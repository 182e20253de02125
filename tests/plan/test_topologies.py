# SPDX-License-Identifier: Apache-2.0
"""Names of TPU slices, and architectures without weights."""

import importlib.util
import json
import math
from pathlib import Path

import pytest

from rapid_jax.model.hf_names import stored
from rapid_jax.plan.architectures import SHAPES, architecture_of
from rapid_jax.plan.topologies import GENERATIONS, chips_of, generation_of, topology_of
from rapid_jax.runtime.errors import InputError


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("v5p", "v5p comes as v5p:2x2x1, v5p:2x2x2"),
        ("v5p:4x4", "v5p comes as v5p:2x2x1"),
        ("v6e:4x4x4", "v6e comes as v6e:2x2, v6e:2x4, v6e:4x4"),
        ("v6:4x4", "did you mean v6e:4x4?"),
        ("H100", "one of v5e, v5p, v6e, tpu7x, as v5p:4x4x4"),
    ],
)
def test_a_wrong_name_lists_the_right_ones(name: str, said: str):
    with pytest.raises(InputError) as caught:
        topology_of(name)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_chips():
    assert [chips_of(name) for name in ("v5p:2x2x1", "v6e:4x4", "v5p:4x4x8")] == [4, 16, 128]
    assert generation_of("v5p:4x4x4") is GENERATIONS["v5p"]


def test_a_missing_compiler_says_how_to_install_it(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "libtpu" else find(name))
    with pytest.raises(InputError, match=r"not installed; run in .*setup.py: pip install '\.\[tpu\]'$"):
        topology_of("v5p:2x2x1")


def test_an_architecture_is_the_folders_own_if_it_is_there(tmp_path: Path):
    folder = tmp_path / "Llama-3.1-8B-Instruct"
    missing = architecture_of(str(folder))
    assert missing.config.hidden_size == 4096
    assert "the published llama-3.1-8b" in missing.said_by
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**SHAPES["llama-3.1-8b"], "num_hidden_layers": 3}))
    found = architecture_of(str(folder))
    assert (found.config.num_layers, found.said_by) == (3, str(folder / "config.json"))
    assert architecture_of(str(folder), "qwen2.5-7b").config.num_kv_heads == 4
    assert found.cut_to(2).config.num_layers == 2


@pytest.mark.parametrize(
    ("source", "layers"),
    [("models/Qwen2.5-72B-Instruct", 80), ("models/Mistral-7B-LongPO-128K", 32), ("x/Llama-3.1-70B", 80)],
)
def test_a_folders_name_says_which_shape(source: str, layers: int):
    assert architecture_of(source).config.num_layers == layers


def test_an_unknown_model_lists_the_shapes():
    with pytest.raises(InputError, match=r"llama-3\.1-8b, llama-3\.1-70b"):
        architecture_of("models/Mystery-1T")
    with pytest.raises(InputError, match="unknown shape 'x'"):
        architecture_of("models/Mystery-1T", "x")


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        *(("llama-3.1-8b", 8.03), ("qwen2.5-7b", 7.62), ("qwen3-0.6b", 0.596), ("qwen3-1.7b", 1.72)),
        *(("qwen3-8b", 8.19), ("qwen3-32b", 32.76), ("smollm3-3b", 3.08), ("phi-4-mini", 3.84)),
    ],
)
def test_a_shape_has_as_many_weights_as_its_card_says(name: str, billions: float):
    config = architecture_of("models/none", name).config
    assert sum(math.prod(array.shape) for array in stored(config)) / 1e9 == pytest.approx(billions, rel=0.005)
    assert config.context_size == {"smollm3-3b": 65536}.get(name, 131072)
