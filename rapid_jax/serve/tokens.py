# SPDX-License-Identifier: Apache-2.0
"""Tokens as OpenAI's answers show them: texts, log-probabilities, and where each piece of an answer came from."""

from collections import deque
from collections.abc import Sequence
from typing import Any

from rapid_jax.engine.request import Piece, TokenLogprobs
from rapid_jax.model.detokenize import REPLACEMENT
from rapid_jax.model.thinking import END, START, Thinking
from rapid_jax.model.tokenizer import Tokenizer
from rapid_jax.speculative.state import Origin

_LEAST = -9999.0  # what OpenAI tells of a token without any probability: JSON has no infinity
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # how SentencePiece spells one


class TokenTexts:
    """The text of a token by itself; a part of a character is spelt as the vocabulary spells it."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._known: dict[int, str] = {}  # at most the vocabulary

    def of(self, token_id: int) -> str:
        """The text."""
        text = self._known.get(token_id)
        if text is None:
            text = self._known[token_id] = self._made(token_id)
        return text

    def _made(self, token_id: int) -> str:
        text = self._tokenizer.decode([token_id], skip_special_tokens=False)
        spelt = self._tokenizer.token_of(token_id) or ""
        if REPLACEMENT in text:
            return spelt
        # Decoded by itself a word loses the space before it.
        return f" {text}" if spelt.startswith(_SPACE) and not text.startswith(" ") else text

    def decoded(self, ids: Sequence[int]) -> str:
        """The text of a prompt's ids, special tokens too."""
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def chat(self, entries: Sequence[TokenLogprobs]) -> list[dict[str, Any]]:
        """`logprobs.content` of a chat completion."""
        return [
            self._one(entry.token_id, entry.logprob) | {"top_logprobs": [self._one(*pair) for pair in entry.top]}
            for entry in entries
        ]

    def completion(self, entries: Sequence[TokenLogprobs | None], ids: Sequence[int], offset: int) -> dict[str, Any]:
        """`logprobs` of a text completion; `offset` is where the first token's text begins.

        Without an entry (the first token of a prompt) there is no log-probability. Of two tokens with the same text the
        more probable one stands for both.
        """
        texts = [self.of(token_id) for token_id in ids]
        offsets, tops = [], []
        for text, entry in zip(texts, entries, strict=True):
            offsets.append(offset)
            offset += len(text)
            top: dict[str, float] = {}
            for token_id, logprob in entry.top if entry else ():
                top.setdefault(self.of(token_id), max(logprob, _LEAST))
            tops.append(top if entry else None)
        logprobs = [max(entry.logprob, _LEAST) if entry else None for entry in entries]
        return {"tokens": texts, "token_logprobs": logprobs, "top_logprobs": tops, "text_offset": offsets}

    def _one(self, token_id: int, logprob: float) -> dict[str, Any]:
        text = self.of(token_id)
        decoded = self._tokenizer.decode([token_id], skip_special_tokens=False)
        own = None if REPLACEMENT in decoded else list(text.encode())
        return {"token": text, "logprob": max(logprob, _LEAST), "bytes": own}


class OriginSpans:
    """The pieces of an answer parted by where they came from; the texts join to the answer's."""

    def __init__(self, tokenizer: Tokenizer):
        self._stream = tokenizer.stream()
        self._waiting: deque[tuple[str, str]] = deque()  # texts of tokens that no piece has shown yet
        self._thinking: Thinking | None = None  # once something was thought
        self._last = Origin.BONUS.name.lower()

    def of(self, piece: Piece) -> list[dict[str, str]]:
        """The piece's text in parts, each with the origin of the token that completed it."""
        for token_id, origin in zip(piece.token_ids, piece.origins, strict=True):
            name = Origin(origin).name.lower()
            if text := self._stream.push([token_id]):
                self._wait(text, name)
        known = "".join(text for text, _ in self._waiting)
        # Nothing may have been thought between the marks; an answer that spells them has them in its text.
        is_parted = piece.thoughts or (piece.text and END in known and not known.startswith(piece.text))
        if is_parted and self._thinking is None:
            given, self._waiting = self._waiting, deque()
            self._thinking = Thinking(opened=START not in known)
            for text, name in given:
                self._wait(text, name)
        spans, rest = [], piece.text
        while rest:
            # The last bytes of a broken character come when the answer ends, and with no token.
            text, self._last = self._waiting.popleft() if self._waiting else (rest, self._last)
            shown, rest = rest[: len(text)], rest[len(text) :]
            if len(shown) < len(text):
                self._waiting.appendleft((text[len(shown) :], self._last))
            spans.append({"text": shown, "origin": self._last})
        return spans

    def _wait(self, text: str, name: str) -> None:
        text = text if self._thinking is None else self._thinking.push(text)
        if text:
            self._waiting.append((text, name))
