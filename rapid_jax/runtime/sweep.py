# SPDX-License-Identifier: Apache-2.0
"""What the sweeps of both command lines share: options, the settings of points on disk, running them, one table.

RUN/settings/POINT.yaml    complete settings of each point, as the command for it reads them
RUN/POINT                  what the command made
RUN/logs/POINT.log         what it printed
RUN/sweep.json, .md        the table of all points that are done
RUN/sweep.png, .svg, .csv  the figure, for screens and for papers, and the numbers in it
"""

import argparse
import json
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from rapid_jax.runtime import settings
from rapid_jax.runtime.command_line import Place, say
from rapid_jax.runtime.device_shares import shares_of
from rapid_jax.runtime.errors import InputError, Unavailable
from rapid_jax.runtime.figure_files import FigureFiles
from rapid_jax.runtime.files import replace_file
from rapid_jax.runtime.jobs import Job, keep_log, kept_log, logs_here, run_jobs
from rapid_jax.runtime.settings_values import shown
from rapid_jax.runtime.storage import AnyPlace, bytes_of
from rapid_jax.runtime.sweep_file import SweepFile, as_text

_MODULES = {"longpo": "longpo_jax", "rapid": "rapid_jax"}
FAILED = 1  # exit status: a point did not end well


@dataclass(frozen=True)
class Task:
    """A command of a sweep, and whether it has done its work already."""

    name: str
    words: tuple[str, ...]  # behind the program's name
    is_done: Callable[[], bool]
    after: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """A line of the table: its point, what else names it, and what came of it."""

    point: str
    names: Mapping[str, str]
    numbers: Mapping[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `sweep`."""
    parser.add_argument("sweep", action=Place, reads=True, metavar="FILE", help="a sweep: base, run, lists or points")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="points at once, each on devices of its own")
    parser.add_argument("--print", action="store_true", help="print the commands instead, for several machines")
    parser.add_argument("--quiet", action="store_true", help="no progress")


def write_settings(
    sweep: SweepFile, configs: Mapping[str, Any], deciding: Callable[[Any], Mapping[str, Any]]
) -> dict[str, AnyPlace]:
    """The settings file of each name. Raises InputError where one is there of which what is `deciding` differs."""
    paths = {name: sweep.run / "settings" / f"{name}.yaml" for name in configs}
    for name, path in paths.items():
        before = deciding(settings.load(type(configs[name]), path)) if path.exists() else {}
        after = deciding(configs[name])
        if differing := [key for key in before if before[key] != after.get(key)]:
            key = differing[0]
            raise InputError(
                f"{sweep.run} was begun with {key} = {shown(before[key])}, expected {shown(after.get(key))}: "
                f"choose another run, or delete {sweep.run}"
            )
    for name, path in paths.items():
        if bytes_of(path) != settings.dump(configs[name]).encode():
            settings.save(configs[name], path)
    return paths


def perform(
    program: str, sweep: SweepFile, tasks: Sequence[Task], options: argparse.Namespace, *, each: int, held: int
) -> int:
    """Runs what is not done, or prints it; 0, or 1 where something failed, each with a line that says why.

    `each` is how many devices a command needs, `held` what `alone_in` gave for the sweep's folder.
    """
    if options.jobs < 1:
        raise InputError(f"--jobs: expected at least 1, got {options.jobs}")
    if options.print:
        for task in tasks:
            if not task.is_done():
                print(shlex.join((program, *task.words)))
        print(shlex.join((program, "sweep", str(options.sweep))))
        return 0
    if os.environ.get("JAX_NUM_PROCESSES", "1") != "1":
        raise InputError("sweep: expected one process, got several: --print has the commands to run on all of them")
    shares = shares_of(options.jobs, each)
    left = [task for task in tasks if not task.is_done()]
    if not options.quiet and len(left) < len(tasks):
        say(f"sweep: {len(tasks) - len(left)} of {len(tasks)} commands are done already")
    logs = logs_here(sweep.run)
    jobs = [
        Job(task.name, task.words, logs / f"{task.name}.log", task.after, partial(keep_log, sweep.run, task.name))
        for task in left
    ]

    def tell(job: Job, said: str) -> None:
        if not options.quiet:
            say(f"sweep: {job.name}: {said}")

    try:
        failed = run_jobs(jobs, _MODULES[program], shares, held, tell)
    finally:
        _keep_logs(sweep.run, tasks)
    for name, why in failed.items():
        if why:
            log = kept_log(sweep.run, name)
            say(f"{program}: {name}: {why}" + (f" ({log})" if log.exists() else ""))
    return FAILED if any(failed.values()) else 0


def _keep_logs(folder: AnyPlace, tasks: Sequence[Task]) -> None:
    """Of all tasks, those done in an earlier start too, as far as the store takes them: it ends no sweep."""
    for task in tasks:
        try:
            keep_log(folder, task.name)
        except Unavailable:  # it would not take the others, after as long a wait for each
            return
        except (InputError, OSError):
            continue


def write_table(sweep: SweepFile, rows: Sequence[Row], picture: FigureFiles | None, about: str) -> AnyPlace:
    """Writes sweep.json, sweep.md and the `picture` (PNG, SVG, CSV), and prints the table; returns its path."""
    by_name = {point.name: point for point in sweep.points}
    names = list(dict.fromkeys(name for row in rows for name in row.names))
    columns = list(dict.fromkeys(name for row in rows for name in row.numbers))
    head = [*sweep.keys, *names, *columns]
    lines = [
        [
            *(
                as_text(by_name[row.point].changes[key]) if key in by_name[row.point].changes else ""
                for key in sweep.keys
            ),
            *(row.names.get(name, "") for name in names),
            *(_number(row.numbers.get(name)) for name in columns),
        ]
        for row in rows
    ]
    lost = [name for name in by_name if name not in {row.point for row in rows}]
    text = f"# Sweep over {', '.join(sweep.keys)}\n\n{about}\n\n{markdown(head, lines)}"
    text += f"\nWithout a result: {', '.join(lost)}.\n" if lost else ""
    text += "\n![the points](sweep.png)\n" if picture is not None else ""
    found = {"keys": sweep.keys, "points": [], "without": lost}
    for row in rows:
        changes = dict(by_name[row.point].changes)
        found["points"].append({"point": row.point, "settings": changes, **row.names, **row.numbers})
    files = {"sweep.json": json.dumps(found, indent=1, ensure_ascii=False).encode() + b"\n", "sweep.md": text.encode()}
    for name, content in (files | ({} if picture is None else picture.named("sweep"))).items():
        with replace_file(sweep.run / name) as temporary:
            temporary.write_bytes(content)
    print(f"{markdown(head, lines)}\n{sweep.run / 'sweep.md'}")
    return sweep.run / "sweep.md"


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]], *, left: bool = False) -> str:
    """A table in Markdown, its columns lined up on the right, or on the left."""
    table = [[cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in (head, *lines)]
    widths = [max(3, *(len(line[at]) for line in table)) for at in range(len(head))]
    lined = str.ljust if left else str.rjust
    padded = [f"| {' | '.join(map(lined, line, widths))} |" for line in table]
    ruler = "|" + "|".join(f":{'-' * (width + 1)}" if left else f"{'-' * (width + 1)}:" for width in widths) + "|"
    return "\n".join([padded[0], ruler, *padded[1:]]) + "\n"


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)
