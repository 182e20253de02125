# SPDX-License-Identifier: Apache-2.0
"""Settings files with a base: what is joined, what is replaced, and what is refused with the name of the file."""

from pathlib import Path

import pytest

from rapid_jax.runtime import settings
from tests.runtime.test_settings import TEXT, Drafter, Retrieval, Run, refusal


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.yaml"
    path.write_text(TEXT)
    return path


def written(path: Path, text: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


def test_a_file_states_what_differs_and_the_rest_is_the_bases(base: Path, tmp_path: Path):
    more = written(tmp_path / "more.yaml", "base: base.yaml\nretrieval: {threshold: 0.5}\nmesh: [1]\ndrafter: null\n")
    assert settings.load(Run, more) == Run("smollm2", "rapid", Retrieval(512, 0.5), None, mesh=(1,), span=(3, 4.0))
    assert settings.load(Run, more, ["retrieval.chunk_tokens=8"]).retrieval == Retrieval(8, 0.5)
    settings.save(settings.load(Run, more), tmp_path / "resolved.yaml")
    assert "base" not in (tmp_path / "resolved.yaml").read_text()
    assert settings.load(Run, tmp_path / "resolved.yaml") == settings.load(Run, more)


def test_a_base_is_beside_the_file_that_names_it_wherever_it_is_read_from(base: Path, tmp_path: Path, monkeypatch):
    written(tmp_path / "deep" / "one.yaml", "base: ../base.yaml\neta: 1\n")
    two = written(tmp_path / "deep" / "two.yaml", "base: one.yaml\nseed: 3\ndrafter: {path: mine}\n")
    written(tmp_path / "elsewhere" / "one.yaml", "base: nowhere.yaml\n")
    monkeypatch.chdir(tmp_path / "elsewhere")
    run = settings.load(Run, two)
    assert (run.eta, run.seed, run.drafter) == (1.0, 3, Drafter("mine"))
    three = written(tmp_path / "three.yaml", f"base: {two}\neta: 7\n")  # by its whole name
    assert (settings.load(Run, three).eta, settings.load(Run, three).seed) == (7.0, 3)


def test_a_loop_is_one_line(base: Path, tmp_path: Path):
    one = written(tmp_path / "one.yaml", "base: two.yaml\n")
    written(tmp_path / "two.yaml", "base: ./one.yaml\n")
    assert f"{one}: base: expected files that end in one without a base, got a loop back to" in refusal(one)
    own = written(tmp_path / "own.yaml", "base: own.yaml\n")
    assert "got a loop back to" in refusal(own)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("etta: 3\n", "more.yaml: unknown setting 'etta'; did you mean 'eta'?"),
        ("retrieval: {thresh: 3}\n", "more.yaml: unknown setting 'thresh' in 'retrieval'"),
        ("eta: many\n", "more.yaml: eta: expected a number, got 'many'"),
        ("retrieval: 3\n", "more.yaml: retrieval: expected a section of 'key: value' lines, got 3"),
        ("retrieval: {chunk_tokens: 0}\n", "retrieval: chunk_tokens: expected at least 1, got 0"),
        ("drafter: {layers: many}\n", "more.yaml: drafter.layers: expected a whole number or 'auto', got 'many'"),
    ],
)
def test_a_mistake_names_the_file_it_is_in(base: Path, tmp_path: Path, text: str, message: str):
    assert message in refusal(written(tmp_path / "more.yaml", f"base: base.yaml\n{text}"))


def test_a_mistake_in_the_base_names_the_base(base: Path, tmp_path: Path):
    base.write_text(TEXT.replace("eta: 20", "etta: 20"))
    more = written(tmp_path / "more.yaml", "base: base.yaml\neta: 3\n")
    assert refusal(more).startswith(f"{base}: unknown setting 'etta'")
    base.write_text(TEXT.replace("eta: 20\n", ""))
    assert settings.load(Run, more).eta == 3.0  # between them they are complete
    more.write_text("base: base.yaml\n")
    assert refusal(more) == f"{more} (base {base}): missing setting 'eta'"


@pytest.mark.parametrize("name", ["5", "", "[a]", "null"])
def test_a_base_is_the_name_of_a_file(tmp_path: Path, name: str):
    assert "base: expected the name of a settings file, got" in refusal(
        written(tmp_path / "more.yaml", f"base: {name}\n")
    )


def test_a_base_that_is_not_there_is_named_with_who_wants_it(tmp_path: Path):
    more = written(tmp_path / "more.yaml", "base: absent.yaml\n")
    said = refusal(more)
    assert said == f"{tmp_path}/absent.yaml: cannot be read: No such file or directory (the base of {more}, " + (
        "looked for beside it)"
    )
    assert "base: expected" in refusal(written(tmp_path / "far.yaml", "base: hdfs://bucket/base.yaml\n"))


def test_a_file_without_a_base_is_complete_as_before(tmp_path: Path):
    part = written(tmp_path / "part.yaml", "eta: 3\n")
    assert refusal(part).startswith(f"{part}: missing settings 'model', 'mode', 'retrieval'")


def test_a_base_in_a_bucket(bucket, tmp_path: Path):
    bucket.put("configs/base.yaml", TEXT)
    one = bucket.put("configs/more/one.yaml", "base: ../base.yaml\neta: 3\n")
    mine = written(tmp_path / "mine.yaml", f"base: {one}\nseed: 1\n")
    assert (settings.load(Run, mine).eta, settings.load(Run, mine).seed) == (3.0, 1)
