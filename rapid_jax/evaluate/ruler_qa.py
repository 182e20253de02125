# SPDX-License-Identifier: Apache-2.0
"""RULER's question answering (qa_1, qa_2): the gold paragraphs of a question among others, from the user's file."""

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from rapid_jax.evaluate.data_files import MOST_BYTES, whole_text
from rapid_jax.evaluate.haystack import exact, needed_length
from rapid_jax.evaluate.samples import Measure, Sample
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.json_input import Fields, parse_json
from rapid_jax.runtime.storage import AnyPlace, open_file, place_of

FILES = {"qa_1": "squad.json", "qa_2": "hotpotqa.json"}  # in a folder; a file alone is known by what is in it

_HEADING = len("Document 99:\n\n\n")
_FRAGMENT = 40  # characters that a cut paragraph has at least


@dataclass(frozen=True)
class Question:
    """A question, its answers, the paragraphs that hold them, and the paragraphs to put beside them first."""

    text: str
    answers: tuple[str, ...]
    gold: tuple[str, ...]
    beside: tuple[str, ...]


@dataclass(frozen=True)
class Paragraphs:
    """A benchmark's questions and all of its paragraphs, each once."""

    questions: tuple[Question, ...]
    paragraphs: tuple[str, ...]


def read(data: AnyPlace | None) -> dict[str, Paragraphs]:
    """What `data` has for the two tasks, by task: a SQuAD or a HotpotQA file, or a folder with FILES.

    SQuAD: the JSON of version 1.1 or 2.0 (questions without an answer are left out). HotpotQA: the JSON of the
    distractor setting.
    """
    if data is None:
        return {}
    data = place_of(data, "data")
    if data.is_dir():
        files = [data / name for name in FILES.values() if (data / name).is_file()]
        if not files:
            raise InputError(f"{data}: expected {' or '.join(FILES.values())} in the folder, got neither")
    else:
        files = [data]
    return dict(_read(file) for file in files)


def questions(known: Paragraphs, seed: int, task: str, count: int) -> list[Question]:
    """`count` questions in a drawn order, the same for every length; all that there are where there are fewer."""
    return random.Random(f"{seed}/{task}").sample(known.questions, min(count, len(known.questions)))


def asked(blank: Sample, rng: random.Random, known: Paragraphs, question: Question, measure: Measure) -> Sample | None:
    """`blank` with the question's gold paragraphs among others in a drawn order; None: draw again.

    The others are those beside it (of the same article, or chosen by the benchmark to mislead), then any, then again
    from the first; one is cut so that the length is exact.
    """
    beside = rng.sample(question.beside, len(question.beside))
    taken = {*question.gold, *beside}
    others = [*beside, *(text for text in rng.sample(known.paragraphs, len(known.paragraphs)) if text not in taken)]
    gold = [(rng.random(), text) for text in question.gold]
    keys: list[float] = []  # of the others: where a paragraph stands does not change when more are added
    blank = replace(
        blank,
        question=question.text,
        answers=question.answers,
        template="Answer the question from the documents below. Give the answer alone, no other words.\n\n{document}"
        "\n\nAnswer the question from the documents above. Give the answer alone, no other words.\n\n"
        "Question: {question}",
        begins="Answer:",
    )

    def make(size: int) -> Sample:
        parts = _parts(others, size)
        keys.extend(rng.random() for _ in range(len(parts) - len(keys)))
        shown = [*gold, *zip(keys, parts, strict=False)]
        shown.sort(key=lambda item: item[0])
        texts = [f"Document {number}:\n{text}" for number, (_, text) in enumerate(shown, 1)]
        before = sum(len(text) + 2 for text, (key, _) in zip(texts, shown, strict=True) if key < min(gold)[0])
        document = "\n\n".join(texts)
        return replace(blank, document=document, depth=before / len(document))

    found = exact(make, measure, needed_length(blank), tries=12)
    return None if found is None else found[1]


