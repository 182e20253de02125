# SPDX-License-Identifier: Apache-2.0
"""Text to token ids and back, chat prompts, stop ids, and text as it streams."""

import datetime
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from rapid_jax.model.chat import PLAIN, Messages, compile_template
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.files import digest

# What goes with the weights of a checkpoint when it is exported, where the checkpoint has it.
FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
# Ends of a turn that a chat template may write without the checkpoint's configs naming them.
_END_OF_TURN = ("<|eot_id|>", "<|im_end|>")
_SPACES = ("\N{LOWER ONE EIGHTH BLOCK}", "\N{LATIN CAPITAL LETTER G WITH DOT ABOVE}")  # how vocabularies spell one
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Tokenizer:
    """A checkpoint's tokenizer: ids equal transformers' for the same text.

    `files` are the checkpoint's own files (names in FILES), kept for export. tokenizer.json is needed; the rest decides
    the chat template, the special tokens and the stop ids.
    """

    def __init__(self, files: Mapping[str, bytes], model_eos: int | Sequence[int] | None = None):
        self.files = dict(files)
        if "tokenizer.json" not in self.files:
            raise InputError("tokenizer.json: no such file; transformers' save_pretrained writes it from other formats")
        try:
            self._backend = tokenizers.Tokenizer.from_str(self.files["tokenizer.json"].decode())
        except Exception as error:  # the package raises plain Exception
            raise InputError(f"tokenizer.json: cannot be read: {error}") from error
        # Settings of whoever saved the file: they would cut long documents and pad short ones.
        self._backend.no_truncation()
        self._backend.no_padding()
        self._config = self._json("tokenizer_config.json")
        self.special_tokens = _special_tokens(self._json("special_tokens_map.json") | self._config)
        template = self._template_source()
        self.has_chat_template = template is not None  # False: `chat` writes plain "User: ... Assistant:" text
        self._template = PLAIN if template is None else template
        self.stop_ids = self._stop_ids(model_eos)
        self.now: datetime.datetime | None = None  # the time that `chat` goes by; None: the clock's

    @property
    def vocab_size(self) -> int:
        """Ids are below this: added tokens are counted. A model's embedding may have more rows."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    @property
    def ids(self) -> set[int]:
        """The ids that have a token; there may be gaps between them."""
        return set(self._backend.get_vocab(with_added_tokens=True).values())

    @cached_property
    def fingerprint(self) -> str:
        """Equal fingerprints: the same ids for the same text, and the same text for the same ids."""
        return digest(self._backend.to_str())

    def id_of(self, token: str) -> int | None:
        """The id of a token spelt exactly so, or None."""
        return self._backend.token_to_id(token)

    def token_of(self, token_id: int) -> str | None:
        """How the vocabulary spells an id, or None."""
        return self._backend.id_to_token(token_id)

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Token ids. Special tokens spelt out in the text become their ids.

        With `add_special_tokens` the tokens that the tokenizer puts around a text (bos) are added, unless the text
        starts with bos already, as most chat templates' text does.
        """
        bos = self.special_tokens.get("bos_token")
        already = bos is not None and text.startswith(bos)
        return self._backend.encode(text, add_special_tokens=add_special_tokens and not already).ids

    def encode_quoted(self, text: str, *, follows: bool = False) -> list[int]:
        """Token ids of somebody else's words: a special token spelt out in them stays text and controls nothing.

        `follows`: without the space that some tokenizers (SentencePiece) put before every text.
        """
        quoting = self._quoting_unspaced if follows and self._adds_space else self._quoting
        return quoting.encode(text, add_special_tokens=False).ids

    def counts(self, texts: Sequence[str]) -> list[int]:
        """Tokens of `encode_quoted` of each text; all processors count."""
        return [len(encoding) for encoding in self._quoting.encode_batch_fast(texts, add_special_tokens=False)]

    def spans(self, text: str) -> list[tuple[int, int]]:
        """Of each token of `encode_quoted(text)`, the characters text[start:end] that it stands for.

        A character that several tokens make up is in the span of each. Whether a span takes in the space before a word
        is the tokenizer's habit.
        """
        return self._quoting.encode(text, add_special_tokens=False).offsets

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of the ids, spaces as the tokens have them; bytes that are not UTF-8 become U+FFFD."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def encode_template(self, text: str, *, first: bool = False) -> list[int]:
        """Token ids of the part of a template before (`first`, special tokens are added), between or behind other text.

        Where the tokenizer starts every text with a space, only the first part gets one, and the space that a part ends
        with is left to what `encode_quoted` gives behind it.
        """
        if not self._adds_space:
            return self.encode(text, add_special_tokens=first)
        text = text.removesuffix(" ")
        if first:
            return self.encode(text, add_special_tokens=True)
        encoding = self._backend.encode(text, add_special_tokens=False)
        special = (index for index, token in enumerate(encoding.ids) if token in self.special_ids)
        at = next(special, len(encoding.ids))  # behind a special token it adds one in joined text, too
        end = encoding.offsets[at][0] if at < len(encoding.ids) else len(text)
        return self._unspaced.encode(text[:end], add_special_tokens=False).ids + encoding.ids[at:]

    def chat(
        self, messages: Messages, *, add_generation_prompt: bool = True, now: datetime.datetime | None = None
    ) -> str:
        """The prompt for `messages` (dicts of role and content), ready for `encode`.

        `now` is the time for templates that write the date; None: the tokenizer's own, else the clock's.
        Raises InputError with the template's words when it refuses them (roles that do not alternate, say).
        """
        return self._render(messages, add_generation_prompt, now or self.now)

    def stream(self) -> "Stream":
        """A decoder for ids that arrive a few at a time."""
        return Stream(self)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids that `decode` leaves out."""
        return frozenset(id for id, token in self._backend.get_added_tokens_decoder().items() if token.special)

    @cached_property
    def _adds_space(self) -> bool:
        return self._backend.encode("a", add_special_tokens=False).tokens[0][0] in _SPACES

    @cached_property
    def _unspaced(self) -> tokenizers.Tokenizer:
        settings = json.loads(self._backend.to_str())
        changed = {name: _without_space(settings[name]) for name in ("normalizer", "pre_tokenizer")}
        return tokenizers.Tokenizer.from_str(json.dumps(settings | changed))

    @cached_property
    def _quoting(self) -> tokenizers.Tokenizer:
        return _quoting(self._backend)

    @cached_property
    def _quoting_unspaced(self) -> tokenizers.Tokenizer:
        return _quoting(self._unspaced)

    @cached_property
    def _render(self):
        return compile_template(self._template, self.special_tokens)

    def _json(self, name: str) -> dict[str, Any]:
        try:
            value = json.loads(self.files.get(name, b"{}"))
        except ValueError as error:
            raise InputError(f"{name}: not JSON") from error
        if not isinstance(value, dict):
            raise InputError(f"{name}: expected a JSON object")
        return value

    def _template_source(self) -> str | None:
        if "chat_template.jinja" in self.files:
            return self.files["chat_template.jinja"].decode()
        given = self._json("chat_template.json").get("chat_template") or self._config.get("chat_template")
        if isinstance(given, list):  # several, by name
            given = {entry["name"]: entry["template"] for entry in given}.get("default")
        return given

    def _stop_ids(self, model_eos: int | Sequence[int] | None) -> tuple[int, ...]:
        found: set[int] = set()
        for value in (model_eos, self._json("generation_config.json").get("eos_token_id")):
            found |= {value} if isinstance(value, int) else set(value or ())
        spelt = [self.special_tokens.get("eos_token")]
        spelt += [token for token in _END_OF_TURN if token in self._template]
        found |= {id for token in spelt if token is not None and (id := self.id_of(token)) is not None}
        return tuple(sorted(found))


class Stream:
    """Ids in, text out: only whole characters, and the pieces join to exactly `decode` of all ids.

    A token may be a part of a character, so text is held back while it could still change. A SentencePiece-like
    tokenizer drops the space before the first word it decodes, so each piece is decoded behind the tokens before it.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._window: list[int] = []  # the last piece's tokens, then those not yet whole
        self._fresh = 0  # where the tokens not yet whole begin
        self._given = ""  # text of the window that was given out

    def push(self, ids: Iterable[int]) -> str:
        """The text that these ids complete; may be empty."""
        # A special token has no text, and a window of nothing else would look like the start of a text.
        self._window += [id for id in ids if id not in self._tokenizer.special_ids]
        text = self._tokenizer.decode(self._window)
        whole = text.rstrip(_REPLACEMENT)
        piece = whole[len(self._given) :]
        self._given += piece
        last = self._window[self._fresh :]
        # A window whose text is empty would again look like the start of a text.
        if whole == text and (behind := self._tokenizer.decode(last)):
            self._window, self._fresh, self._given = last, len(last), behind
        return piece

    def finish(self) -> str:
        """What was held back: U+FFFD for each byte sequence that never became a character."""
        piece = self._tokenizer.decode(self._window)[len(self._given) :]
        self._window, self._fresh, self._given = [], 0, ""
        return piece


