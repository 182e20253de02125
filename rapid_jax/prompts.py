# SPDX-License-Identifier: Apache-2.0
"""The two prompts: the whole document for the target, the retrieved text for the drafter."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

from rapid_jax.config import RapidConfig
from rapid_jax.model.backend import check_unicode
from rapid_jax.model.chat import mark_of, parted
from rapid_jax.model.load import LoadedModel
from rapid_jax.model.tokenizer import Tokenizer
from rapid_jax.retrieval.select import Selection
from rapid_jax.runtime.errors import InputError

_DOCUMENT, _QUESTION = mark_of("document"), mark_of("question")
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


@dataclass(frozen=True)
class Frame:
    """A prompt with its document left out: what stands before and after it, as token ids."""

    tokenizer: Tokenizer
    before: list[int]
    after: list[int]
    strips: bool = False  # the chat template strips the space that the document begins with
    rendered: Callable[[str], tuple[str, str]] | None = None  # document -> what the template makes of it, what is sent

    @property
    def size(self) -> int:
        """Tokens around the document."""
        return len(self.before) + len(self.after)

    def around(self, document: str) -> Prompt:
        """The prompt with the document in place. Tokens never span the document's edges.

        Raises InputError if the chat template, shown the document itself, makes another text of the prompt.
        """
        text = document.lstrip() if self.strips else document
        if self.rendered is not None:
            _check_as_it_is(*self.rendered(document))
        return Prompt(self.before + self.tokenizer.encode_quoted(text), self.after)


@dataclass(frozen=True)
class Reading:
    """The prompts about one question."""

    long: Prompt
    short: Prompt | None  # on the retrieved text; None in mode target
    selection: Selection | None
    document_tokens: int  # of the whole document
    truncated: bool  # the target does not read all of it


def message(tokenizer: Tokenizer, text: str, system: str | None) -> Prompt:
    """A prompt of one user message, quoted; its tail is one token."""
    now, given = tokenizer.now or datetime.now(), text
    before, after = parted(_rendered(tokenizer, _DOCUMENT, system, now), (_DOCUMENT,))
    if text != text.strip():
        bare = parted(_rendered(tokenizer, _SPACE + _DOCUMENT + _SPACE, system, now), (_DOCUMENT,))
        text = text.lstrip() if bare[0] == before else text
        text = text.rstrip() if bare[1] == after else text
    _check_as_it_is(_rendered(tokenizer, given, system, now), before + text + after)
    tokens = tokenizer.encode_template(before, first=True) + tokenizer.encode_quoted(text)
    tokens += tokenizer.encode_template(after)
    return Prompt(tokens[:-1], tokens[-1:])


def frame(tokenizer: Tokenizer, template: str, question: str, system: str | None, begins: str = "") -> Frame:
    """The user message `template` in the checkpoint's chat template, ready for a document; the answer `begins` so.

    The question and the document are quoted: a special token spelt out in them does not end the user's turn. Where the
    chat template strips a message, space at its edges is left out of them too.
    """
    if not question.strip():
        raise InputError("expected a question, got an empty one")
    check_unicode(question, "the question")
    message = template.replace("{document}", _DOCUMENT).replace("{question}", _QUESTION)
    now, asked_as_is = tokenizer.now or datetime.now(), question
    before, between, end = parted(_rendered(tokenizer, message, system, now), (_DOCUMENT, _QUESTION))
    strips, first = False, message.lstrip().startswith(_DOCUMENT)
    if first or question != question.rstrip():
        bare = parted(_rendered(tokenizer, _SPACE + message + _SPACE, system, now), (_DOCUMENT, _QUESTION))
        strips = first and bare[0] == before
        if message.rstrip().endswith(_QUESTION) and bare[2] == end:
            question = question.rstrip()
    asked = tokenizer.encode_quoted(question, follows=not between.endswith(" "))
    if not asked:
        raise InputError("expected a question that this model's tokenizer has tokens for, got one without any")
    after = tokenizer.encode_template(between) + asked + tokenizer.encode_template(end + begins)

    def rendered(document: str) -> tuple[str, str]:
        parts = parted(message, (_DOCUMENT, _QUESTION))
        whole = _rendered(tokenizer, parts[0] + document + parts[1] + asked_as_is + parts[2], system, now)
        return whole, before + (document.lstrip() if strips else document) + between + question + end

    return Frame(tokenizer, tokenizer.encode_template(before, first=True), after, strips, rendered)


def _rendered(tokenizer: Tokenizer, message: str, system: str | None, now: datetime) -> str:
    """What the chat template makes of a user's message at that time."""
    messages = [{"role": "user", "content": message}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    return tokenizer.chat(messages, now=now)


def _check_as_it_is(rendered: str, sent: str) -> None:
    """Raises InputError if a template, shown the words themselves, made another text than what is sent to the model."""
    if rendered != sent:
        raise InputError("the checkpoint's chat template changes a message by what it says, expected it as it is")


def context_of(config: RapidConfig, positions: int) -> int:
    """Tokens that a prompt and its answer may have, of a target that was made for so many `positions`.

    Raises InputError if `models.max_context` asks for more.
    """
    most = config.models.max_context or positions
    if most > positions:
        raise InputError(
            f"models.max_context: expected at most the {positions} positions that {config.models.target} was made "
            f"for, got {most}; a longer context needs rope scaling in the checkpoint's config.json"
        )
    return most


def visible(config: RapidConfig, target: LoadedModel, document: str, around: int) -> tuple[str, int]:
    """(what the target reads of the document, the tokens of the whole document); `around` are the prompt's others.

    What is cut depends on the question only where it takes more than 1/32 of the context: one prefill serves the
    questions that are shorter.
    """
    most = context_of(config, target.config.context_size)
    left = most - config.sampling.max_new_tokens
    usual = frame(target.tokenizer, config.prompts.target, "?", config.prompts.system).size + most // 32
    keep = left - max(around, usual) if left > usual else left - around
    return visible_text(document, left - around, target.tokenizer, config.models.too_long, keep)


def check_fits(config: RapidConfig, drafter: LoadedModel, prompt_tokens: int) -> None:
    """Raises InputError if a prompt of so many tokens and the answer are more than the drafter was made for."""
    needed = prompt_tokens + config.sampling.max_new_tokens
    if needed > drafter.config.context_size:
        raise InputError(
            f"the drafter's prompt is too long: expected at most {drafter.config.context_size} positions, got "
            f"{needed} with the answer; lower retrieval.min_tokens or retrieval.max_chunks"
        )


def visible_text(document: str, room: int, tokenizer: Tokenizer, too_long: str, keep: int) -> tuple[str, int]:
    """(the part of the document that fits into `room` tokens, the tokens of the whole document).

    `too_long` says what becomes of a longer one: error, head (its beginning is kept) or middle (its middle is cut out:
    the first and the last half, as in the paper's evaluation). A cut keeps `keep` tokens, at most `room`.
    """
    if not document.strip():
        raise InputError("expected a document with text in it, got an empty one")
    check_unicode(document, "the document")
    if room < 1:
        raise InputError(f"no room for a document: {1 - room} tokens too many around it; raise models.max_context")
    spans = tokenizer.spans(document)
    if not spans:
        raise InputError("expected a document that this model's tokenizer has tokens for, got one without any")
    if len(spans) <= room:
        return document, len(spans)
    if too_long == "error":
        raise InputError(
            f"the document is too long: expected at most {room} tokens (models.max_context less the prompt around it "
            f"and the answer), got {len(spans)}; models.too_long=middle or head cuts it"
        )
    # Cut text does not always tokenise to the tokens it had: give way until it fits.
    most = min(keep, room)
    for size in range(most, 0, -max(most // 64, 1)):
        if too_long == "head":
            text = document[: spans[size - 1][1]]
        else:
            first, last = size - size // 2, size // 2
            text = document[: spans[first - 1][1]] + (document[spans[-last][0] :] if last else "")
        if len(tokenizer.encode_quoted(text)) <= room:
            return text, len(spans)
    raise InputError(f"no part of the document fits into {room} tokens")
