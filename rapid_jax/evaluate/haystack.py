# SPDX-License-Identifier: Apache-2.0
"""Texts of a wanted length in tokens: running text with sentences hidden in it, and texts of so many units.

Only the whole prompt can be counted (`Measure`), so sizes are searched: a count of a long text takes a while, and a
sample takes 6 to 12 of them, seldom more than 25.
"""

import functools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from rapid_jax.evaluate.samples import Measure, Sample
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.storage import AnyPlace, place_of, text_in

# What RULER calls noise: a line of short sentences that say nothing, again and again. The words are ours.
NOISE = "The river runs down to the sea. The hills are far away. The wind is mild. We walk on. The path bends again.\n"
ATTEMPTS = 10  # draws until a sample is as it must be; one is nearly always enough
_RATE = 4.0  # characters a token, until it is known
_SENTENCE = 16  # tokens; most sentences are longer
_SHORT, _SHIFTS = 7, 6  # sizes counted for an exact length once it is nearly found, and texts tried
_NEIGHBOURS = 1000  # characters to either side in which a sentence's start is looked for
_STARTS = re.compile(r"[.!?][\"')\]\u201d\u2019]*\s++(?![a-z])|[\u3002\uff01\uff1f]\s*|\n\s*")


def running_text(source: AnyPlace | None) -> str:
    """The text that haystacks are cut from: paragraphs with a blank line behind each, no other runs of blanks.

    `source` is a UTF-8 text file, or a folder whose .txt files are joined in the order of their names. None: the prose
    of Python's own language reference (pydoc_data.topics, about 270,000 characters), which every Python has. It differs
    between versions of Python: give a text where samples of several machines must be equal.
    """
    if source is None:
        return _reference()
    source = place_of(source, "text")
    files = sorted(source.glob("*.txt")) if source.is_dir() else [source]
    if not files:
        raise InputError(f"{source}: expected .txt files in the folder, got none")
    text = _paragraphs("\n\n".join(_read(file) for file in files))
    if not text:
        raise InputError(f"{source}: expected text for haystacks, got none")
    return text


def stretch(text: str, start: int, size: int) -> str:
    """`size` characters of the text from `start` (which may be negative), as if it were repeated without end."""
    start %= len(text)
    return (text * math.ceil((start + size) / len(text)))[start : start + size]


def sentence_start(text: str, near: int) -> int:
    """The start of a sentence nearest to `near`; 0 and the text's end count when they are asked for.

    Where no sentence starts in the neighbourhood, the start of a word, and where there are no words, `near` itself.
    """
    if near <= 0 or near >= len(text):
        return min(max(near, 0), len(text))
    first = max(near - _NEIGHBOURS, 0)
    around = text[first : near + _NEIGHBOURS]
    for pattern in (_STARTS, re.compile(r"\s+")):
        starts = [first + match.end() for match in pattern.finditer(around)]
        if starts:
            return min(starts, key=lambda start: abs(start - near))
    return near


def insert(text: str, places: Sequence[int], needles: Sequence[str]) -> str:
    """The text with each needle at its place (ascending, starts of sentences); needles bring the blank behind them."""
    parts, last = [], 0
    for place, needle in zip(places, needles, strict=True):
        before = text[last:place]
        parts += [before, "" if not before or before[-1].isspace() else " ", needle]
        last = place
    rest = text[last:]
    # A blank that the text is cut behind stays: without it the counts of cuts have gaps.
    return "".join([*parts, rest]) if rest else "".join(parts).rstrip()


@dataclass(frozen=True)
class Burial:
    """`blank` with needles at depths of running text, to be cut so that it measures exactly blank.length.

    The text starts at a character `at` of `text` and is cut in its last sentence; with a needle at its end (depth 1) it
    ends at `at` and is cut in its first sentence, so that needles stand between whole sentences. `depths` ascend and
    are not both 0 and 1; each is met to within a sentence.
    """

    blank: Sample
    text: str
    needles: Sequence[str]  # with the blank behind each
    depths: Sequence[float]
    measure: Measure

    @property
    def length(self) -> int:
        """The length that is made for."""
        return needed_length(self.blank)

    @cached_property
    def least(self) -> int:
        """Tokens without any filler. Raises InputError where they are too many."""
        return _least(self.sample(0, 0), self.measure, self.length)

    def sample(self, at: int, size: int, near: Sequence[int] | None = None) -> Sample:
        """The sample with `size` characters of text, its needles near those characters; None: at the depths of them."""
        filler = stretch(self.text, at - size if self.depths[-1] == 1 else at, size)
        if near is None:
            near = [round(depth * size) for depth in self.depths]
        places = [sentence_start(filler, place) for place in near]
        return replace(self.blank, document=insert(filler, places, self.needles))

    def size(self, at: int) -> int | None:
        """Characters of text with which it measures the length to within a sentence; None: none were found."""
        found = exact(lambda size: self.sample(at, size), self.measure, self.length, least=self.least, within=_SENTENCE)
        return None if found is None else found[0]

    def cut(self, at: int, size: int | None, near: Sequence[int] | None = None) -> Sample | None:
        """The sample of exactly the length, with about `size` characters; None: draw again.

        Where the counts of neighbouring cuts leave the length out, the text is taken from the next sentence on.
        """
        if size is None:
            return None
        if near is None:  # needles that stay where they are make the search short
            near = [round(depth * size) for depth in self.depths]
        for _ in range(_SHIFTS):
            make = functools.partial(self._cut, at, size, near)
            found = exact(make, self.measure, self.length, least=self.least, start=size or None, tries=_SHORT)
            if found is not None:
                return found[1]
            at = sentence_start(stretch(self.text, at + 1, 2 * _NEIGHBOURS), 1) + at + 1
        return None

    def _cut(self, at: int, about: int, near: Sequence[int], size: int) -> Sample:
        """As `sample`; a needle at the end stays at the end."""
        return self.sample(at, size, [size if place == about else place for place in near])


