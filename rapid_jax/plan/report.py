# SPDX-License-Identifier: Apache-2.0
"""A program, compiled or counted, against the chip: bytes by kind, the least time, and whether it fits."""

import math
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from rapid_jax.plan.hlo import Collective, collectives, totals
from rapid_jax.plan.programs import Program
from rapid_jax.plan.topologies import GIB, Generation, Topology

LANES, SUBLANES = 128, 8  # of a tile of 32-bit numbers, into which the device's memory is divided


@dataclass(frozen=True)
class Result:
    """One program on one topology; bytes, FLOPs and collectives are of one device and one call, the longest."""

    program: str
    topology: str
    chips: int
    hbm_bytes: int  # that a program may use
    bytes_per_chip: Mapping[str, int]  # weights, optimizer, cache, activations, temporaries, and the peak of them all
    flops_per_chip: float
    collectives: Mapping[str, Mapping[str, int]]
    roofline_seconds: float  # of the longest call
    roofline: Mapping[str, float]  # seconds of the longest call: compute, hbm, interconnect
    calls: int
    total_seconds: float  # roofline of all calls: of a prompt's chunks the earlier ones attend to fewer tokens
    compile_seconds: float | None  # None: counted, not compiled
    fits: bool
    text: str = ""  # of the compiled program; empty if it did not compile

    @property
    def alike(self) -> bool:
        """Whether all calls take the same."""
        return self.total_seconds > 0.999 * self.calls * self.roofline_seconds

    def to_json(self) -> dict[str, Any]:
        """Plain values, without the program's text."""
        return {name: value for name, value in vars(self).items() if name != "text"}


def examine(program: Program, topology: Topology) -> Result:
    """Compiles the program for the topology. One that the compiler finds too large is a result, too.

    For a GPU nothing is compiled: what stays is counted, and working memory is what the program's rule says.
    """
    chip = topology.generation
    counted = chip.platform == "gpu"
    start = time.perf_counter()
    made, added, text, found = (0, program.working, "", []) if counted else _compile_and_read(program, chip)
    seconds = None if counted else time.perf_counter() - start
    size = dense_bytes if counted else tiled_bytes
    kinds = {name: size(program.resident.get(name, ())) for name in ("weights", "optimizer", "cache", "other")}
    kinds["activations"] = kinds.pop("other") + min(made, added)
    kinds["temporaries"] = added - min(made, added)
    kinds["peak"] = sum(kinds.values())
    roofline = {
        "compute": program.work.flops / chip.flops,
        "hbm": program.work.hbm_bytes / chip.hbm_rate,
        "interconnect": sum(map(lambda item: _seconds(item, chip), found)),
    }
    total = (program.total.flops / chip.flops, program.total.hbm_bytes / chip.hbm_rate)
    return Result(
        program=program.name,
        topology=topology.name,
        chips=topology.chips,
        hbm_bytes=chip.hbm_bytes,
        bytes_per_chip=kinds,
        flops_per_chip=program.work.flops,
        collectives=totals(found),
        roofline_seconds=max(roofline.values()),
        roofline=roofline,
        calls=program.calls,
        total_seconds=max(*total, roofline["interconnect"] * program.calls),
        compile_seconds=seconds,
        fits=kinds["peak"] <= chip.hbm_bytes,
        text=text,
    )


def _compile_and_read(program: Program, chip: Generation) -> tuple[int, int, str, list[Collective]]:
    """(Bytes of new results, bytes beyond the arguments at the peak, the program's text, its collectives)."""
    try:
        compiled = program.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        return 0, _excess(str(error), program, chip), "", []
    memory = compiled.memory_analysis()
    made = max(memory.output_size_in_bytes - memory.alias_size_in_bytes, 0)
    # Beyond the arguments, which are counted from `resident`: with what lies beside them on the chip.
    added = max(memory.peak_memory_in_bytes - memory.argument_size_in_bytes, 0)
    text = compiled.as_text()
    return made, added, text, collectives(text, program.loops)


def dense_bytes(tree: Any) -> int:
    """Bytes of all arrays of one device, one element behind the other."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def tiled_bytes(tree: Any) -> int:
    """Bytes of a device's parts of all arrays, as they lie in tiles: the last axis is filled up to whole lanes."""
    return sum(map(_tile, jax.tree.leaves(tree)))


