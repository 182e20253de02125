# SPDX-License-Identifier: Apache-2.0
"""The questions of a command, each with the document that it is about: from options, lines of text or JSON lines."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from rapid_jax.documents import STDIN, read_document
from rapid_jax.runtime.errors import InputError, legible
from rapid_jax.runtime.input_files import blocks, open_regular
from rapid_jax.runtime.json_input import Fields, parse_object, shown
from rapid_jax.runtime.storage import place_of

_MOST_BYTES: Final = 1 << 26  # of a file of questions
_KEYS: Final = ("id", "question", "document")


@dataclass(frozen=True)
class Asked:
    """A question as it was given."""

    id: str | int
    question: str
    document: str | None = None  # the file that it is about; None: those of the options


@dataclass(frozen=True)
class Task:
    """A question about one document."""

    id: str | int
    question: str
    name: str | tuple[str, ...]  # of the document: its file, or those that are one text together
    document: str  # its text

    @property
    def label(self) -> str:
        """What messages call it."""
        return f"question {legible(str(self.id))} about {self.about}"

    @property
    def about(self) -> str:
        """The document's name in messages."""
        return legible(self.name if isinstance(self.name, str) else " and ".join(self.name))


def read_questions(given: Sequence[str], file: str | None) -> list[Asked]:
    """The questions of the options, numbered from 1, and behind them those of a file: a question a line, numbered on,
    or JSON lines where the name ends in .jsonl or the text begins with {.

    Raises InputError, with the number of the line, for what is no question, and for an id that two of them have.
    """
    found = [Asked(number, text) for number, text in enumerate(given, 1)]
    for asked in found:
        if not asked.question.strip():
            raise InputError("--question: expected a question, got an empty one")
    if file is None:
        return found
    ids = {str(asked.id) for asked in found}
    before = len(found)
    for place, asked in _of_file(file, before):
        if str(asked.id) in ids:
            raise InputError(f"{place}: expected an id that no other question has, got {shown(asked.id)} again")
        ids.add(str(asked.id))
        found.append(asked)
    if len(found) == before:
        raise InputError(f"{file}: expected questions, one a line, got none")
    return found


def tasks_of(asked: Sequence[Asked], documents: Sequence[str], *, together: bool) -> list[Task]:
    """Each question about each of the documents, or about all of them as one text, or about the document of its own.

    A file is read once. Tasks about a document follow each other, so that it is prefilled once. Raises InputError for
    a document that cannot be read, and for a question that has none.
    """
    again = [name for at, name in enumerate(documents) if name in documents[:at]]
    if again:
        raise InputError(f"--document: expected each file once, got {again[0]} again")
    if not documents and (together or not all(one.document for one in asked)):
        raise InputError("--document: expected a file, got none, and a question that names none of its own")
    texts: dict[str, str] = {}

    def text_of(name: str) -> str:
        if name not in texts:
            texts[name] = read_document(name)
        return texts[name]

    shared: list[tuple[str | tuple[str, ...], str]] = []
    if not all(one.document for one in asked):
        shared = [(name, text_of(name)) for name in documents]
        if together:
            shared = [(tuple(documents), joined(documents, [text_of(name) for name in documents]))]
    tasks = [
        Task(one.id, one.question, name, text)
        for one in asked
        for name, text in ([(one.document, text_of(one.document))] if one.document else shared)
    ]
    order = {name: at for at, name in reversed(list(enumerate(task.name for task in tasks)))}
    return sorted(tasks, key=lambda task: order[task.name])


def joined(names: Sequence[str], texts: Sequence[str]) -> str:
    """Several documents as one text: each behind a line with its file's name, an empty line between two."""
    titles = ["standard input" if name == STDIN else legible(name) for name in names]
    return "\n\n".join(f"File: {title}\n{text.rstrip()}" for title, text in zip(titles, texts, strict=True))


def _of_file(file: str, before: int) -> Iterator[tuple[str, Asked]]:
    """(where it stands, the question) of every line that is not empty; numbers go on behind `before`."""
    lines = _lines(file)
    first = next((line for line in lines if line.strip()), "")
    is_json = file.lower().endswith(".jsonl") or first.lstrip().startswith("{")
    number = before
    for at, line in enumerate(lines, 1):
        if not line.strip():
            continue
        number, place = number + 1, f"{file}: line {at}"
        yield place, _of_object(parse_object(line, place), number) if is_json else Asked(number, line.strip())


def _of_object(fields: Fields, number: int) -> Asked:
    unknown = [key for key in fields if key not in _KEYS]
    if unknown:
        raise InputError(f"{fields.source}: expected the keys {', '.join(_KEYS)}, got {shown(unknown[0])}")
    question, document = fields.text("question"), fields.text("document", None)
    if not question.strip():
        raise fields.error("question", "a question")
    if document is not None:
        if not document.strip() or document == STDIN:
            raise fields.error("document", "a file")
        place_of(document, f"{fields.source}: document")
    given = fields.get("id")
    is_id = given is None or (isinstance(given, int | str) and not isinstance(given, bool) and str(given).strip())
    if not is_id:
        raise fields.error("id", "a text or a whole number")
    return Asked(number if given is None else given, question, document)


def _lines(file: str) -> list[str]:
    try:
        with open_regular(place_of(file, "--questions"), or_open_already=True) as opened:
            data = b"".join(blocks(opened, _MOST_BYTES, file))
    except InputError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise InputError(f"--questions {file}: cannot be read: {reason}") from error
    try:
        return data.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{file}: line {line}: expected UTF-8, got other bytes") from error
