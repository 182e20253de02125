# SPDX-License-Identifier: Apache-2.0
"""Records survive being written a line at a time, whatever ends the writing, and damaged ones are refused by line."""

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from longpo_jax.journal import Writer
from longpo_jax.records import Answer, Record, Turn, digest_of, read_records, records_with_places, shards_of
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.sealed import sealed

INPUTS = {"seed": 1, "corpus.sources": ("a=b",)}


def record(index: int) -> Record:
    turn = Turn((2, 6), (0, 3), "So,", "why?", Answer(f"Because {index}.\u2028", 4, True), Answer("No\n", 2, False))
    return Record(f"d{index}", "book", "One two\r\n\u00e9 three", 7, (3, 5), (turn, turn), index, "digest")


def add(writer: Writer, index: int) -> None:
    """Every third document is dropped."""
    kept = index % 3 != 2
    writer.add(f"d{index}", record(index) if kept else None, {"documents": 1, "pairs" if kept else "none": 1})


def written(folder: Path, count: int, *, start: int = 0) -> Writer:
    writer = Writer(folder, INPUTS, shard_pairs=2)
    assert writer.finished == [f"d{index}" for index in range(start)]
    for index in range(start, count):
        add(writer, index)
    return writer


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """Seven documents, five records in three files."""
    writer = written(tmp_path / "whole", 7)
    writer.finish({})
    return tmp_path / "whole"


def test_what_is_written_is_read(whole: Path):
    assert list(read_records(whole)) == [record(index) for index in (0, 1, 3, 4, 6)]
    assert [len(path.read_bytes().splitlines()) for path in shards_of(whole)] == [2, 2, 1]
    assert [path.name for path in shards_of(whole)][::2] == ["pairs-00000.jsonl", "pairs-00002.jsonl"]
    first = record(0)
    assert (first.context, first.excerpt_of(first.turns[0])) == ("Onewo\r\n\u00e9 three", "e tw")


def appended(contents: dict[str, bytes]) -> list[tuple[str, bytes]]:
    """(file, line) in the order in which they were written: a record, then the line that names it."""
    records = {name: data.splitlines(keepends=True) for name, data in contents.items() if name.startswith("pairs")}
    found = []
    for line in contents["journal.jsonl"].splitlines(keepends=True):
        if json.loads(line).get("record"):
            name = next(name for name in sorted(records) if records[name])
            found.append((name, records[name].pop(0)))
        found.append(("journal.jsonl", line))
    return found


def test_a_run_that_is_cut_anywhere_goes_on_to_the_same_bytes(whole: Path, tmp_path: Path, monkeypatch):
    """Of every line a part is written when the run is killed: nothing of it, some, and all."""
    # Hundreds of them take seconds.
    monkeypatch.setattr("rapid_jax.runtime.append_log.os.fsync", lambda descriptor: None)
    (whole / "done.json").unlink()
    expected = contents(whole)
    lines = appended(expected)
    assert len(lines) == 1 + 7 + 5
    for index, (name, line) in enumerate(lines):
        for size in (0, 1, len(line) // 2, len(line) - 1, len(line)):
            folder = tmp_path / f"{index} {size}"
            folder.mkdir()
            for earlier, data in [*lines[:index], (name, line[:size])]:
                with open(folder / earlier, "ab") as file:
                    file.write(data)
            names = [earlier for earlier, _ in lines[: index + (size == len(line))]]
            writer = written(folder, 7, start=max(names.count("journal.jsonl") - 1, 0))
            assert contents(folder) == expected
            assert writer.counts == {"documents": 7, "pairs": 5, "none": 2}


def test_a_killed_process_loses_and_repeats_nothing(whole: Path, tmp_path: Path):
    (whole / "done.json").unlink()
    program = """
        import sys
        from pathlib import Path
        from longpo_jax.journal import Writer
        from tests.longpo.test_records import INPUTS, add
        writer = Writer(Path(sys.argv[1]), INPUTS, shard_pairs=2)
        for index in range(len(writer.finished), 7):
            print(index, flush=True)
            add(writer, index)
        print("end", flush=True)
    """
    folder, kills = tmp_path / "killed", 0
    for lines in (1, 3, 2, 9):
        command = [sys.executable, "-c", textwrap.dedent(program), str(folder)]
        root = Path(__file__).resolve().parents[2]
        with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=root, text=True) as process:
            assert process.stdout is not None
            said = [process.stdout.readline().strip() for _ in range(lines)]
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += "end" not in said
    assert kills >= 2
    assert contents(folder) == contents(whole)


def test_other_inputs_are_refused_by_name(tmp_path: Path):
    written(tmp_path, 2)
    before = contents(tmp_path)
    for inputs, message in (
        ({**INPUTS, "seed": 2}, r"seed = 1, expected 2: choose another run folder, or delete"),
        ({**INPUTS, "more": None}, r"more = null, expected null"),
        ({"seed": 1}, r"corpus.sources = \[\"a=b\"\], expected null"),
    ):
        with pytest.raises(InputError, match=message):
            Writer(tmp_path, inputs, shard_pairs=2)
    assert contents(tmp_path) == before


