# SPDX-License-Identifier: Apache-2.0
"""What comes back of a question: the text as it grows, and the finished answer with how it came about."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from rapid_jax.conversation import Prompt
from rapid_jax.model.thinking import Thinking
from rapid_jax.model.tokenizer import Tokenizer
from rapid_jax.prompts import Reading
from rapid_jax.retrieval.select import Selection
from rapid_jax.speculative.config import Mode, SpeculationConfig
from rapid_jax.speculative.generate import Generation
from rapid_jax.speculative.own_sampling import ResolvedSampling

OnText = Callable[[str], None]


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural logarithms of probabilities under the target alone, before temperature and filters."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]  # the most probable tokens, falling


@dataclass(frozen=True)
class Answer:
    """An answer and how it came about."""

    text: str
    token_ids: list[int]
    origins: list[int]  # an Origin for each token
    finish_reason: str  # stop, length
    mode: Mode
    eta: float
    gamma: int | str
    generation: Generation
    reading: Reading  # its prompts
    prefix_reused: bool  # the document was not prefilled anew
    # load, retrieval, prefill, compile (of programs for all that follows loading), first_token, decode
    seconds: dict[str, float] = field(default_factory=dict)
    sampling: ResolvedSampling | None = None  # how it was drawn
    logprobs: list[TokenLogprobs] | None = None  # where they were asked for, one for each token
    thoughts: str = ""  # what the model thought before, where it was to; no part of the text
    lossy: Sequence[str] = ()  # settings by which the target's distribution is not the checkpoint's own

    @property
    def selection(self) -> Selection | None:
        """What was retrieved; None in mode target."""
        return self.reading.selection

    @property
    def prompt(self) -> Prompt:
        """What the target read."""
        is_retrieved = self.mode == "retrieval" and self.reading.short is not None
        return self.reading.short if is_retrieved else self.reading.long  # type: ignore[return-value]

    @property
    def draft_prompt(self) -> Prompt | None:
        """What the drafter read; None where nothing is drafted."""
        return None if self.prompt is self.reading.short else self.reading.short

    @property
    def target_tokens(self) -> int:
        """Of the target's prompt."""
        return len(self.prompt.tokens)

    @property
    def draft_tokens(self) -> int:
        """Of the drafter's prompt."""
        return 0 if self.draft_prompt is None else len(self.draft_prompt.tokens)

    @property
    def document_tokens(self) -> int:
        """Of the whole document, also where it was cut."""
        return self.reading.document_tokens

    @property
    def truncated(self) -> bool:
        """The document did not fit and was cut."""
        return self.reading.truncated

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens over decoding time, those after a stop text included."""
        return len(self.generation.tokens[0]) / self.seconds["decode"] if self.seconds["decode"] else 0.0

    @property
    def acceptance_rate(self) -> float | None:
        """Accepted drafts over verified drafts; None if nothing was drafted."""
        drafted = self.generation.drafted[0]
        return self.generation.accepted[0] / drafted if drafted else None

    @property
    def tokens_per_round(self) -> float:
        """Generated tokens over the target's forward passes for them."""
        return len(self.generation.tokens[0]) / max(self.generation.rounds[0], 1)

    def to_json(self) -> dict:
        """What `rapid answer --json` prints."""
        chosen = self.selection
        return {
            "answer": self.text,
            "thoughts": self.thoughts or None,
            "token_ids": self.token_ids,
            "finish_reason": self.finish_reason,
            "mode": self.mode,
            "eta": self.eta,
            "gamma": self.gamma,
            "drafted": self.generation.drafted[0],
            "accepted": self.generation.accepted[0],
            "acceptance_rate": self.acceptance_rate,
            "rounds": self.generation.target_steps,
            "tokens_per_round": self.tokens_per_round,
            "target_tokens": self.target_tokens,
            "draft_tokens": self.draft_tokens,
            "retrieval": chosen
            and {
                "chunks": [{"start": chunk.start, "end": chunk.end, "tokens": chunk.tokens} for chunk in chosen.chunks],
                "considered": chosen.considered,
                "kept": chosen.kept,
                "tokens": chosen.tokens,
                "scores": list(chosen.scores),
                "fallback": chosen.fallback,
            },
            "copied": self.generation.copied[0],
            "copied_accepted": self.generation.copied_accepted[0],
            "draft_steps": self.generation.draft_steps,
            "rounds_by_gamma": {str(gamma): rounds for gamma, rounds in self.generation.gammas.items()},
            "document_tokens": self.document_tokens,
            "truncated": self.truncated,
            "lossy": list(self.lossy),
            "sampling": self.sampling and self.sampling.to_json(),
            "prefix_reused": self.prefix_reused,
            "seconds": self.seconds,
            "tokens_per_second": self.tokens_per_second,
        }


