# SPDX-License-Identifier: Apache-2.0
"""Files of a run that were damaged: what is read is what was written, or one line says what is wrong."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from longpo_jax.journal import Writer
from longpo_jax.records import read_records
from longpo_jax.reference import check_references, read_references
from longpo_jax.stages import mark_done
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.files import digest, digest_file
from rapid_jax.runtime.sealed import sealed, stated_seal
from tests.longpo.test_records import INPUTS, add, contents, written

DOCUMENTS = 7  # five records in three files
SCORED = {"objective.name": "longpo"}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Pairs and the reference's scores of them, whole and done."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rapid_jax.runtime.append_log.os.fsync", lambda descriptor: None)
        folder = tmp_path_factory.mktemp("run")
        written(folder / "pairs", DOCUMENTS).finish({})
        scores = []
        for index, record in enumerate(read_records(folder / "pairs"), start=1):
            sums = {"id": record.id, "chosen": [-1.5, -2.0], "rejected": [-3.25, -0.5 * index]}
            scores.append(sealed(sums, f"scores-00000.jsonl:{index}"))
        (folder / "reference").mkdir()
        (folder / "reference" / "scores-00000.jsonl").write_bytes(b"".join(scores))
        mark_scores(folder / "reference")
    return folder


def mark_scores(place: Path) -> None:
    files = {path.name: digest_file(path) for path in place.glob("scores-*.jsonl")}
    mark_done(place, SCORED, {"records": 5, "files": files})


def everything_in(run: Path) -> Any:
    """What training is given."""
    records = list(read_records(run / "pairs"))
    scores = read_references(run / "reference", SCORED)
    check_references(scores, {record.id: len(record.turns) for record in records}, "longpo")
    return records, scores


def gone_on(run: Path) -> Any:
    """What the stage of pairs makes of what an earlier start has left."""
    (run / "pairs" / "done.json").unlink()
    writer = Writer(run / "pairs", INPUTS, shard_pairs=2)
    for index in range(len(writer.finished), DOCUMENTS):
        add(writer, index)
    writer.finish({})
    return list(read_records(run / "pairs")), contents(run / "pairs"), writer.counts


def other_bytes(draw: random.Random, data: bytes) -> bytes:
    """Bits flipped, bytes lost, put in, or overwritten."""
    at, end = sorted(draw.randrange(len(data) + 1) for _ in range(2))
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 9))):
        changed[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    near = min(end, at + 20)
    made: list[Callable[[], bytes]] = [
        lambda: bytes(changed),
        lambda: data[:at],
        lambda: data[:at] + data[near:],
        lambda: data[:at] + draw.randbytes(draw.randrange(1, 9)) + data[at:],
        lambda: data[:at] + bytes(near - at) + data[near:],
        lambda: data[:at] + draw.choice((b"\n", b"\r", b" ", b"0", b'"', b"null", b"{")) + data[at:],
        lambda: data.replace(b"\n", b"\r\n"),
        lambda: b"",
    ]
    return draw.choice(made)()


def other_lines(draw: random.Random, data: bytes) -> bytes:
    """Lines that were lost, doubled, moved, or joined."""
    lines = data.splitlines(keepends=True)
    one, two = draw.randrange(len(lines)), draw.randrange(len(lines))
    how = draw.randrange(5)
    if how == 0:
        del lines[one]
    elif how == 1:
        lines.insert(two, lines[one])
    elif how == 2:
        lines[one], lines[two] = lines[two], lines[one]
    elif how == 3:
        lines[one] = lines[one].rstrip(b"\n")
    else:
        lines = lines[:one]
    return b"".join(lines)


def slots_in(value: Any) -> list[tuple[Any, Any]]:
    """(object or list, key or index) of everything in a value."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    return [(value, key) for key in keys] + [slot for key in keys for slot in slots_in(value[key])]


