# SPDX-License-Identifier: Apache-2.0
"""`longpo plan`: what training needs of a TPU slice, before one is rented: its programs, compiled without hardware."""

import argparse
import json
import sys
from dataclasses import replace
from typing import Any

from longpo_jax.config import LongPOConfig
from longpo_jax.objectives import objective_of
from rapid_jax.plan.architectures import SHAPES, Architecture, architecture_of
from rapid_jax.plan.command import DOES_NOT_FIT
from rapid_jax.plan.topologies import GENERATIONS, GIB, Topology, topology_of
from rapid_jax.runtime import settings
from rapid_jax.runtime.command_line import Place

_CHANGES = {
    "weights": "split them over more chips: a larger mesh.context, mesh.fsdp or mesh.model",
    "optimizer": "split it over more chips (a larger mesh.context or mesh.fsdp), or optimizer.moments_dtype bfloat16",
    "temporaries": "a larger mesh.context, train.remat layer, train.offload true, or a smaller train.logits_chunk",
    "activations": "a larger mesh.context",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `plan`."""
    parser.add_argument(
        "--config", required=True, action=Place, reads=True, metavar="FILE", help="settings, as configs/longpo/*.yaml"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="any setting, section.key=value"
    )
    names = ", ".join(f"{name}:{generation.shapes[0]}" for name, generation in GENERATIONS.items())
    parser.add_argument("--topology", required=True, metavar="NAME", help=f"a TPU slice: {names}, v5p:4x4x4, ...")
    parser.add_argument("--shape", metavar="NAME", help=f"architecture where the folder is not: {', '.join(SHAPES)}")
    parser.add_argument("--length", type=int, metavar="N", help="places of the longest row, for train.lengths")
    parser.add_argument("--layers", type=int, metavar="N", help="plan a model of N layers: for a look at the program")
    parser.add_argument("--program", choices=("gradients", "update"), help="only the program of that name")
    parser.add_argument("--json", action="store_true", help="print one JSON object a program")


def run(options: argparse.Namespace) -> int:
    """Prints the plan; 0 if every program fits, else 3."""
    from rapid_jax.plan.report import advice, examine, table

    config = _longest(settings.load(LongPOConfig, options.config, options.set), options.length)
    topology = topology_of(options.topology)
    model = architecture_of(config.model.source, options.shape).cut_to(options.layers)
    if not options.json:
        _introduce(config, model, topology)
    fitting = True
    for program in programs_of(config, topology, model):
        if options.program not in (None, program.name):
            continue
        result = examine(program, topology)
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

    from longpo_jax.optimizer import transform_of
    from longpo_jax.step import Step, TrainState
    from rapid_jax.model.placement import abstract
    from rapid_jax.plan.cost import Work, matrices_read
    from rapid_jax.plan.programs import Program
    from rapid_jax.runtime.axes import TRAINED, with_copied_kv
    from rapid_jax.runtime.mesh import make_mesh

    if config.model.dtype == "auto":
        config = replace(config, model=replace(config.model, dtype="bfloat16"))
    mesh = make_mesh(config.mesh, topology.devices)
    table = with_copied_kv(TRAINED, config.mesh.replicate_kv)
    decoder = abstract(model.config, layout="stacked", dtype=jnp.dtype("float32"), mesh=mesh, table=table)
    step = Step(config, decoder, transform_of(config.optimizer, 1000))
    total, moments = step.zero_total(decoder), step.moments(decoder)
    count = jax.ShapeDtypeStruct((), jnp.int32, sharding=jax.NamedSharding(mesh, jax.P()))
    state = TrainState(count, decoder, moments)  # type: ignore[arg-type]
    rows, row = config.mesh.data * config.mesh.fsdp, _full_row(config)
    batch = {name: _lying(step, name, array, rows) for name, array in row.items()}
    passes = 2 if config.train.remat == "none" else 3  # that read a layer's weights
    tokens = config.train.lengths[-1] / config.mesh.context
    read = passes * step.dtype.itemsize * matrices_read(model.config, tokens) / config.mesh.model
    gradients = Work(_flops(config, model, row)[1] * rows / config.mesh.devices, read)
    held = jax.tree.leaves((decoder, moments, total[0]))
    update = Work(0, sum(x.size * x.dtype.itemsize for x in held) / config.mesh.devices)
    calls = config.train.rows_per_step // rows
    resident = {"weights": decoder, "optimizer": (moments, total[0])}

    def lower() -> Any:
        return step.gradients.lower(decoder, total, batch)

    return [
        Program("gradients", lower, {**resident, "other": batch}, gradients, gradients.times(calls), calls),
        Program("update", lambda: step.updated.lower(state, total), resident, update, update),
    ]


def _longest(config: LongPOConfig, length: int | None) -> LongPOConfig:
    """With rows of at most `length` places."""
    if length is None:
        return config
    lengths = (*(other for other in config.train.lengths if other < length), length)
    return replace(config, train=replace(config.train, lengths=lengths))


def _full_row(config: LongPOConfig) -> dict[str, Any]:
    """The arrays of one row of full length, [1, T], its rejected turns as long as its chosen ones."""
    import numpy as np

    from longpo_jax.dialogue import Branch
    from longpo_jax.rows import batch_rows, packed
    from rapid_jax.speculative.chunk_layout import bucket

    train, wanted, devices = config.train, objective_of(config.objective.name), config.mesh.context

    def arrays(trunk: int, *, forked: bool) -> dict[str, Any]:
        answers = min(train.tail, trunk // 2)
        branch = Branch([0] * answers, [1] * answers)
        shared, tail = [0] * (trunk - answers + 1), train.tail if forked else 0
        row = packed(shared, branch, branch if forked else None, trunk=trunk, tail=tail)
        return dict(batch_rows([row], trunk=trunk, devices=devices))

    row = arrays(train.lengths[-1], forked=wanted.forked)
    if wanted.short:
        short = bucket(config.excerpts.max_tokens + train.tail, 128 * devices)
        row |= {f"short_{key}": array for key, array in arrays(short, forked=True).items()}
    if wanted.teacher:
        top = np.zeros((1, train.tail, config.objective.top_k), np.int32)
        row |= {"reference_ids_BTJ": top, "reference_log_probs_BTJ": top.astype(np.float32)}
        row["reference_rest_BT"] = np.zeros((1, train.tail), np.float32)
    return row | {f"reference_{kind}_B": np.zeros(1, np.float32) for kind in wanted.of_reference}


def _lying(step: Any, name: str, array: Any, rows: int) -> Any:
    """The shape of as many rows as a microbatch has, where they lie."""
    import jax

    sharding = jax.NamedSharding(step.mesh, step.strategy.spec(name))
    return jax.ShapeDtypeStruct((rows, *array.shape[1:]), array.dtype, sharding=sharding)


def _flops(config: LongPOConfig, model: Architecture, row: dict[str, Any]) -> tuple[float, float]:
    """(FLOPs that the model needs for a row, FLOPs that are computed).

    Computed again are the logits; by remat all of a layer but an MLP's last product and, unless it is kept, attention;
    and the scores of attention, by its backward kernels: 7 products of queries and keys where the model needs 4.
    """
    from longpo_jax.flops import flops_of, logits_of, tokens_of
    from rapid_jax.plan.cost import matrices

    shape, remat = model.config, config.train.remat
    nll = config.objective.nll
    needed, tokens, logits = float(flops_of(shape, nll, row)), float(tokens_of(row)), float(logits_of(row, nll))
    layers, head = matrices(shape), shape.hidden_size * shape.vocab_size
    attention = needed - 6 * (layers * tokens + head * logits)
    again = 2 * head * logits + attention * 3 / 6
    if remat != "none":
        dense = sum(
            not shape.kinds[kind].experts for kind in shape.kind_of
        )  # the router's gradient needs experts' last
        again += 2 * (layers - dense * shape.intermediate_size * shape.hidden_size) * tokens
    if remat == "layer":
        again += attention * 2 / 6
    return needed, needed + again


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
    needed, computed = _flops(config, model, _full_row(config))
    print(f"row       {needed:.3g} FLOPs by the model; {computed:.3g} with what is computed again")
    where = f"{topology.name}, {len(topology.devices)} of {chip.hbm_bytes / GIB:.2f} GiB for programs"
    print(f"devices   {where}; mesh {config.mesh}")
