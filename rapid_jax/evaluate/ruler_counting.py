# SPDX-License-Identifier: Apache-2.0
"""RULER's tasks of counting: common words (cwe) and coded words of a Zeta distribution (fwe).

How often words stand, how many are asked and the distribution are those of the benchmark (arXiv 2404.06654 and its
code, Apache-2.0); the words are ours.
"""

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import replace

from rapid_jax.evaluate import word_lists
from rapid_jax.evaluate.haystack import fitted, needed_length
from rapid_jax.evaluate.samples import Measure, Sample

COMMON = 10  # words that are asked for
SHORT = 4096  # below this length words stand less often
ZETA_2 = math.pi**2 / 6
NOISE_WORD = "..."
_LEAST_CODED = 100  # with fewer drawings the third and the fourth coded word stand equally often


def common_words(blank: Sample, rng: random.Random, text: str, measure: Measure) -> Sample | None:
    """`blank` with a numbered list in which 10 words stand 30 times each and all others 3 times (short: 6 and 1).

    An example with its answer stands before the list. The unit of length is one word, three entries. None: draw again.
    """
    short = needed_length(blank) < SHORT
    shown_words, shown_times, shown_others = (20, 3, 1) if short else (40, 10, 3)
    times, others = (6, 1) if short else (30, 3)
    drawn = word_lists.countable(rng, [text])
    example = list(itertools.islice(drawn, shown_words))
    common = list(itertools.islice(drawn, COMMON))
    if any(one in other for one, other in itertools.permutations(common, 2)):
        return None  # naming one would name the other
    rest: list[str] = []
    order = rng.random()
    ask = f"Which {COMMON} words stand most often in the list above?"
    begin = f"The {COMMON} words that stand most often in the list are"
    shown = _numbered(example[:COMMON] * shown_times + example[COMMON:] * shown_others, order)
    template = (
        "Below is a numbered list of words. Some words stand in it more often than others. Remember those.\n\n"
        f"{shown}\n\n{ask}\n{begin} {', '.join(example[:COMMON])}.\n\n"
        "The next list:\n\n{document}\n\n{question}"
    )
    blank = replace(blank, question=ask, answers=tuple(common), template=template, begins=begin)

    def make(size: int) -> Sample:
        rest.extend(itertools.islice(drawn, max(size - len(rest), 0)))
        return replace(blank, document=_numbered(common * times + rest[:size] * others, order))

    return fitted(make, measure, needed_length(blank), most=needed_length(blank))


def coded_words(blank: Sample, rng: random.Random, measure: Measure) -> Sample:
    """`blank` with a text of coded words: the word of rank k stands in it in proportion to k**-2.

    The first rank is dots that mean nothing; asked are ranks 2 to 4. The unit of length is one more drawing, which is
    a word or a few.
    """
    length = needed_length(blank)
    drawn = word_lists.distinct(rng, lambda rng: word_lists.letters(rng, 6))
    vocabulary = [NOISE_WORD, *itertools.islice(drawn, max(length // 50, 10))]
    order = rng.random()
    blank = replace(
        blank,
        question="Ignore the dots '...'. Which three coded words stand most often in the text above?",
        answers=tuple(vocabulary[1:4]),
        template="Below is a text of coded words. Keep track of how often each of them stands in it.\n\n"
        "{document}\n\n{question}",
        begins="The three coded words that stand most often are",
    )

    def make(size: int) -> Sample:
        counts = [int((size + _LEAST_CODED) / (rank**2 * ZETA_2)) for rank in range(1, len(vocabulary) + 1)]
        coded = [word for word, count in zip(vocabulary, counts, strict=True) for _ in range(count)]
        return replace(blank, document=" ".join(_shuffle(coded, order)))

    return fitted(make, measure, length, most=2 * length)


def _shuffle(entries: Sequence[str], order: float) -> list[str]:
    """The entries in an order that follows from `order` alone."""
    return random.Random(order).sample(entries, len(entries))


def _numbered(entries: Sequence[str], order: float) -> str:
    return " ".join(f"{place}. {word}" for place, word in enumerate(_shuffle(entries, order), 1))
