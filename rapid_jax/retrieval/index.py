# SPDX-License-Identifier: Apache-2.0
"""Search over chunk vectors with ScaNN: exact, or a tree with asymmetric hashing (arXiv 1908.10396), one interface.

The `scann` package is imported on first use. It would import TensorFlow if installed (seconds, 600 MB), for operators
that are not used here and that fail to load beside another TensorFlow than it was built for: it is imported without.
"""

import functools
import json
import math
import re
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np

from rapid_jax.retrieval.config import RetrievalConfig
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.files import digest_file, replace_folder
from rapid_jax.runtime.json_input import Fields, read_object, shown

_FORMAT = 1
_MANIFEST = "manifest.json"
# What a ScaNN folder may hold. Its own id file is a pickle, which runs what it says: ids are kept in the manifest.
_SCANN_FILES = frozenset(
    {
        "scann_assets.pbtxt",
        "scann_config.pb",
        "dataset.npy",
        "hashed_dataset.npy",
        "ah_codebook.pb",
        "serialized_partitioner.pb",
        "datapoint_to_token.npy",
    }
)
_MOST_DIM = 2**16  # of a vector
_CODEWORDS = 16  # entries of a 4-bit codebook: a tree cannot be trained on fewer points
_import_lock = threading.Lock()


@functools.cache
def _load_scann() -> ModuleType:
    with _import_lock:
        absent = object()
        tensorflow: Any = sys.modules.get("tensorflow", absent)
        sys.modules["tensorflow"] = None  # type: ignore[assignment]  # an import of it now fails, which scann expects
        try:
            from scann.scann_ops.py import scann_ops_pybind
        finally:
            if tensorflow is absent:
                del sys.modules["tensorflow"]
            else:
                sys.modules["tensorflow"] = tensorflow
    return scann_ops_pybind


def _check(vectors: np.ndarray, what: str) -> np.ndarray:
    """The vectors as a contiguous float32 matrix. A NaN inside ScaNN's tree would end the process, not raise."""
    matrix = np.ascontiguousarray(vectors, np.float32)
    if matrix.ndim != 2 or matrix.shape[1] < 1:
        raise InputError(f"index: expected {what} as a matrix [n, E], got shape {list(matrix.shape)}")
    bad = np.flatnonzero(~np.isfinite(matrix).all(axis=1))
    if len(bad):
        raise InputError(f"index: expected finite {what}, got NaN or infinity in row {bad[0]} ({len(bad)} such rows)")
    return matrix


def _build_exact(vectors_NE: np.ndarray) -> Any:
    return _load_scann().builder(vectors_NE, 1, "dot_product").score_brute_force().build()


def _build_tree(vectors_NE: np.ndarray, leaves: int) -> Any:
    """Chunks in leaves by k-means; in a leaf 4-bit codes of two dimensions each; reordering by exact float32 scores.

    0.2 is the anisotropic threshold that ScaNN's authors use for unit vectors. Training takes every chunk: at most
    tens of thousands of chunks come from one document.
    """
    count = len(vectors_NE)
    return (
        _load_scann()
        .builder(vectors_NE, 1, "dot_product")
        .tree(num_leaves=leaves, num_leaves_to_search=leaves, training_sample_size=count)
        .score_ah(2, anisotropic_quantization_threshold=0.2, training_sample_size=count)
        .reorder(count)
        .build()
    )


def _check_searcher(searcher: Any, ids: np.ndarray, dim: int, leaves: int) -> None:
    """Raises ValueError, or ScaNN's RuntimeError, if the searcher holds something else than the manifest says."""
    if len(np.unique(ids)) != len(ids):
        raise ValueError("two rows have the same id")
    rows = 0 if searcher is None else searcher.size()
    if rows != len(ids):
        raise ValueError(f"it holds {rows} rows and {len(ids)} ids")
    if searcher is None:
        return
    stated = re.search(r"num_children: (\d+)", searcher.config())
    if leaves != (int(stated[1]) if stated else 0):
        raise ValueError(f"it does not have {leaves} leaves")
    searcher.search_batched(np.zeros((1, dim), np.float32), final_num_neighbors=1)


