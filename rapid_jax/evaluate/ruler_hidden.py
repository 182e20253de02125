# SPDX-License-Identifier: Apache-2.0
"""RULER's tasks of hidden sentences: needles in a haystack (niah) and variable tracking (vt).

Kinds, numbers of needles, keys and values, hops, and tokens to generate are those of the benchmark (arXiv 2404.06654,
tables 2 and 3 and its code, Apache-2.0); the words are ours.
"""

import itertools
import random
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from rapid_jax.evaluate import haystack, word_lists
from rapid_jax.evaluate.haystack import NOISE, Burial, fitted, needed_length
from rapid_jax.evaluate.samples import Measure, Sample

GRID = tuple(step / 39 for step in range(40))  # depths that needles are put at
HOPS = 4


@dataclass(frozen=True)
class Niah:
    """A kind of needle in a haystack: of `keys` keys with `values` values each, `asked` keys are asked for."""

    filler: str  # noise, text, or needles: the haystack is other needles
    keys: int = 1
    values: int = 1
    asked: int = 1
    key: Callable[[random.Random], str] = word_lists.key
    value: Callable[[random.Random], str] = word_lists.number

    @property
    def noun(self) -> str:
        """What a value is called."""
        return "identifier" if self.value is word_lists.identifier else "number"


NIAH = {
    "niah_single_1": Niah("noise"),
    "niah_single_2": Niah("text"),
    "niah_single_3": Niah("text", value=word_lists.identifier),
    "niah_multikey_1": Niah("text", keys=4),
    "niah_multikey_2": Niah("needles"),
    "niah_multikey_3": Niah("needles", key=word_lists.identifier, value=word_lists.identifier),
    "niah_multivalue": Niah("text", values=4),
    "niah_multiquery": Niah("text", keys=4, asked=4),
}


def niah(blank: Sample, rng: random.Random, text: str, measure: Measure) -> Sample | None:
    """`blank` with document, question and answers of its task; None: draw again."""
    kind = NIAH[blank.task]
    drawn = word_lists.distinct(rng, kind.value)
    keys = list(itertools.islice(word_lists.distinct(rng, kind.key), kind.keys))
    values = {key: [next(drawn) for _ in range(kind.values)] for key in keys}
    asked = keys[: kind.asked]
    pairs = [(key, value) for key in keys for value in values[key]]
    rng.shuffle(pairs)
    answers = tuple(value for key in asked for value in values[key])
    blank = replace(blank, answers=answers, **_asking(kind.noun, asked, len(answers) > 1))
    if kind.filler == "needles":
        sample = _among_needles(blank, rng, kind, pairs[0], measure)
    else:
        depths = sorted(rng.sample(GRID, len(pairs)))
        if depths[0] == 0 and depths[-1] == 1:
            return None  # one end of the text is where it is cut
        first = next(depth for depth, (key, _) in zip(depths, pairs, strict=True) if key in asked)
        needles = [_needle(kind.noun, *pair) + " " for pair in pairs]
        source = NOISE if kind.filler == "noise" else text
        burial = Burial(replace(blank, depth=first), source, needles, depths, measure)
        at = haystack.sentence_start(source, rng.randrange(len(source)))
        sample = burial.cut(at, burial.size(at))
    if sample is None:
        return None
    counts = {key: kind.values for key in keys} | {value: 1 for value in answers}
    return sample if stand(sample.document, counts) else None


def stand(document: str, counts: dict[str, int]) -> bool:
    """Whether each text stands in the document as often as it must, be it within a longer word."""
    return all(document.count(text) == count for text, count in counts.items())


def variables(blank: Sample, rng: random.Random, measure: Measure) -> Sample | None:
    """`blank` with one chain of assignments hidden among noise; None: draw again.

    The value is written out once and handed on in HOPS assignments; asked are all variables that have it. As in
    RULER's code an example with its answer stands before the text.
    """
    value, names, statements = _chain(rng, 5)
    other, shown, example = _chain(rng, 3)
    depths = sorted(rng.sample(GRID, len(statements)))
    if depths[0] == 0 and depths[-1] == 1:
        return None
    lines = haystack.insert(NOISE * 5, [len(NOISE) * line for line in range(5)], example)
    ask = "Which variables have the value {}, directly or handed on from another variable? Name all {} of them."
    begin = f"The {len(names)} variables that have the value {{}} are"
    template = (
        "Variables are set in lines that are hidden in a text. Keep track of them.\n\n"
        f"{lines}\n\n{ask.format(other, len(shown))}\n{begin.format(other)} {', '.join(shown)}.\n\n"
        "The next text:\n\n{document}\n\n{question}"
    )
    blank = replace(
        blank,
        question=ask.format(value, len(names)),
        answers=tuple(names),
        template=template,
        begins=begin.format(value),
        depth=depths[0],
    )
    burial = Burial(blank, NOISE, statements, depths, measure)
    at = haystack.sentence_start(NOISE, rng.randrange(len(NOISE)))
    sample = burial.cut(at, burial.size(at))
    if sample is None or value == other:
        return None
    # A name stands where it is set and, but for the last, where it is handed on.
    counts = {name: 2 for name in names[:-1]} | {names[-1]: 1, value: 1} | {name: 0 for name in shown}
    return sample if stand(sample.document, counts) else None


def _chain(rng: random.Random, letters: int) -> tuple[str, list[str], list[str]]:
    """The value, the names of the variables, and the lines that set them."""
    drawn = word_lists.distinct(rng, lambda rng: word_lists.letters(rng, letters, string.ascii_uppercase))
    names = [next(drawn) for _ in range(HOPS + 1)]
    value = str(rng.randint(10_000, 99_999))
    lines = [f"VAR {names[0]} = {value}\n"]
    lines += [f"VAR {name} = VAR {before}\n" for before, name in itertools.pairwise(names)]
    return value, names, lines


def _needle(noun: str, key: str, value: str) -> str:
    return f"One of the secret {noun}s of {key} is {value}."


def _asking(noun: str, keys: Sequence[str], several: bool) -> dict[str, str]:
    of = word_lists.joined(keys)
    many = f"secret {noun}s of {of}" if several else f"secret {noun} of {of}"
    are = "are" if several else "is"
    return {
        "template": f"Secret {noun}s are hidden in the text below. Remember them, you will be asked for them."
        "\n\n{document}\n\n{question}",
        "question": f"What {are} {'all ' if several else ''}the {many} that the text gives?",
        "begins": f"The {many} that the text gives {are}",
    }


def _among_needles(blank: Sample, rng: random.Random, kind: Niah, asked: tuple[str, str], measure: Measure) -> Sample:
    """One needle a line; `asked` among others of the same form, as many as the length holds."""
    depth = rng.choice(GRID)
    keys, values = word_lists.distinct(rng, kind.key), word_lists.distinct(rng, kind.value)
    lines: list[str] = []

    def make(size: int) -> Sample:
        while len(lines) < size:
            pair = next(keys), next(values)
            if pair[0] != asked[0] and pair[1] != asked[1]:
                lines.append(_needle(kind.noun, *pair))
        at = round(depth * size)
        return replace(
            blank, document="\n".join([*lines[:at], _needle(kind.noun, *asked), *lines[at:size]]), depth=depth
        )

    length = needed_length(blank)
    return fitted(make, measure, length, most=length)
