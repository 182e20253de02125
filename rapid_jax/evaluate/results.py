# SPDX-License-Identifier: Apache-2.0
"""What an evaluation left in its folder: suite.json, and answers-LABEL*.jsonl with a line a finished sample.

A label is a mode with what differs from the run's settings, as rapid-eta=5.
"""

import logging
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from rapid_jax.evaluate.outcome import FORMER_NAMES, Outcome, is_plain, outcome_of
from rapid_jax.runtime.append_log import has_log, logs_in, open_log
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.json_input import MOST_BYTES, Fields, parse_object, read_object, shown
from rapid_jax.runtime.storage import AnyPlace

SUITE = "suite.json"
SETTINGS = "settings.yaml"
ANSWERS = "answers-*.jsonl"
# The order in which modes are shown: what the others are compared with first. Others follow by name.
MODES = ("target", "retrieval", "lossless", "rapid", "phat")

_AHEAD = 8 << 20  # bytes that a store is asked for at once
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Results:
    """The outcomes of one evaluation, by label in the order to show, each in the order of its file."""

    folder: AnyPlace
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


def read(folder: AnyPlace) -> Results:
    """The results in a folder.

    A last line without its end is a sample that was being written: it is left out and its label noted. Raises
    InputError with file, line and key for any other line that is no sample's, for a sample that a label has twice (its
    score would count twice), and where there is nothing to read.
    """
    suite = read_suite(folder / SUITE)
    by_label, torn = _by_label(folder, suite["suite"])
    if not by_label:
        raise InputError(f"{folder}: expected the answers of an evaluation, got no finished sample in {ANSWERS}")
    labels = sorted(by_label, key=_display_order)
    return Results(
        folder=folder,
        suite=suite["suite"],
        by_label={label: by_label[label] for label in labels},
        options=suite.get("options") or {},
        templates=suite.get("templates") or "",
        settings=_flat(suite.get("settings") or {}),
        samples=suite.get("samples"),
        torn=tuple(label for label in labels if label in torn),
    )


def read_suite(path: AnyPlace) -> dict[str, Any]:
    """What suite.json says. Raises InputError where there is none, and for one that is not a run's."""
    if not path.is_file():
        raise InputError(f"{path.parent}: expected the folder of an evaluation, got no {path.name} there")
    suite = read_object(path)
    suite.text("suite")
    suite.text("templates", None)
    suite.whole("samples", None)
    for name in ("options", "settings"):
        _check_plain(suite.fields(name, None))
    return dict(suite)


def _check_plain(section: Fields | None) -> None:
    """Raises InputError for a value, in sections of it too, that no setting can have."""
    for key, value in (section or {}).items():
        if section is not None and isinstance(value, dict):
            _check_plain(section.fields(key))
        elif section is not None and not is_plain(value):
            raise section.error(key, "a text, a number, true, false, null or a list of these")


def finished(folder: AnyPlace, suite: str) -> dict[str, set[str]]:
    """Label -> the ids of its samples that have a whole line, in the files of all shares of a run.

    Raises InputError as `read` does, but for a folder without any.
    """
    return {label: {outcome.id for outcome in outcomes} for label, outcomes in _by_label(folder, suite)[0].items()}


def torn_at(data: bytes) -> int:
    """The size of a file's bytes without what is behind the end of its last whole line: what it is to be cut to."""
    return data.rfind(b"\n") + 1


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


def _display_order(label: str) -> tuple:
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


def _by_label(folder: AnyPlace, suite: str) -> tuple[dict[str, tuple[Outcome, ...]], set[str]]:
    """(the outcomes of each label in the order of the files, the labels with a last line that is not whole)."""
    by_label: dict[str, tuple[Outcome, ...]] = {}
    torn = set()
    for path in logs_in(folder, ANSWERS):
        outcomes, whole, former = _read_answers(path, suite)
        if not outcomes:
            continue
        label, others = outcomes[0].mode, by_label.get(outcomes[0].mode, ())
        twice = {outcome.id for outcome in others} & {outcome.id for outcome in outcomes}
        if former:
            left = f"; {len(twice)} samples that another file of {label} has are left out" if twice else ""
            _log.warning("%s: mode %s is called %s now%s", path, former, FORMER_NAMES[former], left)
            outcomes = tuple(outcome for outcome in outcomes if outcome.id not in twice)
        elif twice:
            raise InputError(f"{path}: expected every sample of {label} once, got {min(twice)!r} in another file too")
        by_label[label] = others + outcomes  # of shares of a run
        if not whole:
            torn.add(label)
    return by_label, torn


def _lines(path: AnyPlace) -> Iterator[Fields | None]:
    """The objects of every whole line, then None for one that is not whole. Raises InputError for one that is none."""
    if not has_log(path):
        raise InputError(f"{path}: expected a file, got something else")
    with open_log(path, ahead=_AHEAD) as file:
        for number, line in enumerate(iter(lambda: file.readline(MOST_BYTES + 1), b""), start=1):
            if not line.endswith(b"\n") and len(line) <= MOST_BYTES:
                yield None
                return
            yield parse_object(line, f"{path}:{number}")


def _read_answers(path: AnyPlace, suite: str) -> tuple[tuple[Outcome, ...], bool, str]:
    """(the outcomes of a file, whether its last line is whole, the mode's name where it is a former one or "")."""
    found: dict[str, Outcome] = {}
    label, former = None, ""
    for line in _lines(path):
        if line is None:
            return tuple(found.values()), False, former
        outcome = outcome_of(line)
        label = label or outcome.mode
        if line["mode"] != outcome.mode:
            former = mode_of(line["mode"])
        for name, expected, got in (("suite", suite, outcome.suite), ("mode", label, outcome.mode)):
            if got != expected:
                raise line.error(name, shown(expected))
        if outcome.id in found:
            raise InputError(f"{line.source}: expected every sample once, got id {shown(outcome.id)} again")
        found[outcome.id] = outcome
    return tuple(found.values()), True, former