def test_nothing_is_written_before_the_first_document_and_what_made_no_record_hinders_nobody(tmp_path: Path):
    folder = tmp_path / "pairs"
    Writer(folder, INPUTS, shard_pairs=2)
    assert not folder.exists()
    writer = Writer(folder, INPUTS, shard_pairs=2)
    writer.add("d2", None, {"documents": 1, "none": 1})
    assert Writer(folder, INPUTS, shard_pairs=2).finished == ["d2"]
    before = contents(folder)
    other = Writer(folder, {**INPUTS, "seed": 2}, shard_pairs=2)
    assert other.finished == [] and contents(folder) == before
    add(other, 0)
    assert Writer(folder, {**INPUTS, "seed": 2}, shard_pairs=2).finished == ["d0"]
    with pytest.raises(InputError, match="seed = 2, expected 1"):
        Writer(folder, INPUTS, shard_pairs=2)


def test_files_that_are_not_as_the_journal_says_are_refused(tmp_path: Path):
    written(tmp_path, 7)
    first = tmp_path / "pairs-00000.jsonl"
    data = first.read_bytes()
    for changed in (data[:-5], data + b"{}\n", b""):
        first.write_bytes(changed)
        with pytest.raises(InputError, match=rf"00000.jsonl: expected {len(data)} bytes.* got {len(changed)}"):
            Writer(tmp_path, INPUTS, shard_pairs=2)
    first.write_bytes(data)
    journal = tmp_path / "journal.jsonl"
    kept = journal.read_bytes()
    journal.unlink()
    with pytest.raises(InputError, match="got records without a journal"):
        Writer(tmp_path, INPUTS, shard_pairs=2)
    for changed, message in (
        (kept.replace(b'"counts"', b'"count"', 1), r"journal.jsonl:2: .* the checksum does not match"),
        (kept.replace(b'"id": "d1"', b'"id": "d7"', 1), r"journal.jsonl:3: .* the checksum does not match"),
        (b'{"schema": 1, "inputs": {}}\n', r"journal.jsonl:1: expected a checksum at its end, .* an earlier version"),
    ):
        journal.write_bytes(changed)
        with pytest.raises(InputError, match=f"{message}: delete .*{tmp_path.name} to start again"):
            Writer(tmp_path, INPUTS, shard_pairs=2)
    for header, message in (
        ({"schema": 1, "inputs": {}}, "schema must be 2, got 1"),
        ({"schema": 2}, "inputs must be an object, got no such key"),
        ({"schema": 2, "inputs": 3}, "inputs must be an object, got 3"),
    ):
        journal.write_bytes(sealed(header, "journal.jsonl:1") + kept[kept.index(b"\n") + 1 :])
        with pytest.raises(InputError, match=f"journal.jsonl:1: {message}"):
            Writer(tmp_path, INPUTS, shard_pairs=2)
    journal.write_bytes(kept)
    first.write_bytes(data.replace(b"Because", b"because", 1))
    with pytest.raises(InputError, match=r"00000.jsonl:1: .* the checksum does not match"):
        Writer(tmp_path, INPUTS, shard_pairs=2)
    first.write_bytes(data)
    assert len(Writer(tmp_path, INPUTS, shard_pairs=2).finished) == 7


def test_a_full_disk_is_one_line_and_nothing_half_written_stays(whole: Path, tmp_path: Path, monkeypatch):
    (whole / "done.json").unlink()
    folder = tmp_path / "full"
    writer = written(folder, 4)

    def full(descriptor: int) -> None:
        os.truncate(folder / "pairs-00001.jsonl", os.fstat(descriptor).st_size - 9)
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("rapid_jax.runtime.append_log.os.fsync", full)
        with pytest.raises(InputError, match=r"pairs-00001.jsonl: cannot be written: No space left on device"):
            add(writer, 4)
    assert (folder / "pairs-00001.jsonl").read_bytes()[-1:] in (b"", b"\n")
    written(folder, 7, start=4)
    assert contents(folder) == contents(whole)


def test_a_run_that_is_not_finished_is_not_read(tmp_path: Path):
    written(tmp_path / "pairs", 7)
    for folder in (tmp_path / "pairs", tmp_path / "absent"):
        with pytest.raises(InputError, match="expected a stage that is done"):
            list(read_records(folder))


def damaged(line: bytes, **changes: Any) -> bytes:
    """With another value of a field, and a checksum that fits."""
    values = {**json.loads(line), **changes}
    del values["sha256"]
    return sealed(values, "pairs-00001.jsonl:2")