def _tile(array: Any) -> int:
    sharding = getattr(array, "sharding", None)
    shape = array.shape if sharding is None else sharding.shard_shape(array.shape)
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        return 4 * LANES * max(math.prod(shape), 1)
    *outer, rows, columns = (1, 1, *shape)
    packed = max(4 // array.dtype.itemsize, 1)
    tile = min(SUBLANES, 1 << max(-(-rows // packed) - 1, 0).bit_length()) * packed
    padded = -(-rows // tile) * tile * -(-columns // LANES) * LANES
    return math.prod(outer) * padded * array.dtype.itemsize


def _seconds(item: Collective, chip: Generation) -> float:
    """Of one ring: a permute goes one way over one link; the others both ways, a sum there and back."""
    ways = {"collective-permute": 1.0, "all-reduce": 1.0}.get(item.kind, 2.0)
    return item.times * item.bytes / (ways * chip.link_rate)


def _excess(message: str, program: Program, chip: Generation) -> int:
    """Bytes that the compiler says a program needs beyond its arguments; raises what is no lack of memory."""
    if "RESOURCE_EXHAUSTED" not in message:
        raise RuntimeError(f"{program.name} does not compile: {message}")
    sizes = re.findall(r"(?:temporaries \(|Used )([\d.]+)([KMG])", message)
    if not sizes:
        return chip.hbm_bytes
    return int(max(float(size) * {"K": 2**10, "M": 2**20, "G": GIB}[unit] for size, unit in sizes))


def advice(result: Result, mesh: str, changes: Mapping[str, str] | None = None) -> str:
    """What to change about a program that does not fit; `changes` by kind of bytes, where not as for RAPID."""
    parts = result.bytes_per_chip
    over = (parts["peak"] - result.hbm_bytes) / GIB
    largest = max(("weights", "cache", "temporaries", "optimizer", "activations"), key=lambda name: parts[name])
    factor = -(-parts[largest] // max(parts[largest] - (parts["peak"] - result.hbm_bytes), 1))
    times = f"{max(factor, 2)} times" if factor <= 64 else "many times"
    change = {
        "weights": f"split them over more chips: mesh.model (or mesh.fsdp) {times} what it is",
        "cache": f"split it over more chips: mesh.context {times} what it is, or a lower models.max_context",
        "temporaries": "a smaller compute.prefill_chunk or compute.attention_block",
        "optimizer": f"split it over more chips: mesh.fsdp {times} what it is",
        "activations": "a smaller compute.prefill_chunk",
    }
    change = (change | dict(changes or {}))[largest]
    return (
        f"{result.program} needs {over:.2f} GiB a chip more than there are; the largest part are {largest} "
        f"({parts[largest] / GIB:.2f} GiB): {change} (now {mesh})"
    )


def table(results: Sequence[Result]) -> str:
    """The results for people."""
    lines = [row for result in results for row in _rows(result)]
    return "\n".join(lines)


def _rows(result: Result) -> Iterable[str]:
    parts, chip = result.bytes_per_chip, result.hbm_bytes
    share = ", ".join(f"{name} {_size(size)}" for name, size in parts.items() if name != "peak" and size)
    chips = f"{result.chips} chip{'s' * (result.chips != 1)}"
    bound = max(result.roofline, key=lambda name: result.roofline[name])
    yield f"{result.program}: {'fits' if result.fits else 'DOES NOT FIT'} {result.topology} ({chips})"
    yield f"  memory a chip  {_size(parts['peak'])} of {_size(chip)} ({parts['peak'] / chip:.0%}): {share}"
    spent = ", ".join(f"{name} {_time(seconds)}" for name, seconds in result.roofline.items())
    which = "a call" if result.alike else "the longest call"
    fewer = "" if result.alike else ", the earlier ones attend to fewer tokens"
    calls = "" if result.calls == 1 else f"; all {result.calls} calls {_time(result.total_seconds)}{fewer}"
    yield f"  at the least   {_time(result.roofline_seconds)} {which}, bound by {bound}: {spent}{calls}"
    yield f"  arithmetic     {result.flops_per_chip:.3g} FLOPs a chip, {which}"
    if result.compile_seconds is None:
        yield "  counted        from shapes; temporaries by rule, not compiled"
        return
    moved = [f"{kind} {row['count']} x, {_size(row['bytes'])}" for kind, row in sorted(result.collectives.items())]
    yield f"  collectives    {'; '.join(moved) or 'none'}, a chip and call"
    yield f"  compiled in    {result.compile_seconds:.1f} s"


def _size(count: float) -> str:
    return f"{count / GIB:.2f} GiB" if count >= 2**26 else f"{count / 2**20:.2f} MiB"


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.2f} ms"
