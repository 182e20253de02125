# SPDX-License-Identifier: Apache-2.0
"""`longpo sweep`: rounds that differ in some settings; what of them is the same is made once. Imports no jax.

RUN/shared/STAGE-DIGEST holds the pairs, and the references, of all points whose settings for that stage are the same;
a point's folder has links to them, and the stages there find them done.
"""

import argparse
import dataclasses
import json
import statistics
from collections.abc import Callable, Mapping
from typing import Any

from longpo_jax.config import LongPOConfig
from longpo_jax.metrics import read_metrics
from longpo_jax.report import drawn
from longpo_jax.stages import STAGES, check_place, has_ended, inputs_of
from rapid_jax.runtime.files import digest
from rapid_jax.runtime.jobs import alone_in
from rapid_jax.runtime.links import make_link
from rapid_jax.runtime.storage import AnyPlace
from rapid_jax.runtime.sweep import Row, Task, perform, write_settings, write_table
from rapid_jax.runtime.sweep_file import SweepFile, read_sweep, settings_of

_SHARED = ("pairs", "reference")  # stages, in their order
_COLUMNS = ("loss", "nll", "kl", "preference", "rewards/margins", "rewards/accuracies", "grad_norm")


def run(options: argparse.Namespace) -> int:
    """Runs the sweep, or goes on with it, and writes its table and figure; 0, or 1 where a point failed."""
    sweep = read_sweep(options.sweep)
    check_place(sweep.run)
    configs = settings_of(sweep, LongPOConfig, ("run", "rounds"))
    configs = {name: _in_folder(config, sweep.run / name) for name, config in configs.items()}
    each = max(mesh.devices for config in configs.values() for mesh in (config.mesh, config.generation.mesh))
    with alone_in(sweep.run) as held:
        tasks = _tasks(sweep, configs)
        status = perform("longpo", sweep, tasks, options, each=each, held=held)
        if not options.print and any(task.is_done() for task in tasks[-len(configs) :]):
            _write(sweep)
    return status


def _in_folder(config: LongPOConfig, folder: AnyPlace) -> LongPOConfig:
    return dataclasses.replace(config, run=str(folder), rounds=())


def _tasks(sweep: SweepFile, configs: Mapping[str, LongPOConfig]) -> list[Task]:
    """A check of all points, the shared stages, and a round a point, in their order; writes their settings."""
    shared: dict[str, tuple[str, LongPOConfig, tuple[str, ...]]] = {}  # name -> stage, settings, stages before
    links: dict[str, dict[str, str]] = {}  # folder -> stage -> where it is made
    for name, config in configs.items():
        links[name] = {}
        for at, stage in enumerate(_SHARED):
            made = f"{stage}-{_key(config, _SHARED[: at + 1])}"
            before = tuple(links[name].values())
            folder = sweep.run / "shared" / made
            shared.setdefault(made, (stage, _in_folder(config, folder), before))
            links.setdefault(f"shared/{made}", {}).update(dict(links[name]))
            links[name][stage] = made
    paths = write_settings(sweep, configs, _deciding)
    # Of a shared stage the name says all that decides: it is made with the settings of the first that needs it.
    paths |= write_settings(sweep, {made: config for made, (_, config, _) in shared.items()}, lambda _: {})
    for folder, stages in links.items():
        for stage, made in stages.items():
            make_link(sweep.run / folder / stage, sweep.run / "shared" / made / stage)

    points = [
        Task(name, _words("round", paths[name]), _ended(sweep.run / name / STAGES[-1]), tuple(links[name].values()))
        for name in configs
    ]
    first = [
        Task(made, _words(stage, paths[made]), _ended(sweep.run / "shared" / made / stage), ("check", *before))
        for made, (stage, _, before) in shared.items()
    ]
    words = ("check", *(str(paths[name]) for name in configs))
    check = Task("check", words, lambda: any(task.is_done() for task in (*first, *points)))
    return [check, *sorted(first, key=lambda task: _SHARED.index(task.words[0])), *points]


def _words(command: str, file: AnyPlace) -> tuple[str, ...]:
    return command, "--config", str(file)


def _ended(folder: AnyPlace) -> Callable[[], bool]:
    return lambda: has_ended(folder)


def _key(config: LongPOConfig, stages: tuple[str, ...]) -> str:
    """What decides what these stages make, as a digest; the speed of making it does not count."""
    inputs = [inputs_of(config, stage) for stage in stages]
    return digest(config.model.source, json.dumps(inputs, sort_keys=True))[:12]


def _deciding(config: LongPOConfig) -> dict[str, Any]:
    """What a folder that is there has to have been begun with."""
    return {"model.source": config.model.source} | {
        key: value for stage in STAGES for key, value in inputs_of(config, stage).items()
    }


def _write(sweep: SweepFile) -> None:
    """The table of all points that are done, and their curves."""
    done = [point.name for point in sweep.points if has_ended(sweep.run / point.name / "train")]
    metrics = {name: read_metrics(sweep.run / name / "train") for name in done}
    rows = [Row(name, {}, _numbers(lines)) for name, lines in metrics.items()]
    about = "Means over the last tenth of a point's updates; the tokens a second are its median."
    write_table(sweep, rows, drawn(metrics) if metrics else None, about)


def _numbers(lines: list[dict]) -> dict[str, float | int | None]:
    last = lines[-max(1, len(lines) // 10) :]
    found: dict[str, float | int | None] = {"updates": lines[-1]["step"]}
    for name in _COLUMNS:
        values = [line[name] for line in last if line.get(name) is not None]
        if values:
            found[name] = statistics.fmean(values)
    speeds = [line["tokens_per_second"] for line in lines if line.get("tokens_per_second") is not None]
    return found | {"tokens_per_second": statistics.median(speeds) if speeds else None}