def other_values(draw: random.Random, data: bytes, name: str) -> bytes:
    """A value of another type, or beyond every limit, under a checksum that fits."""
    lines = data.splitlines(keepends=True)
    index = draw.randrange(len(lines))
    value = json.loads(lines[index])
    del value["sha256"]
    holder, key = draw.choice(slots_in(value))
    old = holder[key]
    lost = object()
    wrong: list[Any] = [json.loads("[" * 90 + "]" * 90)]
    wrong += [] if key in ("documents", "pairs", "none") else [lost]  # counts may have any names
    wrong += [] if key in ("cut", "record") else [None]  # what these may be
    wrong += [] if key == "counts" else [{}, {"a": 1}]
    wrong += ["7", "\ud800"] if not isinstance(old, str) else [7, True, ["a"]]
    wrong += [10**40, -(10**40)] if not isinstance(old, str) else []
    wrong += [True] if not isinstance(old, bool) else [1, 0]
    new = draw.choice(wrong)
    if new is lost and isinstance(holder, dict):
        del holder[key]
    elif new is not lost:
        holder[key] = new
    try:
        lines[index] = sealed(value, f"{name}:{index + 1}")
    except UnicodeEncodeError:  # no file can hold it but escaped
        lines[index] = lines[index].replace(b'"d', b'"\\ud800', 1)
    return b"".join(lines)


def forge_marks(run: Path) -> None:
    """The marks of what is done, as of the files that are there now."""
    seals = [
        stated_seal(line)
        for path in sorted((run / "pairs").glob("pairs-*"))
        for line in path.read_bytes().splitlines(keepends=True)
    ]
    mark_done(run / "pairs", INPUTS, {"pairs": len(seals), "records": digest(*seals)})
    mark_scores(run / "reference")


def outcome(draw: random.Random, run: Path, path: Path, answer: Callable[[Path], Any]) -> str:
    """Damages a file; how its reading ends: "same", or "refused"."""
    data, name = path.read_bytes(), path.name
    expected = answer_of_whole(answer, run)
    kind = draw.randrange(4)
    if kind == 0 and name != "done.json":
        changed = other_lines(draw, data)
    elif kind == 1 and name != "done.json":
        changed = other_values(draw, data, name)
    else:
        changed = other_bytes(draw, data)
    path.write_bytes(changed)
    if kind == 1 and name != "done.json" and draw.random() < 0.5:
        forge_marks(run)
    try:
        found = answer(run)
    except InputError as error:
        assert "\n" not in str(error) and len(str(error)) < 900
        return "refused"
    assert found == expected, f"other {name} were used: {data!r} became {changed!r}"
    return "same"


WHOLE: dict[str, Any] = {}


def answer_of_whole(answer: Callable[[Path], Any], run: Path) -> Any:
    if answer.__name__ not in WHOLE:
        copy = run.parent / f"whole {answer.__name__}"
        shutil.copytree(run, copy)
        WHOLE[answer.__name__] = answer(copy)
    return WHOLE[answer.__name__]


@pytest.mark.parametrize(
    ("files", "answer", "cases"),
    [
        ("pairs/pairs-*.jsonl", everything_in, 250),
        ("reference/scores-*.jsonl", everything_in, 60),
        ("*/done.json", everything_in, 60),
        ("pairs/journal.jsonl", gone_on, 60),
        ("pairs/pairs-*.jsonl", gone_on, 60),
    ],
)
def test_damage_is_seen(run, tmp_path, request, monkeypatch, files, answer, cases):
    monkeypatch.setattr("rapid_jax.runtime.append_log.os.fsync", lambda descriptor: None)
    monkeypatch.setattr("rapid_jax.runtime.files.os.fsync", lambda descriptor: None)
    ends = {"same": 0, "refused": 0}
    for case in range(cases * request.config.getoption("--fuzz")):
        draw = random.Random(f"{files} {answer.__name__} {case}")
        copy = tmp_path / str(case)
        shutil.copytree(run, copy)
        ends[outcome(draw, copy, draw.choice(sorted(copy.glob(files))), answer)] += 1
        shutil.rmtree(copy)
    assert ends["refused"] > 0.5 * ends["same"]  # it damages indeed
