# SPDX-License-Identifier: Apache-2.0
"""A stored array comes back exactly or not at all."""

import numpy as np
import pytest

from rapid_jax.retrieval.store import EmbeddingStore

VECTORS_NE = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32)


@pytest.fixture
def store(tmp_path):
    return EmbeddingStore(tmp_path / "embeddings")


def test_round_trip_and_absence(store):
    key = store.key("encoder", ["a", "b"])
    assert store.load(key) is None
    store.save(key, VECTORS_NE)
    np.testing.assert_array_equal(store.load(key), VECTORS_NE)


def test_the_key_depends_on_encoder_texts_and_order():
    keys = [
        EmbeddingStore.key(encoder, texts)
        for encoder, texts in [("e", ["a", "b"]), ("f", ["a", "b"]), ("e", ["b", "a"]), ("e", ["ab"]), ("e", ["a"])]
    ]
    keys += [EmbeddingStore.key("e", ["a", "b"], "ann"), EmbeddingStore.key("e", ["b"], "a")]
    assert len(set(keys)) == len(keys)


def test_the_file_is_plain_npy(store):
    store.save("k", VECTORS_NE)
    np.testing.assert_array_equal(np.load(store.path("k"), allow_pickle=False), VECTORS_NE)


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-40], lambda data: data[:150] + b"\xff" + data[151:], lambda data: b""]
)
def test_damage_is_reported_and_counts_as_absent(store, caplog, damage):
    store.save("k", VECTORS_NE)
    store.path("k").write_bytes(damage(store.path("k").read_bytes()))
    assert store.load("k") is None
    assert "unusable" in caplog.text


def test_a_disk_that_cannot_be_written_only_warns(tmp_path, caplog):
    (tmp_path / "file").write_text("not a folder")
    EmbeddingStore(tmp_path / "file" / "below").save("k", VECTORS_NE)
    assert "could not be cached" in caplog.text
