# SPDX-License-Identifier: Apache-2.0
"""`longpo check`: what a run makes and needs, in seconds and before anything is rented; what would fail is said."""

import argparse
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from longpo_jax.config import LongPOConfig
from longpo_jax.findings import Findings
from longpo_jax.objectives import objective_of
from longpo_jax.room import (
    Room,
    bytes_of_checkpoint,
    bytes_of_copies,
    bytes_on_disk,
    check_copies,
    check_places,
    most_checkpoints,
    short_together,
)
from longpo_jax.round import folder_of, rounds_of
from longpo_jax.share_findings import add_shares
from longpo_jax.stages import STAGES, check_place, has_ended, stage_in, summary_of
from rapid_jax.plan.architectures import SHAPES, Architecture, architecture_of
from rapid_jax.plan.topologies import FRACTION, GENERATIONS, GIB, GPUS, chips_of, generation_of
from rapid_jax.runtime import settings
from rapid_jax.runtime.command_line import Place, prepare_jax, say
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.share import Share, shares_of
from rapid_jax.runtime.storage import AnyPlace
from rapid_jax.runtime.sweep import markdown

WOULD_FAIL = 2
_HEAD = ("what", "needed or expected", "there")


@dataclass(frozen=True)
class Machine:
    """Where a run is to be: so many devices, each with so much memory (None: not known)."""

    name: str
    devices: int
    memory: int | None
    shared: bool = False  # the devices share the memory, as those of a CPU do
    bfloat16: bool = True  # the arithmetic of dtype auto


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `check`."""
    parser.add_argument("configs", nargs="+", action=Place, reads=True, metavar="CONFIG", help="settings of a run")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="any setting, section.key=value"
    )
    names = ", ".join(f"{name}:{generation.shapes[0]}" for name, generation in GENERATIONS.items())
    parser.add_argument(
        "--topology",
        metavar="NAME",
        help=f"the slice or GPU meant, {names}, {', '.join(GPUS)}; else this machine",
    )
    parser.add_argument(
        "--share", metavar="I/N", help="and what a host does that makes pairs with --share I/N or any/N"
    )
    parser.add_argument("--shape", metavar="NAME", help=f"architecture where the folder is not: {', '.join(SHAPES)}")


def run(options: argparse.Namespace) -> int:
    """Prints a table a run; 0, or 2 with a line for each thing that would fail."""
    status = 0
    configs = [(path, settings.load(LongPOConfig, path, options.set)) for path in options.configs]
    shares = shares_of(options.share) if options.share is not None else ()
    prepare_jax(programs=False)
    machine, rooms = machine_of(options.topology), []
    for path, config in configs:
        found = Findings(here=options.topology is None)
        rooms.append(examine(config, machine, found, options.shape, shares))
        if len(configs) > 1:
            print(f"{path}\n")
        print(markdown(_HEAD, found.lines, left=True), flush=True)
        for fault in found.faults:
            say(f"longpo: {path}: {fault}")
        status = WOULD_FAIL if found.faults else status
    if options.topology is None:
        for fault in short_together(filter(None, rooms)):
            say(f"longpo: {fault}")
            status = WOULD_FAIL
    return status


def machine_of(topology: str | None) -> Machine:
    """The slice or GPU of that name, which need not be there; None: this machine. Raises InputError for no name."""
    if topology is None:
        import jax

        devices = jax.devices()
        if devices[0].platform == "cpu":
            memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
            return Machine("this machine's CPU", len(devices), memory, shared=True, bfloat16=False)
        memory = (devices[0].memory_stats() or {}).get("bytes_limit")
        return Machine(f"{devices[0].device_kind} here", len(devices), memory)
    if (card := GPUS.get(topology.lower())) is not None:
        return Machine(topology, 1, int(FRACTION * card.hbm_bytes))
    generation = generation_of(topology)
    return Machine(topology, chips_of(topology) * generation.devices_per_chip, generation.hbm_bytes)


def examine(
    config: LongPOConfig,
    machine: Machine,
    found: Findings,
    shape: str | None = None,
    shares: Sequence[Share] = (),
) -> Room | None:
    """Finds all that there is of a run, of each round if it has several; the room that it needs on a disk here.

    `shares` are those of the pairs that a host is asked for.
    """
    rounds = found.try_("rounds", lambda: rounds_of(config)) if config.rounds else [config]
    _packages(config, found)
    tokenizer = _model(config, found)
    architecture = found.try_("architecture", lambda: architecture_of(config.model.source, shape))
    space, reached, ended = 0, True, True
    for number, single in enumerate(rounds or (), 1):
        before = f"round {number}: " if config.rounds else ""
        done = _done(single, before, found) if reached else None
        reached, ended = reached and done is not None, ended and STAGES[-1] in (done or ())
        space += _round(single, before, done, architecture, tokenizer, machine, found, shares)
    passing = 0 if architecture is None else bytes_of_checkpoint(config, _parameters(architecture.config))
    room = check_places(config, 0 if ended else space, passing, found, reached=reached)
    if config.train.emergency_folder is not None and architecture is not None and not ended:
        copies = bytes_of_copies(config, _parameters(architecture.config), machine.devices)
        check_copies(config, copies, room, found)
    found.add("memory, exact", "longpo plan --config CONFIG --topology NAME", "of a TPU slice; compiles, for minutes")
    return room


def _packages(config: LongPOConfig, found: Findings) -> None:
    from longpo_jax.metrics import check_installed

    try:
        check_installed(config.train)
    except InputError as error:
        found.add_of_here("packages", "", str(error), str(error))


def _done(config: LongPOConfig, before: str, found: Findings) -> list[str] | None:
    """The stages of a round that are done; None where its folder cannot be read, which is a fault."""
    folder = folder_of(config)
    done = found.try_(f"{before}run", lambda: [stage for stage in STAGES if has_ended(stage_in(folder, stage))])
    if done:
        found.add(f"{before}done already", "", ", ".join(done))
    return done


def _model(config: LongPOConfig, found: Findings) -> Any:
    """The tokenizer of the model, None where it cannot be read."""
    from rapid_jax.model.load import open_checkpoint

    opened = found.try_("model", lambda: open_checkpoint(config.model.source))
    if opened is None:
        return None
    found.add("model", config.model.source, f"{_parameters(opened[0].config) / 1e9:.3g} B weights")
    return opened[1]


def _round(
    config: LongPOConfig,
    before: str,
    done: list[str] | None,
    architecture: Architecture | None,
    tokenizer: Any,
    machine: Machine,
    found: Findings,
    shares: Sequence[Share],
) -> int:
    """The lines of one round; the bytes that it writes. `done` is None where its folder cannot be read."""
    from longpo_jax.checks import check_rows

    found.try_(f"{before}rows", lambda: check_rows(config))
    found.try_(f"{before}checkpoints", lambda: check_place(folder_of(config)))
    made = stage_in(folder_of(config), "pairs") if "pairs" in (done or ()) else None
    text, turns, steps, documents = _pairs(config, before, made, tokenizer, found)
    if made is None and done is not None:
        found.try_(f"{before}shares", lambda: add_shares(config, before, shares, documents, found))
    text += _reference(config, before, turns, architecture, found)
    kept, bound = f"train.keep {config.train.keep}, one more while it is written", "at most"
    if config.train.keep_every is not None:
        kept += f", train.keep_every {config.train.keep_every}"
        if steps is None:
            kept, bound = f"{kept} (not counted: the updates are not known)", "at least"
    found.add(f"{before}checkpoints", f"{bound} {most_checkpoints(config.train, steps):,}", kept)
    if architecture is None:
        return text
    _devices(config, before, architecture, machine, found)
    return text + bytes_on_disk(config, _parameters(architecture.config), steps)


def _pairs(
    config: LongPOConfig, before: str, made: AnyPlace | None, tokenizer: Any, found: Findings
) -> tuple[int, int, int | None, int | None]:
    """Documents, pairs (those that were made, if they were), rows, updates and the peak rate.

    (The documents' bytes, turns, updates, documents at most): 0 turns and None where that is not known.
    """
    from longpo_jax.corpus_estimate import estimate
    from longpo_jax.train import steps_of

    text, turns, most, known = 0, 0, None, ""
    if made is not None:
        summary = summary_of(made)
        most, turns, known = summary["pairs"], summary["turns"], "made already"
    elif tokenizer is not None:
        corpus = found.try_(f"{before}corpus", lambda: estimate(config.corpus, tokenizer, config.seed))
        if corpus is not None:
            text, most, known = corpus.bytes, corpus.documents, "at most: answers that are of no use are dropped"
            turns = (most or 0) * config.excerpts.per_document
            count = "not known" if most is None else f"{'' if corpus.exact else 'about '}{most:,}"
            found.add(f"{before}documents", count, corpus.said)
    if most is None:
        return text, 0, None, None
    found.add(f"{before}pairs", f"{most:,} with {turns:,} turns", known)
    rows = (turns if objective_of(config.objective.name).row == "turn" else most) * config.train.epochs
    found.add(f"{before}rows", f"{rows:,}", f"{rows // config.train.epochs:,} an epoch")
    steps = found.try_(f"{before}updates", lambda: steps_of(config, rows))
    if steps is not None:
        found.add(f"{before}updates", f"{steps:,}", f"{config.train.rows_per_step} rows each")
        found.add(f"{before}peak learning rate", f"{_peak(config, steps):.3g}", f"{config.optimizer.schedule}")
    return text, turns, steps, most


def _reference(
    config: LongPOConfig, before: str, turns: int, architecture: Architecture | None, found: Findings
) -> int:
    """What the teacher takes on disk, in bytes; 0 for objectives without one, whose few sums are not counted."""
    from longpo_jax.teacher import bytes_per_token, check_top_k

    if not objective_of(config.objective.name).teacher:
        return 0
    if architecture is not None:
        found.try_(f"{before}reference", lambda: check_top_k(config.objective.top_k, architecture.config.vocab_size))
    size, longest = bytes_per_token(config.objective.top_k), config.pairs.max_new_tokens + 1  # and the end token
    space = round(turns * longest * size)
    each = f"{size:.0f} bytes an answer token (objective.top_k {config.objective.top_k}), {longest:,} a turn at most"
    found.add(f"{before}reference", f"at most {space / GIB:.2f} GiB" if turns else "not known", each)
    return space


def _peak(config: LongPOConfig, steps: int) -> float:
    import numpy as np

    from longpo_jax.optimizer import schedule_of

    return float(np.max(np.asarray(schedule_of(config.optimizer, steps)(np.arange(steps)))))


def _devices(config: LongPOConfig, before: str, model: Architecture, machine: Machine, found: Findings) -> None:
    """Devices and the memory of each, for pairs and for training."""
    from longpo_jax.checks import MESHES, check_mesh
    from longpo_jax.memory import abstract_mesh, of_generation, of_training

    dtype = config.model.dtype if config.model.dtype != "auto" else ("bfloat16" if machine.bfloat16 else "float32")
    config = replace(config, model=replace(config.model, dtype=dtype))
    for name, needs in (("generation.mesh", of_generation), ("mesh", of_training)):
        mesh = MESHES[name](config)[0]
        few = mesh.devices > machine.devices
        fault = f"{name}: expected {mesh.devices} devices, got {machine.devices} ({machine.name})" if few else ""
        found.add(f"{before}devices of {name}", str(mesh.devices), f"{machine.devices}, {machine.name}", fault)
        divides = found.try_(
            f"{before}{name}", lambda name=name: check_mesh(name, config, model.config, abstract_mesh) or True
        )
        if divides is None:
            continue
        stage = "pairs" if name == "generation.mesh" else "train"
        parts = needs(config, model.config)
        whole = sum(parts.values()) * (mesh.devices if machine.shared else 1)
        there = "not known" if machine.memory is None else f"{machine.memory / GIB:.2f} GiB"
        short = machine.memory is not None and whole > machine.memory
        said = ", ".join(f"{part} {size / GIB:.2f}" for part, size in parts.items())
        fault = f"{stage}: expected at least {whole / GIB:.2f} GiB of memory a device ({said}), got {there}"
        per = "in all" if machine.shared else "a device"
        found.add(
            f"{before}memory, {stage}", f"at least {whole / GIB:.2f} GiB {per}: {said}", there, fault if short else ""
        )


def _parameters(model: Any) -> int:
    from rapid_jax.model.hf_names import weights

    return sum(math.prod(weight.stored_shape) for weight in weights(model))
