# SPDX-License-Identifier: Apache-2.0
"""What OpenAI's requests have in common, and the fields that say how RAPID answers."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from rapid_jax.engine.request import MOST_LOGPROBS

MOST_STOPS = 16
MOST_CHOICES = 16
_TEXT = 1 << 26  # characters of any text

ShortText = Annotated[str, Field(max_length=256)]
LongText = Annotated[str, Field(max_length=_TEXT)]
StopText = Annotated[str, Field(min_length=1, max_length=512)]
Whole64 = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]


def _only(*values: Any) -> BeforeValidator:
    """Takes the values under which the field changes nothing; every other would be ignored, so it is refused."""

    def check(value: Any) -> Any:
        if value is not None and (isinstance(value, bool) or value not in values):
            raise ValueError(f"not implemented here, expected it to be left out or {values[0]!r}")
        return None

    return BeforeValidator(check)


Unused = Annotated[Any, Field(description="Accepted and without any effect.")]
NoList = Annotated[None, _only([])]
NoObject = Annotated[None, _only({})]
NoValue = Annotated[None, _only(None)]
NoPenalty = Annotated[None, _only(0)]


class Body(BaseModel):
    """A JSON object with the fields that it declares and no others, each of its own type."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True)


class StreamOptions(Body):
    """What a stream tells besides the answer."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Asked(Body):
    """Fields of every request for text."""

    model: ShortText
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=MOST_STOPS)] | None = None
    seed: Whole64 | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1, description="0 and -1: all tokens")] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=2)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    frequency_penalty: NoPenalty = None
    presence_penalty: NoPenalty = None
    logit_bias: NoObject = None
    user: Unused = None


class TextPart(Body):
    """Text in a message."""

    type: Literal["text"]
    text: LongText


class Message(BaseModel):
    """One message of a chat. An answer of this server can be put back as it came."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False, strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: LongText | Annotated[list[TextPart], Field(min_length=1, max_length=1024)]
    tool_calls: NoList = None
    function_call: NoValue = None
    audio: NoValue = None

    @property
    def text(self) -> str:
        """Its parts, joined."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class TextFormat(Body):
    """Plain text."""

    type: Literal["text"]


DocumentId = Annotated[str, Field(max_length=64)]
Use = Annotated[
    Literal["draft", "only", "off"],
    Field(
        description="Who reads what is retrieved: the drafter (draft), the target instead of the document (only: mode "
        "retrieval), nobody (off: mode target)."
    ),
]


class Retrieval(Body):
    """What is retrieved of a document, and who reads it."""

    use: Use | None = None
    min_tokens: Annotated[int | None, Field(ge=1, le=2**24, description="At least so many are retrieved.")] = None
    compression: Annotated[int | None, Field(ge=1, le=10**6, description="Of a long document one part in so many.")] = (
        None
    )
    threshold: Annotated[float | None, Field(ge=-1, le=1, description="Similarity that a chunk must reach.")] = None
    max_chunks: Annotated[int | None, Field(ge=1, le=2**16)] = None


class TemplateOptions(Body):
    """What the chat template is told."""

    enable_thinking: Annotated[
        bool | None, Field(description="A model that can thinks before it answers, in reasoning_content.")
    ] = None


class ChatRequest(Asked):
    """OpenAI's chat completion, and how RAPID makes it."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=1024)]
    max_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    response_format: TextFormat | None = None
    modalities: list[Literal["text"]] | None = None
    tools: NoList = None
    tool_choice: Literal["none", "auto"] | None = None
    functions: NoList = None
    function_call: NoValue = None
    prediction: NoValue = None
    audio: NoValue = None
    metadata: Unused = None
    store: Unused = None
    service_tier: Unused = None
    parallel_tool_calls: Unused = None
    safety_identifier: Unused = None
    prompt_cache_key: Unused = None

    chat_template_kwargs: TemplateOptions | None = None
    document: Annotated[
        LongText | Annotated[list[DocumentId], Field(min_length=1, max_length=64)] | None,
        Field(description="What the question is about: a document's id, ids that are read as one, or a text."),
    ] = None
    mode: Annotated[
        Literal["rapid", "lossless", "phat", "target", "retrieval"] | None,
        Field(description="How the answer is made; left out: as the server was started."),
    ] = None
    eta: Annotated[
        float | None, Field(ge=0, le=1e6, description="How strongly the drafter pulls the target; 0: not at all.")
    ] = None
    gamma: Annotated[
        Annotated[int, Field(ge=0, le=64)] | Literal["auto"] | None, Field(description="Tokens drafted a round.")
    ] = None
    guard: Annotated[
        Literal["code", "paper", "none"] | None, Field(description="Which tokens the drafter may move.")
    ] = None
    retrieval: Use | Retrieval | None = None
    origins: Annotated[bool | None, Field(description="Tell where each piece of the answer came from.")] = None


class CompletionRequest(Asked):
    """OpenAI's text completion: the target alone reads the prompt as it is."""

    prompt: (
        LongText
        | Annotated[list[LongText], Field(min_length=1, max_length=128)]
        | Annotated[list[int], Field(min_length=1, max_length=_TEXT)]
        | Annotated[list[list[int]], Field(min_length=1, max_length=128)]
    )
    max_tokens: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    echo: bool | None = None
    best_of: Annotated[None, _only(1)] = None
    suffix: Annotated[None, _only("")] = None


class DocumentOptions(Body):
    """What can be said about a document beside its text."""

    name: ShortText | None = None
    public: Annotated[bool | None, Field(description="Every key may read it.")] = None
    pinned: Annotated[bool | None, Field(description="It stays whatever else needs the room.")] = None
    expires_in: Annotated[float | None, Field(gt=0, le=1e9, description="Seconds until it goes by itself.")] = None


class DocumentRequest(DocumentOptions):
    """A document that is handed in as text."""

    text: Annotated[str, Field(min_length=1, max_length=_TEXT)]


class DocumentChange(Body):
    """What can be changed about a document."""

    pinned: bool


class TokenizeRequest(Body):
    """A text or a chat to count tokens of."""

    model: ShortText | None = None
    prompt: LongText | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=1024)] | None = None
    add_special_tokens: bool | None = None


BODIES: tuple[type[BaseModel], ...] = (
    ChatRequest,
    CompletionRequest,
    DocumentRequest,
    DocumentChange,
    TokenizeRequest,
)
