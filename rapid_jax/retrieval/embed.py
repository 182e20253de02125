# SPDX-License-Identifier: Apache-2.0
"""Texts to unit vectors: the encoder's own tokens in windows, batched by length, compiled once a shape."""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile

import jax
import numpy as np
from flax import nnx
from tokenizers import Encoding, Tokenizer

from rapid_jax.model.backend import encoding_of, encodings_of, read_backend
from rapid_jax.model.load import LoadDtype, arithmetic
from rapid_jax.retrieval.encoder_io import THRESHOLDS, encoder_folder, fingerprint, load_encoder, read_config
from rapid_jax.retrieval.pooled_decoder import PooledDecoderConfig
from rapid_jax.retrieval.pooling import Pooling
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.json_input import shown
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


@dataclass(frozen=True)
class _Window:
    """Part of a text as the encoder reads it."""

    ids: np.ndarray  # int32, with the special tokens and the prompt
    count: int  # tokens of the text among them


class Embedder:
    """One encoder, loaded once, and its compiled programs.

    `name` is "minilm" or a Hugging Face folder: BERT, RoBERTa, XLM-RoBERTa such as BGE-M3, or a decoder whose hidden
    states are pooled, such as Qwen3-Embedding and EmbeddingGemma. `dtype` is that of the matrices and activations;
    None: float32, of a decoder "auto" (bfloat16 but on a CPU), since it may have billions of weights. Softmax, pooling,
    what comes behind it and the result are float32.

    The prompts that the folder states stand before every query, and before every window of a document.
    """

    def __init__(
        self,
        name: str | AnyPlace,
        *,
        batch_size: int = 32,
        pooling: Pooling | None = None,
        dtype: LoadDtype | None = None,
    ):
        self.folder = encoder_folder(name)
        self.config = read_config(self.folder, pooling)
        self.threshold = THRESHOLDS.get(str(name))
        self.batch_size = batch_size
        usual: LoadDtype = "auto" if isinstance(self.config, PooledDecoderConfig) else "float32"
        self._dtype = arithmetic(dtype or usual)
        self._tokenizer = self._read_tokenizer()
        self._before, self._after, self._pad = self._read_template()
        self._check_ids()
        self._check_prompts()
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
        return tokenizer

    def _check_ids(self) -> None:
        """Raises InputError if a text may have a token that the encoder has no row for.

        EmbeddingGemma's tokenizer has a token of images beyond its table; special tokens are never read from a text.
        """
        never = {id for id, token in self._tokenizer.get_added_tokens_decoder().items() if token.special}
        never -= set(self._tokenizer.get_vocab(with_added_tokens=False).values())
        ids = set(self._tokenizer.get_vocab().values()) - never
        last = max((*ids, *self._before, *self._after), default=-1)
        if last >= self.config.vocab_size:
            raise InputError(
                f"encoder {self.folder}: expected token ids below the {self.config.vocab_size} rows of its word table, "
                f"got {last} in tokenizer.json"
            )

    def _check_prompts(self) -> None:
        for prompt in (self.config.prompts.query, self.config.prompts.document):
            count = len(encoding_of(self._tokenizer, prompt).ids) + len(self._before) + len(self._after)
            if count >= self.config.max_tokens:
                raise InputError(
                    f"encoder {self.folder}: its inputs of {self.config.max_tokens} tokens hold no text beside its "
                    f"prompt {shown(prompt)} of {count} tokens with special ones"
                )

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
        return self.config.dim

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of weights, tokenizer and settings: equal fingerprints give equal vectors. Read from disk once."""
        return fingerprint(self.folder, self.config, self._dtype)

    def embed(
        self, texts: Sequence[str], progress_label: str | None = None, *, are_queries: bool = False
    ) -> np.ndarray:
        """Unit vectors [n, E] in float32, in the order of the texts; reports progress if given a label.

        They stand behind the prompt of documents, or, as `are_queries` says, of queries.

        A text longer than the encoder's input is not cut off: it is embedded as windows of equal length, and its vector
        is the mean of theirs weighted by their token counts, over its norm. (A chunk of 512 target tokens is about
        500 to 700 word pieces, two or three windows of MiniLM's 256.)
        """
        prompts = self.config.prompts
        pieces, owners_W = self._windows(texts, None, prompts.query if are_queries else prompts.document)
        vectors_WE = self._vectors(pieces, progress_label)
        sums_NE = np.zeros((len(texts), self.dim), np.float32)
        counts_W = np.asarray([max(piece.count, 1) for piece in pieces], np.float32)
        np.add.at(sums_NE, owners_W, vectors_WE * counts_W[:, None])
        return sums_NE / np.maximum(np.linalg.norm(sums_NE, axis=1, keepdims=True), 1e-12)

    def embed_windows(
        self, texts: Sequence[str], window_tokens: int | None, progress_label: str | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Unit vectors [W, E] of all windows of the texts, in order, and which text each is of (int32 [W], from 0).

        A text is cut into as few windows of at most `window_tokens` of the encoder's tokens (None: of its whole input),
        special ones and the prompt of documents included, as possible, of equal length; each has at least one.
        """
        pieces, owners_W = self._windows(texts, window_tokens, self.config.prompts.document)
        return self._vectors(pieces, progress_label), owners_W

    def _windows(self, texts: Sequence[str], most: int | None, prompt: str) -> tuple[list[_Window], np.ndarray]:
        if self.config.lower_case:
            prompt, texts = prompt.lower(), [text.lower() for text in texts]
        # White space around a text is the layout of what it was cut from; encoders were trained without.
        prompt, texts = prompt.lstrip(), [text.strip() for text in texts]
        longest = min(most or self.config.max_tokens, self.config.max_tokens)
        encodings = encodings_of(self._tokenizer, [(prompt + text).rstrip() for text in texts], places=bool(prompt))
        cut = [self._cut(encoding, longest, len(prompt)) for encoding in encodings]
        owners_W = np.repeat(np.arange(len(cut), dtype=np.int32), [len(pieces) for pieces in cut])
        return [piece for pieces in cut for piece in pieces], owners_W

    def _cut(self, encoding: Encoding, longest: int, prompt: int) -> list[_Window]:
        """The windows of a text behind a prompt of so many characters.

        Both are read together, as in training: a prompt's last space may be part of the text's first token, which is
        then the text's. All windows stand behind the tokens that are the prompt's alone.
        """
        ends = (end for _, end in encoding.offsets) if prompt else ()
        head = sum(1 for _ in takewhile(lambda end: end <= prompt, ends))
        before = [*self._before, *encoding.ids[:head]]
        capacity = max(longest - len(before) - len(self._after), 1)
        return [
            _Window(np.asarray([*before, *piece, *self._after], np.int32), len(piece))
            for piece in windows(encoding.ids[head:], capacity)
        ]

    def _vectors(self, pieces: list[_Window], progress_label: str | None) -> np.ndarray:
        vectors_WE = np.zeros((len(pieces), self.dim), np.float32)
        with progress(progress_label or "", len(pieces), "windows", quiet=progress_label is None) as report:
            for members, length in self._batches(pieces):
                vectors_WE[members] = self._run([pieces[i].ids for i in members], length)
                report.advance(len(members))
        if not np.isfinite(vectors_WE).all():
            raise InputError(f"encoder {self.folder}: its vectors are not finite; the weights are not usable")
        return vectors_WE

    def warm_up(self, most_tokens: int) -> None:
        """Compiles what texts of up to so many of its tokens need, however many there are."""
        for length in self._buckets[: 1 + sum(bucket < most_tokens for bucket in self._buckets)]:
            for rows in {1, _FEW_ROWS, self._most_rows(length)}:
                if rows <= self._most_rows(length):
                    self._run([np.asarray([*self._before, *self._after], np.int32)] * rows, length)

    def _batches(self, pieces: list[_Window]) -> Iterator[tuple[list[int], int]]:
        """Indices of pieces that share a bucket, at most as many as a batch of that length may hold; long ones first.

        Longest first: a machine that is too small says so at once, and the time left is never underestimated.
        """
        by_bucket: dict[int, list[int]] = {}
        for i, piece in enumerate(pieces):
            length = next(bucket for bucket in self._buckets if bucket >= len(piece.ids))
            by_bucket.setdefault(length, []).append(i)
        for length in sorted(by_bucket, reverse=True):
            members, rows = by_bucket[length], self._most_rows(length)
            for first in range(0, len(members), rows):
                yield members[first : first + rows], length

    def _most_rows(self, length: int) -> int:
        # Attention scores grow with length^2; up to 512 tokens they are small beside the activations.
        return max(1, min(self.batch_size, self.batch_size * 512**2 // length**2))

    def _run(self, inputs: list[np.ndarray], length: int) -> np.ndarray:
        """Vectors of at most one batch of inputs, filled up to 1, 8 or all rows: at most three shapes a length."""
        most = self._most_rows(length)
        rows = next(rows for rows in (1, _FEW_ROWS, most) if len(inputs) <= rows <= most)
        ids_BT = np.full((rows, length), self._pad, np.int32)
        mask_BT = np.zeros((rows, length), bool)
        for row, ids in enumerate(inputs):
            ids_BT[row, : len(ids)] = ids
            mask_BT[row, : len(ids)] = True
        self.shapes.add((rows, length))
        return np.asarray(self._forward(self._weights, ids_BT, mask_BT))[: len(inputs)]
