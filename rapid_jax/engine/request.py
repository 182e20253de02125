# SPDX-License-Identifier: Apache-2.0
"""What is asked of the engine, and what comes back of it piece by piece."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

from rapid_jax.answer import Answer, TokenLogprobs
from rapid_jax.config import PromptsConfig, RapidConfig
from rapid_jax.retrieval.config import RetrievalConfig
from rapid_jax.retrieval.select import Selection
from rapid_jax.runtime.errors import InputError
from rapid_jax.speculative.config import SamplingSettings, SpeculationConfig
from rapid_jax.speculative.state import MOST_LOGPROBS


@dataclass(frozen=True)
class Question:
    """A question about a document, put to the models in the words of `prompts.target` and `prompts.drafter`."""

    document: str
    question: str
    turns: Sequence[tuple[str, str]] = ()  # earlier questions about the document, each with its answer
    template: str | None = None  # stands for both of the settings'
    begins: str = ""  # what the answer is made to begin with
    retrieve_from: str | None = None  # another text to retrieve from (Table 3 of the paper)


@dataclass(frozen=True)
class Chat:
    """Messages as the OpenAI API has them, {"role": ..., "content": ...}, put through the chat template.

    A message of `long_from` tokens or more is a document of its own: it is prefilled once for all requests that begin
    so, and the drafter reads what is retrieved from it. Without one there is nothing to retrieve from and the target
    answers alone. With `document` the last user's message is a question about that document, and the messages before
    are earlier turns.
    """

    messages: Sequence[Mapping[str, str]]
    document: str | None = None


@dataclass(frozen=True)
class Tokens:
    """Token ids, read as they are by the target alone."""

    ids: Sequence[int]
    kept: bool = True  # the keys and values of a long one serve others that begin so


Prompt: TypeAlias = Question | Chat | Tokens


@dataclass(frozen=True)
class Request:
    """One answer that is wanted, with settings of its own: none of them concerns another request.

    The answer depends on the request and the models alone, not on what runs beside it (up to rounding, which can turn
    a near tie; and with gamma auto, which goes by the clock: above temperature 0, and at 0 where the drafter moves the
    tokens).
    """

    prompt: Prompt
    speculation: SpeculationConfig = field(default_factory=SpeculationConfig)
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    stop: tuple[str, ...] = ()  # texts that end the answer, not part of it
    retrieval: RetrievalConfig | None = None  # None: the engine's; so of the next three
    prompts: PromptsConfig | None = None
    max_context: int | None = None
    too_long: Literal["error", "middle", "head"] | None = None
    logprobs: int | None = None  # with each token its log-probability under the target, and so many alternatives
    owner: str = ""  # whose it is: owners take turns, and share nothing made of documents
    public: bool = False  # what is made of its document may serve other owners

    def __post_init__(self):
        if self.logprobs is not None and not 0 <= self.logprobs <= MOST_LOGPROBS:
            raise InputError(f"logprobs must be 0 to {MOST_LOGPROBS}, got {self.logprobs}")

    @classmethod
    def of(cls, prompt: Prompt, config: RapidConfig, **more: Any) -> "Request":
        """One with all the settings of `config`."""
        models = config.models
        return cls(
            prompt,
            config.speculation,
            config.sampling,
            config.stop,
            config.retrieval,
            config.prompts,
            models.max_context,
            models.too_long,
            **more,
        )

    @property
    def whose(self) -> str:
        """Those who share what is made of the document."""
        return "everybody's" if self.public else f"of {self.owner}"

    def under(self, config: RapidConfig) -> RapidConfig:
        """The engine's settings with this request's in their place."""
        models = replace(
            config.models,
            max_context=self.max_context or config.models.max_context,
            too_long=self.too_long or config.models.too_long,
        )
        return replace(
            config,
            models=models,
            speculation=self.speculation,
            sampling=self.sampling,
            stop=self.stop,
            retrieval=self.retrieval or config.retrieval,
            prompts=self.prompts or config.prompts,
        )


@dataclass(frozen=True)
class Retrieved:
    """What was retrieved for the drafter."""

    selection: Selection


@dataclass(frozen=True)
class Piece:
    """More of the answer. A piece has whole characters; one that may yet begin a stop text is held back."""

    text: str
    token_ids: list[int]
    origins: list[int]  # an Origin for each token
    logprobs: list[TokenLogprobs] | None = None
    thoughts: str = ""  # more of what the model thinks before it answers, where it is to; no part of the text


@dataclass(frozen=True)
class Done:
    """The answer is complete."""

    answer: Answer


@dataclass(frozen=True)
class Failed:
    """There will be no answer: InputError where the request is at fault, Cancelled where it was taken back."""

    error: Exception


class Cancelled(Exception):
    """The request was taken back before its answer was complete."""


Event: TypeAlias = Retrieved | Piece | Done | Failed
OnEvent: TypeAlias = Callable[[Event], None]
