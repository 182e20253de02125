# SPDX-License-Identifier: Apache-2.0
"""Text to token ids and back, chat prompts, stop ids, and text as it streams."""

import datetime
import logging
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from rapid_jax.model import detokenize
from rapid_jax.model.backend import backend_of, encoding_of, read_backend, settings_of
from rapid_jax.model.chat import PLAIN, ChatTemplate, Messages, TemplateLimitError
from rapid_jax.model.pieces import sentencepiece_files
from rapid_jax.model.quoting import Quoting
from rapid_jax.model.tokenizer_config import TokenizerConfig
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.files import digest
from rapid_jax.runtime.json_input import MOST_BYTES, shown
from rapid_jax.runtime.storage import AnyPlace, size_of

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
# Ends of a turn that a chat template may write without the checkpoint's configs naming them.
_END_OF_TURN = ("<|eot_id|>", "<|im_end|>", "<end_of_turn>")
_SPACES = ("\N{LOWER ONE EIGHTH BLOCK}", "\N{LATIN CAPITAL LETTER G WITH DOT ABOVE}")  # how vocabularies spell one
_MARKER = re.compile(r"<(?!0x..>).+>|\[.+\]")  # how tokens between messages are spelt; <0x0A> is a byte
_NOW = datetime.datetime(2025, 1, 1)
# Dialogues in which a template shows the tokens that it writes; it may refuse some of them.
_ROLES = (("user",), ("user", "assistant"), ("system", "user", "assistant", "user"))
_log = logging.getLogger(__name__)


