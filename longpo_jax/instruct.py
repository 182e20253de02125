# SPDX-License-Identifier: Apache-2.0
"""Questions that the model proposes about an excerpt (self-instruct): asked for, read from its words, and drawn."""

import random
import re
from collections.abc import Sequence

from longpo_jax.config import InstructConfig

OPENERS = (
    "Going by the text above,",
    "On the basis of the text above,",
    "From what you have just read,",
    "With the preceding text in mind,",
    "Drawing on the material above,",
    "Using only the text that was given,",
    "Considering everything in the text above,",
    "Relying on the passage above,",
    "In the light of the preceding text,",
    "Taking the text above as your source,",
    "Looking back over the text,",
    "Judging from the text above,",
    "Having read the text above,",
    "In keeping with what the text says,",
    "Working from the text provided,",
    "With reference to the text above,",
    "Thinking about the text as a whole,",
    "Starting from what is written above,",
    "Given all that the text tells you,",
    "Following the text that precedes this question,",
)

# What a number is written with where it counts questions: "1:", "1)", "(1)", "**1.**", "Question 1:", "Q1.", "## 1 -".
_NUMBER = (
    r"(?:(?:question|q)[ .#]{0,3}(?P<named>\d{1,2})(?!\d)[ *_]{0,4}[:.)\]\u2013\u2014-]*"
    r"|[(\[#]?(?P<bare>\d{1,2})[ *_]{0,4}[:.)\]\u2013\u2014-]+)(?!\d)[*_]*"
)
_AT_LINE = re.compile(r"^[>#*_+\u2022 \t-]*" + _NUMBER, re.IGNORECASE | re.MULTILINE)
_IN_LINE = re.compile(r"(?:^|(?<=[.?!:\"*])[ \t])[*_# \t]*" + _NUMBER, re.IGNORECASE | re.MULTILINE)
_BULLET = re.compile(r"^(?:[>#*+\u2022\u00b7\u2013\u2014-]+\s+)+")
_ANSWER = re.compile(r"^\W*(?:answer|response|explanation|rationale|note|a)\b[\s\d*]*:", re.IGNORECASE)
_BOLD = re.compile(r"(?<!\w)\*\*(?=\S)|(?<=\S)\*\*(?!\w)")
_QUOTES = {'"': '"', "\u201c": "\u201d"}


def request(config: InstructConfig) -> str:
    """What the model is asked below an excerpt."""
    count = config.questions
    return (
        f"Write {count} comprehensive questions in English that test how well a reader understands and can analyse the "
        "whole text above. Each question should connect separate parts of the text and need synthesis, not the recall "
        "of one fact. The questions should be different from one another, clear and unambiguous, and invite critical "
        f"or hypothetical thinking. Output only the questions, one a line, numbered 1: to {count}:."
    )


def parsed(text: str, config: InstructConfig) -> list[str]:
    """At most `questions` different questions out of the model's words, each one line; maybe fewer than `at_least`.

    A number starts a question only where it continues the count 1, 2, 3 ... at the start of a line; with no such list,
    also behind the end of a sentence; with none of these either, what ends in a question mark is a question.
    """
    found = _different(_whole(_numbered(text, _AT_LINE)))
    for otherwise in (lambda: _whole(_numbered(text, _IN_LINE)), lambda: _asked(text)):
        if len(found) < max(config.at_least, 2):
            found = max(found, _different(otherwise()), key=len)
    return found[: config.questions]


def drawn(questions: Sequence[str], seed: int) -> tuple[str, str]:
    """(opener, one of the questions), each uniformly and from the seed alone; there must be a question."""
    generator = random.Random(seed)
    return generator.choice(OPENERS), generator.choice(questions)


def _numbered(text: str, marker: re.Pattern[str]) -> list[str]:
    """What follows each number that continues the count, up to the next of them."""
    marks: list[re.Match[str]] = []
    for match in marker.finditer(text):
        if int(match["named"] or match["bare"]) == len(marks) + 1:
            marks.append(match)
    edges = [*(mark.start() for mark in marks), len(text)]
    return [_question(text[mark.end() : end]) for mark, end in zip(marks, edges[1:], strict=True)]


def _question(words: str) -> str:
    """Headings and the first paragraph that is a sentence, up to its first question mark at the end of a line.

    Small models go on with an answer.
    """
    lines: list[str] = []
    paragraphs = re.split(r"\n\s*\n", words.strip())
    asking = next((at for at, paragraph in enumerate(paragraphs) if _clean(paragraph).endswith(("?", ".", "!"))), 0)
    for line in "\n".join(paragraphs[: asking + 1]).splitlines():
        if lines and (lines[-1].endswith("?") or _ANSWER.match(line)):
            break
        lines.append(_clean(line) if lines else _unnumbered(line))
    return " ".join(lines)


def _whole(questions: list[str]) -> list[str]:
    """Without a last one that breaks off, as at the limit of tokens, where all others end in a punctuation mark."""
    ended = [re.search(r"[^\w\s]$", question) is not None for question in questions]
    return questions[:-1] if len(ended) > 1 and all(ended[:-1]) and not ended[-1] else questions


def _asked(text: str) -> list[str]:
    """What ends in a question mark, line by line, without the number or bullet before it."""
    sentences = (part for line in text.splitlines() for part in re.split(r"(?<=\?)[*_]*\s+", _unnumbered(line)))
    return [question for sentence in sentences if (question := _unnumbered(sentence)).endswith("?")]


def _unnumbered(line: str) -> str:
    return _clean(_AT_LINE.sub("", line.strip(), count=1))


def _clean(line: str) -> str:
    """Without a bullet, Markdown's marks and quotation marks around it."""
    bare = _BOLD.sub("", _BULLET.sub("", line.strip())).strip("*_#>` \t")
    if len(bare) > 2 and _QUOTES.get(bare[0]) == bare[-1]:
        bare = bare[1:-1].strip()
    return " ".join(bare.split())


def _different(questions: Sequence[str]) -> list[str]:
    """Without those that have no letter, or the same words as an earlier one."""
    first: dict[str, str] = {}
    for question in questions:
        first.setdefault(" ".join(re.findall(r"\w+", question.casefold())), question)
    return [question for words, question in first.items() if re.search(r"[^\W\d_]", words)]
