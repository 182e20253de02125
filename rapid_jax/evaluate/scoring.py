# SPDX-License-Identifier: Apache-2.0
"""What an answer is worth: the rules of the benchmarks' own scorers, each from 0 to 1 for one answer."""

import importlib
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from rapid_jax.runtime.errors import InputError, extra

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_CHOICE = (re.compile(r"The correct answer is \(([A-D])\)"), re.compile(r"The correct answer is ([A-D])"))
_LETTERS = "ABCD"
_ANNOUNCED = ("answer is:", "answer:", "answer is", "option is")  # in the order in which they are looked for


def normalised(text: str) -> str:
    """Lower case, without ASCII punctuation and the words a, an, the, one space between words (SQuAD's evaluation)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def holds(text: str, answer: str) -> bool:
    """Whether the normalised `answer` is in `text`, which is normalised; an answer of which nothing is left is not."""
    sought = normalised(answer)
    return bool(sought) and sought in text


def ruler_all(prediction: str, answers: Sequence[str]) -> float:
    """The share of the answers that occur in the prediction, in any case, as parts of words, too.

    RULER's string_match_all (NVIDIA/RULER, scripts/eval/synthetic/constants.py), of all its tasks but qa.
    """
    text = prediction.lower()
    return sum(answer.lower() in text for answer in answers) / len(answers)


def ruler_part(prediction: str, answers: Sequence[str]) -> float:
    """1 if any answer occurs in the prediction, in any case: RULER's string_match_part, of its qa tasks."""
    text = prediction.lower()
    return float(any(answer.lower() in text for answer in answers))


def qa_f1(prediction: str, answers: Sequence[str]) -> float:
    """The best F1, over the answers, of the words that normalised prediction and answer share, counted with repeats.

    SQuAD v1's evaluation, and InfiniteBench's of En.QA (src/compute_scores.py). Nothing in common is 0, even if both
    normalise to nothing.
    """
    words = Counter(normalised(prediction).split())
    return max(_f1(words, Counter(normalised(answer).split())) for answer in answers)


def _f1(words: Counter[str], expected: Counter[str]) -> float:
    common = (words & expected).total()
    return 2 * common / (words.total() + expected.total()) if common else 0.0


def qa_em(prediction: str, answers: Sequence[str]) -> float:
    """1 if the prediction equals an answer, both normalised (SQuAD's exact match)."""
    return float(normalised(prediction) in {normalised(answer) for answer in answers})


def contains(prediction: str, answers: Sequence[str]) -> float:
    """1 if any normalised answer is in the first line of the prediction, normalised; as parts of words, too.

    Lost in the Middle's best_subspan_em (nelson-liu/lost-in-the-middle), whose evaluation drops what is behind the
    first line: a model that copies its documents would be right. Here white space before the first line is passed
    over, and an answer that normalises to nothing ("The") is never found; there it always is.
    """
    text = normalised(prediction.strip().partition("\n")[0])
    return float(any(holds(text, answer) for answer in answers))


def rouge_l_sum(prediction: str, answers: Sequence[str]) -> float:
    """The best F-measure of ROUGE-L over whole summaries (rougeLsum), lines being the sentences, words not stemmed.

    InfiniteBench's En.Sum, by the package it uses, rouge-score. Raises InputError if that is not installed.
    """
    scorer = _rouge().RougeScorer(["rougeLsum"], use_stemmer=False)
    return max(float(scorer.score(answer, prediction)["rougeLsum"].fmeasure) for answer in answers)


def _rouge():
    """The module rouge_score.rouge_scorer."""
    try:
        return importlib.import_module("rouge_score.rouge_scorer")
    except ImportError as error:
        raise InputError(f"rouge_l_sum needs the package rouge-score; {extra('evaluate')}") from error


def choice(prediction: str, answers: Sequence[str]) -> float:
    """1 if the letter that the prediction gives is the answer (or one of them).

    LongBench v2's rule (THUDM/LongBench, pred.py): without its asterisks, the first "The correct answer is (X)" with a
    letter A to D; if there is none, the first "The correct answer is X". Nothing else counts, letters alone neither.
    """
    text = prediction.replace("*", "")
    match = _CHOICE[0].search(text) or _CHOICE[1].search(text)
    return float(match is not None and match[1] in answers)


def infinitebench_choice(prediction: str, answers: Sequence[str]) -> float:
    """1 if the prediction gives the right option; `answers` are its text and its letter.

    The rule of En.MC (OpenBMB/InfiniteBench, src/compute_scores.py), the first that applies: the prediction starts with
    A, B, C or D (in a word, too): that letter; it is the option's text; it has one of "answer is:", "answer:", "answer
    is", "option is": the letter or the text stands one character behind the first of these (some marks are spaces by
    now); else its first word of these letters alone.
    """
    text = prediction.strip()
    if text and text[0] in _LETTERS:
        return float(text[0] in answers)
    if text in answers:
        return 1.0
    text = re.sub(" {2,}", " ", re.sub(r"[\n\"'.,?!{}]", " ", text))
    for words in _ANNOUNCED:
        _, found, rest = text.partition(words)
        if found:
            return float(rest[1:].startswith(tuple(answers)))
    return float(next((word for word in text.split() if word in _LETTERS), None) in answers)


METRICS: Mapping[str, Callable[[str, Sequence[str]], float]] = {
    "ruler_all": ruler_all,
    "ruler_part": ruler_part,
    "qa_f1": qa_f1,
    "qa_em": qa_em,
    "contains": contains,
    "rouge_l_sum": rouge_l_sum,
    "choice": choice,
    "infinitebench_choice": infinitebench_choice,
    "infinitebench_qa": qa_f1,
}


def check(metric: str) -> None:
    """Raises InputError for a metric that is not in METRICS or needs a package that is not installed."""
    if metric not in METRICS:
        raise InputError(f"expected a metric of {', '.join(METRICS)}, got {metric!r}")
    if metric == "rouge_l_sum":
        _rouge()


def score(metric: str, prediction: str, answers: Sequence[str]) -> float:
    """What the prediction is worth, from 0 to 1, by the metric of that name.

    Raises InputError for an unknown metric, no answers, an empty one, and a package that the metric lacks.
    """
    check(metric)
    if isinstance(answers, str) or not answers or not all(answers):
        raise InputError(f"metric {metric}: expected a sequence of answers that are not empty, got {answers!r}")
    return METRICS[metric](prediction, answers)
