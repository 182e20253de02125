# SPDX-License-Identifier: Apache-2.0
"""How preference pairs are made of documents, a group of them at a time (LongPO, arXiv 2502.13922)."""

from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TypeVar

from longpo_jax import instruct
from longpo_jax.config import LongPOConfig
from longpo_jax.dialogue import Dialogue
from longpo_jax.documents import Document
from longpo_jax.excerpts import Excerpt, excerpts_of, middle_of
from longpo_jax.filters import reason_to_drop
from longpo_jax.generator import About, Generator
from longpo_jax.pair_counts import OF_DOCUMENTS, OF_TEXT, OF_TURNS
from longpo_jax.records import Answer, Record, Turn
from rapid_jax.runtime.files import digest
from rapid_jax.speculative.config import SamplingConfig


@dataclass(frozen=True)
class _Question:
    excerpt: Excerpt
    words: list[int]  # the excerpt's, as tokens
    seed: int
    opener: str
    question: str
    dialogue: Dialogue


@dataclass
class _Work:
    """What is known of one document so far."""

    document: Document
    seed: int
    excerpts: list[Excerpt]
    words: list[list[int]]  # of each excerpt, as tokens
    counts: Counter[str] = field(default_factory=Counter)
    cut: tuple[int, int] | None = None
    questions: list[_Question] = field(default_factory=list)
    chosen: list[Answer] = field(default_factory=list)  # of each question


