# SPDX-License-Identifier: Apache-2.0
"""`longpo plan`: what training needs of a TPU slice, before one is rented: its programs, compiled without hardware."""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from longpo_jax.config import LongPOConfig
from rapid_jax.plan.architectures import SHAPES, Architecture, architecture_of
from rapid_jax.plan.command import DOES_NOT_FIT
from rapid_jax.plan.topologies import GENERATIONS, GIB, Topology, topology_of
from rapid_jax.runtime import settings

_CHANGES = {
    "weights": "split them over more chips: a larger mesh.context, mesh.fsdp or mesh.model",
    "optimizer": "split it over more chips (a larger mesh.context or mesh.fsdp), or optimizer.moments_dtype bfloat16",
    "temporaries": "a larger mesh.context, train.remat layer, train.offload true, or a smaller train.logits_chunk",
    "activations": "a larger mesh.context",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `plan`."""
    parser.add_argument("--config", required=True, metavar="FILE", help="settings, as configs/longpo/*.yaml")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="any setting, section.key=value"
    )
    names = ", ".join(f"{name}:{generation.shapes[0]}" for name, generation in GENERATIONS.items())
    parser.add_argument("--topology", required=True, metavar="NAME", help=f"a TPU slice: {names}, v5p:4x4x4, ...")
    parser.add_argument("--shape", metavar="NAME", help=f"architecture where the folder is not: {', '.join(SHAPES)}")
    parser.add_argument("--layers", type=int, metavar="N", help="plan a model of N layers: for a look at the program")
    parser.add_argument("--program", choices=("gradients", "update"), help="only the program of that name")
    parser.add_argument("--json", action="store_true", help="print one JSON object a program")


def run(options: argparse.Namespace) -> int:
    """Prints the plan; 0 if every program fits, else 3."""
    from rapid_jax.plan.report import advice, examined, table

    config = settings.load(LongPOConfig, Path(options.config), options.set)
    topology = topology_of(options.topology)
    model = architecture_of(config.model.source, options.shape).cut_to(options.layers)
    if not options.json:
        _introduce(config, model, topology)
    fitting = True
    for program in programs_of(config, topology, model):
        if options.program not in (None, program.name):
            continue
        result = examined(program, topology)
        fitting &= result.fits
        print(json.dumps(result.to_json()) if options.json else table([result]), flush=True)
        if not result.fits:
            print(f"longpo: {advice(result, str(config.mesh), _CHANGES)}", file=sys.stderr)
    return 0 if fitting else DOES_NOT_FIT


def programs_of(config: LongPOConfig, topology: Topology, model: Architecture) -> list[Any]:
    """The two programs of an update: the gradient of one microbatch of the longest rows, and the optimizer's step.

    Raises InputError for a mesh that does not divide.
    """
    import jax
    import jax.numpy as jnp

    from longpo_jax.flops import flops_of
    from longpo_jax.optimizer import transform_of
    from longpo_jax.step import Step, TrainState
    from rapid_jax.model.placement import abstract
    from rapid_jax.plan.cost import Work
    from rapid_jax.plan.programs import Program
    from rapid_jax.runtime.axes import TRAINED
    from rapid_jax.runtime.mesh import make_mesh

    if config.model.dtype == "auto":
        config = replace(config, model=replace(config.model, dtype="bfloat16"))
    mesh = make_mesh(config.mesh, topology.devices)
    weights_dtype = jnp.dtype(config.optimizer.weights_dtype)
    table = {**TRAINED, "K": None} if config.mesh.replicate_kv else TRAINED
    decoder = abstract(model.config, layout="stacked", dtype=weights_dtype, mesh=mesh, table=table)
    step = Step(config, decoder, transform_of(config.optimizer, 1000))
    total = step.zero_total(decoder)
    count = jax.ShapeDtypeStruct((), jnp.int32, sharding=jax.NamedSharding(mesh, jax.P()))
    state = TrainState(count, decoder, step.moments(decoder))  # type: ignore[arg-type]
    batch = _batch(config, step)
    rows, devices = config.mesh.data * config.mesh.fsdp, config.mesh.devices
    work = _flops(config, model, flops_of) * rows / devices
    other = {"cache": [], "other": (batch,)}
    resident = {"weights": decoder, "optimizer": (state.moments, total[0])} | other
    recomputed = 4 / 3 if config.train.remat != "none" else 1.0
    gradients = Work(work * recomputed, 2 * jnp.dtype(config.model.dtype).itemsize * _size(decoder))
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((decoder, state.moments, total[0]))) / devices
    calls = config.train.rows_per_step // rows
    return [
        Program(
            "gradients",
            lambda: step.gradients.lower(decoder, total, batch),
            resident,
            gradients,
            gradients.times(calls),
            calls,
        ),
        Program(
            "update", lambda: step.updated.lower(state, total), {**resident, "other": ()}, Work(0, size), Work(0, size)
        ),
    ]


def _batch(config: LongPOConfig, step: Any) -> dict[str, Any]:
    """One microbatch of the longest rows, in shapes."""
    import jax
    import jax.numpy as jnp

    from longpo_jax.rows import PLACES

    rows, name = config.mesh.data * config.mesh.fsdp, config.objective.name
    sizes = {"": config.train.lengths[-1] + step.tail}
    if name == "solopo":
        sizes["short_"] = config.excerpts.max_tokens + 2 * config.train.tail
    shapes = {f"{kind}{place}": (rows, size) for kind, size in sizes.items() for place in PLACES}
    shapes |= {f"{kind}reach_B": (rows,) for kind in sizes}
    floats = {"sft": (), "solopo": ("chosen", "rejected", "long_chosen")}.get(name, ("chosen", "rejected"))
    shapes |= {f"reference_{sums}_B": (rows,) for sums in floats}

    def shaped(key: str, shape: tuple[int, ...]) -> Any:
        sharding = jax.NamedSharding(step.mesh, step.strategy.spec(key))
        return jax.ShapeDtypeStruct(shape, jnp.float32 if "reference" in key else jnp.int32, sharding=sharding)

    return {key: shaped(key, shape) for key, shape in shapes.items()}


def _flops(config: LongPOConfig, model: Architecture, flops_of: Any) -> float:
    """Of one full row whose rejected turns are as long as its chosen ones."""
    import numpy as np

    from longpo_jax.dialogue import Branch
    from longpo_jax.rows import batched, packed

    trunk, tail = config.train.lengths[-1], config.train.tail
    turns = Branch([0] * tail, [1] * tail)
    row = packed(np.zeros(trunk - tail + 1, np.int32).tolist(), turns, turns, trunk=trunk, tail=tail)
    return float(flops_of(model.config, batched([row], trunk=trunk, devices=1)))


def _size(decoder: Any) -> int:
    import jax

    return sum(x.size for x in jax.tree.leaves(decoder))


def _introduce(config: LongPOConfig, model: Architecture, topology: Topology) -> None:
    """What is planned: a plan is as good as its assumptions."""
    shape, train, chip = model.config, config.train, topology.generation
    print(
        f"model     {config.model.source}: {shape.num_layers} layers of {shape.hidden_size}, {shape.num_heads} heads, "
        f"{shape.num_kv_heads} kv, vocabulary {shape.vocab_size} ({model.said_by})"
    )
    print(
        f"rows      {train.lengths[-1]} + {train.tail} places, {train.rows_per_step} an update; objective "
        f"{config.objective.name}, remat {train.remat}{', offloaded' if train.offload else ''}"
    )
    where = f"{topology.name}, {len(topology.devices)} of {chip.hbm_bytes / GIB:.2f} GiB for programs"
    print(f"devices   {where}; mesh {config.mesh}")
