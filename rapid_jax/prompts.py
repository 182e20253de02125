# SPDX-License-Identifier: Apache-2.0
"""The two prompts: the whole document for the target, the retrieved text for the drafter."""

from collections.abc import Sequence
from dataclasses import dataclass

from rapid_jax.config import RapidConfig
from rapid_jax.conversation import Document, Encodes, Frame, Message, Prompt, Quoted, conversation
from rapid_jax.model.backend import check_unicode
from rapid_jax.model.load import LoadedModel
from rapid_jax.model.tokenizer import Tokenizer
from rapid_jax.retrieval.select import Selection
from rapid_jax.runtime.errors import InputError, TooLarge


@dataclass(frozen=True)
class Reading:
    """The prompts about one question."""

    long: Prompt
    short: Prompt | None  # on the retrieved text; None in mode target
    selection: Selection | None
    document_tokens: int  # of the whole document
    truncated: bool  # the target does not read all of it


def message(tokenizer: Tokenizer, text: str, system: str | None) -> list[int]:
    """The prompt of one user message, quoted."""
    messages: list[Message] = [] if system is None else [("system", [system])]
    return conversation(tokenizer, [*messages, ("user", [Quoted(text)])]).before


def frame(
    tokenizer: Tokenizer,
    template: str,
    question: str,
    system: str | None,
    begins: str = "",
    turns: Sequence[tuple[str, str]] = (),
    *,
    thinking: bool = False,
) -> Frame:
    """The user message `template` in the checkpoint's chat template, ready for a document; the answer `begins` so.

    With earlier `turns`, each a question and its answer, the first of them is in the template and `question` comes
    last. `thinking`: a model that can is to think first. Raises InputError for a question without text.
    """
    if not question.strip():
        raise InputError("expected a question, got an empty one")
    check_unicode(question, "the question")
    questions = [*(asked for asked, _ in turns), question]
    before, _, rest = template.partition("{document}")
    between, _, after = rest.partition("{question}")
    messages: list[Message] = [] if system is None else [("system", [system])]
    messages.append(("user", [before, Document(), between, Quoted(questions[0]), after]))
    for (_, answer), asked in zip(turns, questions[1:], strict=True):
        messages += [("assistant", [Quoted(answer)]), ("user", [Quoted(asked)])]
    found = conversation(tokenizer, messages, begins, thinking=thinking)
    if not tokenizer.encode_quoted(question):
        raise InputError("expected a question that this model's tokenizer has tokens for, got one without any")
    return found


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


def visible(config: RapidConfig, target: LoadedModel, document: str, around: int, encoder: Encodes) -> tuple[str, int]:
    """(what the target reads of the document, the tokens of the whole document); `around` are the prompt's others, and
    `encoder` makes the document's tokens as the target's tokenizer does.

    What is cut depends on the question only where it takes more than 1/32 of the context: one prefill serves the
    questions that are shorter.
    """
    left, usual = _room(config, target)
    keep = left - max(around, usual) if left > usual else left - around
    return visible_text(document, left - around, encoder, config.models.too_long, keep)


def room_around(config: RapidConfig, target: LoadedModel, document_tokens: int, *, cut: bool) -> int:
    """Most tokens that a prompt may have around a document without having less of it than one of a short question has.

    `cut`: whether that one does not have all of it.
    """
    left, usual = _room(config, target)
    return usual if cut else left - document_tokens


def _room(config: RapidConfig, target: LoadedModel) -> tuple[int, int]:
    """(tokens beside the answer, those of them that a cut document leaves to the rest of the prompt)."""
    most = context_of(config, target.config.context_size)
    words = config.prompts
    around = frame(target.tokenizer, words.target, "?", words.system, thinking=words.enable_thinking)
    usual = around.size + most // 32
    return most - config.sampling.max_new_tokens, usual


def check_fits(config: RapidConfig, drafter: LoadedModel, prompt_tokens: int) -> None:
    """Raises TooLarge if a prompt of so many tokens and the answer are more than the drafter was made for."""
    needed = prompt_tokens + config.sampling.max_new_tokens
    if needed > drafter.config.context_size:
        raise TooLarge(
            f"the drafter's prompt is too long: expected at most {drafter.config.context_size} positions, got "
            f"{needed} with the answer; lower retrieval.min_tokens or retrieval.max_chunks"
        )


def check_ids(target: LoadedModel, config: RapidConfig, ids: Sequence[int], *, new: int) -> None:
    """Raises InputError if ids are no prompt of this model, or leave no room for so many `new` tokens."""
    if len(ids) < 2:
        raise InputError(f"expected a prompt of at least 2 tokens, got {len(ids)}")
    known = target.tokenizer.ids
    unknown = [token for token in ids if token not in known]
    if unknown:
        raise InputError(f"expected token ids of this model, got {unknown[0]}")
    room = context_of(config, target.config.context_size) - new
    if len(ids) > room:
        raise TooLarge(f"the prompt is too long: expected at most {room} tokens beside {new} new ones, got {len(ids)}")


def visible_text(document: str, room: int, tokenizer: Encodes, too_long: str, keep: int) -> tuple[str, int]:
    """(the part of the document that fits into `room` tokens, the tokens of the whole document).

    `too_long` says what becomes of a longer one: error, head (its beginning is kept) or middle (its middle is cut out:
    the first and the last half, as in the paper's evaluation). A cut keeps `keep` tokens, at most `room`.
    """
    if not document.strip():
        raise InputError("expected a document with text in it, got an empty one")
    check_unicode(document, "the document")
    if room < 1:
        raise TooLarge(f"no room for a document: {1 - room} tokens too many around it; raise models.max_context")
    spans = tokenizer.spans(document)
    if not len(spans):
        raise InputError("expected a document that this model's tokenizer has tokens for, got one without any")
    if len(spans) <= room:
        return document, len(spans)
    if too_long == "error":
        raise TooLarge(
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
    raise TooLarge(f"no part of the document fits into {room} tokens")
