# SPDX-License-Identifier: Apache-2.0
"""JSON from outside: the value, or one line that names file and key."""

from pathlib import Path

import pytest

from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.json_input import MOST_DEPTH, Fields, parse_json, parse_object, read_json, read_object

OBJECT = b'{"n": 3, "x": 0.5, "b": true, "s": "a", "l": [1, 2], "t": ["a"], "o": {"n": 4}, "e": [{"n": 5}], "z": null}'


def test_values_of_each_type():
    fields = parse_object(OBJECT, "c.json")
    assert (fields.whole("n"), fields.number("x"), fields.number("n"), fields.truth("b")) == (3, 0.5, 3.0, True)
    assert (fields.text("s"), fields.wholes("l"), fields.texts("t")) == ("a", [1, 2], ["a"])
    assert fields.fields("o").whole("n") == 4 and [one.whole("n") for one in fields.each("e")] == [5]
    assert dict(fields)["z"] is None


def test_null_is_no_such_key():
    fields = parse_object(OBJECT, "c.json")
    for key in ("z", "absent"):
        for read in (fields.whole, fields.number, fields.truth, fields.text, fields.texts, fields.wholes):
            assert read(key, 7) == 7
        assert fields.fields(key, None) is None and fields.each(key, None) is None


@pytest.mark.parametrize(
    "method, key, line",
    [
        ("whole", "s", "c.json: s must be a whole number of at least 0, got 'a'"),
        ("whole", "b", "c.json: b must be a whole number of at least 0, got True"),
        ("whole", "x", "c.json: x must be a whole number of at least 0, got 0.5"),
        ("whole", "z", "c.json: z must be a whole number of at least 0, got null"),
        ("whole", "q", "c.json: q must be a whole number of at least 0, got no such key"),
        ("number", "b", "c.json: b must be a number, got True"),
        ("truth", "n", "c.json: n must be true or false, got 3"),
        ("text", "l", "c.json: l must be a string, got [1, 2]"),
        ("texts", "l", "c.json: l must be a list of strings, got [1, 2]"),
        ("wholes", "t", "c.json: t must be a list of whole numbers of at least 0, got ['a']"),
        ("fields", "l", "c.json: l must be an object, got [1, 2]"),
        ("each", "l", "c.json: l must be a list of objects, got [1, 2]"),
    ],
)
def test_another_type_names_file_and_key(method, key, line):
    with pytest.raises(InputError) as raised:
        getattr(parse_object(OBJECT, "c.json"), method)(key)
    assert str(raised.value) == line


def test_the_path_of_keys_is_named():
    with pytest.raises(InputError, match=r"c\.json: o\.m must be"):
        parse_object(OBJECT, "c.json").fields("o").whole("m")
    with pytest.raises(InputError, match=r"c\.json: e\[0\]\.m must be"):
        parse_object(OBJECT, "c.json").each("e")[0].whole("m")


@pytest.mark.parametrize("text", ["1e400", "-1e400", "NaN", "Infinity", "1" * 400, "-1", "0"])
def test_numbers_are_finite_and_within_limits(text):
    with pytest.raises(InputError, match="a number above 0"):
        parse_object(f'{{"x": {text}}}', "c.json").number("x", above=0)


def test_lists_of_numbers_are_finite_and_within_limits():
    fields = parse_object('{"a": [1, -2.5], "b": [NaN], "c": [1e400], "d": [true], "e": 1, "f": [3e9]}', "c.json")
    assert fields.numbers("a") == [1.0, -2.5] and fields.numbers("z", None) is None
    for key in "bcde":
        with pytest.raises(InputError, match=f"c.json: {key} must be a list of numbers, got "):
            fields.numbers(key)
    with pytest.raises(InputError, match="f must be a list of numbers"):
        fields.numbers("f", most=1e9)


@pytest.mark.parametrize("value", ["1025", "-1", "1e3", "1" * 400])
def test_whole_numbers_within_limits(value):
    with pytest.raises(InputError, match="from 0 to 1024"):
        parse_object(f'{{"x": {value}}}', "c.json").whole("x", most=1024)


@pytest.mark.parametrize("text", [b"", b"{", b"\xff\xfe", b"[1,]", b"1" * 5000, b"nul"])
def test_what_is_not_json(text):
    with pytest.raises(InputError, match=r"^c\.json: not JSON"):
        parse_json(text, "c.json")


@pytest.mark.parametrize("depth", [MOST_DEPTH + 1, 1000, 100_000])
@pytest.mark.parametrize("opened, closed", [("[", "]"), ('{"a":', "}")])
def test_deep_nesting(depth, opened, closed):
    with pytest.raises(InputError, match="nested at most"):
        parse_json(opened * depth + "1" + closed * depth, "c.json")
    parse_json(opened * MOST_DEPTH + "1" + closed * MOST_DEPTH, "c.json")


def test_files(tmp_path):
    path = tmp_path / "config.json"
    with pytest.raises(InputError, match="no such file"):
        read_object(path)
    path.write_text('\N{BYTE ORDER MARK}{"n": 1}', encoding="utf-8")
    assert read_object(path).whole("n") == 1
    path.write_text("[]")
    with pytest.raises(InputError, match=r"config\.json: expected a JSON object, got \[\]"):
        read_object(path)
    with pytest.raises(InputError, match="no such file"):
        read_object(tmp_path)


def test_numbers_within_limits_of_their_own():
    fields = parse_object('{"x": 0.5}', "c.json")
    assert fields.number("x", least=0.5, most=0.5) == 0.5
    with pytest.raises(InputError, match=r"x must be a number of at least 1 and of at most 2, got 0\.5"):
        fields.number("x", least=1, most=2)
    with pytest.raises(InputError, match=r"x must be a number above 0\.5, got 0\.5"):
        fields.number("x", above=0.5)


@pytest.mark.parametrize("key", ["a\nb", "\x1b[2J", "\ud800", "k" * 10_000])
def test_keys_of_others_are_shown_on_one_line(key):
    fields = Fields({key: {}}, "c.json")
    for read in (fields.whole, fields.fields(key).whole):
        with pytest.raises(InputError) as raised:
            read(key)
        assert str(raised.value).isprintable() and len(str(raised.value)) < 300


def test_a_file_that_git_lfs_has_not_fetched_is_named_so(tmp_path):
    (tmp_path / "config.json").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 9\n")
    with pytest.raises(InputError, match=r"config\.json: a Git LFS pointer and not the file itself"):
        read_object(tmp_path / "config.json")


def test_a_limit_of_bytes(tmp_path):
    (tmp_path / "a.json").write_text("[1, 2]")
    assert read_json(tmp_path / "a.json", 6) == [1, 2]
    for read in (lambda: read_json(tmp_path / "a.json", 5), lambda: parse_json(b"[1, 2]", "a.json", 5)):
        with pytest.raises(InputError, match=r"a\.json: expected JSON of at most 5 bytes, got 6"):
            read()


def test_a_file_that_cannot_be_read(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "a.json").write_text("{}")
    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(InputError, match=r"a\.json: cannot be read: Permission denied"):
        read_json(tmp_path / "a.json")


def test_a_limit_of_values():
    with pytest.raises(InputError, match=r"c\.json: expected JSON of at most 8388608 values, got more"):
        parse_json(b"[" + b"{}," * 8_400_000 + b"{}]", "c.json")
