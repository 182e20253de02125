# SPDX-License-Identifier: Apache-2.0
"""How many documents a corpus has, in seconds: a small one is read, of a large one some files, by chance."""

import random
import time
from collections import Counter
from dataclasses import dataclass
from typing import Final

from longpo_jax.config import CorpusConfig
from longpo_jax.documents import read_corpus
from longpo_jax.sources import File, files_of
from longpo_jax.texts import texts_of
from rapid_jax.model.tokenizer import Tokenizer
from rapid_jax.runtime.storage import size_of

_SMALL: Final = 2 << 20  # bytes of files that are read whole
_BUDGET_S: Final = 8.0
_TOGETHER: Final = 500_000  # characters that are counted at once


@dataclass(frozen=True)
class CorpusEstimate:
    """Documents in the window of tokens, None where none was found in a part, and the bytes of their text."""

    documents: int | None
    bytes: int
    exact: bool
    said: str


def estimate(config: CorpusConfig, tokenizer: Tokenizer, seed: int) -> CorpusEstimate:
    """The documents that the stage pairs will find. Raises InputError for sources that it would refuse."""
    dropped: Counter[str] = Counter()
    files = files_of(config.sources, dropped, follow_links=config.follow_links)
    sizes = {file.name: size_of(file.path) for file in files}
    total = sum(sizes.values())
    if total <= _SMALL:
        corpus = read_corpus(config, tokenizer, seed, quiet=True)
        size = sum(len(document.text.encode()) for document in corpus.documents)
        return CorpusEstimate(len(corpus.documents), size, True, f"of {len(files):,} files, read and counted")
    random.Random(seed).shuffle(files)
    counted = _Counted(config, tokenizer)
    until, seen = time.monotonic() + _BUDGET_S, 0
    for file in files:
        seen += sizes[file.name] if counted.add(file, until) else counted.last
        if time.monotonic() > until:
            break
    scale = total / max(seen, 1)
    found = round(counted.documents * scale)
    said = f"of {len(files):,} files, estimated from {min(1.0, seen / total):.1%} of their bytes"
    if not found:
        return CorpusEstimate(None, 0, False, f"none of corpus.min_tokens to max_tokens found; {said}")
    most = found if config.documents is None else min(found, config.documents)
    return CorpusEstimate(most, round(counted.bytes * scale * most / found), False, said)


class _Counted:
    """Documents so far, by a window of tokens."""

    def __init__(self, config: CorpusConfig, tokenizer: Tokenizer):
        self._config, self._tokenizer = config, tokenizer
        self.documents = self.bytes = self.last = 0

    def add(self, file: File, until: float) -> bool:
        """Counts the documents of a file; whether all of it was read in time. `last`: bytes of text that were."""
        texts, characters, self.last = [], 0, 0
        for _, _, text in texts_of([file], self._config.text_key, self._config.max_mib, Counter(), quiet=True):
            texts.append(text)
            characters += len(text)
            if characters >= _TOGETHER:
                self._count(texts)
                texts, characters = [], 0
                if time.monotonic() > until:
                    return False
        self._count(texts)
        return True

    def _count(self, texts: list[str]) -> None:
        for text, tokens in zip(texts, self._tokenizer.counts(texts) if texts else (), strict=True):
            size = len(text.encode(errors="replace"))
            self.last += size
            least, most = self._config.min_tokens, self._config.max_tokens
            parts = int(least <= tokens <= most)
            if self._config.longer == "split" and tokens > most:
                parts = tokens // most + (tokens % most >= least)
            self.documents += parts
            self.bytes += min(size, size * parts * most // max(tokens, 1))
