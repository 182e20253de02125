# SPDX-License-Identifier: Apache-2.0
"""How the cost of a token grows with the context: one figure of a benchmark's rows."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rapid_jax.evaluate.plotting import line, number_axis, panels, png, require
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.files import replace_file


def draw(rows: Sequence[Mapping[str, Any]], target: Path) -> None:
    """Writes milliseconds a token against context, a line a case, and the floor of plain decoding, as PNG.

    `rows` are those of `rapid bench --json`, batch 1. Raises InputError without matplotlib or without rows.
    """
    require()
    rows = [row for row in rows if row.get("case", {}).get("batch") == 1 and row["case"].get("quoting") is None]
    if not rows:
        raise InputError("--plot: expected rows of batch 1 without copies, got none")
    figure, (panel,) = panels(1, 1, (7.0, 4.5))
    names = list(dict.fromkeys(row["name"] for row in rows))
    for index, name in enumerate(names):
        best: dict[int, float] = {}
        for row in rows:
            if row["name"] == name:
                context = row["case"]["context"]
                best[context] = min(best.get(context, float("inf")), row["ms_per_token"])
        line(panel, [(context, ms, None, None) for context, ms in sorted(best.items())], name, index)
    floors = {row["case"]["context"]: row["floor_ms"] for row in rows if row["name"] == "plain" and row["floor_ms"]}
    line(panel, [(context, ms, None, None) for context, ms in sorted(floors.items())], "floor of plain", 6, thin=True)
    panel.set_yscale("log")
    low, high = min(row["ms_per_token"] for row in rows), max(row["ms_per_token"] for row in rows)
    ticks = [step * 10**power for power in range(-3, 6) for step in (1, 2, 5)]
    panel.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    panel.set_yticks([], minor=True)
    panel.set_ylim(0.7 * low, 1.4 * high)
    number_axis(panel, [row["case"]["context"] for row in rows], "tokens of context", doubling=True)
    panel.set_ylabel("milliseconds a token")
    panel.legend(fontsize=8)
    with replace_file(target) as file:
        file.write_bytes(png(figure))


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The rows of a file that `rapid bench --json` or another measurement in its form left."""
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: expected JSON lines of rapid bench: {error}") from error
