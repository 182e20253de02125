# SPDX-License-Identifier: Apache-2.0
"""Document and question in, selection out; the second question pays only for itself."""

import logging
import threading
from dataclasses import replace

import numpy as np
import pytest

from rapid_jax.retrieval.config import JOIN_TOKENS, RetrievalConfig, retrieved_tokens
from rapid_jax.retrieval.retriever import Retriever
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.files import digest

CONFIG = RetrievalConfig(chunk_tokens=16, min_tokens=48, compression=24, window_tokens=6)
TREE = replace(CONFIG, index="tree")
PAPER = replace(CONFIG, policy="paper")
WINDOWS = 2  # of each of the document's chunks
SUBJECTS = ["apple", "bridge", "candle", "desert", "engine", "forest", "garden", "harbour"]


class WordCounter:
    """Unit vectors of hashed word counts, windows of words; remembers what it was asked to embed."""

    fingerprint = "words"
    threshold: float | None = None

    def __init__(self):
        self.calls: list[list[str]] = []

    def embed(self, texts, progress_label=None, *, are_queries=False):
        self.calls.append(list(texts))
        vectors_NE = np.full((len(texts), 512), 1e-3, np.float32)
        for row, text in enumerate(texts):
            for word in text.lower().split():
                vectors_NE[row, int(digest(word.strip(".?"))[:8], 16) % 512] += 1
        return vectors_NE / np.linalg.norm(vectors_NE, axis=1, keepdims=True)

    def embed_windows(self, texts, window_tokens, progress_label=None):
        cut = [np.array_split(text.split(), -(-len(text.split()) // window_tokens)) for text in texts]
        owners_W = np.repeat(np.arange(len(texts), dtype=np.int32), [len(parts) for parts in cut])
        vectors_WE = self.embed([" ".join(part) for parts in cut for part in parts])
        self.calls[-1] = list(texts)
        return vectors_WE, owners_W


@pytest.fixture
def document():
    """Forty paragraphs of twelve words; the subjects return every eight paragraphs."""
    return "\n\n".join(f"{SUBJECTS[i % 8]} number {i} " + f"{SUBJECTS[i % 8]} " * 8 + "end." for i in range(40))


def ask(retriever, document, query, spans, length_tokens=500):
    return retriever.retrieve(document, query, spans, length_tokens)


def test_the_chunks_of_the_subject_come_in_document_order(document, word_spans):
    selection = ask(Retriever(WordCounter(), CONFIG), document, "Where is the candle?", word_spans)
    assert selection.kept == 3  # 48 tokens of 16
    assert selection.considered == 40
    assert all(chunk.text.startswith("candle") for chunk in selection.chunks)
    assert [chunk.start for chunk in selection.chunks] == sorted(chunk.start for chunk in selection.chunks)
    assert all(document[chunk.start : chunk.end] == chunk.text for chunk in selection.chunks)
    assert selection.text == "\n\n".join(chunk.text.strip() for chunk in selection.chunks)
    assert selection.seconds > 0
    assert not selection.fallback


def test_the_length_of_the_prompt_decides_the_number(document, word_spans):
    retriever = Retriever(WordCounter(), PAPER)
    assert ask(retriever, document, "candle", word_spans, length_tokens=16 * 24 * 5).kept == 5
    assert ask(retriever, document, "candle", word_spans, length_tokens=20).kept == 2


def test_a_question_about_nothing_falls_back_to_one_chunk(document, word_spans):
    """Of a policy with a threshold; else the budget is filled whatever the scores."""
    embedder = WordCounter()
    least = replace(CONFIG, threshold=-1.0)
    for own in (None, 0.3):
        embedder.threshold = own  # the encoder's own, where nobody sets one
        for config, kept in ((PAPER, 1), (replace(CONFIG, threshold=0.3), 1), (least, 3), (CONFIG, 1 if own else 3)):
            selection = ask(Retriever(embedder, config), document, "Who painted the ceiling?", word_spans)
            assert (selection.kept, selection.fallback) == (kept, kept == 1)


@pytest.mark.parametrize("config", [CONFIG, TREE])
@pytest.mark.parametrize("length", [500, 16 * 24 * 5, 16 * 24 * 35])
def test_the_budget_is_filled_with_any_document(document, word_spans, config, length):
    """Whatever the length of its chunks; where all of it fits it goes in as it is."""
    retriever = Retriever(WordCounter(), config)
    for text in (document, document[:300], document.replace(" end.", " end. " * 3)):
        selection = ask(retriever, text, "candle", word_spans, length)
        budget, everything = retrieved_tokens(length, config), len(word_spans(text))
        left = budget - selection.tokens - JOIN_TOKENS * selection.kept
        assert selection.tokens == everything or 0 <= left < 16 + JOIN_TOKENS, "less than the longest chunk"
        assert everything > budget or selection.text == text.strip()


def test_a_chunk_is_as_good_as_its_best_window(word_spans):
    """The mean of its windows puts the chunk that holds the sentence behind others."""
    other, found = "harbour harbour candle " * 4 + "!", "apple " * 6 + "candle " * 3 + "apple " * 3 + "!"
    text = "\n\n".join([other, other, found, other, other])
    best = {"min_tokens": 16, "window_tokens": 3}
    for config in (CONFIG, TREE, PAPER):
        selection = ask(Retriever(WordCounter(), replace(config, **best)), text, "candle", word_spans, 100)
        assert (selection.text == found) == (config is not PAPER)


@pytest.mark.parametrize("config", [CONFIG, TREE])
def test_scores_are_those_of_every_window_compared(document, word_spans, config):
    embedder = WordCounter()
    selection = ask(Retriever(embedder, config), document, "candle number 2", word_spans)
    vectors_WE, owners_W = embedder.embed_windows([chunk.text for chunk in selection.chunks], config.window_tokens)
    scores_W = vectors_WE @ embedder.embed(["candle number 2"])[0]
    best = [scores_W[owners_W == i].max() for i in range(selection.kept)]
    np.testing.assert_allclose(selection.scores, best, atol=1e-5)


def test_a_second_question_embeds_only_itself(document, word_spans):
    embedder = WordCounter()
    calls = []
    retriever = Retriever(embedder, CONFIG)

    def spans(text):
        calls.append(text)
        return word_spans(text)

    first = ask(retriever, document, "candle", spans)
    second = ask(retriever, document, "garden", spans)
    assert [len(call) for call in embedder.calls] == [40, 1, 1]
    assert calls == [document]
    assert first.text != second.text
    ask(retriever, document + " more", "garden", spans)
    assert len(calls) == 2


@pytest.mark.parametrize("config", [CONFIG, TREE])
def test_each_of_those_who_ask_has_documents_of_their_own(document, word_spans, tmp_path, config):
    """In memory and, for another process, on disk."""
    for kept in ([], ["ann", "bob"]):
        embedder = WordCounter()
        retriever = Retriever(embedder, config, tmp_path)
        found = []
        for number, whose in enumerate(("ann", "bob", "ann")):
            embedder.calls.clear()
            assert retriever.remembers(document, word_spans, whose) == (number == 2)
            found.append(retriever.retrieve(document, "candle", word_spans, 500, whose).text)
            assert (len(embedder.calls) == 2) == (whose not in kept and number < 2)
        assert len(set(found)) == 1
    for name in ("embeddings", "indices")[: 1 + (config is TREE)]:
        assert len(list((tmp_path / name).iterdir())) == 2


def test_the_documents_that_were_used_last_are_remembered_within_bytes(document, word_spans):
    one = Retriever(WordCounter(), CONFIG)
    ask(one, document + "a", "candle", word_spans)
    least = WINDOWS * 40 * 512 * 4 + len(document)
    assert least < one.bytes < 1.5 * least
    assert one.remembers(document + "a", word_spans) and not one.remembers(document, word_spans)

    embedder = WordCounter()
    retriever = Retriever(embedder, CONFIG, remember_bytes=2 * one.bytes)
    made = []
    for ending in ("a", "b", "a", "c", "a", "b"):
        embedder.calls.clear()
        ask(retriever, document + ending, "candle", word_spans)
        made.append(len(embedder.calls) == 2)
        assert retriever.bytes <= 2 * one.bytes
    assert made == [True, True, False, True, False, True]
    none = Retriever(WordCounter(), CONFIG, remember_bytes=one.bytes - 1)
    assert ask(none, document + "a", "candle", word_spans).kept and none.bytes == 0


def test_what_is_kept_on_disk_stays_within_its_bound(document, word_spans, tmp_path):
    size = WINDOWS * 40 * 512 * 4
    names = []
    for ending in ("a", "b", "c"):
        retriever = Retriever(WordCounter(), CONFIG, tmp_path, disk_bytes=2 * size + size // 2)
        ask(retriever, document + ending, "candle", word_spans)
        names.append({path.name for path in (tmp_path / "embeddings").iterdir()})
    assert [len(found) for found in names] == [1, 2, 2] and names[0] - names[2]
    ask(Retriever(WordCounter(), CONFIG, tmp_path, disk_bytes=size), document, "candle", word_spans)
    assert {path.name for path in (tmp_path / "embeddings").iterdir()} != names[2]
    before = {path.name for path in (tmp_path / "embeddings").iterdir()}
    ask(Retriever(WordCounter(), CONFIG, tmp_path, disk_bytes=size - 1), document + "d", "candle", word_spans)
    assert {path.name for path in (tmp_path / "embeddings").iterdir()} == before, "too large for all the room"


def test_many_threads_ask_at_once(document, word_spans):
    embedder = WordCounter()
    retriever, found = Retriever(embedder, CONFIG, remember_bytes=1 << 19), []
    threads = [
        threading.Thread(target=lambda n=n: found.append(ask(retriever, document + "ab"[n % 2], "candle", word_spans)))
        for n in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({selection.text for selection in found}) == 1 and len(found) == 8
    assert sum(len(call) > 1 for call in embedder.calls) == 2, "each document's vectors are made once"


@pytest.mark.parametrize("config", [CONFIG, TREE])
def test_another_process_reads_vectors_and_index_from_disk(document, word_spans, tmp_path, config, monkeypatch):
    first = ask(Retriever(WordCounter(), config, tmp_path), document, "candle", word_spans)
    assert len(list((tmp_path / "embeddings").iterdir())) == 1
    assert (tmp_path / "indices").exists() == (config is TREE)
    if config is TREE:
        monkeypatch.setattr("rapid_jax.retrieval.index._build_tree", None)
    embedder = WordCounter()
    second = ask(Retriever(embedder, config, tmp_path), document, "candle", word_spans)
    assert embedder.calls == [["candle"]]
    assert second.chunks == first.chunks
    assert second.scores == first.scores


@pytest.mark.parametrize("kind", ["embeddings", "indices"])
def test_damaged_files_are_reported_and_made_again(document, word_spans, tmp_path, caplog, kind):
    first = ask(Retriever(WordCounter(), TREE, tmp_path), document, "candle", word_spans)
    path = next(path for path in (tmp_path / kind).rglob("*.npy"))
    path.write_bytes(path.read_bytes()[:-60])
    with caplog.at_level(logging.WARNING):
        second = ask(Retriever(WordCounter(), TREE, tmp_path), document, "candle", word_spans)
    assert "unusable and will be made again" in caplog.text
    assert second.chunks == first.chunks
    caplog.clear()
    embedder = WordCounter()
    ask(Retriever(embedder, TREE, tmp_path), document, "candle", word_spans)
    assert caplog.text == ""
    assert embedder.calls == [["candle"]]


def test_a_cache_that_cannot_be_written_only_warns(document, word_spans, tmp_path, caplog):
    (tmp_path / "file").write_text("not a folder")
    selection = ask(Retriever(WordCounter(), TREE, tmp_path / "file"), document, "candle", word_spans)
    assert selection.kept == 3
    assert caplog.text.count("could not be cached") == 2


@pytest.mark.parametrize(
    ("document", "query", "message"),
    [
        ("", "why?", "a document with text"),
        ("text", " \n", "a question with text"),
        ("te\ud800xt", "why?", "a document in valid Unicode, got half a character at 2"),
        ("text", "why\udcff?", "a question in valid Unicode"),
    ],
)
def test_input_that_cannot_be_used(document, query, message, word_spans):
    with pytest.raises(InputError, match=message):
        ask(Retriever(WordCounter(), CONFIG), document, query, word_spans)


def test_minilm_finds_the_needle(minilm, word_spans):
    filler = "The committee discussed the budget of the coming year and the repair of the roof. " * 6
    weather = "Rain is expected in the north, and the wind will turn to the west in the evening. " * 6
    needle = "The magic number of the lighthouse keeper is 4711; nobody else knows it. "
    paragraphs = [filler, weather] * 6
    paragraphs[7] = needle * 2 + weather
    config = RetrievalConfig(chunk_tokens=128, min_tokens=256)
    retriever = Retriever(minilm, config, quiet=True)
    selection = ask(retriever, "\n\n".join(paragraphs), "What is the lighthouse keeper's magic number?", word_spans)
    assert "4711" in selection.text
    assert selection.kept <= 2