class Tokenizer:
    """A checkpoint's tokenizer: ids equal transformers' for the same text.

    `files` are the checkpoint's own files (names in FILES), kept for export. tokenizer.json is needed, or
    SentencePiece's tokenizer.model; the rest decides the chat template, the special tokens and the stop ids.
    `model_eos` is config.json's eos_token_id. No text becomes an id that is not below `rows`, the rows of the model's
    embedding. `place` is what names the files in errors.
    """

    def __init__(
        self, files: Mapping[str, bytes], model_eos: Any = None, *, rows: int | None = None, place: str | AnyPlace = ""
    ):
        self.files, self._rows, place = dict(files), rows, f"{place}/" if place else ""
        if not {"tokenizer.json", "tokenizer.model"} & self.files.keys():
            raise InputError(
                f"{place}tokenizer.json: no such file, nor a tokenizer.model; "
                "transformers' save_pretrained writes it from other formats"
            )
        read = self.files if "tokenizer.json" in self.files else self.files | sentencepiece_files(self.files, place)
        config = TokenizerConfig(read, place)
        self._backend = read_backend(read["tokenizer.json"], f"{place}tokenizer.json")
        config.add_tokens(self._backend)
        self.special_tokens = config.special_tokens
        named = {id for token in config.all_special if (id := self.id_of(token)) is not None}
        self._special = self.special_ids | named  # some tokens are special by a config alone
        self.has_chat_template = config.template is not None  # False: `chat` writes plain "User: ... Assistant:" text
        self._template = ChatTemplate(PLAIN if config.template is None else config.template, self.special_tokens)
        self._warned = self.has_chat_template
        spelt = [self.special_tokens.get("eos_token")]
        spelt += [token for token in _END_OF_TURN if token in self._template.source]
        ends = {id for token in spelt if token is not None and (id := self.id_of(token)) is not None}
        self.stop_ids = tuple(sorted(ends | config.eos_ids(model_eos)))
        self.now: datetime.datetime | None = None  # the time that `chat` goes by; None: the clock's

    @cached_property
    def vocab_size(self) -> int:
        """Ids are below this: added tokens are counted. A model's embedding may have more rows."""
        return 1 + max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1)

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
        starts with those it puts before one, as most chat templates' text does.
        """
        ids = encoding_of(self._backend, text).ids
        if add_special_tokens and (not self._opening or ids[: len(self._opening)] != self._opening):
            ids = encoding_of(self._backend, text, add_special_tokens=True).ids
        return self._check(ids)

    def encode_quoted(self, text: str, *, follows: bool = False) -> list[int]:
        """Token ids of somebody else's words: none is special, ends an answer or is one that the template writes.

        `follows`: without the space that some tokenizers (SentencePiece) put before every text. Raises InputError where
        the tokenizer has no other token for a part of the words.
        """
        quoting = self._quoting_unspaced if follows and self._adds_space else self._quoting
        return self._check(quoting.encode(text).ids)

    def counts(self, texts: Sequence[str]) -> list[int]:
        """Tokens of `encode_quoted` of each text; all processors count."""
        return self._quoting.counts(texts)

    def spans(self, text: str) -> list[tuple[int, int]]:
        """Of each token of `encode_quoted(text)`, the characters text[start:end] that it stands for.

        A character that several tokens make up is in the span of each. Whether a span takes in the space before a word
        is the tokenizer's habit.
        """
        return self.spans_of([text])[0]

    def spans_of(self, texts: Sequence[str]) -> list[list[tuple[int, int]]]:
        """The `spans` of each text; all processors count."""
        return self._quoting.spans(texts)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of the ids, spaces as the tokens have them; bytes that are not UTF-8 become U+FFFD."""
        return detokenize.decode(self._backend, ids, skip_special_tokens=skip_special_tokens)

    def encode_template(self, text: str, *, first: bool = False) -> list[int]:
        """Token ids of the part of a template before, between or behind other text.

        The `first` part begins with the tokens that the tokenizer puts before a text (bos), unless the template writes
        one of them itself. Where the tokenizer starts every text with a space, only the first part gets one, and the
        space that a part ends with is left to what `encode_quoted` gives behind it.
        """
        text = text.removesuffix(" ") if self._adds_space else text
        encoding = encoding_of(self._backend, text)
        ids = encoding.ids
        if first:
            return self._check(ids if not set(ids).isdisjoint(self._opening) else self._opening + ids)
        if self._adds_space:
            special = (index for index, token in enumerate(ids) if token in self.special_ids)
            at = next(special, len(ids))  # behind a special token it adds one in joined text, too
            end = encoding.offsets[at][0] if at < len(ids) else len(text)
            ids = encoding_of(self._unspaced, text[:end]).ids + ids[at:]
        return self._check(ids)

    def chat(
        self,
        messages: Messages,
        *,
        add_generation_prompt: bool = True,
        now: datetime.datetime | None = None,
        thinking: bool = False,
    ) -> str:
        """The prompt for `messages` (dicts of role and content), ready for `encode`.

        `now` is the time for templates that write the date; None: the tokenizer's own, else the clock's. `thinking`:
        a model that can is to think before it answers.
        Raises InputError with the template's words when it refuses them (roles that do not alternate, say).
        """
        if not self._warned:
            self._warned = True
            _log.warning("the checkpoint has no chat template: the prompt is plain text, 'User: ... Assistant:'")
        return self._template.render(messages, add_generation_prompt, now or self.now, thinking=thinking)

    def stream(self) -> detokenize.Stream:
        """A decoder for ids that arrive a few at a time."""
        return detokenize.Stream(self.decode, self.special_ids)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids that `decode` leaves out."""
        return detokenize.special_ids(self._backend)

    def _check(self, ids: list[int]) -> list[int]:
        if self._rows is not None and ids and (most := max(ids)) >= self._rows:
            raise InputError(
                f"the prompt holds token {shown(self.token_of(most))}, id {most}: expected ids below {self._rows}, the "
                f"rows of the model's embedding"
            )
        return ids

    @cached_property
    def _opening(self) -> list[int]:
        """What the tokenizer's post-processor puts before a text."""
        encoding = encoding_of(self._backend, "a", add_special_tokens=True)
        first = next((at for at, text in enumerate(encoding.sequence_ids) if text is not None), 0)
        return encoding.ids[:first]

    @cached_property
    def _adds_space(self) -> bool:
        tokens = encoding_of(self._backend, "a").tokens
        return bool(tokens) and tokens[0].startswith(_SPACES)

    @cached_property
    def _unspaced(self):
        settings = settings_of(self._backend)
        changed = {name: _without_space(settings[name]) for name in ("normalizer", "pre_tokenizer")}
        return backend_of(settings | changed, "the tokenizer for text that follows other text")

    @cached_property
    def _quoting(self) -> Quoting:
        return Quoting(self._backend, self._special | self._written, frozenset(self.stop_ids))

    @cached_property
    def _quoting_unspaced(self) -> Quoting:
        return Quoting(self._unspaced, self._special | self._written, frozenset(self.stop_ids))

    @cached_property
    def _written(self) -> frozenset[int]:
        """Ids of the tokens that the chat template writes between messages."""
        added = self._backend.get_added_tokens_decoder()
        written: set[int] = set()
        if self.has_chat_template:
            text = "\0".join(self._template.literals())
            written = {id for id, token in added.items() if token.content in text}
            for roles in _ROLES:
                written |= self._render([{"role": role, "content": "x"} for role in roles])
            plain = {id for id, token in added.items() if token.content.isspace()}
            written = {id for id in written - plain if id in added or _MARKER.fullmatch(self.token_of(id) or "")}
        return frozenset(written)

    def _render(self, messages: Messages) -> set[int]:
        try:
            ends = (self._template.render(messages, end, _NOW) for end in (True, False))
            return {id for text in ends for id in encoding_of(self._backend, text).ids}
        except TemplateLimitError:
            raise
        except InputError:  # not such a dialogue, by this template
            return set()


def tokenizer_of(folder: AnyPlace, model_eos: Any = None, *, rows: int | None = None) -> Tokenizer:
    """The tokenizer of a checkpoint folder; `model_eos` is config.json's eos_token_id, `rows` the embedding's."""
    files = {name: _bytes_of(folder / name) for name in FILES if (folder / name).is_file()}
    return Tokenizer(files, model_eos, rows=rows, place=folder)


def _bytes_of(path: AnyPlace) -> bytes:
    try:
        if (size := size_of(path)) > MOST_BYTES:
            raise InputError(f"{path}: expected a file of at most {MOST_BYTES} bytes, got {size}")
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error


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
                f"the drafter must have the target's vocabulary: expected token {token_id} to be {_quote(ours)}, "
                f"got {_quote(theirs)} in {source}"
            )


def _quote(token: str | None) -> str:
    return "none" if token is None else repr(token)


def _without_space(part: Any) -> Any:
    """A part of tokenizer.json that adds no space before a text."""
    if not isinstance(part, dict):
        return part
    if part["type"] == "Prepend":
        return {"type": "Sequence", "normalizers": []}
    how = {"Metaspace": {"prepend_scheme": "never"}, "ByteLevel": {"add_prefix_space": False}}.get(part["type"], {})
    inner = {key: [_without_space(item) for item in value] for key, value in part.items() if isinstance(value, list)}
    return part | inner | how
