# SPDX-License-Identifier: Apache-2.0
"""`rapid plan`: what a run needs of a TPU slice or a GPU, before one is rented."""

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from rapid_jax.config import RapidConfig
from rapid_jax.plan.architectures import SHAPES, Architecture, architecture_of
from rapid_jax.plan.topologies import FRACTION_NAMES, GENERATIONS, GIB, GPUS, Topology, card_of, topology_of
from rapid_jax.runtime import settings
from rapid_jax.runtime.command_line import Place
from rapid_jax.runtime.errors import InputError

DOES_NOT_FIT = 3  # exit status
LARGEST_SHARE = 0.95  # of a GPU's memory that JAX may well be given: the rest is CUDA's own


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `plan`."""
    parser.add_argument(
        "--config", required=True, action=Place, reads=True, metavar="FILE", help="settings, as configs/rapid/*.yaml"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="any setting, section.key=value"
    )
    names = ", ".join(f"{name}:{generation.shapes[0]}" for name, generation in GENERATIONS.items())
    parser.add_argument(
        "--topology",
        required=True,
        metavar="NAME",
        help=f"a TPU slice: {names}, v5p:4x4x4, ...; or one GPU: {', '.join(GPUS)}",
    )
    shapes = f"one of {', '.join(SHAPES)}"
    parser.add_argument("--shape", metavar="NAME", help=f"architecture of the target where its folder is not: {shapes}")
    parser.add_argument("--drafter-shape", metavar="NAME", help="the same of the drafter")
    parser.add_argument("--context", type=int, metavar="N", help="tokens of prompt and answer, for models.max_context")
    parser.add_argument("--layers", type=int, metavar="N", help="plan models of N layers: for a look at the program")
    parser.add_argument("--program", metavar="NAME", help="only the program of that name")
    parser.add_argument("--json", action="store_true", help="print one JSON object a program, and one of the speed")


def run(options: argparse.Namespace) -> int:
    """Prints the plan; 0 if every program fits, else 3."""
    from rapid_jax.plan.report import examine, table
    from rapid_jax.plan.speed import predicted, said

    config = settings.load(RapidConfig, options.config, options.set)
    topology = _topology(config, options.topology)
    models = _architectures(config, options)
    context = _context(config, models[0], options.context)
    if not options.json:
        _introduce(config, models, topology, context)
    fitting = True
    for program in _programs(config, topology, models, context, options.program):
        result = examine(program, topology)
        fitting &= result.fits
        print(json.dumps(result.to_json()) if options.json else table([result]), flush=True)
        if not result.fits:
            print(f"rapid: {_advice(result, config, topology)}", file=sys.stderr)
    if topology.generation.platform == "tpu" and options.program is None:  # of a GPU `rapid bench` says what it takes
        speed = predicted(config, topology.devices, *models, context, topology.generation)
        if speed is not None:
            print(json.dumps({"predicted": speed.to_json()}) if options.json else "\n".join(said(speed)))
    return 0 if fitting else DOES_NOT_FIT


def _topology(config: RapidConfig, name: str) -> Topology:
    """The slice or the GPU; raises InputError, before any compiler is loaded, for settings that it is not planned with.

    Weights in 4 bits are for one GPU.
    """
    card = card_of(name)
    if card is not None:
        return card
    if config.models.drafter_weights == "int4":
        raise InputError("models.drafter_weights: TPUs take full and int8, got int4 (a GPU: --topology h200)")
    return topology_of(name)


def _advice(result: Any, config: RapidConfig, topology: Topology) -> str:
    """What to change about a program that does not fit."""
    from rapid_jax.plan.report import advice

    if topology.generation.platform == "tpu":
        apart = result.program in ("draft", "drafter prefill") and config.drafter_mesh
        return advice(result, str(config.drafter_mesh if apart and config.drafter_mesh else config.mesh))
    share = result.bytes_per_chip["peak"] / GPUS[topology.name].hbm_bytes
    if share <= LARGEST_SHARE:
        least = math.ceil(share * 100) / 100
        more = f"the card has room for it, {FRACTION_NAMES[0]}={least:.2f} or more in the run's environment gives it"
        return advice(
            result, f"{topology.generation.hbm_bytes / GIB:.2f} GiB", dict.fromkeys(result.bytes_per_chip, more)
        )
    shorter = "a lower models.max_context, or a card with more memory"
    reading = result.program == "round" and config.compute.kv == "full"
    changes = {
        "weights": "a smaller target, models.drafter same, models.drafter_weights full or int4, models.target_weights "
        "int8 (lossy), or a TPU slice",
        "cache": f"compute.kv int8, {shorter}" if reading else shorter,
    }
    return advice(result, f"{topology.name}, compute.prefill_chunk {config.compute.prefill_chunk}", changes)


def _architectures(config: RapidConfig, options: argparse.Namespace) -> tuple[Architecture, Architecture | None]:
    target = architecture_of(config.models.target, options.shape).cut_to(options.layers)
    if config.models.has_one_checkpoint:
        if options.drafter_shape is not None:
            drafter = config.models.drafter
            raise InputError(f"--drafter-shape: models.drafter is {drafter}: it has the target's architecture")
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
    kind, kv = config.models.drafter_weights, config.compute.kv
    copy = "" if kind == "full" else f", in {kind}"
    if config.models.target_weights != "full":
        print(f"          in {config.models.target_weights}: the answer is the copy's")
    print(f"drafter   {'the target itself' if drafter is None else f'{config.models.drafter}: {_said(drafter)}'}{copy}")
    beyond = context > target.config.context_size
    note = f", beyond the target's {target.config.context_size}: it needs rope scaling for that" if beyond else ""
    print(
        f"context   {context} tokens of prompt and answer{note}{'' if kv == 'full' else f'; keys and values in {kv}'}"
    )
    where = f"mesh {config.mesh}" + (f"; drafter_mesh {config.drafter_mesh}" if config.drafter_mesh else "")
    memory = f"{chip.hbm_bytes / GIB:.2f} GiB for programs"
    if chip.platform == "gpu":
        total = GPUS[topology.name].hbm_bytes
        share = f"{chip.hbm_bytes / total:.0%} of {total / GIB:.2f}, as JAX takes it ({FRACTION_NAMES[0]})"
        memory += f", {share}, nothing is compiled"
    print(f"devices   {topology.name}, {len(topology.devices)} of {memory}; {where}")


def _said(architecture: Architecture) -> str:
    config = architecture.config
    sizes = f"{config.num_layers} layers of {config.hidden_size}, {config.num_heads} heads, {config.num_kv_heads} kv"
    return f"{sizes}, vocabulary {config.vocab_size} ({architecture.said_by})"
