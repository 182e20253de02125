# SPDX-License-Identifier: Apache-2.0
"""Questions of the user's own: over documents as they are, or over many passages put together to an exact length.

The file has a JSON object a line. With `document`, `question` and `answers` it is questions over documents. With
`question`, `answers`, `title` and `passage` (which holds an answer) it is multi-document QA as in Lost in the Middle:
the passage among those of other questions, which hold none of the answers.
"""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from rapid_jax.evaluate import haystack, scoring
from rapid_jax.evaluate.data_files import Record, chosen, data_of, id_of, records, tasks_of, text_of, texts_of
from rapid_jax.evaluate.samples import Measure, Sample, SuiteOptions
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.json_input import shown
from rapid_jax.runtime.storage import AnyPlace

SUITE = "qa"
DOCUMENTS, PASSAGES = "documents", "passages"
SAMPLES = 100  # a length, of questions with passages
_ANSWER_TOKENS = {DOCUMENTS: 64, PASSAGES: 32}
_METRIC = {DOCUMENTS: "qa_f1", PASSAGES: "contains"}
_KEYS = {DOCUMENTS: ("document", "question", "answers"), PASSAGES: ("question", "answers", "title", "passage")}
_EXPECTED = f"a JSONL file with {', '.join(_KEYS[DOCUMENTS])} or with {', '.join(_KEYS[PASSAGES])}"
_BRIEF = "{document}\n\nQuestion: {question}\nGive the answer alone, in as few words as you can."
_AMONG = (
    "The numbered documents below are search results. One of them has the answer to the question at the end; most have "
    "nothing to do with it.\n\n{document}\n\nQuestion: {question}\nGive the answer alone, in as few words as you can."
)
_BETWEEN = "\n\n"  # documents; none has it in itself
_TRIES = 12  # passages that are tried as the last one, for the exact length


@dataclass(frozen=True)
class Question:
    """A question and the passage that answers it; title and passage are one line each."""

    question: str
    answers: tuple[str, ...]
    title: str
    passage: str


class Passage(NamedTuple):
    """A passage of another question, which may be cut."""

    title: str
    words: tuple[str, ...]


def samples(options: SuiteOptions, measure: Measure) -> Iterable[Sample]:
    """The questions of the file `options.data` (.jsonl, .json with a list; .gz too), as its fields say.

    Over documents (task "documents"): as they are, in the order of the file, all of them or as many as are asked for,
    picked by the seed. The metric is the line's `metric` (any of scoring.METRICS), else qa_f1, which does not reward
    copying the document; the answer has at most the line's `max_new_tokens`, else 64. A line may have an `id`.

    With passages (task "passages"): see `composed`; SAMPLES of them a length unless another number is asked for, the
    same questions at every length. Those whose passage does not hold an answer are left out. Raises InputError at once
    for what is wrong with the options or the file, and while samples are made for a length that cannot hold one.
    """
    path = data_of(options, SUITE, _EXPECTED)
    rows = list(records(path))
    task = _task_of(*rows[0])
    tasks_of(options, SUITE, (task,))
    if task == DOCUMENTS:
        if options.lengths or options.depths:
            raise InputError(f"suite {SUITE}: {path} has whole documents: lengths and depths are of no use")
        return _documents(rows, options)
    questions = [_question(record, place) for place, record in rows]
    if not options.lengths:
        raise InputError(f"suite {SUITE}: expected --lengths, which passages are put together to, got none")
    haystack.positive("lengths", options.lengths)
    usable = [at for at, question in enumerate(questions) if _answer(question)]
    if not usable:
        raise InputError(f"{path}: expected passages that hold an answer to their question, got none")
    wanted = SAMPLES if options.samples is None else options.samples
    picked = [usable[at] for at in chosen(len(usable), wanted, f"{options.seed}/{SUITE}/{PASSAGES}")]
    others = _passages(questions)
    return (
        composed(questions[at], others, number=at, length=length, options=options, measure=measure, source=path)
        for length in options.lengths
        for at in picked
    )


def _task_of(place: str, record: Record) -> str:
    """The task that the keys of a file's first line are of; InputError, which names those that lack, for none."""
    if "document" in record:
        return DOCUMENTS
    if "passage" in record or "title" in record:
        return PASSAGES
    missing = {task: [key for key in keys if key not in record] for task, keys in _KEYS.items()}
    got = ", ".join(map(shown, record)) or "none"
    raise InputError(
        f"{place}: expected the keys {', '.join(_KEYS[DOCUMENTS])} (missing: {', '.join(missing[DOCUMENTS])}) or "
        f"{', '.join(_KEYS[PASSAGES])} (missing: {', '.join(missing[PASSAGES])}), got the keys {got}"
    )


def _documents(rows: Sequence[tuple[str, Record]], options: SuiteOptions) -> list[Sample]:
    found: dict[str, Sample] = {}
    for number, (place, record) in enumerate(rows):
        sample = _document(record, place, number)
        if found.setdefault(sample.id, sample) is not sample:
            raise InputError(f"{place}: expected ids to differ, got {sample.id!r} again")
    every = list(found.values())
    return [every[at] for at in chosen(len(every), options.samples, f"{options.seed}/{SUITE}/{DOCUMENTS}")]


