# SPDX-License-Identifier: Apache-2.0
"""Token ids to text, all at once or as they come: whole characters, and the same text either way."""

from collections.abc import Callable, Iterable, Iterator, Sequence

import tokenizers

from rapid_jax.model.backend import guarded

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def decode(backend: tokenizers.Tokenizer, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
    """The text of the ids; of bytes that are no UTF-8 each, or each beginning of a character, is U+FFFD.

    The library's byte fallback makes U+FFFD of every byte that stands in a row with a broken one; here the characters
    that are complete stay.
    """
    with guarded("the tokenizer cannot decode the ids"):
        text = backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        if REPLACEMENT not in text or backend.decoder is None:
            return text
        left_out = special_ids(backend) if skip_special_tokens else ()
        tokens = [token for id in ids if id not in left_out and (token := backend.id_to_token(id)) is not None]
        if not any(_byte(token) is not None for token in tokens):
            return text
        return backend.decoder.decode(list(_parted(tokens)))


def special_ids(backend: tokenizers.Tokenizer) -> frozenset[int]:
    """Ids that `decode` may leave out."""
    return frozenset(id for id, token in backend.get_added_tokens_decoder().items() if token.special)


def _parted(tokens: Iterable[str]) -> Iterator[str]:
    """The tokens, rows of bytes parted by empty ones so that a broken character is decoded apart from whole ones."""
    row = bytearray()
    for token in (*tokens, ""):
        byte = _byte(token)
        if byte is not None:
            row.append(byte)
            continue
        while row:
            size = _whole_bytes(row) or 1
            yield from (f"<0x{one:02X}>" for one in row[:size])
            del row[:size]
            if row:
                yield ""
        if token:
            yield token


def _whole_bytes(row: bytes | bytearray) -> int:
    """How many of the first bytes are whole characters."""
    try:
        row.decode()
    except UnicodeDecodeError as error:
        return error.start
    return len(row)


def _byte(token: str) -> int | None:
    """What a token of byte fallback, <0xE2>, stands for."""
    if len(token) != 6 or not token.startswith("<0x") or not token.endswith(">"):
        return None
    try:
        return int(token[3:5], 16)
    except ValueError:
        return None


class Stream:
    """Ids in, text out: only whole characters, and the pieces join to exactly `decode` of all ids.

    A token may be a part of a character, so text is held back while it could still change. A SentencePiece-like
    tokenizer drops the space before the first word it decodes, so each piece is decoded behind the tokens before it.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], special_ids: frozenset[int]):
        self._decode, self._special_ids = decode, special_ids
        self._window: list[int] = []  # the last piece's tokens, then those not yet whole
        self._fresh = 0  # where the tokens not yet whole begin
        self._given = ""  # text of the window that was given out

    def push(self, ids: Iterable[int]) -> str:
        """The text that these ids complete; may be empty."""
        # A special token has no text, and a window of nothing else would look like the start of a text.
        self._window += [id for id in ids if id not in self._special_ids]
        text = self._decode(self._window)
        whole = text.rstrip(REPLACEMENT)
        piece = whole[len(self._given) :]
        self._given += piece
        last = self._window[self._fresh :]
        # A window whose text is empty would again look like the start of a text.
        if whole == text and (behind := self._decode(last)):
            self._window, self._fresh, self._given = last, len(last), behind
        return piece

    def finish(self) -> str:
        """What was held back: U+FFFD for each byte sequence that never became a character."""
        piece = self._decode(self._window)[len(self._given) :]
        self._window, self._fresh, self._given = [], 0, ""
        return piece