def turns(line: bytes, **changes: Any) -> list[dict[str, Any]]:
    """The turns of a record with other values in the first."""
    found = json.loads(line)["turns"]
    return [{**found[0], **changes}, *found[1:]]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda line: line[:-1], "expected a whole line, got one that is cut off"),
        (lambda line: line[:-9] + b"\n", "expected a checksum at its end, got"),
        (lambda line: b"[]\n", "expected a checksum at its end, got"),
        (lambda line: b"\xff" + line, "got other bytes: the checksum does not match"),
        (lambda line: line.replace(b"Because", b"because", 1), "got other bytes: the checksum does not match"),
        (lambda line: damaged(line, schema=1), "schema must be 2, that of .*, got 1"),
        (lambda line: damaged(line, schema=None), "schema must be 2, .* got null"),
        (lambda line: damaged(line, schema=2.0, id=None), "schema must be 2, .* got 2.0|id must be a string, got null"),
        (lambda line: damaged(line, turns=None), "turns must be a list of objects, got null"),
        (lambda line: damaged(line, turns=[]), "turns must be a list of one turn or more"),
        (lambda line: damaged(line, tokens="7"), "tokens must be a whole number from 0 to .*, got '7'"),
        (lambda line: damaged(line, tokens=10**12), "tokens must be a whole number from 0 to .*, got 10"),
        (lambda line: damaged(line, seed=2**32), "seed must be a whole number from 0 to 4294967295"),
        (lambda line: damaged(line, cut=[3, 99]), r"cut must be the two ends of a stretch of \d+ characters"),
        (lambda line: damaged(line, more=1), "more must be no key of a record, got 1"),
        (lambda line: damaged(line, turns=turns(line, excerpt=[6, 2])), r"turns\[0\].excerpt must be the two ends"),
        (lambda line: damaged(line, turns=turns(line, opener=7)), r"turns\[0\].opener must be a string, got 7"),
        (
            lambda line: damaged(line, turns=turns(line, chosen={"text": "a", "tokens": 1, "finished": 1})),
            r"turns\[0\].chosen.finished must be true or false, got 1",
        ),
        (lambda line: damaged(line, id="d3"), "expected a document once, got 'd3' again"),
    ],
)
def test_a_damaged_record_is_refused_with_its_file_and_line(whole: Path, damage, message: str):
    path = whole / "pairs-00001.jsonl"
    first, second = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + damage(second))
    with pytest.raises(InputError, match=f"pairs-00001.jsonl:2: .*{message}") as error:
        list(read_records(whole))
    assert "\n" not in str(error.value)


def test_missing_files_are_noticed(whole: Path):
    last = whole / "pairs-00002.jsonl"
    data = last.read_bytes()
    last.unlink()
    with pytest.raises(InputError, match="expected 5 records, got 4"):
        list(read_records(whole))
    second = whole / "pairs-00001.jsonl"
    lines = second.read_bytes().splitlines(keepends=True)
    for changed, message in (
        (lines[:1], "expected 5 records, got 3"),
        (lines[1:], "jsonl:1: .* the checksum does not match"),
        (lines[::-1], "jsonl:1: .* the checksum does not match"),
        ([*lines, lines[1]], "jsonl:3: .* the checksum does not match"),
    ):
        second.write_bytes(b"".join(changed))
        with pytest.raises(InputError, match=message):
            list(read_records(whole))
    second.write_bytes(b"".join(lines))
    last.write_bytes(data)
    (whole / "pairs-00001.jsonl").unlink()
    with pytest.raises(InputError, match=r"expected pairs-00001.jsonl, got pairs-00002.jsonl"):
        list(read_records(whole))


def test_records_of_another_run_are_noticed(whole: Path, tmp_path: Path):
    other = Writer(tmp_path / "other", INPUTS, shard_pairs=2)
    for index in range(7):
        other.add(f"d{index}", replace(record(index), domain="code") if index % 3 != 2 else None, {})
    other.finish({})
    (whole / "pairs-00001.jsonl").write_bytes((tmp_path / "other" / "pairs-00001.jsonl").read_bytes())
    with pytest.raises(InputError, match="expected the records that were made, got others"):
        list(read_records(whole))


def test_a_record_is_read_again_from_its_place(whole: Path):
    places = [line for line, _ in records_with_places(whole)]
    assert [line.record() for line in places] == list(read_records(whole))
    path = whole / "pairs-00000.jsonl"
    data = path.read_bytes()
    path.write_bytes(data.replace(b"Because 0", b"Because 9", 1))
    with pytest.raises(InputError, match=r"00000.jsonl:1: .* the checksum does not match"):
        places[0].record()
    path.write_bytes(sealed(replace(record(0), seed=5).to_json(), "pairs-00000.jsonl:1"))
    with pytest.raises(InputError, match=r"00000.jsonl:1: expected the record that was there at first, got another"):
        places[0].record()
    path.unlink()
    with pytest.raises(InputError, match=r"00000.jsonl: cannot be read: No such file"):
        places[0].record()


def test_the_digest_is_that_of_the_records_alone(whole: Path, tmp_path: Path):
    before = digest_of(whole)
    (whole / "notes.txt").write_text("x")
    (whole / "done.json").unlink()
    assert digest_of(whole) == before
    other = Writer(tmp_path / "other", {"seed": 2}, shard_pairs=2)
    for index in range(7):
        add(other, index)
    assert digest_of(tmp_path / "other") == before
    other.add("d7", replace(record(7), domain="code"), {})
    assert digest_of(tmp_path / "other") != before
    with pytest.raises(InputError, match=r"expected records in pairs-\*.jsonl, got none"):
        digest_of(tmp_path)
