# SPDX-License-Identifier: Apache-2.0
"""Exact search is a matrix product; the tree finds nearly the same; every trap of ScaNN is closed."""

import json
import pickle
import subprocess
import sys
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from rapid_jax.retrieval.config import RetrievalConfig
from rapid_jax.retrieval.index import Index
from rapid_jax.runtime.errors import InputError
from tests.json_mutations import VALUES, amiss, mutations

AUTO = RetrievalConfig()
TREE = replace(AUTO, index="tree")


def unit(array: np.ndarray) -> np.ndarray:
    return (array / np.linalg.norm(array, axis=-1, keepdims=True)).astype(np.float32)


def random_rows(count: int, dim: int = 24, seed: int = 0) -> np.ndarray:
    return unit(np.random.default_rng(seed).normal(size=(count, dim)))


@pytest.fixture(scope="module")
def clustered():
    """2000 rows and 200 queries around 80 centres, noise as long as the centres."""
    generator = np.random.default_rng(1)
    centres = unit(generator.normal(size=(80, 48)))
    near = lambda count: unit(centres[generator.integers(0, 80, count)] + unit(generator.normal(size=(count, 48))))  # noqa: E731
    return near(2000), near(200)


@pytest.fixture(scope="module")
def tree(clustered):
    return Index.build(clustered[0], TREE)


def best(rows_NE, queries_QE, k):
    scores_QN = queries_QE @ rows_NE.T
    order_QK = np.argsort(-scores_QN, axis=1)[:, :k]
    return np.take_along_axis(scores_QN, order_QK, axis=1), order_QK


def test_exact_search_is_the_sorted_matrix_product(clustered):
    rows_NE, queries_QE = clustered
    index = Index.build(rows_NE, AUTO)
    scores_QK, ids_QK = index.search(queries_QE, 10)
    expected_scores_QK, expected_ids_QK = best(rows_NE, queries_QE, 10)
    np.testing.assert_allclose(scores_QK, expected_scores_QK, atol=1e-5)
    np.testing.assert_array_equal(ids_QK, expected_ids_QK)
    assert index.kind == "exact"


def test_the_cosine_example_of_the_specification():
    rows_NE = np.array([[1, 0, 0], [0.6, 0.8, 0], [0, 1, 0], [0.8, 0, 0.6], [-0.6, 0, 0.8]], np.float32)
    scores_QK, ids_QK = Index.build(rows_NE, AUTO).search(np.array([[0.8, 0.6, 0]]), 3)
    assert ids_QK.tolist() == [[1, 0, 3]]
    np.testing.assert_allclose(scores_QK, [[0.96, 0.8, 0.64]], atol=1e-6)


def recall(rows_NE, queries_QE, ids_QK) -> float:
    """The share of each query's ten best rows that are among the ids."""
    truth_QK = best(rows_NE, queries_QE, 10)[1]
    return float(np.mean([len(set(found) & set(true)) / 10 for found, true in zip(ids_QK, truth_QK, strict=True)]))


@pytest.mark.parametrize(("dim", "least", "most"), [(48, 0.78, 0.92), (384, 0.6, 0.78)])
def test_what_the_tree_finds_of_vectors_without_structure(dim, least, most):
    """What the docstring of `Index.search` says of them."""
    rows_NE, queries_QE = random_rows(3000, dim), random_rows(200, dim, seed=1)
    ids_QK = Index.build(rows_NE, TREE).search(queries_QE, 10, TREE)[1]
    assert least <= recall(rows_NE, queries_QE, ids_QK) <= most


def test_the_tree_finds_nine_of_ten_around_centres(clustered, tree):
    rows_NE, queries_QE = clustered
    scores_QK, ids_QK = tree.search(queries_QE, 10, TREE)
    assert tree.kind == "tree"
    assert recall(rows_NE, queries_QE, ids_QK) >= 0.93
    # Reordering makes the scores of what was found exact.
    np.testing.assert_allclose(scores_QK, np.take_along_axis(queries_QE @ rows_NE.T, ids_QK, axis=1), atol=1e-5)


def test_the_tree_with_all_leaves_and_candidates_is_exact(clustered, tree):
    rows_NE, queries_QE = clustered
    everything = replace(TREE, leaves_to_search=tree.leaves, reorder=len(rows_NE))
    np.testing.assert_allclose(tree.search(queries_QE, 10, everything)[0], best(rows_NE, queries_QE, 10)[0], atol=1e-5)


def test_auto_takes_a_tree_from_exact_below_on():
    config = replace(AUTO, exact_below=100)
    assert Index.build(random_rows(99), config).kind == "exact"
    assert Index.build(random_rows(100), config).kind == "tree"


@pytest.mark.parametrize("config", [AUTO, TREE])
@pytest.mark.parametrize("count", [1, 3, 15, 16, 17, 40])
def test_small_sets_give_every_row_once_and_no_more(config, count):
    """k > n, n < leaves, n below the codebook's size: never padding, never an error."""
    config = replace(config, leaves=40, leaves_to_search=1)
    rows_NE = random_rows(count)
    scores_QK, ids_QK = Index.build(rows_NE, config).search(rows_NE[:1], 100, config)
    assert sorted(ids_QK[0]) == list(range(count))
    np.testing.assert_allclose(np.sort(scores_QK[0]), np.sort(rows_NE @ rows_NE[0]), atol=1e-5)


def test_equal_rows_and_odd_dimensions_make_a_tree():
    scores_QK, ids_QK = Index.build(np.tile(random_rows(1, 7), (60, 1)), TREE).search(random_rows(1, 7), 60, TREE)
    assert sorted(ids_QK[0]) == list(range(60))
    np.testing.assert_allclose(scores_QK, 1, atol=1e-5)


