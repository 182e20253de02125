# SPDX-License-Identifier: Apache-2.0
"""Settings files: what loads, what is refused and with which words, and that what is written reads back equal."""

import random
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from rapid_jax.runtime import settings, strict_yaml
from rapid_jax.runtime.errors import InputError


@dataclass(frozen=True)
class Retrieval:
    chunk_tokens: int
    threshold: float

    def __post_init__(self):
        if self.chunk_tokens < 1:
            raise InputError(f"chunk_tokens: expected at least 1, got {self.chunk_tokens}")


@dataclass(frozen=True)
class Drafter:
    path: str
    layers: int | Literal["auto"] = "auto"


@dataclass(frozen=True)
class Run:
    model: str
    mode: Literal["rapid", "lossless"]
    retrieval: Retrieval
    drafter: Drafter | None
    eta: float = 20.0
    seed: int | None = None
    stream: bool = True
    mesh: tuple[int, ...] = (1, 1)
    span: tuple[int, float] = (0, 1.0)
    stop: list[str] = field(default_factory=list)
    note: str = field(default="", metadata={"optional": True})


TEXT = """\
model: smollm2   # a comment
mode: rapid
retrieval:
  chunk_tokens: 512
  threshold: 0.3
drafter: {path: other, layers: auto}
eta: 20
seed: null
stream: true
mesh: [2, 4]
span: [3, 4]
stop: []
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(TEXT)
    return path


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(InputError) as caught:
        settings.load(Run, path, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def edited(path: Path, old: str, new: str) -> Path:
    assert TEXT.count(old) == 1
    path.write_text(TEXT.replace(old, new))
    return path


def test_every_kind_of_field_arrives_with_its_type(file: Path):
    run = settings.load(Run, file)
    expected = Run("smollm2", "rapid", Retrieval(512, 0.3), Drafter("other"), mesh=(2, 4), span=(3, 4.0))
    assert run == expected
    assert type(run.eta) is float and type(run.span[1]) is float and type(run.stop) is list


@pytest.mark.parametrize("text", ["1e-6", "1E-6", "1.e-6", ".1e-5", "1.0e-06"])
def test_scientific_notation_is_a_number(file: Path, text: str):
    assert settings.load(Run, edited(file, "0.3", text)).retrieval.threshold == pytest.approx(1e-6)


@pytest.mark.parametrize("text", ["no", "on", "010", "12:30", "2026-01-01", "0x1F", "<<", "'1e-6'", "'null'", "a: b"])
def test_text_that_older_yaml_takes_for_something_else_stays_text(file: Path, text: str):
    value = f'"{text}"' if ": " in text else text
    assert settings.load(Run, edited(file, "smollm2 ", f"{value} ")).model == text.strip("'")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("  threshold", "  treshold", "unknown setting 'treshold' in 'retrieval'; did you mean 'threshold'?"),
        ("mode:", "moed:", "unknown setting 'moed'; did you mean 'mode'?"),
        ("eta: 20\n", "", "missing setting 'eta'"),
        ("mode: rapid\n", "<<: {mode: rapid}\n", "unknown setting '<<'; did you mean "),
        ("seed: null\nstream: true\n", "", "missing settings 'seed', 'stream'"),
        ("  threshold: 0.3\n", "", "missing setting 'retrieval.threshold'"),
        ("mode: rapid", "mode: fast", "mode: expected one of 'rapid', 'lossless', got 'fast'"),
        ("512", "512.0", "retrieval.chunk_tokens: expected a whole number, got 512.0"),
        ("512", "true", "retrieval.chunk_tokens: expected a whole number, got true"),
        ("512", "5e2", "retrieval.chunk_tokens: expected a whole number, got 500.0"),
        ("0.3", "high", "retrieval.threshold: expected a number, got 'high'"),
        ("0.3", "'1e-6'", "retrieval.threshold: expected a number, got '1e-6'"),
        ("0.3", "false", "retrieval.threshold: expected a number, got false"),
        ("0.3", ".nan", "retrieval.threshold: expected a number, got nan"),
        ("0.3", "1" + "0" * 400, "retrieval.threshold: expected a number, got 1000"),
        ("layers: auto", "layers: atuo", "drafter.layers: expected a whole number or 'auto', got 'atuo'"),
        ("seed: null", "seed: x", "seed: expected a whole number or null, got 'x'"),
        ("stream: true", "stream: yes", "stream: expected true or false, got 'yes'"),
        ("smollm2 ", "7 ", "model: expected text, got 7"),
        ("[2, 4]", "8", "mesh: expected a list of items that are each a whole number, got 8"),
        ("[2, 4]", "[2, b]", "mesh: expected a list of items that are each a whole number, got [2, 'b']"),
        ("[3, 4]", "[3]", "span: expected a list [a whole number, a number], got [3]"),
        ("{path: other, layers: auto}", "3", "drafter: expected a section of 'key: value' lines, got 3"),
        ("512", "0", "retrieval: chunk_tokens: expected at least 1, got 0"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(file: Path, old: str, new: str, message: str):
    assert refusal(edited(file, old, new)).startswith(f"{file}: {message}")


@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        ("mode: rapid", "mode: rapid\nmode: lossless", 3, "duplicate key 'mode'"),
        ("  threshold: 0.3", "  threshold: 0.3\n  threshold: 0.3", 6, "duplicate key 'threshold'"),
        ("[2, 4]", "[2, 4", 11, "expected ',' or ']'"),
        ("mode: rapid", "\tmode: rapid", 2, "cannot start any token"),
        ("smollm2 ", "!!python/name:os.system ", 1, "could not determine a constructor"),
        ("mode:", "? [a]\n:", 2, "a key must be a word"),
    ],
)
def test_bad_yaml_is_refused_with_its_line(file: Path, old: str, new: str, line: int, message: str):
    text = refusal(edited(file, old, new))
    assert text.startswith(f"{file}, line {line}: ") and message in text


@pytest.mark.parametrize(
    "text",
    [
        *("!!bool maybe", "!!int ''", "!!float ''", "!!timestamp x", "!!map [1]", "!!set [a]"),
        *("[" * 3000 + "]" * 3000, "{a: " * 3000 + "}" * 3000, "".join(f"{' ' * n}a:\n" for n in range(1500))),
    ],
)
def test_explicit_tags_and_deep_nesting_are_one_line(text):
    with pytest.raises(InputError, match=r"^here: "):
        strict_yaml.parse(text if text.startswith(" ") or text.startswith("a") else f"a: {text}", "here")


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "word"])
def test_a_file_that_is_no_mapping_is_refused(file: Path, text: str):
    file.write_text(text)
    assert "expected a section of 'key: value' lines" in refusal(file)
    assert str(file) in refusal(file, "eta=1")


def test_files_that_cannot_be_read_are_refused(tmp_path: Path):
    assert "cannot be read: No such file" in refusal(tmp_path / "absent.yaml")
    assert "cannot be read: Is a directory" in refusal(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"model: caf\xe9\n")
    assert "expected UTF-8 text, got other bytes at offset 10" in refusal(tmp_path / "latin.yaml")
    (tmp_path / "null.yaml").write_bytes(b"model: a\x00\n")
    assert "not YAML" in refusal(tmp_path / "null.yaml")


def test_only_an_optional_key_may_be_left_out(file: Path):
    assert settings.load(Run, file).note == ""
    file.write_text(TEXT + "note: given\n")
    assert settings.load(Run, file).note == "given"


def test_overrides_are_put_over_the_file_and_the_later_wins(file: Path):
    changes = ["eta=5", "eta=1e-2", "retrieval.chunk_tokens=64", "drafter=null", "mesh=[8]", "model=a=b", "note='1'"]
    run = settings.load(Run, file, changes)
    assert (run.eta, run.retrieval, run.drafter) == (0.01, Retrieval(64, 0.3), None)
    assert (run.mesh, run.model, run.note) == ((8,), "a=b", "1")


def test_an_override_can_fill_what_the_file_leaves_out(file: Path):
    edited(file, "{path: other, layers: auto}", "null")
    assert "missing setting 'drafter.layers'" in refusal(file, "drafter.path=x")
    filled = settings.load(Run, file, ["drafter.path=x", "drafter.layers=3"])
    assert filled.drafter == Drafter("x", 3)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("eta", "expected section.key=value"),
        ("=3", "expected section.key=value"),
        ("a..b=3", "expected section.key=value"),
        ("retrieval.chunk=3", "unknown setting 'chunk' in 'retrieval'; did you mean 'chunk_tokens'?"),
        ("retreival.chunk_tokens=3", "unknown setting 'retreival'; did you mean 'retrieval'?"),
        ("eta.x=3", "'eta' is a value and has no settings below it"),
        ("retrieval=3", "'retrieval' is a section: set one of its settings (chunk_tokens, threshold)"),
        ("mode=fast", "mode: expected one of 'rapid', 'lossless', got 'fast'"),
        ("stream=1", "stream: expected true or false, got 1"),
        ("eta=", "eta: expected a number, got null"),
    ],
)
def test_a_wrong_override_is_refused_by_name(file: Path, override: str, message: str):
    assert refusal(file, "seed=1", override).startswith(f"--set {override}: {message}")


def test_an_override_that_breaks_a_check_of_the_class_is_named(file: Path):
    text = refusal(file, "retrieval.chunk_tokens=0")
    assert text.startswith(f"{file} with --set retrieval.chunk_tokens=0: retrieval: chunk_tokens: expected at least 1")


def test_defaults_need_only_what_has_no_default():
    with pytest.raises(InputError, match=re.escape("default settings: missing settings 'model', 'mode', 'drafter'")):
        settings.defaults(Run)
    given = ["model=m", "mode=lossless", "drafter=null", "retrieval.chunk_tokens=7", "retrieval.threshold=1"]
    assert settings.defaults(Run, given) == Run("m", "lossless", Retrieval(7, 1.0), None)


def test_a_field_type_that_settings_cannot_hold_is_a_programming_error(file: Path):
    @dataclass(frozen=True)
    class Wrong:
        model: dict[str, int]

    with pytest.raises(TypeError, match="cannot have the type"):
        settings.defaults(Wrong, ["model={a: 1}"])


def test_what_is_dumped_loads_back_equal(tmp_path: Path):
    rng = random.Random(0)
    words = [
        "",
        "yes",
        "1e-6",
        "null",
        "~",
        "010",
        "a: b",
        "- x",
        "#",
        " lead",
        "two\nlines",
        "é 漢",
        "'",
        "<<",
        "12:30",
        "=",
        "!t",
    ]
    for _ in range(60):
        run = Run(
            model=rng.choice(words),
            mode=rng.choice(["rapid", "lossless"]),
            retrieval=Retrieval(rng.randrange(1, 10**9), rng.choice([1e-6, 1e22, -0.1, float("inf"), rng.random()])),
            drafter=rng.choice([None, Drafter(rng.choice(words), rng.choice(["auto", 3]))]),
            eta=rng.random() * 10 ** rng.randrange(-30, 30),
            seed=rng.choice([None, -1, 0]),
            stream=rng.random() < 0.5,
            mesh=tuple(rng.randrange(9) for _ in range(rng.randrange(4))),
            stop=rng.sample(words, 3),
            note=rng.choice(words),
        )
        settings.save(run, tmp_path / "run.yaml")
        assert (tmp_path / "run.yaml").read_text(encoding="utf-8") == settings.dump(run)
        assert settings.load(Run, tmp_path / "run.yaml") == run


def test_saving_over_a_file_replaces_it_whole(tmp_path: Path, file: Path):
    run = settings.load(Run, file)
    settings.save(run, file)
    assert settings.load(Run, file) == run
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]
