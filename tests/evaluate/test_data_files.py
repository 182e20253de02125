# SPDX-License-Identifier: Apache-2.0
"""Lists, lines and packed files are read alike; what is wrong is named with its line."""

import gzip
import json
import os
import re
from pathlib import Path

import pytest

from rapid_jax.evaluate import data_files
from rapid_jax.evaluate.samples import SuiteOptions
from rapid_jax.runtime.errors import InputError

ROWS = [{"a": "ä\u2028b"}, {"a": 2}, {"a": [None]}]


@pytest.mark.parametrize("packed", [False, True])
def test_lists_and_lines_give_the_same_objects(tmp_path, packed):
    lines = "\ufeff" + "\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\r\n \n"
    texts = {"x.jsonl": lines, "x.json": json.dumps(ROWS), "y.json": "\n" + json.dumps(ROWS, indent=1)}
    places = {"x.jsonl": ["line 1", "line 3", "line 5"]}
    for name, text in texts.items():
        path = tmp_path / (f"{name}.gz" if packed else name)
        path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
        found = list(data_files.records(path))
        assert [record for _, record in found] == ROWS
        expected = places.get(name, ["item 1", "item 2", "item 3"])
        assert [place for place, _ in found] == [f"{path}: {where}" for where in expected]


@pytest.mark.parametrize(
    "data, message",
    [
        (b'{"a": 1}\n{"a": }\n', "line 2: not JSON: Expecting value"),
        (b'\n[{"a": 1},\n{"a": }]\n', "not JSON: Expecting value: line 3 column 7"),
        (b'[{"a": 1},\n{"a": "\xff"}]\n', "not JSON: 'utf-8' codec can't decode byte 0xff"),
        (b'{"a": 1}\n{"a": "\xff"}\n', "line 2: not JSON: 'utf-8' codec can't decode byte 0xff"),
        (b'{"a": 1}\n7\n', "line 2: expected a JSON object, got 7"),
        (b'[{"a": 1}, "b"]', "item 2: expected a JSON object, got 'b'"),
        (b'{"a": 1}\n[{"a": 1}]\n', "line 2: expected a JSON object"),
        (b"\n\n", "expected JSON objects, one a line or in a list, got none"),
        (b"[]", "expected JSON objects, one a line or in a list, got none"),
        (b"[" * 100_000, "expected JSON nested at most 64 deep, got more"),
        (b'{"a": ' * 70 + b"1" + b"}" * 70, "line 1: expected JSON nested at most 64 deep, got more"),
        (b'{"a": ' + b"1" * 5000 + b"}", "line 1: not JSON: Exceeds the limit"),
    ],
)
def test_what_is_no_such_file_is_named(tmp_path, data, message):
    path = tmp_path / "x.jsonl"
    path.write_bytes(data)
    with pytest.raises(InputError, match=rf"^{re.escape(str(path))}: {message}"):
        list(data_files.records(path))


def test_files_that_cannot_be_read_are_input_errors(tmp_path):
    with pytest.raises(InputError, match=r"x\.jsonl: cannot be read: No such file"):
        list(data_files.records(tmp_path / "x.jsonl"))
    packed = gzip.compress(json.dumps({"a": "b" * 10_000}).encode())
    for name, data in {
        "cut": packed[:-12],
        "other": b'{"a": 1}',
        "damaged": packed[:14] + b"\xff\xff" + packed[16:],
    }.items():
        (tmp_path / f"{name}.gz").write_bytes(data)
        with pytest.raises(InputError, match=rf"{name}.gz: (cannot be read|line 1)"):
            list(data_files.records(tmp_path / f"{name}.gz"))


def test_a_file_is_read_up_to_a_limit_and_nothing_else_at_all(tmp_path, monkeypatch):
    monkeypatch.setattr(data_files, "MOST_BYTES", 100)
    for name, data in {
        "lines": b'{"a": 1}\n' * 20,
        "list": b"[" + b'{"a": 1},' * 20 + b"1]",
        "line": b" " * 200,
    }.items():
        (tmp_path / name).write_bytes(data)
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(data))
        for path in (tmp_path / name, tmp_path / f"{name}.gz"):
            with pytest.raises(InputError, match="expected at most 100 bytes of JSON, got more"):
                list(data_files.records(path))
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(InputError, match="expected a file, got something else"):
            list(data_files.records(path))


def test_fields_are_checked_and_made_whole():
    record = {"text": " a\ud83d ", "none": " \n", "list": ["a", "b\ud800"], "holes": ["a", ""], "n": 3, "yes": True}
    assert data_files.text_of(record, "text", "p") == " a\ufffd "
    assert data_files.texts_of(record, "list", "p") == ("a", "b\ufffd")
    assert data_files.texts_of(record, "text", "p") == (" a\ufffd ",)
    assert data_files.id_of(record, "n", "p") == "3"
    for key, got in {"none": r"' \\n'", "n": "3", "missing": "no such field"}.items():
        with pytest.raises(InputError, match=f"^p: expected '{key}' to be a text that is not empty, got {got}$"):
            data_files.text_of(record, key, "p")
        with pytest.raises(InputError, match=f"^p: expected '{key}' to be a text or a list of texts"):
            data_files.texts_of(record, key, "p")
    for key in ("holes", "yes"):
        with pytest.raises(InputError, match="list of texts"):
            data_files.texts_of(record, key, "p")
    with pytest.raises(InputError, match="expected 'yes' to be a text"):
        data_files.id_of(record, "yes", "p")


def test_a_larger_choice_has_the_smaller_one_in_it():
    few, more = data_files.chosen(50, 5, "0/x"), data_files.chosen(50, 12, "0/x")
    assert len(few) == 5 and few == sorted(few) and set(few) < set(more)
    assert few != data_files.chosen(50, 5, "1/x")
    assert data_files.chosen(4, None, "0/x") == data_files.chosen(4, 9, "0/x") == [0, 1, 2, 3]
    with pytest.raises(InputError, match="at least 1 sample, got 0"):
        data_files.chosen(4, 0, "")


def test_tasks_and_data_of_the_options(tmp_path):
    assert data_files.tasks_of(SuiteOptions(), "s", ("a", "b")) == ("a", "b")
    assert data_files.tasks_of(SuiteOptions(tasks=("b", "a")), "s", ("a", "b", "c")) == ("a", "b")
    with pytest.raises(InputError, match="suite s: expected tasks of a, b, got 'd'"):
        data_files.tasks_of(SuiteOptions(tasks=("a", "d")), "s", ("a", "b"))
    assert data_files.data_of(SuiteOptions(data=tmp_path), "s", "a file") == tmp_path
    with pytest.raises(InputError, match="suite s: expected --data, a file, got none"):
        data_files.data_of(SuiteOptions(), "s", "a file")
    with pytest.raises(InputError, match="does not exist"):
        data_files.data_of(SuiteOptions(data=Path(tmp_path / "x")), "s", "a file")
