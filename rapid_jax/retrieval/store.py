# SPDX-License-Identifier: Apache-2.0
"""Embeddings on disk, one file a document, named by the hash of everything that made them."""

import contextlib
import hashlib
import io
import logging
import os
from pathlib import Path

import numpy as np

from rapid_jax.runtime.files import digest, remove_leftovers, replace_file

_log = logging.getLogger(__name__)
_CHECKSUM_BYTES = hashlib.sha256().digest_size


class EmbeddingStore:
    """Windows' vectors [W, E] of float32 and their owners, int32 [W], under a folder, read back exactly or not at all.

    A file is two plain .npy (never a pickle), one behind the other, and the SHA-256 of their bytes. A damaged file is
    reported and counts as absent; an error while writing (full disk, no permission) is reported and changes nothing.
    The time of a file is when it was last used.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    @staticmethod
    def key(fingerprint: str, windows: str, texts: list[str], whose: str = "") -> str:
        """The name of what an encoder with this fingerprint makes of these texts in this order, in these windows, of
        those it is for.
        """
        return digest("embeddings-3", fingerprint, windows, whose, *texts)

    def path(self, key: str) -> Path:
        """The file of this key, whether or not it exists."""
        return self.folder / f"{key}.npy"

    def load(self, key: str) -> tuple[np.ndarray, np.ndarray] | None:
        """(vectors, owners) stored under the key; None if there are none, or none that can be trusted."""
        path = self.path(key)
        try:
            found = read_embeddings(path)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            _log.warning("cached embeddings %s are unusable and will be made again: %s", path, error)
            return None
        with contextlib.suppress(OSError):  # a folder that may only be read is no less useful
            os.utime(path)
        return found

    def save(self, key: str, vectors_WE: np.ndarray, owners_W: np.ndarray) -> None:
        """Stores both, whole or not at all."""
        buffer = io.BytesIO()
        for array in (vectors_WE, owners_W):
            np.save(buffer, array, allow_pickle=False)
        body = buffer.getvalue()
        try:
            remove_leftovers(self.folder)
            with replace_file(self.path(key)) as temporary:
                temporary.write_bytes(body + hashlib.sha256(body).digest())
        except OSError as error:
            _log.warning("embeddings could not be cached in %s: %s", self.folder, error)


def read_embeddings(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """(vectors, owners) of one file. OSError for what cannot be read, ValueError for what is not as it was written."""
    data = path.read_bytes()
    body, checksum = data[:-_CHECKSUM_BYTES], data[-_CHECKSUM_BYTES:]
    if hashlib.sha256(body).digest() != checksum:
        raise ValueError("its checksum does not match")
    buffer = io.BytesIO(body)
    vectors_WE, owners_W = (np.load(buffer, allow_pickle=False) for _ in range(2))
    if vectors_WE.ndim != 2 or owners_W.shape != vectors_WE.shape[:1]:
        raise ValueError(f"it holds {vectors_WE.shape} vectors and {owners_W.shape} owners")
    return vectors_WE, owners_W
