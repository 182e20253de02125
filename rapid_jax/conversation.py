# SPDX-License-Identifier: Apache-2.0
"""Messages as token ids by a checkpoint's chat template, with a place for a document."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol

import numpy as np

from rapid_jax.model.backend import check_unicode
from rapid_jax.model.chat import mark_of, split_at_marks
from rapid_jax.model.tokenizer import Tokenizer
from rapid_jax.runtime.errors import InputError

_SPACE = " \n "  # around a message it shows whether a chat template strips it


@dataclass(frozen=True)
class Prompt:
    """Token ids of a prompt; those of `head` depend on the document alone, those of `tail` on the question."""

    head: list[int]  # template up to the document, and the document
    tail: list[int]  # the question, and the template to the end

    @property
    def tokens(self) -> list[int]:
        """The whole prompt."""
        return self.head + self.tail


class Encodes(Protocol):
    """What of a tokenizer a document needs; `Tokenizer` is one."""

    def encode_quoted(self, text: str) -> list[int]:
        """As `Tokenizer.encode_quoted`."""
        ...

    def spans(self, text: str) -> Sequence[Any] | np.ndarray:
        """As `Tokenizer.spans`."""
        ...


@dataclass(frozen=True)
class Frame:
    """A prompt with its document left out: what stands before and after it, as token ids."""

    tokenizer: Encodes
    before: list[int]
    after: list[int]
    strips: tuple[bool, bool] = (False, False)  # the chat template strips space before and behind the document
    rendered: Callable[[str], tuple[str, str]] | None = None  # document -> what the template makes of it, what is sent

    @property
    def size(self) -> int:
        """Tokens around the document."""
        return len(self.before) + len(self.after)

    def around(self, document: str) -> Prompt:
        """The prompt with the document in place. Tokens never span the document's edges.

        Raises InputError if the chat template, shown the document itself, makes another text of the prompt.
        """
        text = _strip(document, *self.strips)
        if self.rendered is not None:
            _check_as_it_is(*self.rendered(document))
        return Prompt(self.before + self.tokenizer.encode_quoted(text), self.after)


@dataclass(frozen=True)
class Quoted:
    """Somebody's words in a message: a special token spelt out in them is none."""

    text: str


@dataclass(frozen=True)
class Document:
    """The place of the document in a message."""


Piece = str | Quoted | Document  # text of a template is str
Message = tuple[str, Sequence[Piece]]  # role, content


def conversation(
    tokenizer: Tokenizer, messages: Sequence[Message], begins: str = "", *, thinking: bool = False
) -> Frame:
    """Messages in the checkpoint's chat template, ready for a document where one has its place; the answer `begins` so.

    `thinking`: a model that can is to think before it answers. Where the chat template strips a message, space at its
    edges is left out of the words too. Without a place for a document everything is before it. Raises InputError if the
    template makes another text of a message.
    """
    now = tokenizer.now or datetime.now()
    for _, pieces in messages:
        for piece in pieces:
            if isinstance(piece, Quoted):
                check_unicode(piece.text, "a message")
    marked, words = _mark(messages)
    marks = [mark for mark, _ in words]

    def render(contents: Sequence[str]) -> str:
        filled = [{"role": role, "content": text} for (role, _), text in zip(messages, contents, strict=True)]
        return tokenizer.chat(filled, now=now, thinking=thinking)

    parts = split_at_marks(render(marked), marks) if marks else [render(marked)]
    stripped = _stripped(messages, marked, marks, parts, render)
    texts = [
        None if piece is None else _strip(piece.text, *edges) for (_, piece), edges in zip(words, stripped, strict=True)
    ]
    place = next((at for at, text in enumerate(texts) if text is None), len(texts))

    def rendered(document: str) -> tuple[str, str]:
        own = [document if piece is None else piece.text for _, piece in words]
        contents = [_fill(text, dict(zip(marks, own, strict=True))) for text in marked]
        given = [_strip(document, *stripped[place]) if text is None else text for text in texts]
        return render(contents), "".join(text for pair in zip(parts, [*given, ""], strict=True) for text in pair)

    def tokens(start: int, stop: int) -> list[int]:
        found: list[int] = []
        for at in range(start, stop):
            if at > start:
                found += tokenizer.encode_quoted(texts[at - 1] or "", follows=not parts[at - 1].endswith(" "))
            last = at == len(parts) - 1
            found += tokenizer.encode_template(parts[at] + begins * last, first=at == 0)
        return found

    before = tokens(0, min(place + 1, len(parts)))
    if place == len(texts):
        _check_as_it_is(*rendered(""))
        return Frame(tokenizer, before, [])
    return Frame(tokenizer, before, tokens(place + 1, len(parts)), stripped[place], rendered)


def _mark(messages: Sequence[Message]) -> tuple[list[str], list[tuple[str, Quoted | None]]]:
    """(contents with marks for words, each mark with its words; None is the document)."""
    contents, words = [], []
    for _, pieces in messages:
        content = ""
        for piece in pieces:
            if not isinstance(piece, str):
                name = "document" if isinstance(piece, Document) else f"words {len(words)}"
                words.append((mark_of(name), piece if isinstance(piece, Quoted) else None))
                piece = words[-1][0]
            content += piece
        contents.append(content)
    return contents, words


def _fill(text: str, words: Mapping[str, str]) -> str:
    """The content with its words; those of one are not looked through for the marks of others."""
    pieces = re.split("(" + "|".join(map(re.escape, words)) + ")", text) if words else [text]
    return "".join(words.get(piece, piece) for piece in pieces)


def _strip(text: str, left: bool, right: bool) -> str:
    text = text.lstrip() if left else text
    return text.rstrip() if right else text


def _stripped(
    messages: Sequence[Message],
    marked: Sequence[str],
    marks: Sequence[str],
    parts: Sequence[str],
    render: Callable[[Sequence[str]], str],
) -> list[tuple[bool, bool]]:
    """Of each mark whether the template strips the space to its left and right: at the edges of its message it may."""
    found, first = [(False, False)] * len(marks), 0
    for at, (_, pieces) in enumerate(messages):
        content, own = marked[at].strip(), [piece for piece in pieces if not isinstance(piece, str)]
        last = first + len(own) - 1
        edges = bool(own) and content.startswith(marks[first]), bool(own) and content.endswith(marks[last])
        spaced = [isinstance(piece, Document) or piece.text != piece.text.strip() for piece in own]
        if (edges[0] and spaced[0]) or (edges[1] and spaced[-1]):
            contents = [_SPACE + text + _SPACE if index == at else text for index, text in enumerate(marked)]
            bare = split_at_marks(render(contents), marks)
            left, right = edges[0] and bare[first] == parts[first], edges[1] and bare[last + 1] == parts[last + 1]
            found[first] = left, found[first][1]
            found[last] = found[last][0], right
        first = last + 1
    return found


def _check_as_it_is(rendered: str, sent: str) -> None:
    """Raises InputError if a template, shown the words themselves, made another text than what is sent to the model."""
    if rendered != sent:
        raise InputError("the checkpoint's chat template changes a message by what it says, expected it as it is")
