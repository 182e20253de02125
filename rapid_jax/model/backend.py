# SPDX-License-Identifier: Apache-2.0
"""The Rust library `tokenizers` behind one door: whatever it raises, or panics with, is an InputError of one line."""

import contextlib
import json
import math
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import tokenizers

from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.json_input import parse_object, shown

_LOADING = threading.RLock()
_MOST_GROWTH = 1000  # replacements are of a character or two by another
_PROBE = "a B\n<" + "".join(char * 64 for char in "a1 .") + "!"  # rows that a pattern could try in 2**64 ways
_MOST_ID = 2**22  # the largest vocabularies have some 2**18 tokens


def read_backend(data: bytes, source: str) -> tokenizers.Tokenizer:
    """The tokenizer of a tokenizer.json.

    Raises InputError if it cannot be read, or if the library gives a token another id than the file states.
    """
    fields = parse_object(data, source)
    stated = fields.each("added_tokens", ())
    if math.prod(_growths([value for key, value in fields.items() if key != "model"])) > _MOST_GROWTH:
        raise InputError(f"{source}: its replacements may make a text more than {_MOST_GROWTH} times as long")
    with _LOADING, _silent(), guarded(f"{source}: cannot be read"):
        backend = tokenizers.Tokenizer.from_str(data.decode("utf-8-sig"))
        # Settings of whoever saved the file: they would cut long documents and pad short ones.
        backend.no_truncation()
        backend.no_padding()
        with contextlib.suppress(Exception):  # a vocabulary may lack its letters; a panic is no Exception
            backend.decode(backend.encode(_PROBE).ids)
        most = max(backend.get_vocab(with_added_tokens=True).values(), default=0)
    if most > _MOST_ID:
        raise InputError(f"{source}: expected ids of at most {_MOST_ID}, got {most}")
    for token in stated:
        content, id = token.text("content"), token.whole("id")
        if (found := backend.token_to_id(content)) != id:
            raise InputError(f"{source}: added token {shown(content)} must be the next id, {found}, got id {id}")
    return backend


def backend_of(settings: Mapping[str, Any], what: str) -> tokenizers.Tokenizer:
    """The tokenizer of settings as tokenizer.json has them; `what` names it in errors."""
    with _LOADING, _silent(), guarded(f"{what}: cannot be made"):
        return tokenizers.Tokenizer.from_str(json.dumps(settings))


def settings_of(backend: tokenizers.Tokenizer) -> dict[str, Any]:
    """What tokenizer.json says of a tokenizer."""
    return json.loads(backend.to_str())


def encoding_of(backend: tokenizers.Tokenizer, text: str, *, add_special_tokens: bool = False) -> tokenizers.Encoding:
    """The tokens of a text and where they lie in it. Raises InputError for what is not Unicode, or has no tokens."""
    check_unicode(text)
    with guarded("the tokenizer cannot encode the text"):
        return backend.encode(text, add_special_tokens=add_special_tokens)


def encodings_of(
    backend: tokenizers.Tokenizer, texts: Sequence[str], *, places: bool = False
) -> list[tokenizers.Encoding]:
    """The tokens of many texts, and their places if asked for, by all processors. Raises as `encoding_of` does."""
    for text in texts:
        check_unicode(text)
    with guarded("the tokenizer cannot encode the text"):
        encode = backend.encode_batch if places else backend.encode_batch_fast
        return encode(texts, add_special_tokens=False)


def check_unicode(text: str, name: str = "the text") -> None:
    """Raises InputError for half a surrogate pair: no tokenizer has tokens for it, and no UTF-8 text holds one."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        char = text[error.start]
        raise InputError(
            f"{name}: expected valid Unicode, got {char!r}, half of a surrogate pair, at character {error.start}"
        ) from None


def _growths(value: Any) -> Iterator[int]:
    """By how much each replacement in a part of tokenizer.json may lengthen a text."""
    if isinstance(value, dict) and value.get("type") == "Replace":
        yield max(len(str(value.get("content"))), 1)
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _growths(inner)


@contextlib.contextmanager
def guarded(failure: str) -> Iterator[None]:
    """Around calls of the library alone: what it raises becomes an InputError that begins with `failure`."""
    try:
        yield
    except Exception as error:  # the library raises plain Exception, TypeError, OverflowError
        raise InputError(f"{failure}: {_words(error)}") from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of Rust; it is no Exception, and no module holds its class
            raise
        raise InputError(f"{failure}: {_words(error)}") from error


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Nothing on standard error: a panic prints a stack of its own before it is raised."""
    try:
        kept = os.dup(2)
    except OSError:  # it is closed
        yield
        return
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _words(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
