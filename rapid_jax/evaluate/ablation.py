# SPDX-License-Identifier: Apache-2.0
"""Figures of runs that differ in one setting: score and acceptance against its value."""

import statistics
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rapid_jax.evaluate import plotting
from rapid_jax.evaluate.results import Results, mode_of, named
from rapid_jax.evaluate.summary import acceptances, cells_of, estimate, overall
from rapid_jax.runtime.figure_files import figure_files

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Setting -> its name in a figure, and whether its axis is of lengths.
SETTINGS: Mapping[str, tuple[str, bool]] = {
    "speculation.eta": ("eta", False),
    "retrieval.min_tokens": ("retrieved tokens", True),
}


def figure(results: Results, setting: str) -> plotting.Drawn | None:
    """Score and acceptance against one setting: a row of panels a mode, a line a length."""
    series = _series(results, setting)
    if not series:
        return None
    labels = [label for values in series.values() for label in values.values()]
    drafts = any(acceptances(results.by_label[label]) for label in labels)
    name, doubling = SETTINGS[setting]
    drawing, axes = plotting.panels(len(series) * (1 + drafts), columns=1 + drafts, size=(4.6, 3.6))
    scored, accepted = axes[:: 1 + drafts], axes[1::2] if drafts else []
    numbers = []
    for panel, (title, values) in zip(scored, series.items(), strict=True):
        numbers += [{"panel": title, name: row.pop("value"), **row} for row in _draw_scores(panel, results, values)]
        panel.set(title=title, ylabel=plotting.SCORE)
    for panel, (title, values) in zip(accepted, series.items(), strict=bool(accepted)):
        for index, length in enumerate(results.lengths):
            found = [(value, acceptances(results.at(label, length))) for value, label in values.items()]
            points = [(value, statistics.fmean(rates), None, None) for value, rates in found if rates]
            plotting.line(panel, points, named(length), index)
            numbers += [{"panel": title, name: at, "length": length, "accepted": rate} for at, rate, *_ in points]
        panel.set(title=title, ylabel="accepted drafts, %")
        plotting.from_zero([panel], most=100)
    for number, values in enumerate(series.values()):
        for panel in axes[number * (1 + drafts) : (number + 1) * (1 + drafts)]:
            plotting.number_axis(panel, list(values), name, doubling=doubling and min(values) > 0)
    plotting.from_zero(scored, most=100)
    plotting.legend(drawing, axes, [*map(named, results.lengths), results.labels[0]])
    caption = f"Score and acceptance against {name}, a line a length."
    return plotting.Drawn(setting.rpartition(".")[2], caption, figure_files(drawing, numbers))


def _draw_scores(panel: "Axes", results: Results, values: Mapping[float, str]) -> list[dict[str, Any]]:
    """Draws a line a length, and dashed the score of the first label, where that is of another mode.

    Returns the numbers of the lines.
    """
    numbers: list[dict[str, Any]] = []
    first = results.labels[0]
    compared = mode_of(first) not in {mode_of(label) for label in values.values()}
    for index, length in enumerate(results.lengths):
        row = overall(cells_of(results), [length])
        found = [(value, estimate(row, results.by_label[label])) for value, label in values.items()]
        points = [plotting.score_point(value, got) for value, got in found if got]
        plotting.line(panel, points, named(length), index)
        numbers += [
            {"value": value, "length": length, "score": score, "low": low, "high": high}
            for value, score, low, high in points
        ]
        level = estimate(row, results.by_label[first]) if compared else None
        if level:
            panel.axhline(100 * level.mean, color=plotting.COLOURS[index % 8], linestyle="--", linewidth=1)
    if compared:
        panel.plot([], [], color="grey", linestyle="--", linewidth=1, label=first)
    return numbers


def _series(results: Results, setting: str) -> dict[str, dict[float, str]]:
    """Name -> value of the setting -> label, of labels that differ in nothing else and have two values or more.

    A label that leaves the setting alone has the value of the run's settings.
    """
    groups: dict[str, dict[float, str]] = {}
    named_by: dict[str, bool] = {}
    for label in results.labels:
        changed = dict(results.by_label[label][0].settings)
        if mode_of(label) in ("target", "retrieval") and changed.get("lookup") == "off":
            del changed["lookup"]  # what these modes are without being asked
        said = [key for key in changed if key in (setting, setting.rpartition(".")[2])]
        for key in said:
            del changed[key]
        value = results.settings_of(label).get(setting)
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        words = [part for part in label.split("-")[1:] if part.isalpha()]  # changes without a value: unrelated
        group = "-".join([mode_of(label), *words, *(f"{key}={changed[key]}" for key in sorted(changed))])
        groups.setdefault(group, {})[float(value)] = label
        named_by[group] = named_by.get(group, False) or bool(said)
    return {
        group: dict(sorted(values.items())) for group, values in groups.items() if len(values) > 1 and named_by[group]
    }
