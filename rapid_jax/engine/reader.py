# SPDX-License-Identifier: Apache-2.0
"""From a request to the prompts of the two models."""

from collections.abc import Callable
from dataclasses import replace

from rapid_jax.config import RapidConfig
from rapid_jax.conversation import Frame, Prompt, conversation
from rapid_jax.engine.messages import split_chat
from rapid_jax.engine.models import Models
from rapid_jax.engine.request import Chat, Question, Request, Tokens
from rapid_jax.model.load import LoadedModel
from rapid_jax.prompts import Reading, check_fits, check_ids, frame, visible
from rapid_jax.retrieval.select import Selection

OnRetrieved = Callable[[Selection], None]


def read(models: Models, config: RapidConfig, request: Request, on_retrieved: OnRetrieved | None = None) -> Reading:
    """The prompts of a request under `config`, which has the request's settings in it; `on_retrieved` gets the chunks
    before the drafter's prompt is made.

    Raises InputError for what the models cannot read: no text, too much of it, an id that is no token.
    """
    prompt = request.prompt
    if isinstance(prompt, Tokens):
        return _of_tokens(models.target, config, list(prompt.ids))
    if isinstance(prompt, Question):
        document, question = prompt.document, prompt.question

        def framed(model: LoadedModel, template: str) -> Frame:
            template = prompt.template or template
            how = config.prompts.system, prompt.begins, prompt.turns
            return frame(model.tokenizer, template, question, *how, thinking=config.prompts.enable_thinking)

        return _about(models, config, request, document, question, framed, prompt.retrieve_from, on_retrieved)
    return _of_chat(models, config, request, prompt, on_retrieved)


def _of_tokens(target: LoadedModel, config: RapidConfig, ids: list[int]) -> Reading:
    check_ids(target, config, ids, new=config.sampling.max_new_tokens)
    return Reading(Prompt(ids[:-1], ids[-1:]), None, None, 0, truncated=False)


def _of_chat(
    models: Models, config: RapidConfig, request: Request, chat: Chat, on_retrieved: OnRetrieved | None
) -> Reading:
    tokenizer = models.target.tokenizer
    encoder = models.encoded.of(request.owner, tokenizer)
    found = split_chat(chat, config.prompts, config.retrieval.chunk_tokens, encoder.counts)
    thinking = config.prompts.enable_thinking
    if found.document is None:
        plain = conversation(tokenizer, found.long, thinking=thinking)
        return _of_tokens(models.target, config, plain.before + plain.after)

    def framed(model: LoadedModel, template: str) -> Frame:
        messages = found.short if template == config.prompts.drafter else found.long
        return conversation(model.tokenizer, messages, thinking=thinking)

    if not found.question.strip():  # a long message and no question behind it: the target reads all of it, alone
        config = replace(config, speculation=replace(config.speculation, mode="target"))
    return _about(models, config, request, found.document, found.question, framed, None, on_retrieved)


def _about(
    models: Models,
    config: RapidConfig,
    request: Request,
    document: str,
    question: str,
    framed: Callable[[LoadedModel, str], Frame],
    retrieve_from: str | None,
    on_retrieved: OnRetrieved | None,
) -> Reading:
    """The prompts about a question on a document."""
    target, speculation = models.target, config.speculation
    encoder = models.encoded.of(request.owner, target.tokenizer)
    long_frame = replace(framed(target, config.prompts.target), tokenizer=encoder)
    text, document_tokens = visible(config, target, document, long_frame.size, encoder)
    long, short, selection = long_frame.around(text), None, None
    if config.models.retrieves(speculation):
        retriever = models.retriever(config.retrieval)
        about = retrieve_from or text, question, models.token_spans, len(long.tokens)
        selection = retriever.retrieve(*about, request.whose)
        if on_retrieved is not None:
            on_retrieved(selection)
        drafter = models.drafter if speculation.drafts else target
        short = framed(drafter, config.prompts.drafter).around(selection.text)
        check_fits(config, drafter, len(short.tokens))
    return Reading(long, short, selection, document_tokens, truncated=len(text) < len(document))
