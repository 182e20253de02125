# SPDX-License-Identifier: Apache-2.0
"""`rapid bench`: how fast this machine decodes with RAPID and without, for models of a real shape.

Needs no checkpoint and no document: weights, keys and values are random, and the dial sets how often drafts are
accepted. What is measured is what `rapid answer` runs.
"""

import argparse
from dataclasses import replace
from typing import Any

from rapid_jax.bench.cases import Case, Drafter, Timing, table
from rapid_jax.bench.options import PARTS, Sizes, case_of, check, known, mesh_of, shape_of, sizes_of
from rapid_jax.bench.rows import Rows
from rapid_jax.model.config import ModelConfig
from rapid_jax.runtime.command_line import prepare_jax, say

DIFFERENT = 1  # exit status: something did not decode the baseline's tokens


def run(options: argparse.Namespace) -> int:
    """Measures and prints; 0, or 1 if something did not decode the baseline's tokens."""
    options.mesh = None if options.mesh is None else mesh_of(options)
    allowed = PARTS if options.mesh is None else PARTS[1:]
    parts = [known(part, allowed, "--parts") for part in (options.parts or ",".join(allowed)).split(",")]
    kinds = [case_of(text) for text in options.cases.split(",")]
    check(options, kinds)
    others: list[dict[str, Any]] = []
    if options.plot is not None:
        from rapid_jax.bench.figure import rows_of
        from rapid_jax.evaluate.plotting import require

        require()
        others = [row for path in options.others for row in rows_of(path)]
    prepare_jax(programs=True, cache=None)
    import jax

    platform = jax.devices()[0]
    sizes = sizes_of(platform.platform)
    config = shape_of(options.shape or sizes.shape, options.layers)
    small = _drafter(options, config)
    contexts = options.contexts or sizes.contexts
    say(f"{platform.device_kind}, jax {jax.__version__}; {options.shape or sizes.shape}, {config.num_layers} layers"
        + (f"; {options.mesh}" if options.mesh else ""))  # fmt: skip
    if options.mesh is not None:  # too few devices are told before anything is measured
        from rapid_jax.runtime.mesh import make_meshes

        make_meshes(options.mesh, None)
    rows = Rows(options.json)
    if options.tpu_hour:
        from rapid_jax.bench.first_hour import first_hour

        first_hour(config, _dtype(options), options.repeats, rows.add)
        return 0
    good = True
    rate = _memory(rows, platform.platform)
    if "attention" in parts:
        rate = max(rate, *_attention(rows, config, options, contexts, rate))  # some read faster than XLA copies
    if "decoding" in parts:
        good = _decoding(rows, config, options, sizes, rate, kinds, small)
    if "prefill" in parts:
        _prefill(rows, config, options, contexts, sizes)
    if options.plot is not None:
        from rapid_jax.bench.figure import draw

        draw([*rows.kept, *others], options.plot)
    return 0 if good else DIFFERENT


def _memory(rows: Rows, platform: str) -> float:
    from rapid_jax.bench.parts import memory_rate

    rate = memory_rate(1 << (26 if platform == "cpu" else 32))
    rows.add("memory", {"bytes_per_second": rate})
    print(f"memory of the device: {rate / 1e12:.3g} TB/s\n")
    return rate


def _attention(
    rows: Rows, config: ModelConfig, options: argparse.Namespace, contexts: tuple[int, ...], rate: float
) -> list[float]:
    """Bytes a second of each."""
    from rapid_jax.bench.parts import attention

    print("attention of a layer")
    print(f"{'context':>8} {'tokens':>6} {'us':>8} {'least to most':>18} {'TB/s':>6} {'share':>7} {'xla us':>8}  error")
    made = []
    for context in contexts:
        for tokens in (1, 8, 16):
            row = attention(config, _dtype(options), context, tokens, rate, options.repeats)
            rows.add("attention", row.to_json())
            made.append(row.rate)
            spread = f"{row.kernel_us_least:.1f} to {row.kernel_us_most:.1f}"
            speed = f"{row.kernel_us:>8.1f} {spread:>18} {row.rate / 1e12:>6.2f} {row.share:>7.2f} {row.xla_us:>8.1f}"
            print(f"{context:>8} {tokens:>6} {speed}  {row.error:.1e}", flush=True)
    print()
    return made


