# SPDX-License-Identifier: Apache-2.0
"""Folders of evaluations that somebody damaged: report, compare and resume show them right or say one line."""

import copy
import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rapid_jax.evaluate import figures
from rapid_jax.evaluate.compare import compare
from rapid_jax.evaluate.folder import check_same
from rapid_jax.evaluate.report import report
from rapid_jax.evaluate.results import read_suite
from rapid_jax.runtime.errors import InputError
from tests.evaluate.synthetic import folder, grid

OTHERS: tuple[Any, ...] = (None, "", "x\x1b[2J", [], [1], {}, {"a": {"b": [None]}}, -1, 0.5, 10**30, 2**52, True)
OTHERS += (float("nan"), float("inf"), "\ud800", [[[]]], 1e300, -0.0)
LABELS = ("target", "rapid-eta=5")
DRAWN = 20  # cases of which one is drawn, too: figures take long


def lines_of(label: str) -> list[dict]:
    settings = {"eta": 5} if "eta" in label else {}
    tags = {"kind": "easy"}
    return grid(label, lambda task, length, number: number % 2 == 0, ["needle"], count=3, settings=settings, tags=tags,
                depth=0.5, chunks=[{"start": 0, "end": 9, "tokens": 3, "score": 0.5}])  # fmt: skip


def places(value: Any, at: tuple = ()) -> Iterator[tuple]:
    """The paths of all values in a value, and of one key that is not there."""
    if at:
        yield at
    if isinstance(value, dict):
        for key in (*value, "more"):
            yield from places(value.get(key), (*at, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from places(item, (*at, index))


def changed(value: Any, at: tuple, new: Any) -> Any:
    """A copy with another value at the path; where that is `places`, with none at all."""
    found = inner = copy.deepcopy(value)
    for key in at[:-1]:
        inner = inner[key]
    if new is not places:
        inner[at[-1]] = new
    elif at[-1] != "more":
        del inner[at[-1]]
    return found


def damaged_lines(text: bytes, rng: random.Random) -> bytes:
    """Lines dropped, doubled, cut, joined, or with a few bytes turned."""
    lines = text.splitlines(keepends=True)
    at = rng.randrange(len(lines))
    kind = rng.randrange(7)
    if kind == 0:
        del lines[at]
    elif kind == 1:
        lines.insert(rng.randrange(len(lines) + 1), lines[at])
    elif kind == 2:
        lines[at] = lines[at][: rng.randrange(len(lines[at]))] + rng.choice([b"", b"\n"])
    elif kind == 3:
        lines[at] = lines[at].rstrip(b"\n")
    elif kind == 4:
        place, new = rng.randrange(len(lines[at])), rng.randbytes(rng.randrange(1, 4))
        lines[at] = lines[at][:place] + new + lines[at][place + len(new) :]
    elif kind == 5:
        lines[at] = rng.choice(
            [b"\n", b"[]\n", b"1\n", b"[" * 5000 + b"\n", b'{"a":' * 100 + b"\n", b"1" * 5000 + b"\n"]
        )
    else:
        rng.shuffle(lines)
    return b"".join(lines)


def cases(whole: Path, fuzz: int) -> Iterator[tuple[str, str, bytes]]:
    """(what was done, the file, its content), each in a folder that is `whole` but for this."""
    rng = random.Random(53)
    lines = lines_of(LABELS[0])
    suite = json.loads((whole / "suite.json").read_text())

    def among_others(line: dict) -> bytes:
        return "".join(json.dumps(one) + "\n" for one in (*lines[:2], line, *lines[3:])).encode()

    for file, value, written, most in (
        ("suite.json", suite, lambda value: json.dumps(value).encode(), 250),
        (f"answers-{LABELS[0]}.jsonl", lines[2], among_others, 400),
    ):
        every = [(at, new) for at in places(value) for new in (*OTHERS, places)]
        for at, new in rng.sample(every, min(len(every), most * fuzz)):
            said = "nothing" if new is places else repr(new)
            yield f"{file} {at} {said}", file, written(changed(value, at, new))
    for file in ("suite.json", f"answers-{LABELS[1]}.jsonl"):
        for number in range(60 * fuzz):
            yield f"{file} damage {number}", file, damaged_lines((whole / file).read_bytes(), rng)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A folder that nothing is wrong with."""
    return folder(tmp_path_factory.mktemp("whole") / "run", {label: lines_of(label) for label in LABELS})


def outcome(work: Callable[..., Any], *given: Any) -> Any:
    """What the work gives, or the one line that it ends with."""
    try:
        return work(*given)
    except InputError as error:
        assert "\n" not in str(error), str(error)
        return error


def check(run: Path, whole: Path, out: Path) -> bool:
    """Reports, compares and resumes; whether the folder was shown, and rightly, or was refused in one line."""
    described = read_suite(whole / "suite.json")
    shown = outcome(report, run, out)
    others = outcome(compare, whole, run), outcome(check_same, run, described)
    if isinstance(shown, InputError):
        assert str(run) in str(shown)
        assert isinstance(others[0], InputError)
        return False
    assert all(letter.isprintable() for letter in shown[1].replace("\n", ""))
    assert not re.search(r"nan|inf\b", shown[1])
    if not isinstance(others[0], InputError):
        assert all(letter.isprintable() for letter in others[0].replace("\n", ""))
    there = {key: value for key, value in read_suite(run / "suite.json").items() if value is not None}
    if there != described:
        assert isinstance(others[1], InputError)
    return True


def test_a_damaged_folder_is_shown_right_or_refused_in_one_line(request, whole, tmp_path, monkeypatch):
    draw, seen = figures.draw, {True: 0, False: 0}
    for count, (name, file, content) in enumerate(cases(whole, request.config.getoption("--fuzz"))):
        run = tmp_path / "run"
        run.mkdir(exist_ok=True)
        for path in whole.iterdir():
            (run / path.name).write_bytes(content if path.name == file else path.read_bytes())
        monkeypatch.setattr(figures, "draw", draw if count % DRAWN == 0 else lambda results: [])
        try:
            seen[check(run, whole, tmp_path / "report")] += 1
        except Exception as error:
            raise AssertionError(f"case {count}, {name}: {error!r}") from error
    assert sum(seen.values()) >= 700 and min(seen.values()) > 100, seen
