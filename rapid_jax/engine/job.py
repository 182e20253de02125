# SPDX-License-Identifier: Apache-2.0
"""A request on its way through the engine, and what it has come to so far."""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from rapid_jax.answer import Transcript
from rapid_jax.config import RapidConfig
from rapid_jax.engine.request import Done, Event, Failed, OnEvent, Piece, Request, TokenLogprobs
from rapid_jax.model.thinking import START, Thinking
from rapid_jax.model.tokenizer import Tokenizer
from rapid_jax.prompts import Reading
from rapid_jax.runtime.compiling import Timed
from rapid_jax.speculative.generate import Generation
from rapid_jax.speculative.own_sampling import ResolvedSampling
from rapid_jax.speculative.rounds import Progress

_log = logging.getLogger(__name__)
_MARKER_TOKENS = 16  # at the end of a prompt, which hold the marker of thinking and the lines behind it


@dataclass
class Job:
    """One request between `submit` and its last event; of the engine's thread but for `cancelled`."""

    request: Request
    config: RapidConfig  # the engine's, with the request's settings
    on_event: OnEvent
    sampling: ResolvedSampling
    transcript: Transcript
    streams: bool  # somebody reads the answer as it comes
    reading: Reading | None = None
    reused: bool = False  # the document was not prefilled anew
    told: int = 0  # tokens that the transcript has been given
    pieces: list[str] = field(default_factory=list)  # of text, not told yet
    thought: int = 0  # characters of thinking that have been told
    gammas: dict[int, int] = field(default_factory=dict)  # rounds run with each
    generation: Generation | None = None  # once it is complete
    ended: bool = False  # the last event is out
    token_logprobs: list[TokenLogprobs] | None = None
    seconds: dict[str, float] = field(  # those to the first token are of a clock on the wall
        default_factory=lambda: dict.fromkeys(("retrieval", "prefill", "compile", "first_token", "decode"), 0.0)
    )
    submitted_at: float = field(default_factory=time.perf_counter)
    cancelled: threading.Event = field(default_factory=threading.Event)
    at_end: list[Callable[[], object]] = field(default_factory=list)  # what gives back what the request has taken

    @classmethod
    def of(
        cls,
        request: Request,
        config: RapidConfig,
        on_event: OnEvent,
        sampling: ResolvedSampling,
        tokenizer: Tokenizer,
        *,
        streams: bool,
    ) -> "Job":
        """A request that has just come."""
        pieces: list[str] = []
        transcript = Transcript(tokenizer, config.stop, pieces.append)
        return cls(request, config, on_event, sampling, transcript, streams, pieces=pieces)

    def end(self, event: Done | Failed) -> None:
        """Gives back what it has taken, and tells the last event."""
        self.give_back()
        self.ended = True
        self.tell(event)

    def give_back(self) -> None:
        """Gives back what it has taken: it is over, in whatever way."""
        while self.at_end:
            self.at_end.pop()()

    def tell(self, event: Event) -> None:
        """Tells the caller; one that cannot hear it takes its request back by that."""
        try:
            self.on_event(event)
        except Exception:
            _log.exception("a request's listener failed: the request is taken back")
            self.cancelled.set()

    def took(self, what: str, timed: Timed) -> None:
        """Counts the seconds of a stretch of work to this request."""
        self.seconds[what] += timed.working
        self.seconds["compile"] += timed.compiling

    def receive(self, row: int, progress: Progress) -> bool:
        """Takes in the row's new tokens and tells of them; whether the answer ends here by a stop text."""
        count = int(progress.count_B[row])
        if count == self.told or self.transcript.stopped:
            return self.transcript.stopped
        span, self.told = slice(self.told, count), count
        tokens, origins = progress.emitted_BO[row, span].tolist(), progress.origin_BO[row, span].tolist()
        before = len(self.transcript.token_ids)
        stopped = self.transcript.on_tokens(row, tokens, origins)
        taken = len(self.transcript.token_ids) - before
        if self.streams:
            logprobs = None if self.request.logprobs is None else self.logprobs(row, progress, before, taken)
            self.tell(Piece(self._text(), tokens[:taken], origins[:taken], logprobs, self._thoughts()))
        return stopped

    def finish(self) -> None:
        """Nothing more comes; what was held back belongs to the answer."""
        self.transcript.finish()
        first = self.transcript.first_token_at or time.perf_counter()
        self.seconds["first_token"] = first - self.submitted_at
        rest, thoughts = self._text(), self._thoughts()
        if self.streams and (rest or thoughts):
            self.tell(Piece(rest, [], [], None if self.request.logprobs is None else [], thoughts))

    def thinks_after(self, prompt: Sequence[int], tokenizer: Tokenizer) -> None:
        """The model may think before it answers, by a prompt of its chat template; that may have begun already."""
        end = tokenizer.decode(prompt[-_MARKER_TOKENS:], skip_special_tokens=False).rstrip()
        self.transcript.thinking = Thinking(opened=end.endswith(START))

    def _thoughts(self) -> str:
        more, self.thought = self.transcript.thoughts[self.thought :], len(self.transcript.thoughts)
        return more

    def _text(self) -> str:
        text = "".join(self.pieces)
        self.pieces.clear()
        return text

    def logprobs(self, row: int, progress: Progress, start: int, count: int) -> list[TokenLogprobs]:
        """Of so many emitted tokens from `start` on."""
        asked, found, known = self.request.logprobs or 0, [], progress.logprobs
        if known is None:
            raise ValueError("expected rows with log-probabilities, got some without")
        for at in range(start, start + count):
            ids, values = known.top_ids_BON[row, at, :asked].tolist(), known.top_BON[row, at, :asked].tolist()
            top = tuple(zip(ids, values, strict=True))
            found.append(TokenLogprobs(int(progress.emitted_BO[row, at]), float(known.token_BO[row, at]), top))
        return found


@dataclass(frozen=True)
class Ticket:
    """A request that the engine has taken."""

    id: str
    job: Job

    def cancel(self) -> None:
        """Takes the request back: its last event is Failed(Cancelled()), unless it has ended. Of any thread."""
        self.job.cancelled.set()
