# SPDX-License-Identifier: Apache-2.0
"""One sample answered in one mode, as a line of an evaluation's answers has it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rapid_jax.runtime.json_input import Fields

SCHEMA = 1
LONGEST = 2**40  # tokens of a length that a line may name
# Modes by the names that older folders have for them.
FORMER_NAMES: Mapping[str, str] = {"sd": "lossless"}


@dataclass(frozen=True)
class Outcome:
    """One sample answered in one mode. Fields are those of the line."""

    id: str
    suite: str
    task: str
    length: int | None
    depth: float | None
    tags: Mapping[str, str]
    mode: str  # the label
    metric: str
    score: float  # 0 to 1
    answer: str  # the one that is scored
    thoughts: str  # of a sample in two stages the first answer, else ""
    answers: tuple[str, ...]
    question: str
    prompt_hash: str
    prompt_ends: tuple[str, ...]  # the first and the last characters of the prompt as the model reads it
    draft_ends: tuple[str, ...] | None  # the same of the drafter's prompt
    prompt_tokens: int
    document_tokens: int
    truncated: bool  # the document did not fit and was cut
    finish_reason: str  # stop, or length if any stage was cut
    new_tokens: int
    chunks: tuple[Mapping[str, Any], ...]  # what was retrieved: start, end, tokens, score
    draft_tokens: int | None
    acceptance: float | None
    tokens_per_round: float | None
    tokens_per_second: float | None
    prefix_reused: bool  # the document's prefill was there already
    seconds: Mapping[str, float]
    settings: Mapping[str, Any]  # what the label changes


def outcome_of(line: Fields) -> Outcome:
    """The sample of a line. Raises InputError, which names the line and the key, for a line that is no sample's."""
    if line.whole("schema") != SCHEMA:
        raise line.error("schema", str(SCHEMA))
    values: dict[str, Any] = {name: read(line, name) for name, read in _READ.items()}
    return Outcome(**values)


def label_of(said: str) -> str:
    """The label by the mode's name of today: lossless-gamma=5 for sd-gamma=5."""
    mode, hyphen, changes = said.partition("-")
    return f"{FORMER_NAMES.get(mode, mode)}{hyphen}{changes}"


def is_plain(value: Any) -> bool:
    """Whether a setting can have it: a text, a finite number, a truth value, null, or a list of them."""
    if isinstance(value, list):
        return all(map(is_plain, value))
    if isinstance(value, int | float) and not isinstance(value, bool):
        return abs(value) <= 1e30  # not so for NaN
    return value is None or isinstance(value, str | bool)


def _count_or_none(line: Fields, name: str) -> int | None:
    return line.whole(name, None)


def _length(line: Fields, name: str) -> int | None:
    return line.whole(name, None, least=1, most=LONGEST)


def _rate(line: Fields, name: str) -> float | None:
    value = line.number(name, None)
    if value is not None and value < 0:
        raise line.error(name, "a number of at least 0")
    return value


def _share_or_none(line: Fields, name: str) -> float | None:
    value = line.number(name, None)
    if value is not None and not 0 <= value <= 1:
        raise line.error(name, "a number from 0 to 1")
    return value


def _share(line: Fields, name: str) -> float:
    value = _share_or_none(line, name)
    if value is None:
        raise line.error(name, "a number from 0 to 1")
    return value


def _texts(line: Fields, name: str) -> tuple[str, ...]:
    return tuple(line.texts(name))


def _ends(line: Fields, name: str) -> tuple[str, ...]:
    texts = line.texts(name)
    if len(texts) != 2:
        raise line.error(name, "a list of 2 strings")
    return tuple(texts)


def _ends_or_none(line: Fields, name: str) -> tuple[str, ...] | None:
    return None if line.get(name) is None else _ends(line, name)


def _mapping(right: Callable[[Any], bool], expected: str) -> Callable[[Fields, str], dict[str, Any]]:
    """Reads an object whose values are all `right`."""

    def read(line: Fields, name: str) -> dict[str, Any]:
        found = line.fields(name)
        for key, value in found.items():
            if not right(value):
                raise found.error(key, expected)
        return dict(found)

    return read


def _is_seconds(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1e30


def _objects(line: Fields, name: str) -> tuple[Mapping[str, Any], ...]:
    return tuple(line.each(name))


_READ: Mapping[str, Callable[[Fields, str], Any]] = {
    **dict.fromkeys(("id", "suite", "task", "metric", "answer", "thoughts"), Fields.text),
    **dict.fromkeys(("question", "prompt_hash", "finish_reason"), Fields.text),
    **dict.fromkeys(("prompt_tokens", "document_tokens", "new_tokens"), Fields.whole),
    **dict.fromkeys(("truncated", "prefix_reused"), Fields.truth),
    **dict.fromkeys(("tokens_per_round", "tokens_per_second"), _rate),
    **dict.fromkeys(("depth", "acceptance"), _share_or_none),
    "mode": lambda line, name: label_of(line.text(name)),
    "length": _length,
    "score": _share,
    "answers": _texts,
    "prompt_ends": _ends,
    "draft_ends": _ends_or_none,
    "draft_tokens": _count_or_none,
    "chunks": _objects,
    "tags": _mapping(lambda value: isinstance(value, str), "a string"),
    "seconds": _mapping(_is_seconds, "a number of at least 0"),
    "settings": _mapping(is_plain, "a text, a number, true, false, null or a list of these"),
}