def _prefill(rows: Rows, config: ModelConfig, options: argparse.Namespace, contexts: tuple[int, ...], sizes: Sizes):
    from rapid_jax.bench.models import random_decoder
    from rapid_jax.bench.parts import prefill_seconds
    from rapid_jax.model.fused import fuse
    from rapid_jax.runtime.mesh import make_meshes

    mesh = None if options.mesh is None else make_meshes(options.mesh, None)[0]
    decoder = fuse(random_decoder(config, _dtype(options), mesh=mesh), spent=True)
    short = options.short or sizes.short
    drafter = prefill_seconds(decoder, short, sizes.chunk, options.repeats)
    for context in contexts:
        long = prefill_seconds(decoder, context, sizes.chunk, options.repeats)
        ends = {"seconds_least": long.least, "seconds_most": long.most}
        row = {"context": context, "seconds": long.median, **ends, "short": short, "short_seconds": drafter.median}
        rows.add("prefill", row | {"short_seconds_least": drafter.least, "short_seconds_most": drafter.most})
        share = f"the drafter's {short} in {_spread(drafter)}, {drafter.median / long.median:.1%} of it"
        print(f"prefill of {context}: {_spread(long)}, {context / long.median:.0f} tokens/s; {share}", flush=True)


def _spread(timing: Timing) -> str:
    return f"{timing.median:.2f} s ({timing.least:.2f} to {timing.most:.2f})"


def _decoding(
    rows: Rows,
    config: ModelConfig,
    options,
    sizes: Sizes,
    rate: float,
    kinds: list[Case],
    small: ModelConfig | None,
) -> bool:
    from rapid_jax.bench.decoding import Decoding

    tokens, short = options.tokens or sizes.tokens, options.short or sizes.short
    rules: dict[str, Any] = {"memory_rate": rate, "over": options.mesh, "first_dial": options.dial, "tell": say}
    bench = Decoding(config, _dtype(options), short, tokens, options.repeats, small=small, **rules)
    good, lines = True, 0
    for context in options.contexts or sizes.contexts:
        for batch in options.batch:
            turned: set[Drafter] = set()
            for kind in kinds:
                shape = None if kind.drafter == "none" else options.drafter
                case = replace(kind, context=context, batch=batch, documents=options.documents, shape=shape)
                if case.drafter != "none" and case.drafter not in turned:
                    turned.add(case.drafter)
                    first = replace(case, gamma=4 if case.gamma == "auto" else case.gamma)
                    reached = bench.calibrate(first, options.acceptance)
                    say(f"{case}, context {context}: dial {bench.dial:.4g}, {reached:.3f} accepted")
                # With the dial plain decoding says something else: it is measured, and told, at each.
                for each in (case,) if bench.knows_baseline(case) or case == case.baseline else (case.baseline, case):
                    row = bench.measure(each)
                    rows.add("decoding", row.to_json() | {"peak_bytes": _peak()})
                    for text in list(table([row]))[min(lines, 1) :]:
                        print(text, flush=True)
                    lines += 1
                    good &= not row.same.startswith("no")
            bench.release()
    peak = _peak()
    print(f"peak memory of the device: {peak / 2**30:.2f} GiB\n" if peak else "")
    return good


def _drafter(options: argparse.Namespace, config: ModelConfig) -> ModelConfig | None:
    """The shape that drafts, with the target's vocabulary and tying, so that both vote for the same token."""
    if options.drafter is None:
        return None
    return replace(shape_of(options.drafter, None), vocab_size=config.vocab_size, tie_embeddings=config.tie_embeddings)


def _dtype(options: argparse.Namespace) -> Any:
    import jax
    import jax.numpy as jnp

    return jnp.dtype(options.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16"))


def _peak() -> int:
    """Bytes of the device's memory in use at most so far; 0 where the device does not say."""
    import jax

    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
