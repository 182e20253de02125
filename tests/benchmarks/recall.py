# SPDX-License-Identifier: Apache-2.0
"""How much of what answers a question is among what is retrieved, by policy, at budgets of tokens.

python -m tests.benchmarks.recall --gold nq_gold.jsonl.gz

Documents of a length are composed of paragraphs of running text and of passages of the gold file (JSON lines
with `question` and `passage`, plain or gzipped) in turn, with sentences planted in some of either. Asked are questions
of passages in which none is, and one about each planted sentence. Recall is the share of the passage's, or the
sentence's, characters that retrieved chunks hold; its intervals, and those of the differences from the first policy,
are of a bootstrap of questions (95 %). JSON lines go to standard output or --out, a table to standard error.

A policy is what `rapid evaluate` calls a mode's changes, settings of retrieval behind colons: `fill:chunk_tokens=256`.
"""

import argparse
import gzip
import json
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rapid_jax.evaluate.haystack import insert, running_text, sentence_start
from rapid_jax.evaluate.statistics import Cell, Estimate, estimate
from rapid_jax.model.load import open_checkpoint
from rapid_jax.retrieval.config import RetrievalConfig
from rapid_jax.retrieval.embed import Embedder
from rapid_jax.retrieval.retriever import Retriever
from rapid_jax.retrieval.select import Selection

NAMES = ("Ada Brandt", "Hugo Lindqvist", "Mira Okafor", "Tomas Varga", "Ines Calder", "Oskar Niemi", "Leila Haddad")
PLACES = ("boathouse", "lighthouse", "town mill", "old brewery", "observatory", "parish hall", "ferry office")
THINGS = ("brass telescope", "oak chest", "silver flute", "red bicycle", "harbour map", "stone lion", "walnut clock")
CITIES = ("Trieste", "Bergen", "Porto", "Leeds", "Gdansk", "Basel", "Antwerp", "Cork")
FRAMES = (
    ("The access code of the {place} in {city} is {number}.", "Which code opens the {place} in {city}?"),
    ("{name} keeps the spare key of the {place} in {city} under the {thing}.", "Who has the key to {city}'s {place}?"),
    (
        "In the spring of {year} {name} sold the {thing} to a dealer from {city}.",
        "To whom did {name} sell the {thing} in {year}?",
    ),
    (
        "The {thing} was found again in the cellar of the {place} in {city}.",
        "Where in {city} did the lost {thing} turn up?",
    ),
)


class Asked(NamedTuple):
    """A question, and where in the document what answers it lies."""

    kind: str  # gold, planted
    question: str
    start: int
    end: int


@dataclass(frozen=True)
class Document:
    """A text of so many tokens, and what is asked about it."""

    text: str
    tokens: int
    asked: list[Asked]


class Remembered(Embedder):
    """An encoder that remembers the vectors of windows: policies have many in common."""

    def __init__(self, name: str):
        super().__init__(name)
        self._known: dict[bytes, np.ndarray] = {}

    def _vectors(self, pieces: list[np.ndarray], progress_label: str | None) -> np.ndarray:
        new = list({piece.tobytes(): piece for piece in pieces if piece.tobytes() not in self._known}.values())
        for piece, vector_E in zip(new, super()._vectors(new, progress_label), strict=True):
            self._known[piece.tobytes()] = vector_E
        return np.stack([self._known[piece.tobytes()] for piece in pieces])


def read_gold(file: Path) -> list[dict[str, str]]:
    """The questions with different passages."""
    with gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else file.open(encoding="utf-8") as lines:
        every = [json.loads(line) for line in lines]
    return list({one["passage"]: one for one in every}.values())


