# SPDX-License-Identifier: Apache-2.0
"""Every metric against answers judged by hand, and ROUGE against a plain reference."""

import re
import sys
import types
from collections import Counter

import pytest

from rapid_jax.evaluate import scoring
from rapid_jax.evaluate.scoring import METRICS, score
from rapid_jax.runtime.errors import InputError

CASES = [
    # RULER: substrings, in any case; the share, or one is enough
    ("ruler_all", "The numbers are 12345 and 67890.", ("12345", "67890"), 1.0),
    ("ruler_all", "12345", ("12345", "67890"), 0.5),
    ("ruler_all", "VAR ABCDE", ("abcde", "x", "y", "z"), 0.25),
    ("ruler_all", "1234567", ("12345",), 1.0),
    ("ruler_all", "", ("12345",), 0.0),
    ("ruler_part", "it was PARIS, I think", ("London", "Paris"), 1.0),
    ("ruler_part", "Pari s", ("London", "Paris"), 0.0),
    # SQuAD
    ("qa_f1", "The Eiffel Tower!", ("eiffel tower",), 1.0),
    ("qa_f1", "in the old town of Paris", ("Paris", "Paris old town"), 3 / 4),  # 3 common of 5 and of 3
    ("qa_f1", "b b c", ("b c d",), 2 / 3),  # repeats count as often as both have them
    ("qa_f1", "London", ("Paris",), 0.0),
    ("qa_f1", "", ("Paris",), 0.0),
    ("qa_f1", "the", ("The",), 0.0),
    ("qa_f1", "fourth-class", ("fourthclass",), 1.0),  # marks leave no space
    ("qa_em", " the  U.S. ", ("us",), 1.0),
    ("qa_em", "the U.S. army", ("us", "US Army."), 1.0),
    ("qa_em", "a us navy", ("us",), 0.0),
    ("infinitebench_qa", "an old town", ("old town",), 1.0),
    # Lost in the Middle: any answer within the first line
    ("contains", "It was Wilhelm Conrad Röntgen, of Germany.", ("wilhelm conrad röntgen",), 1.0),
    ("contains", "\n\n It was Paris\nor London", ("Paris",), 1.0),
    ("contains", "It was Paris\nor London", ("London",), 0.0),
    ("contains", "parisian", ("Oslo", "Paris"), 1.0),
    ("contains", "anything", ("The",), 0.0),
    ("contains", "", ("Paris",), 0.0),
    # LongBench v2: the two forms and nothing else
    ("choice", "The correct answer is (B).", ("B",), 1.0),
    ("choice", "The correct answer is (C).", ("B",), 0.0),
    ("choice", "**The correct answer is B**", ("B",), 1.0),
    ("choice", "The correct answer is **(B)**", ("B",), 1.0),
    ("choice", "The correct answer is A? No. The correct answer is (B)", ("B",), 1.0),  # parentheses go first
    ("choice", "The correct answer is (A). The correct answer is (B)", ("B",), 0.0),  # the first of them
    ("choice", "the correct answer is (B)", ("B",), 0.0),
    ("choice", "(B)", ("B",), 0.0),
    ("choice", "B", ("B",), 0.0),
    ("choice", "The correct answer is (E)", ("B",), 0.0),
    ("choice", "", ("B",), 0.0),
    # En.MC
    ("infinitebench_choice", "B. Mr Smith", ("Mr Smith", "B"), 1.0),
    ("infinitebench_choice", "  C", ("Mr Smith", "B"), 0.0),
    ("infinitebench_choice", "Because of Mr Smith", ("Mr Smith", "B"), 1.0),  # a word's letter counts, as there
    ("infinitebench_choice", "Mr Smith", ("Mr Smith", "B"), 1.0),
    ("infinitebench_choice", "The answer is: B", ("Mr Smith", "B"), 1.0),
    ("infinitebench_choice", "The answer is Mr Smith!", ("Mr Smith", "B"), 1.0),
    ("infinitebench_choice", "My answer:\n\nB", ("Mr Smith", "B"), 1.0),
    ("infinitebench_choice", "The right option is C, not B", ("Mr Smith", "B"), 0.0),
    ("infinitebench_choice", "The answer is", ("Mr Smith", "B"), 0.0),
    ("infinitebench_choice", "I say B, not C", ("Mr Smith", "B"), 1.0),
    ("infinitebench_choice", "I say C, not B", ("Mr Smith", "B"), 0.0),
    ("infinitebench_choice", "(B)", ("Mr Smith", "B"), 0.0),
    ("infinitebench_choice", "no idea", ("Mr Smith", "B"), 0.0),
    ("infinitebench_choice", "", ("Mr Smith", "B"), 0.0),
]


