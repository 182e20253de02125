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
    """Arrays [n, E] of float32 under a folder; a stored array is read back exactly or not at all.

    A file is a plain .npy (never a pickle) followed by the SHA-256 of its bytes, which NumPy ignores. A damaged file is
    reported and counts as absent; an error while writing (full disk, no permission) is reported and changes nothing.
    The time of a file is when it was last used.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    @staticmethod
    def key(fingerprint: str, texts: list[str], whose: str = "") -> str:
        """The name of what an encoder with this fingerprint makes of these texts in this order, of those it is for."""
        return digest("embeddings-2", fingerprint, whose, *texts)

    def path(self, key: str) -> Path:
        """The file of this key, whether or not it exists."""
        return self.folder / f"{key}.npy"

    def load(self, key: str) -> np.ndarray | None:
        """The array stored under the key; None if there is none, or none that can be trusted."""
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

    def save(self, key: str, embeddings_NE: np.ndarray) -> None:
        """Stores the array, whole or not at all."""
        buffer = io.BytesIO()
        np.save(buffer, embeddings_NE, allow_pickle=False)
        body = buffer.getvalue()
        try:
            remove_leftovers(self.folder)
            with replace_file(self.path(key)) as temporary:
                temporary.write_bytes(body + hashlib.sha256(body).digest())
        except OSError as error:
            _log.warning("embeddings could not be cached in %s: %s", self.folder, error)


def read_embeddings(path: Path) -> np.ndarray:
    """The array of one file. Raises OSError for what cannot be read, ValueError for what is not as it was written."""
    data = path.read_bytes()
    body, checksum = data[:-_CHECKSUM_BYTES], data[-_CHECKSUM_BYTES:]
    if hashlib.sha256(body).digest() != checksum:
        raise ValueError("its checksum does not match")
    return np.load(io.BytesIO(body), allow_pickle=False)