def planted(rng: random.Random, count: int) -> list[tuple[str, str]]:
    """Sentences and their questions, no two of a kind about the same."""
    found: dict[str, str] = {}
    while len(found) < count:
        words = {
            "name": rng.choice(NAMES),
            "place": rng.choice(PLACES),
            "thing": rng.choice(THINGS),
            "city": rng.choice(CITIES),
            "year": str(rng.randint(1900, 1999)),
            "number": str(rng.randint(10**5, 10**6 - 1)),
        }
        sentence, question = FRAMES[len(found) % len(FRAMES)]
        if question.format(**words) not in found:
            found[question.format(**words)] = sentence.format(**words)
    return [(sentence, question) for question, sentence in found.items()]


def compose(
    rng: random.Random, gold: Sequence[dict[str, str]], prose: str, length: int, ask: tuple[int, int], rate: float
) -> Document:
    """A document of about so many tokens; `ask` questions about passages and planted sentences, `rate` characters a
    token.
    """
    size, at = round(length * rate), rng.randrange(len(prose))
    passages = iter(rng.sample(gold, len(gold)))
    sentences = planted(rng, ask[1])
    blocks: list[tuple[str, str | None]] = []  # a text, and its question
    while sum(len(text) + 2 for text, _ in blocks) < size - 60 * len(sentences):
        end = sentence_start(prose, at + rng.randint(300, 900))
        if rng.random() < 0.6 or end <= at:
            one = next(passages)
            blocks.append((one["passage"], one["question"]))
        elif end < len(prose):
            blocks.append((prose[at:end].strip(), None))
        at = end if at < end < len(prose) else 0
    parts, asked, begin = [], [], 0
    into: dict[int, list[tuple[str, str]]] = {}
    for one in sentences:
        into.setdefault(rng.randrange(len(blocks)), []).append(one)
    for i, (text, question) in enumerate(blocks):
        for sentence, about in into.get(i, ()):
            place = sentence_start(text, rng.randrange(len(text)))
            text = insert(text, [place], [sentence + " "])
            asked.append(Asked("planted", about, begin, begin + len(text)))  # found below
        if question is not None and i not in into:
            asked.append(Asked("gold", question, begin, begin + len(text)))
        parts.append(text)
        begin += len(text) + 2
    whole = "\n\n".join(parts)
    sentence_of = {about: sentence for sentence, about in sentences}
    placed = [one if one.kind == "gold" else _placed(one, whole, sentence_of[one.question]) for one in asked]
    chosen = [one for kind in ("gold", "planted") for one in _some(rng, placed, kind, ask[kind == "planted"])]
    return Document(whole, length, chosen)


def _placed(one: Asked, text: str, sentence: str) -> Asked:
    start = text.index(sentence, one.start)
    return one._replace(start=start, end=start + len(sentence))


def _some(rng: random.Random, asked: list[Asked], kind: str, count: int) -> list[Asked]:
    those = [one for one in asked if one.kind == kind]
    return rng.sample(those, min(count, len(those)))


