# SPDX-License-Identifier: Apache-2.0
"""`rapid plan`: what a run needs of a TPU slice, before one is rented."""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from rapid_jax.config import RapidConfig
from rapid_jax.plan.architectures import SHAPES, Architecture, architecture_of
from rapid_jax.plan.topologies import GENERATIONS, GIB, Topology, topology_of
from rapid_jax.runtime import settings
from rapid_jax.runtime.errors import InputError

DOES_NOT_FIT = 3  # exit status


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `plan`."""
    parser.add_argument("--config", required=True, metavar="FILE", help="settings, as configs/rapid/*.yaml")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="any setting, section.key=value"
    )
    names = ", ".join(f"{name}:{generation.shapes[0]}" for name, generation in GENERATIONS.items())
    parser.add_argument("--topology", required=True, metavar="NAME", help=f"a TPU slice: {names}, v5p:4x4x4, ...")
    shapes = f"one of {', '.join(SHAPES)}"
    parser.add_argument("--shape", metavar="NAME", help=f"architecture of the target where its folder is not: {shapes}")
    parser.add_argument("--drafter-shape", metavar="NAME", help="the same of the drafter")
    parser.add_argument("--context", type=int, metavar="N", help="tokens of prompt and answer, for models.max_context")
    parser.add_argument("--layers", type=int, metavar="N", help="plan models of N layers: for a look at the program")
    parser.add_argument("--program", metavar="NAME", help="only the program of that name")
    parser.add_argument("--json", action="store_true", help="print one JSON object a program")


def run(options: argparse.Namespace) -> int:
    """Prints the plan; 0 if every program fits, else 3."""
    from rapid_jax.plan.report import advice, examined, table

    config = settings.load(RapidConfig, Path(options.config), options.set)
    for name, kind in (("models.drafter_weights", config.models.drafter_weights), ("compute.kv", config.compute.kv)):
        if kind != "full":
            raise InputError(f"{name}: plans are of full weights and caches, expected full, got {kind}")
    topology = topology_of(options.topology)
    models = _architectures(config, options)
    context = _context(config, models[0], options.context)
    if not options.json:
        _introduce(config, models, topology, context)
    fitting = True
    for program in _programs(config, topology, models, context, options.program):
        result = examined(program, topology)
        fitting &= result.fits
        print(json.dumps(result.to_json()) if options.json else table([result]), flush=True)
        if not result.fits:
            apart = program.name in ("draft", "drafter prefill") and config.drafter_mesh
            mesh = config.drafter_mesh if apart and config.drafter_mesh else config.mesh
            print(f"rapid: {advice(result, str(mesh))}", file=sys.stderr)
    return 0 if fitting else DOES_NOT_FIT


def _architectures(config: RapidConfig, options: argparse.Namespace) -> tuple[Architecture, Architecture | None]:
    target = architecture_of(config.models.target, options.shape).cut_to(options.layers)
    if config.models.drafter == "same":
        if options.drafter_shape is not None:
            raise InputError("--drafter-shape: models.drafter is same: the drafter has the target's architecture")
        return target, None
    return target, architecture_of(config.models.drafter, options.drafter_shape).cut_to(options.layers)


def _context(config: RapidConfig, target: Architecture, given: int | None) -> int:
    context = given if given is not None else config.models.max_context or target.config.context_size
    if context <= config.sampling.max_new_tokens:
        least = config.sampling.max_new_tokens
        raise InputError(f"--context: expected more than the {least} tokens of the answer, got {context}")
    return context


def _programs(
    config: RapidConfig,
    topology: Topology,
    models: tuple[Architecture, Architecture | None],
    context: int,
    only: str | None,
) -> Iterator:
    from rapid_jax.plan.programs import programs_of

    programs = programs_of(config, topology.devices, *models, context)
    if only is not None and only not in [program.name for program in programs]:
        raise InputError(f"--program: expected one of {', '.join(x.name for x in programs)}, got {only}")
    return (program for program in programs if only in (None, program.name))


def _introduce(config: RapidConfig, models: Sequence[Architecture | None], topology: Topology, context: int) -> None:
    """What is planned: a plan is as good as its assumptions."""
    target, drafter = models
    chip = topology.generation
    assert target is not None
    print(f"target    {config.models.target}: {_said(target)}")
    print(f"drafter   {'the target itself' if drafter is None else f'{config.models.drafter}: {_said(drafter)}'}")
    beyond = context > target.config.context_size
    note = f", beyond the target's {target.config.context_size}: it needs rope scaling for that" if beyond else ""
    print(f"context   {context} tokens of prompt and answer{note}")
    where = f"mesh {config.mesh}" + (f"; drafter_mesh {config.drafter_mesh}" if config.drafter_mesh else "")
    print(f"devices   {topology.name}, {len(topology.devices)} of {chip.hbm_bytes / GIB:.2f} GiB for programs; {where}")


def _said(architecture: Architecture) -> str:
    config = architecture.config
    sizes = f"{config.num_layers} layers of {config.hidden_size}, {config.num_heads} heads, {config.num_kv_heads} kv"
    return f"{sizes}, vocabulary {config.vocab_size} ({architecture.said_by})"