def answer_of(
    read: Reading,
    transcript: "Transcript",
    generation: Generation,
    speculation: SpeculationConfig,
    sampling: ResolvedSampling,
    seconds: dict[str, float],
    *,
    reused: bool,
) -> Answer:
    """The finished answer of one row."""
    reason = generation.finish_reasons[0]
    drafted = read.short is not None and speculation.mode != "retrieval"
    return Answer(
        text=transcript.text,
        thoughts=transcript.thoughts,
        token_ids=transcript.token_ids,
        origins=transcript.origins,
        finish_reason="stop" if reason == "interrupted" else reason,
        mode=speculation.mode,
        eta=speculation.effective_eta,
        gamma=speculation.gamma if drafted else 0,
        generation=generation,
        reading=read,
        prefix_reused=reused,
        seconds=seconds,
        sampling=sampling,
    )


class Transcript:
    """The answer while it is generated: whole characters only, cut before the first of the stop texts."""

    def __init__(self, tokenizer: Tokenizer, stop_texts: Sequence[str], on_text: OnText | None):
        self._stream = tokenizer.stream()
        self._stop_texts = [text for text in stop_texts if text]
        self._on_text = on_text
        self._told = 0
        self.text = ""
        self.token_ids: list[int] = []
        self.origins: list[int] = []
        self.thinking: Thinking | None = None  # of a model that thinks first; stop texts are of the answer
        self.stopped = False  # a stop text was met
        self.first_token_at: float | None = None

    @property
    def thoughts(self) -> str:
        """What was thought by now."""
        return "" if self.thinking is None else self.thinking.text

    def on_tokens(self, row: int, token_ids: list[int], origins: list[int]) -> bool:
        """Takes in new tokens; True once a stop text was met, and later tokens are dropped."""
        if self.first_token_at is None:
            self.first_token_at = time.perf_counter()
        for token_id, origin in zip(token_ids, origins, strict=True):
            if self.stopped:
                break
            self.token_ids.append(token_id)
            self.origins.append(origin)
            self._grow(self._stream.push([token_id]))
        # What may be the beginning of a stop text is held back.
        self._tell(len(self.text) if self.stopped else len(self.text) - self._undecided())
        return self.stopped

    def finish(self) -> None:
        """Nothing more comes: what was held back belongs to the answer."""
        if not self.stopped:
            self._grow(self._stream.finish())
            self._add("" if self.thinking is None else self.thinking.finish())
        self._tell(len(self.text))

    def _grow(self, piece: str) -> None:
        self._add(piece if self.thinking is None else self.thinking.push(piece))

    def _add(self, piece: str) -> None:
        longest = max((len(text) for text in self._stop_texts), default=0)
        searched = max(len(self.text) - longest + 1, 0)
        self.text += piece
        found = [at for text in self._stop_texts if (at := self.text.find(text, searched)) >= 0]
        if found:
            self.text, self.stopped = self.text[: min(found)], True

    def _undecided(self) -> int:
        """How many last characters may yet turn out to begin a stop text."""
        lengths = [size for text in self._stop_texts for size in range(1, len(text)) if self.text.endswith(text[:size])]
        return max(lengths, default=0)

    def _tell(self, until: int) -> None:
        if self._on_text is not None and until > self._told:
            self._on_text(self.text[self._told : until])
            self._told = until