def _parts(texts: Sequence[str], size: int) -> list[str]:
    """The texts in turn, again from the first after the last, in about `size` characters with their headings.

    The last is cut, and where little of it would be left, the one before it as well: one character more is always
    about as many tokens more, also where another heading comes in.
    """
    parts: list[str] = []
    for text in itertools.cycle(texts):
        if size <= 0:
            break
        part = text[: max(size - _HEADING, _FRAGMENT)]
        missing = _HEADING + len(part) - size
        if missing > 0 and parts:
            parts[-1] = parts[-1][: max(len(parts[-1]) - missing, 1)]
        parts.append(part)
        size -= _HEADING + len(text)
    return parts


def _read(file: AnyPlace) -> tuple[str, Paragraphs]:
    if not file.is_file():
        raise InputError(f"data {file}: cannot be read: there is no such file")
    try:
        with open_file(file) as opened:
            content = parse_json(opened.read(MOST_BYTES + 1), f"data {file}", most_bytes=MOST_BYTES)
    except OSError as error:
        raise InputError(f"data {file}: cannot be read: {error.strerror}") from error
    if isinstance(content, dict) and "data" in content:
        task, found = "qa_1", _squad(Fields(content, f"data {file}"))
    elif isinstance(content, list) and content and isinstance(content[0], dict) and "context" in content[0]:
        task, found = "qa_2", _hotpot(Fields({"list": content}, f"data {file}").each("list"))
    else:
        raise InputError(f"data {file}: expected the JSON of SQuAD (an object with data) or of HotpotQA (a list)")
    paragraphs = {text for question in found for text in question.gold + question.beside}
    if not found:
        raise InputError(f"data {file}: expected questions with answers, got none")
    if all(paragraphs <= set(question.gold) for question in found):
        raise InputError(f"data {file}: expected paragraphs besides the gold ones, got none")
    return task, Paragraphs(tuple(found), tuple(sorted(paragraphs)))


def _squad(content: Fields) -> list[Question]:
    found = []
    for article in content.each("data"):
        paragraphs = article.each("paragraphs")
        contexts = [_text(paragraph, "context") for paragraph in paragraphs]
        for paragraph, gold in zip(paragraphs, contexts, strict=True):
            beside = tuple(dict.fromkeys(text for text in contexts if text != gold))
            for asked in paragraph.each("qas"):
                texts = (whole_text(answer.text("text", "")) for answer in asked.each("answers"))
                answers = tuple(dict.fromkeys(text for text in texts if text.strip()))
                if answers and not asked.truth("is_impossible", False):
                    found.append(Question(_text(asked, "question").strip(), answers, (gold,), beside))
    return found


def _hotpot(entries: Sequence[Fields]) -> list[Question]:
    found = []
    for entry in entries:
        titles = {title for title, _ in _pairs(entry, "supporting_facts", int, "a list of [title, sentence's number]")}
        context = _pairs(entry, "context", list, "a list of [title, list of sentences]")
        if not all(isinstance(sentence, str) for _, sentences in context for sentence in sentences):
            raise entry.error("context", "a list of [title, list of sentences]")
        texts = {title: whole_text(f"{title}\n{''.join(sentences)}") for title, sentences in context}
        if not titles <= set(texts):
            raise entry.error("supporting_facts", "of paragraphs that are in context")
        gold = tuple(text for title, text in texts.items() if title in titles)
        beside = tuple(text for title, text in texts.items() if title not in titles)
        found.append(Question(_text(entry, "question").strip(), (_text(entry, "answer"),), gold, beside))
    return found


def _text(fields: Fields, key: str) -> str:
    text = fields.text(key)
    if not text.strip():
        raise fields.error(key, "a text that is not empty")
    return whole_text(text)


def _pairs(entry: Fields, key: str, second: type, expected: str) -> list[tuple[str, Any]]:
    """The pairs of a title and another value; InputError for anything else, and for none."""
    pairs = entry.get(key)
    right = isinstance(pairs, list) and bool(pairs)
    for pair in pairs if isinstance(pairs, list) else ():
        right &= isinstance(pair, list) and [type(item) for item in pair] == [str, second]
    if not right or not isinstance(pairs, list):
        raise entry.error(key, expected)
    return [(title, value) for title, value in pairs]
