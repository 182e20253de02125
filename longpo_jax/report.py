# SPDX-License-Identifier: Apache-2.0
"""`longpo report`: the curves of one or more training runs, as a picture and as a page that needs nothing else."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from longpo_jax.metrics import FILE, read_metrics
from rapid_jax.runtime.append_log import has_log
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.figure_files import FigureFiles, figure_files
from rapid_jax.runtime.files import replace_file
from rapid_jax.runtime.storage import AnyPlace, working_place
from rapid_jax.runtime.templates import render

# Panel -> the metrics in it.
_PANELS: Mapping[str, tuple[str, ...]] = {
    "loss": ("loss",),
    "NLL": ("nll",),
    "preference loss": ("preference",),
    "reverse KL": ("kl",),
    "rewards": ("rewards/chosen", "rewards/rejected"),
    "margins": ("rewards/margins",),
    "accuracies": ("rewards/accuracies",),
    "gradient norm": ("grad_norm",),
    "learning rate": ("learning_rate",),
    "tokens/s": ("tokens_per_second",),
}
_SMOOTHED = 20  # a line's mean is over a twentieth of it
_TABLE = ("loss", "nll", "kl", "rewards/margins", "rewards/accuracies", "grad_norm", "tokens_per_second", "mfu")


def report(runs: Sequence[AnyPlace], out: AnyPlace | None = None) -> None:
    """Writes report.html and its figure (report.png, .svg, .csv) into `out`, by default the first of the runs.

    A run is the folder of a run, of a round or of its training; of a run of several rounds all are drawn. Raises
    InputError where there are no metrics.
    """
    found = {name: read_metrics(folder) for run in runs for name, folder in _trainings(run)}
    if not any(_points(lines, key) for lines in found.values() for key, *_ in _PANELS.values()):
        raise InputError(f"{', '.join(found)}: expected metrics such as {next(iter(_PANELS))}, got none that is known")
    place = working_place(runs[0] if out is None else out, "report")
    if place.is_file():
        raise InputError(f"{place}: expected a folder to write to, got a file")
    picture = drawn(found)
    for name, content in picture.named("report").items():
        with replace_file(place / name) as temporary:
            temporary.write_bytes(content)
    with replace_file(place / "report.html") as temporary:
        temporary.write_text(_page(found, picture), encoding="utf-8")
    print(place / "report.html")


def _trainings(run: AnyPlace) -> list[tuple[str, AnyPlace]]:
    """(name, folder of the metrics) of each training in a folder."""
    for folder in (run, run / "train"):
        if has_log(folder / FILE):
            return [(str(run), folder)]
    numbers = {folder: folder.parent.name.partition("-")[2] for folder in run.glob("round-*/train")}
    rounds = sorted((folder for folder in numbers if numbers[folder].isdigit()), key=lambda f: int(numbers[f]))
    with_metrics = [folder for folder in rounds if has_log(folder / FILE)]
    if not with_metrics:
        raise InputError(f"{run}: expected the metrics of a training run, got no {FILE}")
    return [(str(folder.parent), folder) for folder in with_metrics]


def drawn(runs: Mapping[str, list[dict[str, Any]]]) -> FigureFiles:
    """All panels that some run has."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        matplotlib.rcParams["text.parse_math"] = False  # a run's name may hold a $
        from matplotlib import pyplot
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        message = (
            f"the report needs matplotlib, which cannot be imported ({error}): pip install '.[longpo]' in a checkout"
        )
        raise InputError(message) from error

    some = {name: keys for name, keys in _PANELS.items() if any(_points(lines, keys[0]) for lines in runs.values())}
    figure, axes = pyplot.subplots(-(-len(some) // 3), 3, figsize=(15, 3.6 * -(-len(some) // 3)), squeeze=False)
    for panel in axes.flat[len(some) :]:
        panel.axis("off")
    for panel, (name, keys) in zip(axes.flat, some.items(), strict=False):
        panel.set_title(name)
        panel.set_xlabel("update")
        panel.grid(alpha=0.3)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        for index, (run, lines) in enumerate(runs.items()):
            for style, key in zip(("-", "--"), keys, strict=False):
                points = _points(lines, key)
                if not points:
                    continue
                steps, values = zip(*points, strict=True)
                label = f"{run} {key.rpartition('/')[2]}" if len(keys) > 1 else run
                dot, size, alpha = ("o", 7, 1.0) if len(points) == 1 else (".", 3, 0.3)  # one has no line to it
                panel.plot(steps, values, dot, color=f"C{index}", alpha=alpha, markersize=size)
                panel.plot(steps, _smooth(values), style, color=f"C{index}", label=label)
        panel.set_facecolor("none")  # a page may be dark
        panel.legend(fontsize=7, facecolor="none")
    figure.tight_layout()
    files = figure_files(figure, _numbers(runs), dpi=110)
    pyplot.close(figure)
    return files


def _numbers(runs: Mapping[str, list[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """What the dots show, a row an update."""
    keys = [key for some in _PANELS.values() for key in some]
    for run, lines in runs.items():
        for line in lines:
            yield {"run": run, "step": line["step"], **{key: line.get(key) for key in keys}}


def _points(lines: Sequence[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    return [(line["step"], line[key]) for line in lines if line.get(key) is not None]


def _smooth(values: Sequence[float]) -> list[float]:
    """The mean of each value and those about it."""
    reach = len(values) // (2 * _SMOOTHED)
    windows = (values[max(0, index - reach) : index + reach + 1] for index in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def _page(runs: Mapping[str, list[dict[str, Any]]], picture: FigureFiles) -> str:
    rows = [
        {"name": run, "updates": lines[-1]["step"], "cells": [_cell(lines, key) for key in _TABLE]}
        for run, lines in runs.items()
    ]
    values = {"title": "LongPO training", "keys": _TABLE, "runs": rows, "curves": picture.uri}
    return render("longpo_jax", "report.html", **values)


def _cell(lines: Sequence[Mapping[str, Any]], key: str) -> str:
    points = _points(lines, key)
    return f"{points[0][1]:.4g} to {points[-1][1]:.4g}" if points else ""