class Index:
    """Vectors that can be searched by inner product (the cosine, for unit vectors); made by `build` or `load`."""

    def __init__(self, searcher: Any, kind: Literal["exact", "tree"], ids: np.ndarray, dim: int, leaves: int):
        self._searcher = searcher
        self.kind = kind
        self.ids = ids  # int64 [n], what `search` gives back for each row
        self.dim = dim
        self.leaves = leaves  # 0 for an exact index

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def build(cls, vectors_NE: np.ndarray, config: RetrievalConfig, ids: Sequence[int] | None = None) -> "Index":
        """An index of the rows, exact or a tree as `config.index` and `config.exact_below` say.

        `ids` name the rows (default 0 .. n-1). No rows at all is an index that finds nothing. A tree has at most as
        many leaves as rows; below 16 rows it is exact, whatever the config says.
        """
        vectors_NE = _check(vectors_NE, "vectors")
        count, dim = vectors_NE.shape
        names = np.arange(count, dtype=np.int64) if ids is None else np.asarray(ids, np.int64)
        if names.shape != (count,) or len(np.unique(names)) != count:
            raise InputError(f"index: expected {count} different ids, got {len(np.unique(names))} of {names.size}")
        tree = config.index == "tree" or (config.index == "auto" and count >= config.exact_below)
        if tree and count >= _CODEWORDS:
            leaves = min(config.leaves or round(math.sqrt(count)), count)
            return cls(_build_tree(vectors_NE, leaves), "tree", names, dim, leaves)
        return cls(_build_exact(vectors_NE) if count else None, "exact", names, dim, 0)

    def search(
        self, queries_QE: np.ndarray, k: int, config: RetrievalConfig | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The min(k, n) best rows of each query: scores float32 [Q, k] falling, ids int64 [Q, k].

        Of a tree, `config.leaves_to_search` leaves are looked into (default half) and `config.reorder` candidates
        compared exactly. How many of the ten best are found then depends on the vectors: 0.95 of 2,000 unit vectors of
        48 numbers around 80 centres, 0.85 of 3,000 random ones of 48, which have no leaves to be in, 0.7 of random ones
        of 384 (tests/retrieval/test_index.py measures all three). A query whose leaves hold fewer than k chunks is
        searched again in all of them, so there is never an empty place in the result.
        """
        config = config or RetrievalConfig()
        queries_QE = _check(queries_QE, "queries")
        if queries_QE.shape[1] != self.dim:
            raise InputError(f"index: expected queries of {self.dim} dimensions, got {queries_QE.shape[1]}")
        if k < 1:
            raise InputError(f"index: expected k >= 1, got {k}")
        k = min(k, len(self))
        if not k or not len(queries_QE):
            return np.zeros((len(queries_QE), k), np.float32), np.zeros((len(queries_QE), k), np.int64)
        if self.kind == "exact":
            rows_QK, scores_QK = self._searcher.search_batched(queries_QE, final_num_neighbors=k)
        else:
            rows_QK, scores_QK = self._search_tree(queries_QE, k, config)
        return np.asarray(scores_QK, np.float32), self.ids[np.asarray(rows_QK, np.int64)]

    def _search_tree(self, queries_QE: np.ndarray, k: int, config: RetrievalConfig) -> tuple[np.ndarray, np.ndarray]:
        leaves = min(config.leaves_to_search or math.ceil(self.leaves / 2), self.leaves)
        candidates = min(max(config.reorder or max(10 * k, 200), k), len(self))
        rows_QK, scores_QK = self._searcher.search_batched(
            queries_QE, final_num_neighbors=k, pre_reorder_num_neighbors=candidates, leaves_to_search=leaves
        )
        # ScaNN fills up a short result with row 0 and NaN.
        short_Q = np.isnan(scores_QK).any(axis=1)
        if short_Q.any():
            rows_QK[short_Q], scores_QK[short_Q] = self._searcher.search_batched(
                queries_QE[short_Q],
                final_num_neighbors=k,
                pre_reorder_num_neighbors=len(self),
                leaves_to_search=self.leaves,
            )
        return rows_QK, scores_QK

    def save(self, folder: Path) -> None:
        """Writes the index as a folder that can be moved, whole or not at all, with a hash of every file."""
        with replace_folder(folder) as temporary:
            if self._searcher is not None:
                self._searcher.serialize(str(temporary), relative_path=True)
            files = {path.name: digest_file(path) for path in sorted(temporary.iterdir())}
            manifest = {
                "format": _FORMAT,
                "kind": self.kind,
                "dim": self.dim,
                "leaves": self.leaves,
                "ids": self.ids.tolist(),
                "files": files,
            }
            (temporary / _MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> "Index":
        """The index that `save` wrote. InputError if anything in the folder is missing, damaged or unknown."""
        try:
            manifest = read_object(folder / _MANIFEST)
            if manifest.whole("format") != _FORMAT:
                raise manifest.error("format", str(_FORMAT))
            hashes: Fields = manifest.fields("files")
            present = {path.name for path in folder.iterdir()} - {_MANIFEST}
            if unknown := sorted((present | set(hashes)) - _SCANN_FILES):
                raise InputError(f"expected the files of an index, got {shown(unknown[0])}; nothing was read")
            for name in hashes:
                if not (folder / name).is_file() or digest_file(folder / name) != hashes.text(name):
                    raise InputError(f"{name} is damaged: its hash is not the one in {_MANIFEST}")
            ids = np.asarray(manifest.wholes("ids", least=-(2**63), most=2**63 - 1), np.int64)
            kind, leaves = manifest.text("kind"), manifest.whole("leaves", most=len(ids))
            if kind not in ("exact", "tree") or (kind == "tree") != (leaves > 0):
                raise manifest.error("kind", f"exact or tree, as its {leaves} leaves are")
            dim = manifest.whole("dim", least=1, most=_MOST_DIM)
            searcher = _load_scann().load_searcher(str(folder)) if hashes else None
            _check_searcher(searcher, ids, dim, leaves)
            return cls(searcher, kind, ids, dim, leaves)
        except (InputError, OSError, ValueError, RuntimeError) as error:
            said = str(error) if isinstance(error, InputError) else repr(error)
            raise InputError(f"index {folder}: cannot be read: {said}") from None
