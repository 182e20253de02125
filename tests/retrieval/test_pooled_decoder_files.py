# SPDX-License-Identifier: Apache-2.0
"""The folders of decoders that pool: what is read of them, and what is refused in one line."""

import json
import re

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rapid_jax.model.config import from_hf
from rapid_jax.model.hf_io import HfCheckpoint
from rapid_jax.retrieval.embed import Embedder
from rapid_jax.retrieval.encoder_io import fingerprint, read_config, weight_files
from rapid_jax.runtime.errors import InputError
from tests.retrieval.pooled_decoders import PROMPTS, reference, save, tokenizer

FLOAT32 = jnp.dtype("float32")


def restate(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_names_with_and_without_their_prefix_and_a_head_are_the_same_encoder(tmp_path):
    folder = save(tmp_path, "qwen3")
    before = Embedder(folder).embed(["boats at night"])
    tensors = {f"model.{name}": tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors | {"lm_head.weight": np.ones((400, 32), np.float32)}, folder / "model.safetensors")
    restate(folder / "config.json", tie_word_embeddings=False, architectures=["Qwen3ForCausalLM"])
    np.testing.assert_array_equal(Embedder(folder).embed(["boats at night"]), before)


def test_the_fingerprint_follows_prompts_and_linear_layers(tmp_path):
    folder = save(tmp_path, "gemma3")
    prints = [fingerprint(folder, read_config(folder), FLOAT32)]
    prints.append(fingerprint(folder, read_config(folder), jnp.dtype("bfloat16")))
    assert [path.parent.name for path in weight_files(folder)][1:] == ["2_Dense", "3_Dense"]
    weight = load_file(folder / "3_Dense/model.safetensors")["linear.weight"]
    save_file({"linear.weight": weight * 2}, folder / "3_Dense/model.safetensors")
    prints.append(fingerprint(folder, read_config(folder), FLOAT32))
    restate(folder / "config_sentence_transformers.json", prompts=PROMPTS["qwen3"])
    prints.append(fingerprint(folder, read_config(folder), FLOAT32))
    assert len(set(prints)) == 4


def test_a_bidirectional_model_encodes_and_does_not_generate(tmp_path):
    given = json.loads((save(tmp_path / "a", "gemma3") / "config.json").read_text())
    encoder = from_hf(given, encodes=True)
    assert encoder.bidirectional and encoder.window_of == (6, 6, None, 6)
    with pytest.raises(InputError, match="use_bidirectional_attention must be null or false"):
        from_hf(given | {"architectures": ["Gemma3ForCausalLM"]})
    with pytest.raises(InputError, match="architectures must be"):
        HfCheckpoint(save(tmp_path / "b", "qwen3"))


def test_prompts_are_found_by_the_names_that_sentence_transformers_knows(tmp_path):
    folder = save(tmp_path, "qwen3")
    file = folder / "config_sentence_transformers.json"
    for prompts, default, expected in (
        ({"query": "q: ", "passage": "p: ", "corpus": "c: "}, None, ("q: ", "p: ")),
        ({"document": "d: ", "passage": "p: "}, None, ("", "d: ")),
        ({"query": "q: ", "other": "o: "}, "other", ("q: ", "o: ")),
        ({}, None, ("", "")),
    ):
        restate(file, prompts=prompts, default_prompt_name=default)
        found = read_config(folder).prompts
        assert (found.query, found.document) == expected
    file.unlink()
    assert read_config(folder).prompts.query == ""


def test_tokens_that_no_text_has_may_lie_beyond_the_table(tmp_path):
    """EmbeddingGemma's tokenizer has a token of images behind the last row."""
    folder = save(tmp_path, "gemma3")
    settings = json.loads((folder / "tokenizer.json").read_text())
    beyond = {"content": "<image>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    made = tokenizer("gemma3").get_vocab_size()
    for special in (True, False):
        token = beyond | {"id": made, "special": special}
        (folder / "tokenizer.json").write_text(
            json.dumps(settings | {"added_tokens": [*settings["added_tokens"], token]})
        )
        restate(folder / "config.json", vocab_size=made)
        tensors = load_file(folder / "model.safetensors")
        save_file(
            tensors | {"embed_tokens.weight": tensors["embed_tokens.weight"][:made]}, folder / "model.safetensors"
        )
        if special:
            np.testing.assert_allclose(
                Embedder(folder).embed(["boats <image>"])[0],
                reference("gemma3", "boats <image>", "document"),
                atol=1e-5,
            )
        else:
            with pytest.raises(InputError, match=f"expected token ids below the {made} rows"):
                Embedder(folder)


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("config.json", {"is_causal": False}, "is_causal must be true"),
        ("config.json", {"architectures": ["Gemma3ForSequenceClassification"]}, "architectures must be"),
        ("config.json", {"quantization_config": {"bits": 4}}, "quantization_config must be null"),
        ("config.json", {"use_bidirectional_attention": "all"}, "use_bidirectional_attention must be true or false"),
        ("config.json", {"hidden_size": 36}, "in_features must be 36.*got 32"),
        ("config.json", {"intermediate_size": 50}, r"has shape \[32, 48\], expected \[32, 50\]"),
        ("1_Pooling/config.json", {"pooling_mode_max_tokens": True}, "expected pooling by mean, by cls or by the last"),
        ("1_Pooling/config.json", {"include_prompt": False}, "include_prompt must be true"),
        (
            "2_Dense/config.json",
            {"activation_function": "torch.nn.modules.activation.GELU"},
            "activation_function must",
        ),
        ("2_Dense/config.json", {"out_features": 81}, "3_Dense/config.json: in_features must be 81"),
        ("3_Dense/config.json", {"out_features": 25}, r"linear.weight has shape \[24, 80\], expected \[25, 80\]"),
        ("3_Dense/config.json", {"bias": True}, "expected the tensors linear.weight, linear.bias"),
        ("3_Dense/config.json", {"module_input_name": "token_embeddings"}, "module_input_name must be"),
        ("config_sentence_transformers.json", {"prompts": {"query": 3}}, "prompts.query must be"),
        ("config_sentence_transformers.json", {"prompts": {"query": "\ud800"}}, "prompts: expected valid Unicode"),
        (
            "config_sentence_transformers.json",
            {"default_prompt_name": "x"},
            "default_prompt_name must be null or one of",
        ),
        ("config_sentence_transformers.json", {"prompts": {"document": "a b " * 80}}, "hold no text beside its prompt"),
    ],
)
def test_folders_that_are_no_such_encoder_are_refused_in_one_line(tmp_path, file, changes, message):
    folder = save(tmp_path, "gemma3")
    restate(folder / file, **changes)
    with pytest.raises(InputError, match=message) as error:
        Embedder(folder)
    assert "\n" not in str(error.value)


