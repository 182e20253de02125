# SPDX-License-Identifier: Apache-2.0
"""Texts to unit vectors: the encoder's own tokens in windows, batched by length, compiled once a shape."""

import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tokenizers import Tokenizer

from rapid_jax.model.backend import encoding_of, encodings_of, read_backend
from rapid_jax.retrieval.encoder import Pooling
from rapid_jax.retrieval.encoder_io import THRESHOLDS, encoder_folder, fingerprint, load_encoder, read_config
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.progress import progress
from rapid_jax.runtime.storage import AnyPlace

_SHORTEST_BUCKET = 32
_FEW_ROWS = 8


def bucket_lengths(max_tokens: int) -> list[int]:
    """Padded lengths 32, 48, 64, 96, 128, 192, ... up to `max_tokens`: at most a third of a row is padding above 32."""
    lengths = []
    power = _SHORTEST_BUCKET
    while power < max_tokens:
        lengths += [length for length in (power, power * 3 // 2) if length < max_tokens]
        power *= 2
    return [*lengths, max_tokens]


def windows(ids: Sequence[int], capacity: int) -> list[np.ndarray]:
    """The ids cut into as few windows of at most `capacity` as possible, of equal length but for one id."""
    return np.array_split(np.asarray(ids, np.int32), max(1, -(-len(ids) // capacity)))


class Embedder:
    """One encoder, loaded once, and its compiled programs.

    `name` is "minilm" or a Hugging Face folder (BERT, RoBERTa, XLM-RoBERTa such as BGE-M3). `dtype` is that of the
    matrices and activations; norms, softmax, pooling and the result are float32.
    """

    def __init__(
        self,
        name: str | AnyPlace,
        *,
        batch_size: int = 32,
        pooling: Pooling | None = None,
        dtype: str = "float32",
    ):
        self.folder = encoder_folder(name)
        self.config = read_config(self.folder, pooling)
        self.threshold = THRESHOLDS.get(str(name))
        self.batch_size = batch_size
        self._dtype = jnp.dtype(dtype)
        self._tokenizer = self._read_tokenizer()
        self._before, self._after, self._pad = self._read_template()
        graph, self._weights = nnx.split(load_encoder(self.folder, self.config, self._dtype))
        self._forward = jax.jit(lambda weights, ids_BT, mask_BT: nnx.merge(graph, weights)(ids_BT, mask_BT))
        self._buckets = bucket_lengths(self.config.max_tokens)
        self.shapes: set[tuple[int, int]] = set()  # (rows, length) of every program compiled so far

    def _read_tokenizer(self) -> Tokenizer:
        path = self.folder / "tokenizer.json"
        if not path.is_file():
            raise InputError(f"encoder: expected the file {path}, found none")
        # Folders ship with truncation and padding of their own (MiniLM: to 128); both are done here.
        tokenizer = read_backend(path.read_bytes(), f"encoder: {path}")
        # "[SEP]" in a document is text, not the end of a segment.
        tokenizer.encode_special_tokens = True
        last = max(tokenizer.get_vocab().values(), default=-1)
        if last >= self.config.vocab_size:
            raise InputError(
                f"encoder {self.folder}: expected token ids below the {self.config.vocab_size} rows of its word table, "
                f"got {last} in tokenizer.json"
            )
        return tokenizer

    def _read_template(self) -> tuple[list[int], list[int], int]:
        """The special tokens before and after a text, and an id to fill rows with (masked, so any id will do)."""
        encoding = encoding_of(self._tokenizer, "a", add_special_tokens=True)
        content = [i for i, special in enumerate(encoding.special_tokens_mask) if not special]
        if not content:
            raise InputError(f"encoder {self.folder}: its tokenizer makes no token of the letter a")
        before, after = encoding.ids[: content[0]], encoding.ids[content[-1] + 1 :]
        if len(before) + len(after) >= self.config.max_tokens:
            raise InputError(f"encoder {self.folder}: its inputs of {self.config.max_tokens} tokens hold no text")
        return before, after, encoding.ids[0]

    @property
    def dim(self) -> int:
        """E, the length of a vector."""
        return self.config.embed_dim

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of weights, tokenizer and settings: equal fingerprints give equal vectors. Read from disk once."""
        return fingerprint(self.folder, self.config, self._dtype)

    def embed(self, texts: Sequence[str], progress_label: str | None = None) -> np.ndarray:
        """Unit vectors [n, E] in float32, in the order of the texts; reports progress if given a label.

        A text longer than the encoder's input is not cut off: it is embedded as windows of equal length, and its vector
        is the mean of theirs weighted by their token counts, over its norm. (A chunk of 512 target tokens is about
        500 to 700 word pieces, two or three windows of MiniLM's 256.)
        """
        pieces, owners_W = self._windows(texts, None)
        vectors_WE = self._vectors(pieces, progress_label)
        sums_NE = np.zeros((len(texts), self.dim), np.float32)
        counts_W = np.asarray([max(len(piece), 1) for piece in pieces], np.float32)
        np.add.at(sums_NE, owners_W, vectors_WE * counts_W[:, None])
        return sums_NE / np.maximum(np.linalg.norm(sums_NE, axis=1, keepdims=True), 1e-12)

    def embed_windows(
        self, texts: Sequence[str], window_tokens: int | None, progress_label: str | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Unit vectors [W, E] of all windows of the texts, in order, and which text each is of (int32 [W], from 0).

        A text is cut into as few windows of at most `window_tokens` of the encoder's tokens (None: of its whole input),
        special ones included, as possible, of equal length; each has at least one.
        """
        pieces, owners_W = self._windows(texts, window_tokens)
        return self._vectors(pieces, progress_label), owners_W

    def _windows(self, texts: Sequence[str], most: int | None) -> tuple[list[np.ndarray], np.ndarray]:
        if self.config.lower_case:
            texts = [text.lower() for text in texts]
        special, longest = len(self._before) + len(self._after), self.config.max_tokens
        capacity = max(min(most or longest, longest) - special, 1)
        cut = [windows(encoding.ids, capacity) for encoding in encodings_of(self._tokenizer, list(texts))]
        owners_W = np.repeat(np.arange(len(cut), dtype=np.int32), [len(pieces) for pieces in cut])
        return [piece for pieces in cut for piece in pieces], owners_W

    def _vectors(self, pieces: list[np.ndarray], progress_label: str | None) -> np.ndarray:
        vectors_WE = np.zeros((len(pieces), self.dim), np.float32)
        with progress(progress_label or "", len(pieces), "windows", quiet=progress_label is None) as report:
            for members, length in self._batches(pieces):
                vectors_WE[members] = self._run([pieces[i] for i in members], length)
                report.advance(len(members))
        if not np.isfinite(vectors_WE).all():
            raise InputError(f"encoder {self.folder}: its vectors are not finite; the weights are not usable")
        return vectors_WE

    def warm_up(self, most_tokens: int) -> None:
        """Compiles what texts of up to so many of its tokens need, however many there are."""
        for length in self._buckets[: 1 + sum(bucket < most_tokens for bucket in self._buckets)]:
            for rows in {1, _FEW_ROWS, self._most_rows(length)}:
                if rows <= self._most_rows(length):
                    self._run([np.zeros(0, np.int32)] * rows, length)

    def _batches(self, pieces: list[np.ndarray]) -> Iterator[tuple[list[int], int]]:
        """Indices of pieces that share a bucket, at most as many as a batch of that length may hold; long ones first.

        Longest first: a machine that is too small says so at once, and the time left is never underestimated.
        """
        special = len(self._before) + len(self._after)
        by_bucket: dict[int, list[int]] = {}
        for i, piece in enumerate(pieces):
            length = next(bucket for bucket in self._buckets if bucket >= len(piece) + special)
            by_bucket.setdefault(length, []).append(i)
        for length in sorted(by_bucket, reverse=True):
            members, rows = by_bucket[length], self._most_rows(length)
            for first in range(0, len(members), rows):
                yield members[first : first + rows], length

    def _most_rows(self, length: int) -> int:
        # Attention scores grow with length^2; up to 512 tokens they are small beside the activations.
        return max(1, min(self.batch_size, self.batch_size * 512**2 // length**2))

    def _run(self, pieces: list[np.ndarray], length: int) -> np.ndarray:
        """Vectors of at most one batch of pieces, filled up to 1, 8 or all rows: at most three shapes a length."""
        most = self._most_rows(length)
        rows = next(rows for rows in (1, _FEW_ROWS, most) if len(pieces) <= rows <= most)
        ids_BT = np.full((rows, length), self._pad, np.int32)
        mask_BT = np.zeros((rows, length), bool)
        for row, piece in enumerate(pieces):
            whole = np.concatenate([self._before, piece, self._after])
            ids_BT[row, : len(whole)] = whole
            mask_BT[row, : len(whole)] = True
        self.shapes.add((rows, length))
        return np.asarray(self._forward(self._weights, ids_BT, mask_BT))[: len(pieces)]
