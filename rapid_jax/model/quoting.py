# SPDX-License-Identifier: Apache-2.0
"""Somebody else's words as token ids, of which none controls the model, whatever the words spell.

A document that spells `</s>` must not end the user's turn. First no added token that controls is looked for in the
words. Where the tokenizer's model itself still comes to such a token (merges that spell it, a piece of a unigram
vocabulary, a whole word), the words are encoded by a copy whose model lacks the token and so makes them of others.
Where it has no others for them, they are refused.
"""

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import tokenizers

from rapid_jax.model.backend import backend_of, encoding_of, encodings_of, settings_of
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.json_input import shown

_NOT_TEXT = "\U0010ffff"  # a code point that Unicode assigns to nothing, ever


class _Unknown(NamedTuple):
    """The token that stands for what a vocabulary does not have."""

    token: str
    id: int


class Quoting:
    """Encodes words into ids that are neither among `special` nor among `ends`, those that end an answer.

    The token for what the vocabulary does not have is left where words are unknown, unless it ends an answer.
    """

    def __init__(self, backend: tokenizers.Tokenizer, special: frozenset[int], ends: frozenset[int]):
        self._settings = settings = settings_of(backend)
        self._unknown = unknown = _unknown_of(settings["model"], backend)
        self._controls = controls = ends | (special if unknown is None else special - {unknown.id})
        self._spelt = {token for id in controls if (token := backend.id_to_token(id)) is not None}
        for token in settings["added_tokens"]:
            # One that swallows the space beside it is not looked for either: the text would lose the space.
            strips = token["lstrip"] or token["rstrip"]
            token["special"] = token["special"] or strips or token["id"] in controls
        self._plain = self._made(settings)

    def encode(self, text: str) -> tokenizers.Encoding:
        """The tokens, and the characters that each stands for.

        Raises InputError if the tokenizer has nothing but a token that controls for a part of the text.
        """
        encoding = encoding_of(self._plain, text)
        return encoding if self._harmless(text, encoding.ids) else self._of_others(text, encoding)

    def counts(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text; all processors count."""
        return [len(found) for found in self._encode(texts)]

    def spans(self, texts: Sequence[str]) -> list[list[tuple[int, int]]]:
        """Of each text, the characters that its tokens stand for; by all processors."""
        return [found.offsets for found in self._encode(texts, places=True)]

    def _encode(self, texts: Sequence[str], *, places: bool = False) -> Iterator[tokenizers.Encoding]:
        for text, found in zip(texts, encodings_of(self._plain, texts, places=places), strict=True):
            yield found if self._harmless(text, found.ids) else self.encode(text)

    def _harmless(self, text: str, ids: Sequence[int]) -> bool:
        if not self._controls.isdisjoint(ids):
            return False
        # The token of unknown words is no harm where a word is unknown, but it should not be spelt.
        return self._unknown is None or self._unknown.token not in text or self._unknown.id not in ids

    def _of_others(self, text: str, first: tokenizers.Encoding) -> tokenizers.Encoding:
        """The tokens by the copy that lacks what controls; `first` are those with it."""
        found = encoding_of(self._lacking, text)
        written = bytearray(len(text))
        for id, (start, end) in zip(found.ids, found.offsets, strict=True):
            if id not in self._controls and (self._unknown is None or id != self._unknown.id):
                written[start:end] = b"1" * (end - start)
        for id, (start, end) in zip(first.ids, first.offsets, strict=True):
            lost = (at for at in range(start, end) if not written[at] and not text[at].isspace())
            if id in self._controls and next(lost, None) is not None:
                raise self._refusal(text, id, start, end)
        for id, (start, end) in zip(found.ids, found.offsets, strict=True):
            if id in self._controls:
                raise self._refusal(text, id, start, end)
        return found

    def _refusal(self, text: str, id: int, start: int, end: int) -> InputError:
        token = self._plain.id_to_token(id)
        return InputError(
            f"the text has {shown(text[start:end])} at character {start}, for which this tokenizer has only "
            f"{shown(token)}, a token that controls the model: expected a text without it"
        )

    @cached_property
    def _lacking(self) -> tokenizers.Tokenizer:
        model = self._settings["model"]
        spelt = self._spelt if self._unknown is None else self._spelt | {self._unknown.token}
        # What one character or byte is written with stays: without it the character would vanish from the text.
        lacking = {token for token in spelt if len(token) > 1 and not (model.get("byte_fallback") and _is_byte(token))}
        return self._made(_without(self._settings, lacking))

    def _made(self, settings: dict[str, Any]) -> tokenizers.Tokenizer:
        made = backend_of(settings, "the tokenizer for quoted text")
        made.encode_special_tokens = True
        expected = {token["content"]: token["id"] for token in settings["added_tokens"]}
        got = {token.content: id for id, token in made.get_added_tokens_decoder().items()}
        if expected != got:
            raise InputError(
                "tokenizer.json: its added tokens have no fixed ids, so that quoted text cannot be encoded"
            )
        return made


def _without(settings: dict[str, Any], lacking: set[str]) -> dict[str, Any]:
    """The settings with those tokens spelt as no text is: every id stays what it was."""
    model, new = dict(settings["model"]), {token: token + _NOT_TEXT for token in lacking}
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        model["vocab"] = {new.get(token, token): id for token, id in vocabulary.items()}
    else:
        model["vocab"] = [[new.get(piece, piece), score] for piece, score in vocabulary]
    if "merges" in model:
        inner = model.get("continuing_subword_prefix") or ""
        model["merges"] = [
            pair for pair in model["merges"] if lacking.isdisjoint((*pair, pair[0] + pair[1].removeprefix(inner)))
        ]
    if model.get("unk_token") in new:
        model["unk_token"] = new[model["unk_token"]]
    added = [token | {"content": new.get(token["content"], token["content"])} for token in settings["added_tokens"]]
    return settings | {"model": model, "added_tokens": added}


def _unknown_of(model: dict[str, Any], backend: tokenizers.Tokenizer) -> _Unknown | None:
    if (id := model.get("unk_id")) is not None:
        token = backend.id_to_token(id)
        return None if token is None else _Unknown(token, id)
    if (token := model.get("unk_token")) is None:
        return None
    return None if (id := backend.token_to_id(token)) is None else _Unknown(token, id)


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")