def _document(record: Record, place: str, number: int) -> Sample:
    metric = record.get("metric", _METRIC[DOCUMENTS])
    if not isinstance(metric, str) or metric not in scoring.METRICS:
        raise InputError(f"{place}: expected 'metric' of {', '.join(scoring.METRICS)}, got {metric!r}")
    scoring.check(metric)
    new_tokens = record.get("max_new_tokens", _ANSWER_TOKENS[DOCUMENTS])
    if not isinstance(new_tokens, int) or isinstance(new_tokens, bool) or new_tokens < 1:
        raise InputError(f"{place}: expected 'max_new_tokens' to be 1 or more, got {new_tokens!r}")
    return Sample(
        id=f"{DOCUMENTS}/{id_of(record, 'id', place) if 'id' in record else number}",
        suite=SUITE,
        task=DOCUMENTS,
        document=text_of(record, "document", place),
        question=text_of(record, "question", place).strip(),
        answers=texts_of(record, "answers", place),
        metric=metric,
        max_new_tokens=new_tokens,
        template=_BRIEF,
    )


def _question(record: Record, place: str) -> Question:
    return Question(
        text_of(record, "question", place).strip(),
        texts_of(record, "answers", place),
        *(" ".join(text_of(record, key, place).split()) for key in ("title", "passage")),
    )


def _holds(text: str, answers: Sequence[str]) -> bool:
    return any(scoring.holds(text, answer) for answer in answers)


def _answer(question: Question) -> bool:
    return _holds(scoring.normalised(question.passage), question.answers)


def _passages(questions: Sequence[Question]) -> dict[tuple[str, str], str]:
    """Each passage once, as (title, passage): all of it normalised."""
    pairs = [(question.title, question.passage) for question in questions]
    return {pair: scoring.normalised(" ".join(pair)) for pair in pairs}


def composed(
    question: Question,
    others: dict[tuple[str, str], str],
    *,
    number: int,
    length: int,
    options: SuiteOptions,
    measure: Measure,
    source: AnyPlace,
) -> Sample:
    """A question whose passage is one of many, prompt and answer `length` tokens in all.

    The other passages are drawn from `others` (normalised texts by title and passage) by the seed, none with an answer
    of the question in its normalised text or title. The last of them is cut between words: the prompt is never longer
    than asked, and exact unless a dozen passages in its place do not give that length. The passage lies at a depth
    drawn by the seed (`options.depths`: at these, by number in turn); `depth` is where it came to lie. Raises
    InputError where the passage alone is too long and where there are too few others.
    """
    key = f"{PASSAGES}/{length}/{number}"
    generator = random.Random(f"{options.seed}/{SUITE}/{key}")
    depth = options.depths[number % len(options.depths)] if options.depths else generator.random()
    free = [pair for pair, text in others.items() if not _holds(text, question.answers)]
    generator.shuffle(free)
    blank = Sample(
        id=key,
        suite=SUITE,
        task=PASSAGES,
        document="",
        question=question.question,
        answers=question.answers,
        metric=_METRIC[PASSAGES],
        max_new_tokens=_ANSWER_TOKENS[PASSAGES],
        length=length,
        template=_AMONG,
    )
    pool = [Passage(title, tuple(text.split(" "))) for title, text in free]

    def fitted(fixed: int, rest: Sequence[Passage]) -> Sample:
        """With the first `fixed` of the pool whole, and as many words of `rest` as there is room for."""

        def make(size: int) -> Sample:
            return _among(blank, question, [*pool[:fixed], *_cut(rest, size)], depth)

        return haystack.fitted(make, measure, length, sum(len(passage.words) for passage in rest))

    best = fitted(0, pool)
    count, used = measure(best), best.document.count(_BETWEEN)
    if count < length and best == _among(blank, question, pool, depth):
        raise InputError(f"{source}: expected passages for {length} tokens, got {count} of those without the answer")
    for at in range(used, min(used + _TRIES, len(pool))):
        if count == length or not used:
            break
        other = fitted(used - 1, pool[at : at + 2])
        if measure(other) > count:
            best, count = other, measure(other)
    return best


def _cut(passages: Sequence[Passage], size: int) -> list[Passage]:
    """The first `size` words of the passages, and the titles of those that are begun."""
    found = []
    for passage in passages:
        if size <= 0:
            break
        found.append(Passage(passage.title, passage.words[:size]))
        size -= len(passage.words)
    return found


def _among(blank: Sample, question: Question, others: Sequence[Passage], depth: float) -> Sample:
    """`blank` with the question's passage among the others, as many of them before it as `depth` says."""
    before = round(depth * len(others))
    texts = [(other.title, " ".join(other.words)) for other in others]
    texts.insert(before, (question.title, question.passage))
    parts = [f"Document [{at}] (Title: {title})\n{text}" for at, (title, text) in enumerate(texts, 1)]
    start = sum(len(part) + len(_BETWEEN) for part in parts[:before])
    document = _BETWEEN.join(parts)
    return replace(blank, document=document, depth=start / max(len(document) - len(parts[before]), 1))
