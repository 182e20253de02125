# SPDX-License-Identifier: Apache-2.0
"""How the cost of a token grows with the context: one figure of a benchmark's rows."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rapid_jax.evaluate.plotting import Point, line, number_axis, panels, require, texts_as_they_are
from rapid_jax.runtime.errors import InputError, printable
from rapid_jax.runtime.figure_files import FigureFiles, figure_files
from rapid_jax.runtime.files import replace_file
from rapid_jax.runtime.json_input import MOST_BYTES, Fields, parse_object


def draw(rows: Sequence[Mapping[str, Any]], target: Path) -> None:
    """Writes milliseconds a token against context, a line a case, and the floor of plain decoding.

    A PNG, and beside it an SVG and a CSV of the numbers: `target` may end in any of the three, or in none.
    `rows` are those of `rapid bench --json`, batch 1. Raises InputError without matplotlib or without rows.
    """
    require()
    left_out = ("quoting", "documents")
    cases = [row for row in rows if "case" in row and row["case"]["batch"] == 1]
    rows = [row for row in cases if all(row["case"].get(name) is None for name in left_out)]
    if not rows:
        raise InputError("--plot: expected rows of batch 1 without copies, got none")
    with texts_as_they_are():
        files = _draw(rows)
    name = target.stem if target.suffix in (".png", ".svg", ".csv") else target.name
    for file, content in files.named(name).items():
        with replace_file(target.with_name(file)) as temporary:
            temporary.write_bytes(content)


def _draw(rows: Sequence[Mapping[str, Any]]) -> FigureFiles:
    numbers: list[dict[str, Any]] = []
    figure, (panel,) = panels(1, 1, (7.0, 4.5))
    names = list(dict.fromkeys(row["name"] for row in rows))
    for index, name in enumerate(names):
        best: dict[int, Mapping[str, Any]] = {}
        for row in sorted((row for row in rows if row["name"] == name), key=lambda row: row["ms_per_token"]):
            best.setdefault(row["case"]["context"], row)
        points = [(at, row["ms_per_token"], row.get("ms_least"), row.get("ms_most")) for at, row in best.items()]
        line(panel, sorted(points), printable(name), index)
        numbers += [_numbers(printable(name), point) for point in sorted(points)]
    floors = {row["case"]["context"]: row["floor_ms"] for row in rows if row["name"] == "plain" and row.get("floor_ms")}
    floor = [(context, ms, None, None) for context, ms in sorted(floors.items())]
    line(panel, floor, "floor of plain", 6, thin=True)
    numbers += [_numbers("floor of plain", point) for point in floor]
    panel.set_yscale("log")
    low, high = min(row["ms_per_token"] for row in rows), max(row["ms_per_token"] for row in rows)
    ticks = [step * 10**power for power in range(-3, 6) for step in (1, 2, 5)]
    panel.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    panel.set_yticks([], minor=True)
    panel.set_ylim(0.7 * low, 1.4 * high)
    number_axis(panel, [row["case"]["context"] for row in rows], "tokens of context", doubling=True)
    panel.set_ylabel("milliseconds a token")
    panel.legend(fontsize=8)
    return figure_files(figure, numbers)


def _numbers(name: str, point: Point) -> dict[str, Any]:
    context, middle, low, high = point
    return {"case": name, "context": context, "ms a token": middle, "low": low, "high": high}


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The rows of a file that `rapid bench --json` or another measurement in its form left, of any version.

    Raises InputError, which names line and key, for a row of decoding that cannot be drawn.
    """
    if not path.is_file():
        raise InputError(f"{path}: expected JSON lines of rapid bench, got no such file")
    try:
        with open(path, "rb") as file:
            lines = file.read(MOST_BYTES + 1).splitlines()
    except OSError as error:
        raise InputError(f"{path}: expected JSON lines of rapid bench: {error.strerror}") from error
    found = [parse_object(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    for row in found:
        if row.get("case") is not None:
            _check(row)
    return [{key: value for key, value in row.items() if value is not None} for row in found]


def _check(row: Fields) -> None:
    """Raises InputError for what a figure cannot be drawn of."""
    row.text("name")
    row.number("ms_per_token", above=0.0)
    for name in ("ms_least", "ms_most", "floor_ms"):  # those of other programs and of older versions lack some
        row.number(name, None, above=0.0)
    case = row.fields("case")
    case.whole("context", least=1, most=2**40)
    case.whole("batch", least=1)
    case.truth("quoting", None)
