# SPDX-License-Identifier: Apache-2.0
"""Decoders that pool, against transformers and torch: vectors, prompts, windows, retrieval."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rapid_jax.config import CacheConfig, ComputeConfig, ModelsConfig, RapidConfig
from rapid_jax.rapid import Rapid
from rapid_jax.retrieval.config import RetrievalConfig
from rapid_jax.retrieval.embed import Embedder
from rapid_jax.retrieval.encoder_io import load_encoder, read_config
from rapid_jax.retrieval.pooled_decoder import attend_texts
from rapid_jax.retrieval.retriever import Retriever
from rapid_jax.speculative.config import SamplingConfig, SpeculationConfig
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
from tests.tiny_models import save_decoder

FLOAT32 = jnp.dtype("float32")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {kind: save(tmp_path_factory.mktemp(kind), kind) for kind in KINDS}


@pytest.fixture(scope="module")
def embedders(folders):
    return {kind: Embedder(folder, batch_size=8) for kind, folder in folders.items()}


def sentence(count: int, seed: int = 0) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS, count))


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


def test_every_parameter_name_ends_in_its_axes(folders):
    encoder = load_encoder(folders["gemma3"], read_config(folders["gemma3"]), FLOAT32)
    for path, parameter in nnx.to_flat_state(nnx.state(encoder.dense, nnx.Param)):
        assert parameter[...].ndim == len(str(path[-1]).rsplit("_", 1)[1]), path


@pytest.mark.parametrize("kind", KINDS)
def test_a_question_is_answered_with_what_it_retrieves(folders, kind, tmp_path):
    config = RapidConfig(
        models=ModelsConfig(target=str(save_decoder(tmp_path / "model")), encoder=str(folders[kind])),
        retrieval=RetrievalConfig(chunk_tokens=32, min_tokens=64),
        speculation=SpeculationConfig(gamma=2),
        sampling=SamplingConfig(temperature=0.0, max_new_tokens=4),
        compute=ComputeConfig(prefill_chunk=128),
        cache=CacheConfig(folder=str(tmp_path / "cache"), prefixes=False),
    )
    document = "\n\n".join(f"{sentence(14, seed)}." for seed in range(8))
    answer = Rapid(config, quiet=True).answer(document, "when do the boats leave?")
    assert len(answer.token_ids) == 4 and answer.draft_tokens < answer.target_tokens
    assert 0 < answer.selection.kept < answer.selection.considered
