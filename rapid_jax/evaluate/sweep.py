# SPDX-License-Identifier: Apache-2.0
"""`rapid sweep`: evaluations that differ in some settings, one table and one figure. Loads no model.

The file has a section `evaluate`, the options of `rapid evaluate`: {suite: ruler, lengths: [4096, 8192], samples: 5}.
"""

import argparse
import shlex
import statistics as std
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from rapid_jax.config import RapidConfig
from rapid_jax.evaluate import plotting
from rapid_jax.evaluate.command import add_evaluate
from rapid_jax.evaluate.results import SUITE, Results, named, read
from rapid_jax.evaluate.statistics import Estimate
from rapid_jax.evaluate.summary import acceptances, cells_of, estimate, overall, speeds
from rapid_jax.runtime import settings
from rapid_jax.runtime.errors import InputError, legible
from rapid_jax.runtime.figure_files import FigureFiles, figure_files
from rapid_jax.runtime.files import replace_file
from rapid_jax.runtime.jobs import alone_in
from rapid_jax.runtime.settings_values import shown
from rapid_jax.runtime.storage import AnyPlace, bytes_of
from rapid_jax.runtime.sweep import Row, Task, perform, write_settings, write_table
from rapid_jax.runtime.sweep_file import SweepFile, read_sweep, settings_of

_OWN = ("config", "set", "out", "resume", "share", "quiet")  # options that the sweep gives


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"evaluate: {message}")


def run(options: argparse.Namespace) -> int:
    """Runs the sweep, or goes on with it, and writes its table and figure; 0, or 1 where a point failed."""
    sweep = read_sweep(options.sweep, ("evaluate",))
    words = _words(sweep)
    configs = settings_of(sweep, RapidConfig, ())
    meshes = [[mesh for mesh in (config.mesh, config.drafter_mesh) if mesh] for config in configs.values()]
    each = max(sum(mesh.devices for mesh in some) for some in meshes)
    with alone_in(sweep.run) as held:
        paths = write_settings(sweep, configs, _deciding)
        _check_same(sweep, shlex.join(words))
        tasks = []
        for name, path in paths.items():
            place = sweep.run / name
            given = ("--config", str(path), "--out", str(place), "--resume", "--quiet")
            tasks.append(Task(name, ("evaluate", *words, *given), _ended(place)))
        status = perform("rapid", sweep, tasks, options, each=each, held=held)
        if not options.print and any(task.is_done() for task in tasks):
            _write(sweep)
    return status


def _words(sweep: SweepFile) -> list[str]:
    """The options of `rapid evaluate`. Raises InputError, before anything runs, for what it would not take."""
    section, source = sweep.more["evaluate"], f"{sweep.source}: evaluate"
    if not isinstance(section, dict):
        raise InputError(f"{source}: expected options of `rapid evaluate`, as suite: ruler, got {shown(section)}")
    if own := [key for key in section if key in _OWN]:
        raise InputError(f"{source}: --{own[0]} is set by the sweep, expected other options")
    words: list[str] = []
    for key, value in section.items():
        text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        words += [f"--{key}", text]
    parser = _Parser(add_help=False, allow_abbrev=False)
    add_evaluate(parser)
    try:
        parser.parse_args(words)
    except InputError as error:
        raise InputError(f"{sweep.source}: {error}") from error
    return words


def _deciding(config: RapidConfig) -> Mapping[str, Any]:
    return {key: value for key, value in settings.flat(config).items() if not key.startswith("cache.")}


def _check_same(sweep: SweepFile, words: str) -> None:
    """Raises InputError if the evaluations there had other options."""
    path = sweep.run / "settings" / "evaluate.txt"
    before = bytes_of(path)
    if before is None:
        with replace_file(path) as temporary:
            temporary.write_text(words, encoding="utf-8")
    elif before != words.encode():
        said = legible(before.decode(errors="replace"))
        raise InputError(f"{sweep.run} was begun with evaluate {said}, expected {words}: choose another run")


def _ended(place: AnyPlace) -> Callable[[], bool]:
    """Whether all samples are answered in every mode that was begun, and the report is written, which comes last."""

    def ended() -> bool:
        if not (place / SUITE).is_file() or not (place / "report.html").is_file():
            return False
        results = read(place)
        return all(len(outcomes) == results.samples for outcomes in results.by_label.values())

    return ended


def _write(sweep: SweepFile) -> None:
    """The table of the points that are done, a row a mode, and the figure."""
    found = {point.name: read(sweep.run / point.name) for point in sweep.points if _ended(sweep.run / point.name)()}
    rows = [
        Row(name, {"mode": label}, _numbers(results, label))
        for name, results in found.items()
        for label in results.labels
    ]
    about = "Scores in %, with the ends of their 95 % intervals; acceptance in % and tokens a second are medians."
    draws = bool(found) and not plotting.missing()
    write_table(sweep, rows, _draw(sweep, found) if draws else None, about)


def _numbers(results: Results, label: str) -> dict[str, float | None]:
    outcomes = results.by_label[label]
    got = _score(results, label)
    numbers: dict[str, float | None] = {
        "score": _percent(got.mean),
        "low": _percent(got.low),
        "high": _percent(got.high),
    }
    if len(results.lengths) > 1:
        for length in results.lengths:
            at = estimate(overall(cells_of(results), [length]), outcomes)
            numbers[named(length)] = None if at is None else _percent(at.mean)
    accepted, speed = acceptances(outcomes), speeds(outcomes)
    numbers["acceptance"] = round(std.median(accepted), 2) if accepted else None
    return numbers | {"tokens/s": round(std.median(speed), 2) if speed else None}


def _score(results: Results, label: str) -> Estimate:
    """Over all lengths; of a label that lacks a task's samples there is none, and no such run is done."""
    got = estimate(overall(cells_of(results), results.lengths), results.by_label[label])
    if got is None:
        raise InputError(f"{results.folder}: expected samples of every task and length for {label}, got less")
    return got


def _percent(share: float | None) -> float | None:
    return None if share is None else round(100 * share, 2)


def _draw(sweep: SweepFile, found: Mapping[str, Results]) -> FigureFiles:
    """Score, acceptance and speed of each point, a colour a mode."""
    labels = list(dict.fromkeys(label for results in found.values() for label in results.labels))
    names = list(found)
    with plotting.texts_as_they_are():
        table: list[dict[str, Any]] = []
        figure, axes = plotting.panels(3, columns=3, size=(4.2, 1.2 + 0.4 * len(names)))
        for index, label in enumerate(labels):
            beside = 0.5 * ((index + 0.5) / len(labels) - 0.5)
            numbers = {name: _numbers(results, label) for name, results in found.items() if label in results.labels}
            table += [{"point": name, "mode": label, **each} for name, each in numbers.items()]
            for panel, key in zip(axes, ("score", "acceptance", "tokens/s"), strict=True):
                rows = []
                for name, each in numbers.items():
                    if (middle := each[key]) is not None:
                        ends = (each["low"], each["high"]) if key == "score" else (None, None)
                        rows.append((names.index(name) + beside, (0.0, middle, *ends)))
                if rows:
                    plotting.dots(panel, rows, label, index)
        for panel, title in zip(axes, ("score, %", "acceptance, %", "tokens a second"), strict=True):
            panel.set_xlabel(title)
            panel.set_yticks(range(len(names)), names if panel is axes[0] else [""] * len(names))
            panel.set_ylim(len(names) - 0.5, -0.5)
            panel.grid(alpha=0.3)
        plotting.legend(figure, axes, labels)
        return figure_files(figure, table)