@pytest.mark.parametrize("metric, prediction, answers, expected", CASES)
def test_scores_are_those_of_the_published_rules(metric, prediction, answers, expected):
    assert score(metric, prediction, answers) == pytest.approx(expected, abs=1e-12)


def test_every_metric_has_cases():
    assert {case[0] for case in CASES} | {"rouge_l_sum"} == set(METRICS)


def test_normalised_texts_and_what_they_hold():
    assert scoring.normalised(" The  cat, a dog\n& AN   ant's theatre. ") == "cat dog ants theatre"
    assert scoring.holds("cat dog", "The Dog!")
    assert not scoring.holds("cat dog", "an a the ...")


# -- ROUGE-L over summaries, as the package rouge-score has it: the reference that stands in for it here.


def words(text):
    return re.findall(r"[a-z0-9]+", text.lower())


def common_places(reference, line):
    """Places in `reference` of a longest common subsequence with `line`; of several, the one read from the end."""
    table = [[0] * (len(line) + 1) for _ in range(len(reference) + 1)]
    for i, word in enumerate(reference, 1):
        for j, other in enumerate(line, 1):
            table[i][j] = table[i - 1][j - 1] + 1 if word == other else max(table[i - 1][j], table[i][j - 1])
    i, j, places = len(reference), len(line), set()
    while i and j:
        if reference[i - 1] == line[j - 1]:
            places.add(i - 1)
            i, j = i - 1, j - 1
        elif table[i][j - 1] > table[i - 1][j]:
            j -= 1
        else:
            i -= 1
    return places


def rouge_l_sum(target, prediction):
    """F-measure: for every line of the target, the union of its common subsequences with all lines predicted."""
    lines, others = ([words(line) for line in text.split("\n") if line] for text in (target, prediction))
    left, hits = [Counter(word for line in group for word in line) for group in (lines, others)], 0
    for line in lines:
        places = set().union(*(common_places(line, other) for other in others))
        for word in (line[place] for place in sorted(places)):
            if left[0][word] > 0 and left[1][word] > 0:  # no word is counted more often than either text has it
                hits += 1
                left[0][word] -= 1
                left[1][word] -= 1
    total = sum(map(len, lines)), sum(map(len, others))
    return 2 * hits / sum(total) if hits else 0.0


class Scorer:
    def __init__(self, kinds, use_stemmer=True):
        assert kinds == ["rougeLsum"] and use_stemmer is False

    def score(self, target, prediction):
        return {"rougeLsum": types.SimpleNamespace(precision=2, recall=2, fmeasure=rouge_l_sum(target, prediction))}


def test_rouge_is_the_best_f_measure_of_the_package(monkeypatch):
    package = types.ModuleType("rouge_score")
    module = types.ModuleType("rouge_score.rouge_scorer")
    monkeypatch.setattr(module, "RougeScorer", Scorer, raising=False)
    monkeypatch.setitem(sys.modules, "rouge_score", package)
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", module)
    assert score("rouge_l_sum", "The cat sat.", ("the cat SAT",)) == 1.0
    # Lines: "police killed the gunman" shares police, the, gunman with the first; 3 of 4 and of 4 words.
    assert score("rouge_l_sum", "police kill the gunman", ("police killed the gunman",)) == pytest.approx(3 / 4)
    # Two lines predicted: together they have a, c and e of the line (union), 3 of 5; of 3 + 3 words predicted.
    assert score("rouge_l_sum", "a c x\nc e y", ("a b c d e",)) == pytest.approx(2 * 3 / 11)
    assert score("rouge_l_sum", "a b", ("c d", "a b c", "a d")) == pytest.approx(4 / 5)
    assert score("rouge_l_sum", "", ("a",)) == 0.0


def test_rouge_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "rouge_score", None)
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    for call in (lambda: score("rouge_l_sum", "a", ("a",)), lambda: scoring.check("rouge_l_sum")):
        with pytest.raises(InputError, match="pip install rouge-score"):
            call()


def test_unknown_metrics_and_missing_answers_are_input_errors():
    with pytest.raises(InputError, match=r"expected a metric of ruler_all, .*got 'bleu'"):
        score("bleu", "a", ("a",))
    for answers in ((), ("a", ""), "abc"):
        with pytest.raises(InputError, match="expected a sequence of answers"):
            score("qa_f1", "a", answers)