def exact(
    make: Callable[[int], Sample],
    measure: Measure,
    length: int,
    *,
    least: int | None = None,
    start: int | None = None,
    within: int = 0,
    tries: int = 20,
) -> tuple[int, Sample] | None:
    """(size, make(size)) that measures `length` to within `within` tokens, or None: none was found in `tries`.

    `make` takes a size in characters, about in proportion to the tokens; `least` are the tokens of make(0), if they are
    known. The search begins at `start`. Raises InputError where make(0) is too long already.
    """
    if least is None:
        least = _least(make(0), measure, length)
    if length - least <= within:
        return 0, make(0)
    counts = {0: least}
    for _ in range(tries):
        size = start if start is not None and len(counts) == 1 else _next_size(counts, length)
        sample = make(size)
        counts[size] = measure(sample)
        if abs(length - counts[size]) <= within:
            return size, sample
    return None


def fitted(make: Callable[[int], Sample], measure: Measure, length: int, most: int) -> Sample:
    """make(size) of the largest size up to `most` that measures at most `length`.

    A larger size must not measure less. Raises InputError where make(0) is too long already.
    """
    best = make(0)
    least = at_low = _least(best, measure, length)
    low, high, at_high = 0, most + 1, None
    size, steps = 64, 0
    while high - low > 1:
        size = min(max(size, low + 1), high - 1)
        sample = make(size)
        count = measure(sample)
        steps += 1
        if count <= length:
            low, at_low, best = size, count, sample
        else:
            high, at_high = size, count
        # In proportion; by halves where that does not close in.
        slope = (at_low - least) / max(low, 1) if at_high is None else (at_high - at_low) / (high - low)
        if slope > 0 and steps < 12:
            size = low + int((length - at_low) / slope)
        else:
            size = 2 * low if at_high is None else (low + high) // 2
    return best


def needed_length(sample: Sample) -> int:
    """The length that a sample is made for."""
    if sample.length is None:
        raise ValueError(f"{sample.id} is made for no length")
    return sample.length


def not_found(sample: Sample) -> InputError:
    """What is said when ATTEMPTS draws gave no sample."""
    return InputError(
        f"{sample.id}: no text of exactly {sample.length} tokens in which the answer stands as often as it must: "
        f"{ATTEMPTS} were tried; give another text or length"
    )


def positive(name: str, values: Sequence[int]) -> None:
    """Raises InputError unless all are 1 or more."""
    wrong = [value for value in values if value < 1]
    if wrong:
        raise InputError(f"{name}: expected 1 or more, got {wrong[0]}")


def _least(empty: Sample, measure: Measure, length: int) -> int:
    count = measure(empty)
    if count > length:
        raise InputError(
            f"{empty.suite} {empty.task}: a length of {length} tokens is too short: "
            f"prompt and answer need {count} without any filler"
        )
    return count


def _next_size(counts: dict[int, int], length: int) -> int:
    """A size that is not in `counts` (size to tokens), and most likely measures `length`."""
    best = min(counts, key=lambda size: abs(length - counts[size]))
    rate = best / (counts[best] - counts[0]) if counts[best] > counts[0] else _RATE
    other = min((size for size in counts if size != best), key=lambda size: abs(size - best), default=best)
    if other and (counts[other] - counts[best]) * (other - best) > 0:  # text is denser here than there
        rate = min(max((other - best) / (counts[other] - counts[best]), rate / 4), rate * 4)
    guess = best + round((length - counts[best]) * rate)
    low = max(size for size in counts if counts[size] < length)
    high = min((size for size in counts if size > low), default=None)
    if high is not None and high - low > 1:
        return min(max(guess, low + 1), high - 1)
    # Counts are not quite monotone: what two neighbours leave out may stand a little further on.
    return next(size for size in _outward(guess) if size > 0 and size not in counts)


def _outward(middle: int) -> Iterator[int]:
    yield middle
    distance = 0
    while True:
        distance += 1
        yield middle + distance
        yield middle - distance


def _read(file: AnyPlace) -> str:
    try:
        return text_in(file, "utf-8-sig")
    except OSError as error:
        raise InputError(f"text {file}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"text {file}: expected UTF-8, got byte {error.object[error.start]:#04x}") from error


def _paragraphs(text: str, keep: Callable[[str], bool] = bool) -> str:
    found = (" ".join(part.split()) for part in re.split(r"\n\s*\n", text))
    return "".join(f"{paragraph}\n\n" for paragraph in found if paragraph and keep(paragraph))


@functools.cache
def _reference() -> str:
    from pydoc_data.topics import topics

    def prose(paragraph: str) -> bool:
        # Programs, grammars and tables have these and more signs.
        if len(paragraph) < 60 or paragraph in seen or re.search(r"::=|>>>|[-+=|]{3}", paragraph):
            return False
        seen.add(paragraph)
        return sum(sign.isalpha() or sign == " " for sign in paragraph) > 0.8 * len(paragraph)

    seen: set[str] = set()
    return _paragraphs("\n\n".join(topics[name] for name in sorted(topics)), prose)
