# SPDX-License-Identifier: Apache-2.0
"""What the files beside tokenizer.json say: special tokens, added tokens, chat template, ids that end an answer.

Which file wins where two say the same is transformers' rule.
"""

from collections.abc import Mapping
from typing import Any

import tokenizers

from rapid_jax.model.backend import guarded
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.json_input import Fields, parse_object, shown

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_EXTRA = ("extra_special_tokens", "additional_special_tokens")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_MOST_ID = 2**31 - 1


class TokenizerConfig:
    """The files of a tokenizer by name, read; `place` is what names their folder in errors."""

    def __init__(self, files: Mapping[str, bytes], place: str = ""):
        self._files, self._place = files, place
        self._config = self._object("tokenizer_config.json")
        self._states_added = self._config.fields("added_tokens_decoder", None) is not None
        map_ = self._object("special_tokens_map.json")
        self._maps = [self._config] if self._states_added else [map_, self._config]  # the first that has a token wins
        self.special_tokens = self._special_tokens()  # by name, such as bos_token
        self.all_special = list(dict.fromkeys([*self.special_tokens.values(), *self._extra()]))
        self.template = self._template()

    def add_tokens(self, backend: tokenizers.Tokenizer) -> None:
        """Adds the tokens that only these files state.

        Raises InputError if one that tokenizer.json lacks does not get the id that is stated for it.
        """
        stated = self._decoder() if self._states_added else self._added_tokens(backend)
        known = backend.get_vocab(with_added_tokens=True)
        have = {repr(token) for token in backend.get_added_tokens_decoder().values()}
        name = "tokenizer_config.json: added_tokens_decoder" if self._states_added else "added_tokens.json"
        with guarded(f"{self._place}{name}"):
            backend.add_tokens([token for _, token in sorted(stated.items()) if repr(token) not in have])
        for id, token in sorted(stated.items()):
            if token.content not in known and (found := backend.token_to_id(token.content)) != id:
                raise InputError(
                    f"{self._place}{name}: {shown(token.content)} must be the next id behind tokenizer.json's, "
                    f"{found}, got id {id}"
                )
        added = {token.content for token in backend.get_added_tokens_decoder().values()}
        with guarded(f"{self._place}tokenizer_config.json: special tokens"):
            backend.add_special_tokens([token for token in self.all_special if token not in added])

    def eos_ids(self, model_eos: Any) -> set[int]:
        """The ids that end an answer, by config.json's eos_token_id and by generation_config.json's."""
        given = Fields({"eos_token_id": model_eos}, f"{self._place}config.json")
        return _ids(given) | _ids(self._object("generation_config.json"))

    def _object(self, name: str) -> Fields:
        return parse_object(self._files.get(name, b"{}"), f"{self._place}{name}")

    def _special_tokens(self) -> dict[str, str]:
        """bos_token and the like by name; each is written as text or as an object with the text in `content`."""
        others = [key for key in self._config if key.endswith("_token") and isinstance(self._config[key], str)]
        found = {}
        for name in dict.fromkeys((*_NAMED, *others)):
            holder = next((fields for fields in self._maps if name in fields), None)
            if holder is not None and holder[name] is not None:
                found[name] = _content(holder, name)
        return {name: token for name, token in found.items() if token}

    def _extra(self) -> list[str]:
        """Special tokens without a name."""
        for fields in self._maps:
            for key in _EXTRA:
                given = fields.get(key)
                if isinstance(given, dict):
                    inner = fields.fields(key)
                    return [_content(inner, name) for name in inner if inner[name] is not None]
                if isinstance(given, list):
                    entries = Fields({f"{key}[{at}]": entry for at, entry in enumerate(given)}, fields.source)
                    return [_content(entries, name) for name in entries]
                if given is not None:
                    raise fields.error(key, "a list of tokens")
        return []

    def _decoder(self) -> dict[int, tokenizers.AddedToken]:
        stated = self._config.fields("added_tokens_decoder")
        found = {}
        for key in stated:
            if not (key.isascii() and key.isdigit() and len(key) < 11):
                raise stated.error(key, "under a token's id")
            found[int(key)] = _added_token(stated.fields(key))
        return found

    def _added_tokens(self, backend: tokenizers.Tokenizer) -> dict[int, tokenizers.AddedToken]:
        """Those of added_tokens.json, which older checkpoints have; tokenizer.json's win."""
        given, special = self._object("added_tokens.json"), set(self.all_special)
        found = {}
        for content in given:
            if not content:
                raise given.error(content, "under a token's text")
            id = given.whole(content, most=_MOST_ID)
            plain = content not in special
            found[id] = tokenizers.AddedToken(content, normalized=plain, special=not plain)
        return found | backend.get_added_tokens_decoder() if found else {}

    def _template(self) -> str | None:
        """The chat template, None if there is none. Raises InputError for several of which none is the default."""
        if (data := self._files.get("chat_template.jinja")) is not None:
            try:
                return data.decode()
            except UnicodeDecodeError as error:
                raise InputError(f"{self._place}chat_template.jinja: expected UTF-8: {error}") from error
        beside = self._object("chat_template.json")
        fields = beside if beside.get("chat_template") is not None else self._config
        given, templates = fields.get("chat_template"), {}
        if given is None or isinstance(given, str):
            return given
        if isinstance(given, list):
            templates = {entry.text("name"): entry.text("template") for entry in fields.each("chat_template")}
        elif isinstance(given, dict):
            named = fields.fields("chat_template")
            templates = {name: named.text(name) for name in named}
        else:
            raise fields.error("chat_template", "a string, or templates by name")
        if "default" not in templates:
            names = ", ".join(map(shown, templates)) or "none"
            raise InputError(f"{fields.source}: chat_template must have a template named 'default', got {names}")
        return templates["default"]


def _content(fields: Fields, name: str) -> str:
    if isinstance(fields[name], dict):
        return fields.fields(name).text("content")
    if not isinstance(fields[name], str):
        raise fields.error(name, "a token's text, or an object with it in content")
    return fields[name]


def _added_token(fields: Fields) -> tokenizers.AddedToken:
    content = fields.text("content")
    if not content:
        raise fields.error("content", "a token's text")
    flags = {flag: fields.truth(flag) for flag in _FLAGS if fields.get(flag) is not None}
    with guarded(f"{fields.source}: added_tokens_decoder: {shown(content)}"):
        return tokenizers.AddedToken(content, **flags)


def _ids(fields: Fields) -> set[int]:
    """eos_token_id: nothing, an id, or several."""
    value = fields.get("eos_token_id")
    if value is None:
        return set()
    if isinstance(value, list):
        return set(fields.wholes("eos_token_id", most=_MOST_ID))
    if not isinstance(value, int) or isinstance(value, bool):
        raise fields.error("eos_token_id", "a whole number or a list of them")
    return {fields.whole("eos_token_id", most=_MOST_ID)}
