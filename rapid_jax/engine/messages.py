# SPDX-License-Identifier: Apache-2.0
"""Messages of a chat: which of them is a document, and what is asked about it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rapid_jax.config import PromptsConfig
from rapid_jax.conversation import Document, Message, Quoted
from rapid_jax.engine.request import Chat
from rapid_jax.runtime.errors import InputError

_LONG_CHUNKS = 2  # a message of more than so many chunks has something to retrieve from
_QUESTION_CHARACTERS = 2000  # that the last paragraph of a long message may have, to be the question about the rest


@dataclass(frozen=True)
class PartedChat:
    """Messages with the document's place, for the target and for the drafter, and what is asked."""

    long: Sequence[Message]
    short: Sequence[Message]
    document: str | None  # None: there is nothing to retrieve from
    question: str


def split_chat(
    chat: Chat, prompts: PromptsConfig, chunk_tokens: int, counts: Callable[[Sequence[str]], list[int]]
) -> PartedChat:
    """The messages of a chat as prompts are made of them.

    A document of the chat's own stands in the first user's message, in the words of the settings; else the longest
    message is one, where it has more than two chunks of retrieval.
    """
    messages = [(message["role"], message["content"]) for message in chat.messages]
    asked = [at for at, (role, _) in enumerate(messages) if role == "user"]
    if not asked:
        raise InputError("expected a message of the user, got none")
    question = messages[asked[-1]][1]
    quoted: list[Message] = [(role, [Quoted(text)]) for role, text in messages]
    if chat.document is not None:
        return PartedChat(
            _with(quoted, asked[0], _around(prompts.target, messages[asked[0]][1])),
            _with(quoted, asked[0], _around(prompts.drafter, messages[asked[0]][1])),
            chat.document,
            question,
        )
    sizes = counts([text for _, text in messages])
    longest = max(range(len(messages)), key=lambda at: sizes[at])
    if sizes[longest] <= _LONG_CHUNKS * chunk_tokens:
        return PartedChat(quoted, quoted, None, question)
    text, rest = messages[longest][1], ""
    if longest == asked[-1]:
        text, rest = _cut(text)
        question = rest
    own = _with(quoted, longest, [Document(), *([Quoted(rest)] if rest else [])])
    return PartedChat(own, own, text, question)


def _around(template: str, question: str) -> list[str | Quoted | Document]:
    before, _, rest = template.partition("{document}")
    between, _, after = rest.partition("{question}")
    return [before, Document(), between, Quoted(question), after]


def _with(messages: Sequence[Message], at: int, pieces: Sequence[str | Quoted | Document]) -> list[Message]:
    return [(role, pieces) if index == at else (role, own) for index, (role, own) in enumerate(messages)]


def _cut(text: str) -> tuple[str, str]:
    """(the document, the question behind it with the space between): a message that ends in a paragraph of its own."""
    body = text.rstrip()
    at = max(body.rfind("\n\n"), body.rfind("\n", max(len(body) - _QUESTION_CHARACTERS, 0)))
    if at <= 0 or len(body) - at > _QUESTION_CHARACTERS:
        return text, ""
    return text[:at], text[at:]
