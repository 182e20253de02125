# SPDX-License-Identifier: Apache-2.0
"""A stored array comes back exactly or not at all."""

import numpy as np
import pytest

from rapid_jax.retrieval.store import EmbeddingStore

VECTORS_WE = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32)
OWNERS_W = np.array([0, 0, 1, 2, 2, 2, 3], np.int32)


@pytest.fixture
def store(tmp_path):
    return EmbeddingStore(tmp_path / "embeddings")


def test_round_trip_and_absence(store):
    key = store.key("encoder", "128", ["a", "b"])
    assert store.load(key) is None
    store.save(key, VECTORS_WE, OWNERS_W)
    for read, written in zip(store.load(key), (VECTORS_WE, OWNERS_W), strict=True):
        np.testing.assert_array_equal(read, written)
        assert read.dtype == written.dtype


def test_the_key_depends_on_encoder_windows_texts_and_order():
    keys = [
        EmbeddingStore.key(encoder, "128", texts)
        for encoder, texts in [("e", ["a", "b"]), ("f", ["a", "b"]), ("e", ["b", "a"]), ("e", ["ab"]), ("e", ["a"])]
    ]
    keys += [EmbeddingStore.key("e", "128", ["a", "b"], "ann"), EmbeddingStore.key("e", "128", ["b"], "a")]
    keys += [EmbeddingStore.key("e", "mean", ["a", "b"]), EmbeddingStore.key("e", "None", ["a", "b"])]
    assert len(set(keys)) == len(keys)


def test_the_file_is_plain_npy(store):
    store.save("k", VECTORS_WE, OWNERS_W)
    np.testing.assert_array_equal(np.load(store.path("k"), allow_pickle=False), VECTORS_WE)


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-40], lambda data: data[:150] + b"\xff" + data[151:], lambda data: b""]
)
def test_damage_is_reported_and_counts_as_absent(store, caplog, damage):
    store.save("k", VECTORS_WE, OWNERS_W)
    store.path("k").write_bytes(damage(store.path("k").read_bytes()))
    assert store.load("k") is None
    assert "unusable" in caplog.text


def test_owners_of_other_vectors_are_not_read(store, caplog):
    store.save("k", VECTORS_WE, OWNERS_W[:-1])
    assert store.load("k") is None and "unusable" in caplog.text


def test_a_disk_that_cannot_be_written_only_warns(tmp_path, caplog):
    (tmp_path / "file").write_text("not a folder")
    EmbeddingStore(tmp_path / "file" / "below").save("k", VECTORS_WE, OWNERS_W)
    assert "could not be cached" in caplog.text