def documents(args: argparse.Namespace, spans: Any) -> Iterator[Document]:
    """Of each length as many as bring about `args.questions` questions about passages and half as many about others."""
    gold, prose = read_gold(args.gold), running_text(args.text)
    sample = prose[:20000] + "".join(one["passage"] for one in gold[:40])
    rate = len(sample) / len(spans(sample))
    for length in args.lengths:
        each = max(2, min(args.questions, length // 400))
        for number in range(-(-args.questions // each)):
            rng = random.Random(f"{args.seed} {length} {number}")
            made = compose(rng, gold, prose, length, (each, max(each // 2, 1)), rate)
            yield replace(made, tokens=len(spans(made.text)))


def recall(selection: Selection, one: Asked) -> float:
    """The share of the characters from start to end that lie in chunks."""
    held = sum(max(0, min(one.end, chunk.end) - max(one.start, chunk.start)) for chunk in selection.chunks)
    return held / (one.end - one.start)


def config_of(policy: str, budget: int) -> RetrievalConfig:
    """The settings of a policy at a budget of tokens, whatever the document's length."""
    name, *changes = policy.split(":")
    values = dict(change.split("=", 1) for change in changes)
    given = {key: json.loads(value) for key, value in values.items()}
    return RetrievalConfig(**{"policy": name, "min_tokens": budget, "compression": 10**6, **given})


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One record for each question, policy and budget."""
    _, tokenizer = open_checkpoint(args.tokenizer)
    spans, embedder = tokenizer.spans, Remembered(args.encoder)
    for document in documents(args, spans):
        for policy in args.policies:
            start = time.perf_counter()
            for budget in args.budgets:
                retriever = Retriever(embedder, config_of(policy, budget), quiet=True)
                for one in document.asked:
                    found = retriever.retrieve(document.text, one.question, spans, document.tokens)
                    inside = [
                        score
                        for chunk, score in zip(found.chunks, found.scores, strict=True)
                        if chunk.start < one.end and one.start < chunk.end
                    ]
                    yield {
                        "length": document.tokens,
                        "policy": policy,
                        "budget": budget,
                        "kind": one.kind,
                        "question": one.question,
                        "recall": recall(found, one),
                        "tokens": found.tokens,
                        "score": max(inside, default=None),
                    }
            spent = time.perf_counter() - start
            print(f"{document.tokens} tokens, {policy}: {spent:.1f} s", file=sys.stderr, flush=True)


def summary(records: list[dict[str, Any]], policies: Sequence[str], lengths: Sequence[int]) -> Iterator[str]:
    """Rows of a table: recall by kind, length, budget and policy."""
    yield "| asked | document | budget | policy | recall | from the first policy | retrieved tokens |"
    yield "|---|---|---|---|---|---|---|"
    cells: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for one in records:
        near = min(lengths, key=lambda length: abs(length - one["length"]))
        for length in (near, 0):
            cell = cells.setdefault((one["kind"], length, one["budget"]), {})
            cell.setdefault(one["policy"], {})[f"{near} {one['length']} {one['question']}"] = one
    for (kind, length, budget), cell in sorted(
        cells.items(), key=lambda item: (item[0][0], item[0][1] or 1e9, item[0])
    ):
        first = cell[policies[0]]
        for policy in policies:
            found = cell[policy]
            own = estimate([Cell(1.0, [(key, one["recall"]) for key, one in found.items()])])
            gains = [(key, one["recall"] - first[key]["recall"]) for key, one in found.items()]
            gain = "" if policy == policies[0] else shown(estimate([Cell(1.0, gains)], span=(-1.0, 1.0)), "+")
            tokens = np.mean([one["tokens"] for one in found.values()])
            yield f"| {kind} | {length or 'all'} | {budget} | {policy} | {shown(own)} | {gain} | {tokens:,.0f} |"


def shown(found: Estimate, sign: str = "") -> str:
    """A mean in per cent with its interval."""
    ends = "" if found.low is None else f" [{100 * found.low:{sign}.1f}, {100 * (found.high or 0.0):{sign}.1f}]"
    return f"{100 * found.mean:{sign}.1f}{ends}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = {"type": lambda text: [int(one) for one in text.split(",")]}
    parser.add_argument("--gold", type=Path, required=True)
    parser.add_argument("--text", help="running text: a file or a folder of .txt; else Python's language reference")
    parser.add_argument("--policies", type=lambda text: text.split(","), default=["paper", "fill"])
    parser.add_argument("--lengths", default=[2048, 8192, 32768, 131072], **numbers)
    parser.add_argument("--budgets", default=[1024, 2048, 4096], **numbers)
    parser.add_argument("--questions", type=int, default=120, help="about gold passages, of each length")
    parser.add_argument("--encoder", default="minilm")
    parser.add_argument("--tokenizer", default="smollm2")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    records = []
    with args.out.open("w") if args.out else sys.stdout as out:
        for record in measure(args):
            records.append(record)
            print(json.dumps(record), file=out, flush=True)
    print("\n".join(summary(records, args.policies, args.lengths)), file=sys.stderr)


if __name__ == "__main__":
    main()
