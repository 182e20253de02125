# SPDX-License-Identifier: Apache-2.0
"""Windows, batches, order, shapes; and that a fact late in a long chunk is found."""

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from rapid_jax.retrieval.embed import Embedder, bucket_lengths, windows
from rapid_jax.runtime.errors import InputError
from tests.retrieval.encoders import WORDS, hf_model, save


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(tmp_path_factory.mktemp("tiny"), "bert", max_seq_length=48, pooling="mean_tokens")


@pytest.fixture(scope="module")
def tiny(folder):
    return Embedder(folder, batch_size=16)


def sentence(count: int, seed: int = 0) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS, count))


def reference(folder, text: str, capacity: int) -> np.ndarray:
    """One window at a time through transformers; mean of the unit vectors weighted by token count."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    total = np.zeros(32)
    for part in np.array_split(ids, max(1, -(-len(ids) // capacity))):
        with torch.no_grad():
            whole = torch.tensor([[2, *part.astype(int), 3]])
            mean_E = hf_model("bert")(input_ids=whole).last_hidden_state[0].mean(axis=0).numpy()
        total += max(len(part), 1) * mean_E / np.linalg.norm(mean_E)
    return total / np.linalg.norm(total)


def test_texts_of_all_lengths_match_transformers(tiny, folder):
    """Capacity is 48 less the two special tokens; 46 is one full window, 47 two, 200 five."""
    texts = [sentence(count, seed=count) for count in (200, 1, 46, 47, 0, 92, 93, 30)]
    vectors_NE = tiny.embed(texts)
    assert vectors_NE.dtype == np.float32
    np.testing.assert_allclose(vectors_NE, [reference(folder, text, 46) for text in texts], atol=1e-5)


@pytest.mark.parametrize(("most", "counts"), [(None, [5, 1, 2, 1]), (48, [5, 1, 2, 1]), (22, [10, 1, 3, 1]), (1, None)])
def test_windows_are_as_many_as_are_needed_and_each_has_its_vector(tiny, folder, most, counts):
    """Special tokens count: of 22, two."""
    texts = [sentence(count, seed=count) for count in (200, 1, 47, 0)]
    vectors_WE, owners_W = tiny.embed_windows(texts, most)
    counts = counts or [200, 1, 47, 1]
    assert np.bincount(owners_W).tolist() == counts and (np.diff(owners_W) >= 0).all()
    parts = [
        " ".join(part)
        for text, count in zip(texts, counts, strict=True)
        for part in np.array_split(text.split(), count)
    ]
    np.testing.assert_allclose(vectors_WE[::7], [reference(folder, part, 46) for part in parts[::7]], atol=1e-5)


def test_order_is_that_of_the_texts_and_batches_do_not_matter(tiny):
    texts = [sentence(int(count), seed=count) for count in np.random.default_rng(3).integers(1, 150, 40)]
    together_NE = tiny.embed(texts)
    np.testing.assert_allclose(together_NE, np.concatenate([tiny.embed([text]) for text in texts]), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(together_NE, axis=1), 1, atol=1e-5)


def test_a_hundred_lengths_compile_few_programs(folder):
    embedder = Embedder(folder, batch_size=16)
    embedder.embed([sentence(count) for count in range(1, 101)])
    for copies in range(1, 20, 3):
        embedder.embed([sentence(10)] * copies + [sentence(40)] * copies)
    # Two lengths (32, 48), at most three row counts (1, 8, 16) each.
    assert {length for _, length in embedder.shapes} == {32, 48}
    assert len(embedder.shapes) <= 6


@pytest.mark.parametrize("batch_size", [4, 8, 16])
def test_after_a_warm_up_no_text_brings_a_new_shape(folder, batch_size):
    embedder = Embedder(folder, batch_size=batch_size)
    embedder.warm_up(40)
    known = set(embedder.shapes)
    assert {length for _, length in known} == {32, 48}
    for copies in (1, 2, 9, 40):
        embedder.embed([sentence(10)] * copies + [sentence(40)] * copies + ["", sentence(300)])
    assert embedder.shapes == known
    short = Embedder(folder, batch_size=batch_size)
    short.warm_up(20)
    assert {length for _, length in short.shapes} == {32}


def test_buckets_and_windows():
    assert bucket_lengths(256) == [32, 48, 64, 96, 128, 192, 256]
    assert bucket_lengths(300)[-2:] == [256, 300]
    assert bucket_lengths(20) == [20]
    assert [len(part) for part in windows(range(600), 254)] == [200, 200, 200]
    assert [len(part) for part in windows(range(255), 254)] == [128, 127]
    assert [len(part) for part in windows([], 254)] == [0]


def test_long_inputs_make_small_batches(folder):
    """Attention scores of a batch never exceed those of `batch_size` rows of 512 tokens."""
    embedder = Embedder(folder, batch_size=32)
    for length in (32, 512, 1024, 4096, 8192):
        rows = embedder._most_rows(length)
        assert rows == 1 or rows * length**2 <= 32 * 512**2
        assert rows == 32 or length > 512


def test_special_tokens_in_a_text_are_text(tiny):
    plain, marked = tiny.embed(["w1 w2", "w1 [SEP] w2"])
    assert not np.allclose(plain, marked, atol=1e-3)
    assert tiny._tokenizer.encode("w1 [SEP] w2", add_special_tokens=False).ids.count(3) == 0


def test_no_texts_give_no_rows(tiny):
    assert tiny.embed([]).shape == (0, 32)


def test_progress_is_reported_under_the_label(tiny, capsys, monkeypatch):
    monkeypatch.setattr("rapid_jax.runtime.progress.time.monotonic", iter(range(0, 10000, 60)).__next__)
    tiny.embed([sentence(100)] * 20, "reading")
    assert "reading: " in capsys.readouterr().err
    tiny.embed([sentence(100)] * 20)
    assert capsys.readouterr().err == ""


def test_folders_without_a_usable_tokenizer_are_refused(tmp_path):
    folder = save(tmp_path, "bert")
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"tokenizer\.json: cannot be read"):
        Embedder(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"tokenizer\.json, found none"):
        Embedder(folder)


def test_a_tokenizer_larger_than_the_word_table_is_refused(tmp_path):
    folder = save(tmp_path, "bert")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens([f"extra{i}" for i in range(20)])
    tokenizer.save(str(folder / "tokenizer.json"))
    with pytest.raises(InputError, match="below the 100 rows of its word table"):
        Embedder(folder)


def test_minilm_puts_a_paraphrase_nearer_than_another_subject(minilm):
    texts = ["A man is eating food.", "A man is eating a piece of bread.", "The girl is carrying a baby."]
    cosines = minilm.embed(texts) @ minilm.embed(texts).T
    assert cosines[0, 1] > 0.7 > 0.2 > cosines[0, 2]


def test_a_fact_in_the_second_half_of_a_chunk_is_found(minilm):
    """450 words: MiniLM's own input ends before the fact; the windows' mean still ranks the chunk first."""
    filler = "The committee discussed the budget of the coming year and the repair of the roof at length. "
    other = "Rain is expected in the north, and the wind will turn to the west in the evening hours. "
    fact = "The secret password of the old lighthouse keeper is marmalade. " * 3
    chunks = [filler * 26, filler * 16 + fact + filler * 10, other * 26]
    query = minilm.embed(["What is the password of the lighthouse keeper?"])[0]
    scores = minilm.embed(chunks) @ query
    first_window = minilm.embed([filler * 13])[0] @ query
    assert len(minilm._tokenizer.encode(filler * 16, add_special_tokens=False).ids) > 256
    assert scores.argmax() == 1
    assert scores[1] > first_window + 0.1
