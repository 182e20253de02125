# SPDX-License-Identifier: Apache-2.0
"""What the server answers, for its OpenAPI schema."""

from typing import Any, Literal

from pydantic import BaseModel


class ErrorDetail(BaseModel):
    """OpenAI's error."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """An error."""

    error: ErrorDetail


class ModelInfo(BaseModel):
    """A model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class ModelList(BaseModel):
    """The models."""

    object: Literal["list"]
    data: list[ModelInfo]


class ChatMessage(BaseModel):
    """The model's message."""

    role: Literal["assistant"]
    content: str
    refusal: None
    reasoning_content: str | None = None


class Citation(BaseModel):
    """A retrieved chunk: its place, in characters, in a document (null: the request's own text)."""

    document: str | None
    start: int
    end: int
    tokens: int
    score: float
    text: str


class Span(BaseModel):
    """A piece of the answer and where it came from."""

    text: str
    origin: Literal["lookup", "draft", "correction", "bonus"]


class HowMade(BaseModel):
    """How an answer came about."""

    mode: str
    eta: float
    gamma: int | str
    acceptance: float | None
    drafted: int
    accepted: int
    tokens_per_round: float
    document_tokens: int
    document_reused: bool
    truncated: bool
    seconds: dict[str, float]
    citations: list[Citation]
    origins: list[Span] | None = None


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: ChatMessage
    logprobs: dict[str, Any] | None
    finish_reason: Literal["stop", "length"]
    rapid: HowMade


class CachedTokens(BaseModel):
    """What of the prompt was there already."""

    cached_tokens: int


class Usage(BaseModel):
    """Tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens | None = None


class ChatCompletion(BaseModel):
    """The answers to a chat."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class TextLogprobs(BaseModel):
    """Log-probabilities of tokens."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One completion."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Literal["stop", "length"]


class Completion(BaseModel):
    """The completions of prompts."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class Document(BaseModel):
    """A document."""

    id: str
    object: Literal["document"]
    name: str
    bytes: int
    characters: int
    tokens: int | None
    state: Literal["uploaded", "chunked", "prefilled", "on host", "on disk"]
    pinned: bool
    public: bool
    created_at: int
    expires_at: int | None


class DocumentList(BaseModel):
    """Documents."""

    object: Literal["list"]
    data: list[Document]


class DocumentDeleted(BaseModel):
    """A document is no more."""

    id: str
    object: Literal["document"]
    deleted: Literal[True]


class Tokenized(BaseModel):
    """Token ids."""

    tokens: list[int]
    count: int
    max_model_len: int


class Health(BaseModel):
    """How the server is."""

    status: Literal["starting", "ready", "draining", "failed"]
