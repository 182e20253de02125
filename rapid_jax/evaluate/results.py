# SPDX-License-Identifier: Apache-2.0
"""What an evaluation left in its folder: suite.json, and answers-LABEL*.jsonl with a line a finished sample.

A label is a mode with what differs from the run's settings, as rapid-eta=5.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rapid_jax.runtime.errors import InputError

SCHEMA = 1
SUITE = "suite.json"
SETTINGS = "settings.yaml"
ANSWERS = "answers-*.jsonl"
# The order in which modes are shown: what the others are compared with first. Others follow by name.
MODES = ("target", "retrieval", "sd", "lossless", "rapid", "phat")

_NUMBER = (int, float)
_NONE = type(None)
# Field -> the types that it may have in a line; a bool is no number.
_FIELDS: Mapping[str, tuple[type, ...]] = {
    "id": (str,),
    "suite": (str,),
    "task": (str,),
    "length": (int, _NONE),
    "depth": (*_NUMBER, _NONE),
    "tags": (dict,),
    "mode": (str,),
    "metric": (str,),
    "score": _NUMBER,
    "answer": (str,),
    "thoughts": (str,),
    "answers": (list,),
    "question": (str,),
    "prompt_hash": (str,),
    "prompt_ends": (list,),
    "draft_ends": (list, _NONE),
    "prompt_tokens": (int,),
    "document_tokens": (int,),
    "truncated": (bool,),
    "finish_reason": (str,),
    "new_tokens": (int,),
    "chunks": (list,),
    "draft_tokens": (int, _NONE),
    "acceptance": (*_NUMBER, _NONE),
    "tokens_per_round": (*_NUMBER, _NONE),
    "tokens_per_second": (*_NUMBER, _NONE),
    "prefix_reused": (bool,),
    "seconds": (dict,),
    "settings": (dict,),
}


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


@dataclass(frozen=True)
class Results:
    """The outcomes of one evaluation, by label in the order to show, each in the order of its file."""

    folder: Path
    suite: str
    by_label: Mapping[str, tuple[Outcome, ...]]
    options: Mapping[str, Any] = field(default_factory=dict)  # that the suite was asked for
    templates: str = ""  # where the prompts' wording came from
    settings: Mapping[str, Any] = field(default_factory=dict)  # section.key -> value: what decides answers
    samples: int | None = None  # of the whole run
    torn: tuple[str, ...] = ()  # labels whose last line was not whole and is left out

    @property
    def labels(self) -> tuple[str, ...]:
        """All labels, the one that the others are compared with first."""
        return tuple(self.by_label)

    @property
    def lengths(self) -> list[int | None]:
        """All lengths, ascending; None, the samples that have the length they have, last."""
        found = {outcome.length for outcomes in self.by_label.values() for outcome in outcomes}
        return sorted(found, key=lambda length: math.inf if length is None else length)

    @property
    def tasks(self) -> tuple[str, ...]:
        """All tasks in the order of the files: that of the suite."""
        return tuple(dict.fromkeys(outcome.task for outcomes in self.by_label.values() for outcome in outcomes))

    def settings_of(self, label: str) -> dict[str, Any]:
        """The settings with the label's mode and what it changes, by their full names."""
        changed = {"mode": mode_of(label), **self.by_label[label][0].settings}
        return {**self.settings, **{key if "." in key else f"speculation.{key}": changed[key] for key in changed}}

    def at(self, label: str, length: int | None) -> list[Outcome]:
        """The outcomes of a label at one length."""
        return [outcome for outcome in self.by_label[label] if outcome.length == length]


def read(folder: Path) -> Results:
    """The results in a folder.

    A last line without its end is a sample that was being written: it is left out and its label noted. Raises
    InputError with file and line for any other line that is no sample's, for a sample that a label has twice (its score
    would count twice), and where there is nothing to read.
    """
    suite = read_suite(folder / SUITE)
    files = sorted(folder.glob(ANSWERS))
    by_label: dict[str, tuple[Outcome, ...]] = {}
    torn = []
    for path in files:
        outcomes, whole = _read_answers(path, suite["suite"])
        if not outcomes:
            continue
        label, others = outcomes[0].mode, by_label.get(outcomes[0].mode, ())
        twice = {outcome.id for outcome in others} & {outcome.id for outcome in outcomes}
        if twice:
            raise InputError(f"{path}: expected every sample of {label} once, got {min(twice)!r} in another file too")
        by_label[label] = others + outcomes  # of shares of a run
        if not whole:
            torn.append(label)
    if not by_label:
        raise InputError(f"{folder}: expected the answers of an evaluation, got no finished sample in {ANSWERS}")
    labels = sorted(by_label, key=_shown)
    return Results(
        folder=folder,
        suite=suite["suite"],
        by_label={label: by_label[label] for label in labels},
        options=suite.get("options") or {},
        templates=str(suite.get("templates") or ""),
        settings=_flat(suite.get("settings") or {}),
        samples=suite.get("samples"),
        torn=tuple(label for label in labels if label in torn),
    )


