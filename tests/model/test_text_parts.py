# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of text and images: the decoder of text is read, by its names in older files and in newer ones."""

import logging
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers

from rapid_jax.model.hf_io import load_hf, save_hf
from rapid_jax.model.hf_names import stored
from rapid_jax.runtime.errors import InputError
from tests.model.conftest import FAMILIES, SIZES, our_logits, tokens_at, torch_logits

VISION = {
    **{"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
    **{"image_size": 28, "patch_size": 14},
}


@pytest.fixture(scope="module")
def with_images(tmp_path_factory) -> tuple[transformers.PreTrainedModel, Path]:
    torch.manual_seed(0)
    text = {**SIZES, **FAMILIES["gemma3"][1]}
    config = transformers.Gemma3Config(text_config=text, vision_config=VISION, mm_tokens_per_image=4)
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    folder = tmp_path_factory.mktemp("with_images")
    model.save_pretrained(folder)
    return model, folder


def renamed(folder: Path, target: Path, old: str, new: str) -> Path:
    """The folder with other names for its tensors."""
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    target.mkdir()
    (target / "config.json").write_bytes((folder / "config.json").read_bytes())
    changed = {key.replace(old, new, 1) if key.startswith(old) else key: value for key, value in tensors.items()}
    assert changed.keys() != tensors.keys()
    safetensors.torch.save_file(changed, target / "model.safetensors")
    return target


def test_the_text_part_says_what_transformers_says_and_is_exported_alone(with_images, tmp_path, caplog):
    model, folder = with_images
    tokens_BT, pos_BT = tokens_at(8100, 150, windows=True)
    expected = torch_logits(model, tokens_BT, pos_BT)
    names = safetensors.torch.load_file(folder / "model.safetensors").keys()
    prefix = "language_model.model." if "language_model.model.norm.weight" in names else "model.language_model."
    other = {"language_model.model.": "model.language_model.", "model.language_model.": "language_model.model."}[prefix]
    for place in (folder, renamed(folder, tmp_path / "renamed", prefix, other)):
        with caplog.at_level(logging.WARNING):
            decoder = load_hf(place, layout="unrolled", dtype=jnp.dtype("float32"), quiet=True)
        others = sum("language_model" not in name for name in names)
        assert caplog.messages == [
            f"{place}: the vision tower ({others} tensors) is left out: the model reads text alone"
        ]
        caplog.clear()
        np.testing.assert_allclose(our_logits(decoder, tokens_BT, pos_BT), expected, atol=1e-4 * np.abs(expected).max())
    save_hf(tmp_path / "written", decoder, dtype="float32", files={})
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "written", dtype=torch.float32).eval()
    assert isinstance(back, transformers.Gemma3ForCausalLM)
    np.testing.assert_allclose(torch_logits(back, tokens_BT, pos_BT), expected, atol=1e-5 * np.abs(expected).max())
    assert safetensors.torch.load_file(tmp_path / "written/model.safetensors").keys() == {
        array.key for array in stored(decoder.config)
    }


def test_a_tensor_of_neither_part_is_refused(with_images, tmp_path):
    folder = renamed(with_images[1], tmp_path / "odd", "multi_modal_projector.", "audio_tower.")
    with pytest.raises(InputError, match=r"tensor 'model\.audio_tower|tensor 'audio_tower"):
        load_hf(folder, layout="unrolled", dtype=jnp.dtype("float32"), quiet=True)