def test_a_decoder_that_states_no_pooling_is_refused(tmp_path):
    folder = save(tmp_path, "qwen3")
    (folder / "modules.json").unlink()
    assert read_config(folder).pooling == "last"
    (folder / "1_Pooling/config.json").unlink()
    with pytest.raises(InputError, match=re.escape("expected modules.json or 1_Pooling/config.json")):
        read_config(folder)
    assert read_config(folder, "mean").pooling == "mean"


def test_missing_files_are_named(tmp_path):
    folder = save(tmp_path / "a", "gemma3")
    (folder / "3_Dense/model.safetensors").unlink()
    with pytest.raises(InputError, match=r"3_Dense: expected model\.safetensors"):
        Embedder(folder)
    folder = save(tmp_path / "b", "qwen3")
    tensors = load_file(folder / "model.safetensors")
    save_file({name: t for name, t in tensors.items() if "layers.2.mlp.up" not in name}, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"tensor model\.layers\.2\.mlp\.up_proj\.weight is missing"):
        Embedder(folder)


def test_the_published_configs_are_read_as_what_they_are():
    """Sizes and keys of EmbeddingGemma's and of Qwen3-Embedding-0.6B's config.json, in their older spelling."""
    gemma = {
        **{"architectures": ["Gemma3TextModel"], "model_type": "gemma3_text", "vocab_size": 262144},
        **{"hidden_size": 768, "intermediate_size": 1152, "num_hidden_layers": 24, "head_dim": 256},
        **{"num_attention_heads": 3, "num_key_value_heads": 1, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-6},
        **{"hidden_activation": "gelu_pytorch_tanh", "max_position_embeddings": 2048, "_sliding_window_pattern": 6},
        **{"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": None, "sliding_window": 512},
        **{"use_bidirectional_attention": True, "final_logit_softcapping": None, "attn_logit_softcapping": None},
        "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 4,
    }
    read = from_hf(gemma, encodes=True)
    assert read.window_of == ((257,) * 5 + (None,)) * 4 and read.bidirectional and read.tie_embeddings
    qwen = {
        **{"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 151669, "hidden_size": 1024},
        **{"intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8},
        **{"head_dim": 128, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 1e6},
        **{"hidden_act": "silu", "rope_scaling": None, "sliding_window": None, "use_sliding_window": False},
        **{"max_window_layers": 28, "attention_bias": False, "tie_word_embeddings": True},
    }
    read = from_hf(qwen, encodes=True)
    assert (
        not read.bidirectional and set(read.window_of) == {None} and (read.qk_norm, read.max_positions) == (True, 32768)
    )
