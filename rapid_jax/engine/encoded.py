# SPDX-License-Identifier: Apache-2.0
"""The tokens of documents that are asked about again: making 100,000 of them takes longer than many rounds."""

import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from rapid_jax.model.tokenizer import Tokenizer

MOST_BYTES = 2**28
_Key: TypeAlias = tuple[str, Tokenizer, str, str]  # owner, tokenizer, what is made, of which text


class EncodedTexts:
    """What tokenizers made of the texts that were used last. Of any thread.

    Each owner has its own: how long a request takes tells nobody what others have asked about.
    """

    def __init__(self, most: int = MOST_BYTES):
        self._most, self._lock = most, threading.Lock()
        self._kept: OrderedDict[_Key, np.ndarray] = OrderedDict()  # int32
        self._bytes = 0  # of the texts, too

    def of(self, owner: str, tokenizer: Tokenizer) -> "Encoder":
        """A tokenizer that remembers for that owner."""
        return Encoder(self, owner, tokenizer)

    def kept(self, key: _Key, make: Callable[[], Any]) -> np.ndarray:
        """What there is for a key, else `make()`, which then is there."""
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        made = np.asarray(make(), np.int32)
        made.setflags(write=False)  # whoever asks gets this very array
        with self._lock:
            if key not in self._kept:
                self._kept[key] = made
                self._bytes += _size(key, made)
            while self._bytes > self._most:
                self._bytes -= _size(*self._kept.popitem(last=False))
        return made


def _size(key: _Key, made: np.ndarray) -> int:
    return made.nbytes + sys.getsizeof(key[-1])


@dataclass(frozen=True)
class Encoder:
    """A tokenizer's `encode_quoted` and `spans`, for long texts."""

    _texts: EncodedTexts
    _owner: str
    _tokenizer: Tokenizer

    def encode_quoted(self, text: str) -> list[int]:
        """As the tokenizer's."""
        key = self._owner, self._tokenizer, "ids", text
        return self._texts.kept(key, lambda: self._tokenizer.encode_quoted(text)).tolist()

    def counts(self, texts: Sequence[str]) -> list[int]:
        """As the tokenizer's."""
        return [len(self.encode_quoted(text)) for text in texts]

    def spans(self, text: str) -> np.ndarray:
        """As the tokenizer's, int32 [tokens, 2]."""
        key = self._owner, self._tokenizer, "spans", text
        return self._texts.kept(key, lambda: self._tokenizer.spans(text) or np.empty((0, 2)))
