# SPDX-License-Identifier: Apache-2.0
"""A page made of a few kinds of blocks, as Markdown, as HTML that needs nothing else, as text for a terminal.

Every text given is shown as it is: what it would mean in Markdown or HTML, or to a terminal, is escaped.
"""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rapid_jax.runtime.errors import printable
from rapid_jax.runtime.templates import render

# Characters that Markdown may take for more than themselves; not a lone bracket, nor _ inside a word.
_MEANING = re.compile(r"([\\`*<>|~$&]|(?<!\w)_|_(?!\w)|\](?=[\[(:]))")


class Bold(str):
    """A text to be shown bold."""

    bold = True  # templates ask for it


@dataclass(frozen=True)
class Heading:
    """A heading; level 1 is the page's own."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Text:
    """A paragraph of texts, of which some may be Bold."""

    parts: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """A table whose first column is names, the others numbers."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Verbatim:
    """A text in full with its lines as they are."""

    text: str


@dataclass(frozen=True)
class Picture:
    """A PNG beside the page; HTML has it inside."""

    file: str
    caption: str


Block = Heading | Text | Table | Verbatim | Picture


def text(*parts: str) -> Text:
    """A paragraph."""
    return Text(parts)


def markdown(blocks: Sequence[Block]) -> str:
    """The blocks as Markdown, with tables of GitHub's kind and pictures by their file names."""
    return "\n\n".join(_markdown(block) for block in blocks) + "\n"


def page(blocks: Sequence[Block], pictures: Mapping[str, str]) -> str:
    """The blocks as a whole HTML page; `pictures` has an address for each file name, which may hold the picture."""
    title = next(block.text for block in blocks if isinstance(block, Heading))
    return render(
        "rapid_jax",
        "report.html",
        title=title,
        blocks=[(type(block).__name__, block) for block in blocks],
        pictures=pictures,
    )


def plain(blocks: Sequence[Block]) -> str:
    """The blocks as text for a terminal, without pictures."""
    parts = []
    for block in blocks:
        match block:
            case Heading():
                said = printable(block.text)
                parts.append(f"{said}\n{('=' if block.level == 1 else '-') * _columns(said)}")
            case Table():
                parts.append(_aligned([[printable(cell) for cell in line] for line in (block.head, *block.rows)]))
            case Verbatim():
                parts.append("\n".join(f"  {printable(line)}" for line in block.text.split("\n")))
            case Text():
                parts.append(printable("".join(block.parts)))
    return "\n\n".join(parts)


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    """The first column to the left, the others to the right; a last one without a number to the left."""
    widths = [max(_columns(line[column]) for line in lines) for column in range(len(lines[0]))]
    left = {0} if any(letter.isdigit() for line in lines[1:] for letter in line[-1]) else {0, len(widths) - 1}
    shown = []
    for line in lines:
        cells = []
        for column, (cell, width) in enumerate(zip(line, widths, strict=True)):
            space = " " * (width - _columns(cell))
            cells.append(cell + space if column in left else space + cell)
        shown.append("  ".join(cells).rstrip())
    return "\n".join(shown)


def _columns(said: str) -> int:
    """How many columns of a terminal a text takes: letters of East Asia two, marks upon letters none."""
    return sum(
        0 if unicodedata.combining(letter) else 2 if unicodedata.east_asian_width(letter) in "WF" else 1
        for letter in said
    )


def _markdown(block: Block) -> str:
    match block:
        case Heading():
            return f"{'#' * block.level} {_escape(block.text)}"
        case Text():
            return "".join(_escape(part) for part in block.parts)
        case Table():
            rule = ["---", *["---:"] * (len(block.head) - 1)]
            lines = [[_escape(cell) for cell in row] for row in (block.head, *block.rows)]
            return "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], rule, *lines[1:]))
        case Verbatim():
            longest = max((len(run) for run in re.findall("`+", block.text)), default=0)
            fence = "`" * max(3, longest + 1)
            return f"{fence}text\n{block.text}\n{fence}"
        case Picture():
            return f"![{_escape(block.caption)}]({block.file})\n\n{_escape(block.caption)}"


def _escape(part: str) -> str:
    """As Markdown, on one line."""
    shown = _MEANING.sub(r"\\\1", " ".join(part.split("\n")))
    return f"**{shown.strip()}**" if isinstance(part, Bold) and shown.strip() else shown
