# SPDX-License-Identifier: Apache-2.0
"""Decoders that pool, against transformers and torch: vectors, prompts, windows, retrieval, and what is refused."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from rapid_jax.model.config import from_hf
from rapid_jax.model.hf_io import HfCheckpoint
from rapid_jax.retrieval.config import RetrievalConfig
from rapid_jax.retrieval.embed import Embedder
from rapid_jax.retrieval.encoder_io import fingerprint, load_encoder, read_config, weight_files
from rapid_jax.retrieval.pooled_decoder import attend_texts
from rapid_jax.retrieval.retriever import Retriever
from rapid_jax.runtime.errors import InputError
from tests.retrieval.encoders import vectors_of
from tests.retrieval.pooled_decoders import (
    KINDS,
    MOST_TOKENS,
    PROMPTS,
    WORDS,
    reference,
    reference_of_ids,
    save,
    tokenizer,
)

FLOAT32 = jnp.dtype("float32")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {kind: save(tmp_path_factory.mktemp(kind), kind) for kind in KINDS}


@pytest.fixture(scope="module")
def embedders(folders):
    return {kind: Embedder(folder, batch_size=8) for kind, folder in folders.items()}


def sentence(count: int, seed: int = 0) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS, count))


def restate(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("kind", KINDS)
def test_queries_and_documents_of_different_lengths_match_torch(embedders, kind):
    texts = [sentence(count, seed=count) for count in (1, 12, 3, 20, 7, 12)]
    texts += ["", "\u00e9t\u00e9 42!" if kind == "qwen3" else "x 42!", "  space \n around\n\n"]
    for prompt, are_queries in (("query", True), ("document", False)):
        vectors_NE = embedders[kind].embed(texts, are_queries=are_queries)
        assert vectors_NE.shape == (len(texts), 24 if kind == "gemma3" else 32) and vectors_NE.dtype == np.float32
        np.testing.assert_allclose(vectors_NE, [reference(kind, text, prompt) for text in texts], atol=1e-5)
    assert not np.allclose(embedders[kind].embed(texts), embedders[kind].embed(texts, are_queries=True), atol=1e-2)


def test_a_text_of_more_than_a_block_of_keys_matches_torch(embedders):
    text = sentence(550)
    count = len(tokenizer("qwen3").encode(text).ids)
    assert 512 < count <= MOST_TOKENS["qwen3"]
    np.testing.assert_allclose(embedders["qwen3"].embed([text])[0], reference("qwen3", text, "document"), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("most", [None, 24])
def test_every_window_stands_behind_the_prompt_and_before_the_end(embedders, kind, most):
    """EmbeddingGemma's prompt ends in a space, which belongs to the first token of whatever follows it."""
    text = sentence(300 if most is None else 60)
    most, made = most or embedders[kind].config.max_tokens, tokenizer(kind)
    first, last = ([], [0]) if kind == "qwen3" else ([0], [1])
    before = first + made.encode(PROMPTS[kind]["document"].rstrip(), add_special_tokens=False).ids
    space = " " if kind == "gemma3" else ""
    ids = made.encode(space + text, add_special_tokens=False).ids
    pieces = np.array_split(ids, -(-len(ids) // (most - len(before) - 1)))
    vectors_WE, owners_W = embedders[kind].embed_windows([text, "a"], most)
    assert len(pieces) > (1 if kind == "gemma3" or most == 24 else 0) and owners_W.tolist() == [0] * len(pieces) + [1]
    truth = [reference_of_ids(kind, [*before, *map(int, piece), *last]) for piece in pieces]
    np.testing.assert_allclose(vectors_WE[:-1], truth, atol=1e-5)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize(("time", "window"), [(40, None), (40, 7), (600, None), (600, 130), (1100, 513)])
def test_attention_over_texts_is_the_dense_one(time, window, bidirectional):
    """Below and above a block of 512, two texts of different lengths, windows known while tracing and not."""
    rng, lengths = np.random.default_rng(time), np.array([time, time * 2 // 3])
    q_BTNH = rng.normal(size=(2, time, 4, 8)).astype(np.float32)
    k_BTKH, v_BTKH = rng.normal(size=(2, 2, time, 2, 8)).astype(np.float32)
    at_T = np.arange(time)
    pos_BT = np.where(at_T < lengths[:, None], at_T, -1).astype(np.int32)
    distance_TS = at_T[:, None] - at_T[None, :]
    far = np.abs(distance_TS) if bidirectional else np.where(distance_TS < 0, 2**20, distance_TS)
    seen_BTS = (far < (window or 2**20)) & (pos_BT >= 0)[:, None, :]
    score_BNTS = np.einsum("BTNH,BSNH->BNTS", q_BTNH, k_BTKH.repeat(2, axis=2)) / 8**0.5
    weight_BNTS = np.where(seen_BTS[:, None], np.exp(score_BNTS), 0)
    weight_BNTS /= np.maximum(weight_BNTS.sum(axis=-1, keepdims=True), 1e-30)
    truth_BTNH = np.einsum("BNTS,BSNH->BTNH", weight_BNTS, v_BTKH.repeat(2, axis=2))

    @jax.jit
    def ours(pos_BT, window):
        attend = attend_texts(pos_BT, bidirectional=bidirectional)
        return attend(q_BTNH, k_BTKH, v_BTKH, None, window=window)[0]

    real = pos_BT >= 0
    np.testing.assert_allclose(np.asarray(ours(pos_BT, window))[real], truth_BTNH[real], atol=2e-5)
    assert not np.asarray(ours(pos_BT, window))[~real].any()


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_row_is_zeros_and_padding_does_not_matter(folders, kind):
    encoder = load_encoder(folders[kind], read_config(folders[kind]), FLOAT32)
    ids_BT = np.random.default_rng(0).integers(2, 300, (2, 40))
    mask_BT = np.arange(40) < np.array([[17], [0]])
    vectors_BE = np.asarray(vectors_of(encoder, ids_BT, mask_BT))
    other_BE = np.asarray(vectors_of(encoder, np.where(mask_BT, ids_BT, 5), mask_BT))
    np.testing.assert_allclose(vectors_BE[0], reference_of_ids(kind, ids_BT[0, :17].tolist()), atol=1e-5)
    np.testing.assert_array_equal(vectors_BE, other_BE)
    np.testing.assert_array_equal(vectors_BE[1], 0)


def test_after_a_warm_up_no_text_brings_a_new_shape(folders):
    embedder = Embedder(folders["gemma3"], batch_size=4)
    embedder.warm_up(64)
    known = set(embedder.shapes)
    for copies in (1, 3, 9):
        embedder.embed([sentence(5)] * copies + [sentence(90)], are_queries=True)
        embedder.embed_windows([sentence(30)] * copies, 32)
    assert embedder.shapes == known


@pytest.mark.parametrize("kind", KINDS)
def test_retrieval_finds_what_the_encoder_finds_nearest(embedders, kind, word_spans):
    """End to end: chunks by the words of a document, their windows, the query, the budget, the best in order."""
    text, query = "\n\n".join(f"{sentence(14, seed)}." for seed in range(12)), "when do the boats leave"
    config = RetrievalConfig(chunk_tokens=16, compression=24, min_tokens=48, window_tokens=None)
    selection = Retriever(embedders[kind], config, quiet=True).retrieve(text, query, word_spans, 400)
    paragraphs = text.split("\n\n")
    query_E = reference(kind, query, "query")
    chosen = {chunk.text.strip() for chunk in selection.chunks}
    assert selection.considered == len(paragraphs) and chosen < set(paragraphs)
    whole = Retriever(embedders[kind], config, quiet=True)._prepare(text, word_spans, "")
    scores = [float(reference(kind, chunk.text, "document") @ query_E) for chunk in whole.chunks]
    best = np.argsort(scores)[::-1][: selection.kept]
    assert chosen == {whole.chunks[i].text.strip() for i in best}
    np.testing.assert_allclose(selection.scores, [scores[i] for i in sorted(best)], atol=1e-5)


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


def test_a_bidirectional_model_encodes_and_does_not_generate(folders):
    given = json.loads((folders["gemma3"] / "config.json").read_text())
    encoder = from_hf(given, encodes=True)
    assert encoder.bidirectional and encoder.window_of == (6, 6, None, 6)
    with pytest.raises(InputError, match="use_bidirectional_attention must be null or false"):
        from_hf(given | {"architectures": ["Gemma3ForCausalLM"]})
    with pytest.raises(InputError, match="architectures must be"):
        HfCheckpoint(folders["qwen3"])


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


def test_every_parameter_name_ends_in_its_axes(folders):
    encoder = load_encoder(folders["gemma3"], read_config(folders["gemma3"]), FLOAT32)
    for path, parameter in nnx.to_flat_state(nnx.state(encoder.dense, nnx.Param)):
        assert parameter[...].ndim == len(str(path[-1]).rsplit("_", 1)[1]), path
