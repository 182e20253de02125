# SPDX-License-Identifier: Apache-2.0
"""The encoder against transformers: both families, padding, different lengths, and the real MiniLM."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import BertModel

from rapid_jax.retrieval.encoder_io import encoder_folder, load_encoder, read_config
from tests.retrieval.encoders import hf_model, hidden_of, save, vectors_of

LENGTHS = (1, 7, 40, 23)


def batch(vocab_size: int, lengths=LENGTHS):
    """Right-padded ids and their mask; the padding holds ordinary ids, which must not matter."""
    ids_BT = np.random.default_rng(0).integers(5, vocab_size, (len(lengths), max(lengths)))
    return ids_BT.astype(np.int32), np.arange(max(lengths)) < np.array(lengths)[:, None]


def reference(model, ids_BT, mask_BT):
    """Last hidden states, one text at a time and without padding."""
    with torch.no_grad():
        return [
            model(input_ids=torch.tensor(ids[mask][None]).long()).last_hidden_state[0].numpy()
            for ids, mask in zip(ids_BT, mask_BT, strict=True)
        ]


def pooled(hidden_TE, pooling):
    vector_E = hidden_TE[0] if pooling == "cls" else hidden_TE.mean(axis=0)
    return vector_E / np.linalg.norm(vector_E)


@pytest.mark.parametrize("family", ["bert", "xlm-roberta"])
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_tiny_models_match_transformers(tmp_path, family, pooling):
    folder = save(tmp_path, family)
    encoder = load_encoder(folder, read_config(folder, pooling), jnp.dtype("float32"))
    ids_BT, mask_BT = batch(100)
    truth = reference(hf_model(family), ids_BT, mask_BT)
    hidden_BTE = np.asarray(hidden_of(encoder, ids_BT, mask_BT))
    vectors_BE = np.asarray(vectors_of(encoder, ids_BT, mask_BT))
    for row, expected_TE in enumerate(truth):
        np.testing.assert_allclose(hidden_BTE[row, : len(expected_TE)], expected_TE, atol=1e-4)
        np.testing.assert_allclose(vectors_BE[row], pooled(expected_TE, pooling), atol=1e-5)


def test_padded_batch_of_transformers_too(tmp_path):
    """XLM-RoBERTa counts positions from the mask of its ids: the same for a padded row."""
    folder = save(tmp_path, "xlm-roberta")
    encoder = load_encoder(folder, read_config(folder), jnp.dtype("float32"))
    ids_BT, mask_BT = batch(100)
    ids_BT = np.where(mask_BT, ids_BT, 1)
    with torch.no_grad():
        model = hf_model("xlm-roberta")
        output = model(input_ids=torch.tensor(ids_BT).long(), attention_mask=torch.tensor(mask_BT).long())
    hidden_BTE = np.asarray(hidden_of(encoder, ids_BT, mask_BT))
    np.testing.assert_allclose(hidden_BTE[mask_BT], output.last_hidden_state.numpy()[mask_BT], atol=1e-4)


def test_the_last_position_of_the_table_is_usable(tmp_path):
    for family, longest in (("bert", 64), ("xlm-roberta", 64)):
        folder = save(tmp_path / family, family)
        config = read_config(folder)
        assert config.max_tokens == longest
        ids_BT, mask_BT = batch(100, lengths=(longest,))
        truth = reference(hf_model(family), ids_BT, mask_BT)[0]
        encoder = load_encoder(folder, config, jnp.dtype("float32"))
        np.testing.assert_allclose(hidden_of(encoder, ids_BT, mask_BT)[0], truth, atol=1e-4)


def test_an_empty_row_is_zeros(tmp_path):
    folder = save(tmp_path, "bert")
    for pooling in ("mean", "cls"):
        encoder = load_encoder(folder, read_config(folder, pooling), jnp.dtype("float32"))
        vectors_BE = vectors_of(encoder, np.full((2, 8), 7), np.arange(2)[:, None] < np.ones((1, 8)))
        assert np.linalg.norm(vectors_BE[0]) == pytest.approx(1, abs=1e-5)
        np.testing.assert_array_equal(vectors_BE[1], 0)


def test_bfloat16_stays_near_float32_and_keeps_its_norms_in_float32():
    folder = encoder_folder("minilm")
    config = read_config(folder)
    ids_BT, mask_BT = batch(30000)
    exact = vectors_of(load_encoder(folder, config, jnp.dtype("float32")), ids_BT, mask_BT)
    half = load_encoder(folder, config, jnp.dtype("bfloat16"))
    assert half.layers.query_LENH[...].dtype == jnp.bfloat16
    assert half.layers.ffn_norm_scale_LE[...].dtype == jnp.float32
    assert float((exact * vectors_of(half, ids_BT, mask_BT)).sum(axis=1).min()) > 0.995


def test_real_minilm_matches_transformers():
    folder = encoder_folder("minilm")
    config = read_config(folder)
    assert (config.pooling, config.max_tokens, config.position_offset) == ("mean", 256, 0)
    model = BertModel.from_pretrained(folder).eval()
    ids_BT, mask_BT = batch(30000, lengths=(256, 3, 100))
    truth = reference(model, ids_BT, mask_BT)
    vectors_BE = vectors_of(load_encoder(folder, config, jnp.dtype("float32")), ids_BT, mask_BT)
    for vector_E, expected_TE in zip(vectors_BE, truth, strict=True):
        np.testing.assert_allclose(vector_E, pooled(expected_TE, "mean"), atol=1e-5)


def test_every_parameter_name_ends_in_its_axes(tmp_path):
    folder = save(tmp_path, "bert")
    encoder = load_encoder(folder, read_config(folder), jnp.dtype("float32"))
    parameters = nnx.to_flat_state(nnx.state(encoder, nnx.Param))
    assert len(parameters) == 21
    for path, parameter in parameters:
        assert parameter[...].ndim == len(str(path[-1]).rsplit("_", 1)[1]), path