class PairMaker:
    """Documents to records; `settings` is the digest that goes into each."""

    def __init__(self, config: LongPOConfig, generator: Generator, settings: str):
        self._config, self._generator, self._settings = config, generator, settings
        ask, pairs = config.instruct, config.pairs
        self._asking = SamplingConfig(temperature=ask.temperature, top_p=ask.top_p, max_new_tokens=ask.max_new_tokens)
        self._answering = SamplingConfig(
            temperature=pairs.temperature,
            top_p=pairs.top_p,
            repetition_penalty=pairs.repetition_penalty,
            max_new_tokens=pairs.max_new_tokens,
        )
        self._drafted = pairs.speculation == "lossless"

    def compiling(self) -> Iterator[None]:
        """Loads the model and compiles, a program or a few a step, what documents need if there are enough of them for
        whole batches and the longest of a batch has about `corpus.max_tokens` tokens. What has other sizes is compiled
        when it comes.
        """
        pairs, corpus = self._config.pairs, self._config.corpus
        count = min(pairs.batch, corpus.documents or pairs.batch)
        for sampling in dict.fromkeys((self._asking, self._answering)):
            self._generator.compile_short(sampling, min(pairs.batch, count * self._config.excerpts.per_document))
            yield
        tokens, drafted = min(corpus.max_tokens, pairs.max_context - pairs.max_new_tokens), self._drafted
        self._generator.compile_long(self._answering, min(pairs.documents, count), tokens, drafted=drafted)
        yield

    def made(
        self, documents: Sequence[Document], start: int = 0
    ) -> Iterator[tuple[Document, Record | None, Mapping[str, int]]]:
        """(document, its record or None, what was counted) of the documents from `start` on, in their order.

        The short prompts of `pairs.batch` documents are answered together. The groups are the same wherever it starts:
        so are the batches, and with them every rounding. While the model answers, texts that come next are cut and
        turned into tokens.
        """
        size, total = self._config.pairs.batch, len(documents)
        starts = range(start - start % size, total if start < total else 0, size)

        def begun(first: int) -> list[_Work]:
            return [self._begun(documents[index]) for index in range(first, min(first + size, total))]

        aside = ThreadPoolExecutor(1, "texts")
        try:
            for first, group in _ahead(aside, begun, starts):
                self._ask(group)
                self._choose(group)
                for index, record in enumerate(self._records(group, max(start - first, 0), aside), max(start, first)):
                    work = group[index - first]
                    yield work.document, record, work.counts
        finally:  # also where nobody wants more of them
            aside.shutdown(wait=False, cancel_futures=True)

    def _records(self, group: Sequence[_Work], start: int, aside: Executor) -> Iterator[Record | None]:
        """Of each document from `start` on; None for one without a turn of use.

        `pairs.documents` of those that have questions are read and answered at once.
        """
        step = self._config.pairs.documents
        asked = [place for place, work in enumerate(group) if work.questions]
        parts = [asked[at : at + step] for at in range(0, len(asked), step)]
        parts = [part for part in parts if part[-1] >= start]
        found: dict[int, Record | None] = {}
        read = _ahead(aside, lambda part: self._read([group[place] for place in part]), parts)
        for place in range(start, len(group)):
            while group[place].questions and place not in found:
                part, records = next(read)
                found.update(zip(part, self._finish([group[each] for each in part], records), strict=True))
            yield found[place] if place in found else self._with_turns(group[place], self._record(group[place]), ())

    def _begun(self, document: Document) -> _Work:
        """Its excerpts, and their tokens."""
        seed, text, tokenizer = _seed(self._config.seed, document.id), document.text, self._generator.tokenizer
        excerpts, left = excerpts_of(text, tokenizer, self._config.excerpts, seed)
        words = [tokenizer.encode_quoted(text[excerpt.start : excerpt.end]) for excerpt in excerpts]
        counts = Counter(documents=1, excerpts=len(excerpts))
        counts.update({f"{OF_TEXT}{reason}": count for reason, count in left.items()})
        return _Work(document, seed, excerpts, words, counts)

    def _ask(self, group: Sequence[_Work]) -> None:
        """A question about each excerpt."""
        config, tokenizer = self._config, self._generator.tokenizer
        asked = [(work, at, _seed(work.seed, at)) for work in group for at in range(len(work.excerpts))]
        request = Dialogue(tokenizer, [instruct.request(config.instruct)])
        begun = tokenizer.encode_template(config.instruct.begins) if config.instruct.begins else []
        prompts = [request.around(work.words[at]) + begun for work, at, _ in asked]
        said = self._generator.answers(prompts, self._asking, [_seed(seed, "ask") for *_, seed in asked])
        for (work, at, seed), answer in zip(asked, said, strict=True):
            questions = instruct.parsed(config.instruct.begins + answer.text, config.instruct)
            if len(questions) < config.instruct.at_least:
                cut_off = (
                    "" if answer.finished else ", cut off"
                )  # at the limit of tokens: of the setting, not the model
                work.counts[f"{OF_TURNS}too few questions{cut_off}"] += 1
                continue
            opener, question = instruct.drawn(questions, _seed(seed, "draw"))
            dialogue = Dialogue(tokenizer, [f"{opener} {question}"])
            work.questions.append(_Question(work.excerpts[at], work.words[at], seed, opener, question, dialogue))

    def _choose(self, group: Sequence[_Work]) -> None:
        """What of each document the model will read, and the answers from the excerpts."""
        for work in group:
            self._cut(work)
        asked = [(work, question) for work in group for question in work.questions]
        prompts = [self._short(question) for _, question in asked]
        seeds = [_seed(question.seed, "chosen") for _, question in asked]
        said = self._generator.answers(prompts, self._answering, seeds)
        for (work, _), answer in zip(asked, said, strict=True):
            work.chosen.append(answer)

    def _short(self, question: _Question) -> list[int]:
        return question.dialogue.around(question.words)

    def _cut(self, work: _Work) -> None:
        """Leaves out what is too much of a document, and the questions about an excerpt that is then not all there."""
        if not work.questions:
            return
        pairs = self._config.pairs
        around = max(len(question.dialogue.before) + len(question.dialogue.first) for question in work.questions)
        room = pairs.max_context - pairs.max_new_tokens - around
        if work.document.tokens <= room:  # as it mostly is: nothing to look for
            return
        work.cut = cut = middle_of(work.document.text, room, self._generator.tokenizer)
        if cut is not None:
            whole = [q for q in work.questions if q.excerpt.end <= cut[0] or q.excerpt.start >= cut[1]]
            work.counts[f"{OF_TURNS}excerpt cut out"] += len(work.questions) - len(whole)
            work.questions = whole

    def _record(self, work: _Work) -> Record:
        """Without turns."""
        document, text = work.document, work.document.text
        what = document.id, document.domain, text, document.tokens, work.cut, (), work.seed, self._settings
        return Record(*what)

    def _read(self, group: Sequence[_Work]) -> list[tuple[Record, list[int]]]:
        """Of each document: the record, still without turns, and what the prompts of all its questions begin with."""
        found = []
        for work in group:
            record, before = self._record(work), work.questions[0].dialogue.before
            found.append((record, before + self._generator.tokenizer.encode_quoted(record.context)))
        return found

    def _finish(self, group: Sequence[_Work], read: Sequence[tuple[Record, list[int]]]) -> list[Record | None]:
        """The records of documents whose long answers are generated at once; None for one without a turn of use."""
        rejected = self._rejected(group, [head for _, head in read])
        return [
            self._with_turns(work, record, answers)
            for work, (record, _), answers in zip(group, read, rejected, strict=True)
        ]

    def _with_turns(self, work: _Work, record: Record, rejected_answers: Sequence[Answer]) -> Record | None:
        """The record with the turns whose answers are of use; None without any."""
        turns = []
        for question, chosen, rejected in zip(work.questions, work.chosen, rejected_answers, strict=True):
            reason = reason_to_drop(chosen.text, rejected.text, self._config.pairs)
            if reason is not None:
                work.counts[f"{OF_TURNS}{reason}"] += 1
                continue
            at = question.excerpt
            spans = (at.start, at.end), (at.first, at.last)
            turns.append(Turn(*spans, question.opener, question.question, chosen, rejected))
            work.counts["turns"] += 1
            work.counts["chosen_tokens"] += chosen.tokens
            work.counts["rejected_tokens"] += rejected.tokens
            work.counts["unfinished"] += (not chosen.finished) + (not rejected.finished)
        if not turns:
            reason = "no turn left" if work.counts["excerpts"] else "no excerpt"
            work.counts[f"{OF_DOCUMENTS}{reason}"] += 1
            return None
        work.counts["pairs"] += 1
        return replace(record, turns=tuple(turns))

    def _rejected(self, group: Sequence[_Work], heads: Sequence[list[int]]) -> list[list[Answer]]:
        asked, seeds = [], []
        for work, head in zip(group, heads, strict=True):
            drafts = [self._short(question) for question in work.questions] if self._drafted else None
            asked.append(About(head, [question.dialogue.first for question in work.questions], drafts))
            seeds.append([_seed(question.seed, "rejected") for question in work.questions])
        return self._generator.answers_about(asked, self._answering, seeds)


_Item = TypeVar("_Item")
_Made = TypeVar("_Made")


def _ahead(aside: Executor, make: Callable[[_Item], _Made], items: Sequence[_Item]) -> Iterator[tuple[_Item, _Made]]:
    """Each with what is made of it; the next one is being made while one is in use."""
    coming = deque(aside.submit(make, item) for item in items[:1])
    for place, item in enumerate(items, 1):
        made = coming.popleft().result()
        coming.extend(aside.submit(make, item) for item in items[place : place + 1])
        yield item, made


def _seed(*parts: object) -> int:
    """A seed of 32 bits that follows from the parts."""
    return int(digest(*map(str, parts))[:8], 16)