def read_suite(path: Path) -> dict[str, Any]:
    """What suite.json says. Raises InputError where there is none, and for one that is not a run's."""
    if not path.is_file():
        raise InputError(f"{path.parent}: expected the folder of an evaluation, got no {path.name} there")
    try:
        suite = json.loads(path.read_bytes())
    except ValueError:
        suite = None
    if not isinstance(suite, dict) or not isinstance(suite.get("suite"), str):
        raise InputError(f"{path}: expected an object with a suite's name, got something else")
    for name, kind, said in (("options", dict, "an object"), ("settings", dict, "an object"), ("samples", int, "int")):
        if not isinstance(suite.get(name), kind | _NONE):
            raise InputError(f"{path}: expected {name} to be {said}, got {_shortened(suite, name)}")
    return suite


def finished(folder: Path, label: str) -> set[str]:
    """The ids of a label's samples that have a whole line, in the files of all shares of a run.

    Less is checked than by `read`. Raises InputError with file and line for a line of the label that has no id.
    """
    found: set[str] = set()
    for path in sorted(folder.glob(ANSWERS)):
        for place, values in _lines(path):
            if values.get("mode") != label:
                break  # a file is of one label
            if not isinstance(values.get("id"), str):
                raise InputError(f"{place}: expected id to be str, got {_shortened(values, 'id')}")
            found.add(values["id"])
    return found


def torn_at(path: Path) -> int:
    """The size of a file without what is behind the end of its last whole line: what it is to be cut to."""
    return path.read_bytes().rfind(b"\n") + 1


def mode_of(label: str) -> str:
    """The mode that a label begins with."""
    return label.partition("-")[0]


def named(length: int | None) -> str:
    """A length as it is shown: 4K, 1.5K, 1M; "own" of samples that have the length they have."""
    if length is None:
        return "own"
    for size, letter in ((2**20, "M"), (2**10, "K")):
        if length >= size:
            return f"{round(length / size, 1):g}{letter}"
    return str(length)


def _shown(label: str) -> tuple:
    """Sorts modes by MODES, then labels of one mode by name with numbers as numbers: eta=5 before eta=10."""
    mode = mode_of(label)
    place = MODES.index(mode) if mode in MODES else len(MODES)
    parts = re.split(r"(\d+(?:\.\d+)?)", label)
    return place, [(float(part), "") if index % 2 else (-1.0, part) for index, part in enumerate(parts)]


def _flat(settings: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """section.key -> value."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found |= _flat(value, f"{before}{key}.") if isinstance(value, dict) else {before + key: value}
    return found


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file:line, the object) of every whole line. Raises InputError for one that is no object."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            place = f"{path}:{number}"
            try:
                values = json.loads(line)
            except ValueError:
                values = None
            if not isinstance(values, dict):
                said = line[:40].decode(errors="replace").rstrip("\n")
                raise InputError(f"{place}: expected a line of a sample, got {said!r}")
            yield place, values


def _read_answers(path: Path, suite: str) -> tuple[tuple[Outcome, ...], bool]:
    """The outcomes of a file, and whether its last line is whole."""
    found: dict[str, Outcome] = {}
    label = None
    for place, values in _lines(path):
        outcome = _outcome(values, place)
        label = label or outcome.mode
        for name, expected, got in (("suite", suite, outcome.suite), ("mode", label, outcome.mode)):
            if got != expected:
                raise InputError(f"{place}: expected {name} {expected!r}, got {got!r}")
        if outcome.id in found:
            raise InputError(f"{place}: expected every sample once, got {outcome.id!r} again")
        found[outcome.id] = outcome
    return tuple(found.values()), torn_at(path) == path.stat().st_size


def _outcome(values: Mapping[str, Any], place: str) -> Outcome:
    if values.get("schema") != SCHEMA:
        raise InputError(f"{place}: expected schema {SCHEMA}, got {values.get('schema')!r}")
    for name, types in _FIELDS.items():
        value = values.get(name)
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            kinds = " or ".join("null" if kind is _NONE else kind.__name__ for kind in types)
            raise InputError(f"{place}: expected {name} to be {kinds}, got {_shortened(values, name)}")
    if not 0 <= values["score"] <= 1:
        raise InputError(f"{place}: expected a score from 0 to 1, got {values['score']!r}")
    for name, count, said in (("answers", None, "texts"), ("prompt_ends", 2, "2 texts"), ("draft_ends", 2, "2 texts")):
        texts = values[name]
        if texts is not None and not (all(isinstance(x, str) for x in texts) and count in (None, len(texts))):
            raise InputError(f"{place}: expected {name} to be {said}, got {_shortened(values, name)}")
    kept: dict[str, Any] = {name: values[name] for name in _FIELDS}
    kept |= {name: tuple(value) for name, value in kept.items() if isinstance(value, list)}
    return Outcome(**kept)


def _shortened(values: Mapping[str, Any], name: str) -> str:
    return repr(values[name])[:40] if name in values else "nothing"