def test_an_empty_set_finds_nothing():
    scores_QK, ids_QK = Index.build(np.zeros((0, 8)), TREE).search(random_rows(2, 8), 5)
    assert scores_QK.shape == ids_QK.shape == (2, 0)


def test_no_queries_give_no_results():
    assert Index.build(random_rows(5), AUTO).search(np.zeros((0, 24)), 3)[1].shape == (0, 3)


@pytest.mark.parametrize("config", [AUTO, TREE])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_rows_that_are_not_finite_never_reach_scann(config, value):
    rows_NE = random_rows(50)
    rows_NE[7, 3] = value
    with pytest.raises(InputError, match="row 7"):
        Index.build(rows_NE, config)
    with pytest.raises(InputError, match="finite queries"):
        Index.build(random_rows(50), config).search(rows_NE[7:8], 3)


def test_wrong_shapes_are_refused():
    index = Index.build(random_rows(5), AUTO)
    with pytest.raises(InputError, match="24 dimensions, got 8"):
        index.search(random_rows(1, 8), 3)
    with pytest.raises(InputError, match="matrix"):
        index.search(random_rows(1)[0], 3)
    with pytest.raises(InputError, match="k >= 1"):
        index.search(random_rows(1), 0)
    with pytest.raises(InputError, match="5 different ids"):
        Index.build(random_rows(5), AUTO, ids=[1, 2, 3, 3, 4])


def test_ids_name_the_rows():
    rows_NE = random_rows(5)
    assert Index.build(rows_NE, AUTO, ids=[50, 40, 30, 20, 10]).search(rows_NE[3:4], 1)[1].tolist() == [[20]]


@pytest.mark.parametrize("config", [AUTO, TREE])
@pytest.mark.parametrize("count", [0, 60])
def test_a_saved_index_can_be_moved_and_answers_the_same(tmp_path, monkeypatch, config, count):
    rows_NE, queries_QE = random_rows(count), random_rows(3, seed=5)
    index = Index.build(rows_NE, config, ids=range(100, 100 + count))
    index.save(tmp_path / "made here")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "made here").rename(tmp_path / "elsewhere" / "index")
    monkeypatch.chdir(tmp_path / "elsewhere")
    loaded = Index.load(tmp_path / "elsewhere" / "index")
    for made, read in zip(index.search(queries_QE, 7, config), loaded.search(queries_QE, 7, config), strict=True):
        np.testing.assert_array_equal(made, read)
    assert (loaded.kind, loaded.dim, loaded.leaves, len(loaded)) == (index.kind, 24, index.leaves, count)


def test_a_saved_index_holds_no_pickle_and_reads_none(tmp_path):
    folder = tmp_path / "index"
    Index.build(random_rows(60), TREE).save(folder)
    assert not list(folder.glob("*.pkl"))
    assert json.loads((folder / "manifest.json").read_text())["ids"] == list(range(60))
    (folder / "scann_docids.pkl").write_bytes(pickle.dumps(list(range(60))))
    with pytest.raises(InputError, match=r"scann_docids\.pkl"):
        Index.load(folder)


@pytest.mark.parametrize("name", ["dataset.npy", "scann_config.pb", "scann_assets.pbtxt", "manifest.json"])
def test_damage_is_found(tmp_path, name):
    folder = tmp_path / "index"
    Index.build(random_rows(60), AUTO).save(folder)
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 0xFF
    (folder / name).write_bytes(data)
    with pytest.raises(InputError, match="index"):
        Index.load(folder)
    (folder / name).unlink()
    with pytest.raises(InputError, match="cannot be read"):
        Index.load(folder)


def test_neither_import_nor_search_brings_tensorflow():
    program = """
import importlib, pkgutil, sys
import numpy as np
import rapid_jax.retrieval as package
for module in pkgutil.iter_modules(package.__path__):
    importlib.import_module("rapid_jax.retrieval." + module.name)
assert "scann" not in sys.modules and "tensorflow" not in sys.modules, "imported by importing"
from rapid_jax.retrieval.config import RetrievalConfig
from rapid_jax.retrieval.index import Index
rows = np.eye(40, dtype=np.float32)
for kind in ("exact", "tree"):
    config = RetrievalConfig(index=kind)
    assert Index.build(rows, config).search(rows[:1], 1, config)[1].tolist() == [[0]]
assert "scann" in sys.modules and "tensorflow" not in sys.modules, "imported by searching"
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr


def test_a_manifest_with_each_value_replaced(tmp_path):
    folder, rows = tmp_path / "index", random_rows(60)
    Index.build(rows, TREE).save(folder)
    expected = Index.load(folder).search(rows[:5], 10)
    given = json.loads((folder / "manifest.json").read_text())
    ids = given["ids"]
    few = [(f"ids begin with {value!r}", given | {"ids": [value, *ids[1:]]}) for value in VALUES if value != 0]
    few += [("fewer ids", given | {"ids": ids[1:]}), ("more ids", given | {"ids": [*ids, 60]})]
    few += [(f"ids = {value!r}", given | {"ids": value}) for value in VALUES]
    rest = {key: value for key, value in given.items() if key != "ids"}
    cases = [(what, {"ids": ids, **case}) for what, case in mutations(rest)] + few
    cases += [(f"all of it = {value!r}", value) for value in VALUES]

    def check(case: object) -> None:
        (folder / "manifest.json").write_text(json.dumps(case))
        found = Index.load(folder).search(rows[:5], 10)
        np.testing.assert_array_equal(found[0], expected[0])
        assert "ids begin" in what or np.array_equal(found[1], expected[1])

    wrong = []
    for what, case in cases:
        wrong.append(amiss(what, partial(check, case)))
    assert len(wrong) > 200
    assert not any(wrong), "\n".join(list(filter(None, wrong))[:20])