def tokenizer_of(folder: Path, model_eos: int | Sequence[int] | None = None) -> Tokenizer:
    """The tokenizer of a checkpoint folder; `model_eos` is config.json's eos_token_id."""
    return Tokenizer({name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}, model_eos)


def check_same_vocabulary(target: Tokenizer, drafter: Tokenizer, source: str) -> None:
    """Raises InputError unless both tokenizers give every id the same meaning; `source` names the drafter.

    Ids without a meaning may differ: those that a vocabulary does not have, and the [PAD9] with which llama.cpp fills
    one at id 9.
    """
    if target.fingerprint == drafter.fingerprint:
        return
    for token_id in sorted(target.ids | drafter.ids):
        ours, theirs = target.token_of(token_id), drafter.token_of(token_id)
        unused = (None, f"[PAD{token_id}]")
        if ours != theirs and not (ours in unused and theirs in unused):
            raise InputError(
                f"the drafter must have the target's vocabulary: expected token {token_id} to be {_quoted(ours)}, "
                f"got {_quoted(theirs)} in {source}"
            )


def _quoted(token: str | None) -> str:
    return "none" if token is None else repr(token)


def _quoting(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    copy = tokenizers.Tokenizer.from_str(backend.to_str())
    copy.encode_special_tokens = True
    return copy


def _without_space(part: Any) -> Any:
    """A part of tokenizer.json that adds no space before a text."""
    if not isinstance(part, dict):
        return part
    if part["type"] == "Prepend":
        return {"type": "Sequence", "normalizers": []}
    how = {"Metaspace": {"prepend_scheme": "never"}, "ByteLevel": {"add_prefix_space": False}}.get(part["type"], {})
    inner = {key: [_without_space(item) for item in value] for key, value in part.items() if isinstance(value, list)}
    return part | inner | how


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """bos_token and the like by name; each is written as text or as an object with the text in `content`."""
    found = {}
    for name in _SPECIAL:
        token = config.get(name)
        if isinstance(token, Mapping):
            token = token.get("content")
        if isinstance(token, str):
            found[name] = token
    return found
