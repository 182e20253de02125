# SPDX-License-Identifier: Apache-2.0
"""A sweep's file: its points, their names, and what is refused."""

from pathlib import Path

import pytest

from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.sweep_file import read_sweep, settings_of
from tests.runtime.test_settings import TEXT, Run

HEAD = "base: base.yaml\nrun: out\n"


@pytest.fixture
def sweep(tmp_path: Path):
    """`sweep(text)`: the sweep in a file beside a base."""
    (tmp_path / "base.yaml").write_text(TEXT)

    def read(text: str, *more: str):
        (tmp_path / "sweep.yaml").write_text(text)
        return read_sweep(tmp_path / "sweep.yaml", more)

    return read


def test_lists_are_every_combination(sweep):
    found = sweep(f"{HEAD}lists: {{eta: [1, 2.5e-7], retrieval.threshold: [0.5], drafter.layers: [auto, 3]}}\n")
    assert [point.name for point in found.points] == [
        "eta=1_threshold=0.5_layers=auto",
        "eta=1_threshold=0.5_layers=3",
        "eta=2.5e-07_threshold=0.5_layers=auto",
        "eta=2.5e-07_threshold=0.5_layers=3",
    ]
    assert found.keys == ["eta", "retrieval.threshold", "drafter.layers"] and found.run == Path("out")
    configs = settings_of(found, Run, ("seed",))
    last = configs["eta=2.5e-07_threshold=0.5_layers=3"]
    assert (last.eta, last.retrieval.threshold, last.drafter and last.drafter.layers) == (2.5e-7, 0.5, 3)


def test_points_are_as_they_stand(sweep):
    found = sweep(f"{HEAD}points: [{{eta: 1, mesh: [2, 4]}}, {{seed: 3}}, {{model: 'a/b c'}}]\n")
    assert [point.name for point in found.points] == ["eta=1_mesh=2,4", "seed=3", "model=a-b-c"]
    assert settings_of(found, Run, ())["eta=1_mesh=2,4"].mesh == (2, 4)


def test_names_tell_points_apart(sweep):
    alike = sweep(f"{HEAD}lists: {{model: ['a b', 'a/b']}}\n")
    assert len({point.name for point in alike.points}) == 2
    long = sweep(f"{HEAD}lists: {{model: [{'x' * 200}, {'x' * 201}]}}\n")
    assert len({point.name for point in long.points}) == 2 and max(len(point.name) for point in long.points) <= 109
    wide = sweep(f"{HEAD}lists: {{model: [{'長' * 100}, {'長' * 101}]}}\n")
    assert len({point.name for point in wide.points}) == 2
    assert max(len(point.name.encode()) for point in wide.points) <= 109
    same = sweep(f"{HEAD}lists: {{retrieval.path: [a], drafter.path: [a]}}\n")
    assert same.points[0].name == "retrieval.path=a_drafter.path=a"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1\n", "expected a sweep with base, run and lists or points, got [1]"),
        ("base: base.yaml\nlists: {eta: [1]}\n", "expected run, got none"),
        ("run: x\nlists: {eta: [1]}\n", "expected base, got none"),
        (HEAD, "expected lists or points, got neither"),
        (f"{HEAD}lists: {{eta: [1]}}\npoints: [{{eta: 1}}]\n", "expected lists or points, got both"),
        (f"{HEAD}grid: {{eta: [1]}}\n", "expected base, run, lists, points, got 'grid'"),
        (f"{HEAD}lists: {{eta: 1}}\n", "lists: eta: expected a list of values, got 1"),
        (f"{HEAD}lists: {{eta: []}}\n", "lists: eta: expected a list of values, got []"),
        (f"{HEAD}lists: [1]\n", "lists: expected lines 'section.key: [value, ...]', got [1]"),
        (f"{HEAD}points: {{eta: 1}}\n", "points: expected a list of 'section.key: value' settings"),
        (f"{HEAD}points: [3]\n", "points: expected settings 'section.key: value', got 3"),
        (f"{HEAD}lists: {{eta: [{{1: 2, a: 3}}]}}\n", "eta: expected a value or a list of values, got {1: 2, 'a': 3}"),
        (f"{HEAD}points: [{{seed: {{1: a, b: c}}}}]\n", "seed: expected a value or a list of values, got {1: 'a'"),
        (f"{HEAD}lists: {{mesh: [[{{1: 2}}]]}}\n", "mesh: expected a value or a list of values, got [{1: 2}]"),
        (f"{HEAD}points: [{{mesh: &a [*a]}}]\n", "mesh: expected a value or a list of values, got [[...]]"),
        (f"{HEAD}points: [{{model: !!timestamp 2026-01-01}}]\n", "model: expected a value or a list of values, got"),
        (f"{HEAD}lists: {{eta: [1, 1]}}\n", "expected points that differ, got {'eta': 1} twice"),
        (f"{HEAD}lists: {{etta: [1]}}\n", "etta=1: unknown setting 'etta'; did you mean 'eta'?"),
        (f"{HEAD}lists: {{eta: [many]}}\n", "eta=many: eta: expected a number, got 'many'"),
        (f"{HEAD}lists: {{retrieval.chunk_tokens: [0]}}\n", "retrieval: chunk_tokens: expected at least 1, got 0"),
        (f"{HEAD}lists: {{retrieval: [0]}}\n", "'retrieval' is a section: set one of its settings"),
        (f"{HEAD}lists: {{seed: [0]}}\n", "seed is set by the sweep, expected other settings"),
        ("base: absent.yaml\nrun: x\nlists: {eta: [1]}\n", "absent.yaml: cannot be read: No such file"),
        ("base: base.yaml\nrun: hdfs://bucket/x\nlists: {eta: [1]}\n", "run: expected a path on this machine"),
    ],
)
def test_what_is_no_sweep_is_one_line(sweep, text, message):
    with pytest.raises(InputError) as caught:
        settings_of(sweep(text), Run, ("seed",))
    assert message in str(caught.value) and "\n" not in str(caught.value)
