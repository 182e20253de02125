# SPDX-License-Identifier: Apache-2.0
"""`rapid bench`: how fast this machine decodes with RAPID and without, for models of a real shape.

Needs no checkpoint and no document: weights, keys and values are random, and the dial sets how often drafts are
accepted. What is measured is what `rapid answer` runs.
"""

import argparse
from dataclasses import dataclass, replace
from typing import Any, get_args

from rapid_jax.bench.cases import FIRST_DIAL, Case, Drafter, KvBits, Timing, table
from rapid_jax.bench.rows import Rows
from rapid_jax.model.config import ModelConfig, from_hf
from rapid_jax.plan.architectures import SHAPES
from rapid_jax.runtime.command_line import Place, prepare_jax, say
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.mesh_config import MeshConfig

DIFFERENT = 1  # exit status: something did not decode the baseline's tokens
_SMALL: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 2048,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
}
PARTS = ("attention", "prefill", "decoding")
CASES = "plain,full:4,int8:5"
GRAMMAR = (
    "plain, or a drafter's weights (full, int8, int4) and how many tokens it drafts a round, as int8:6 or int8:auto; "
    "attended, attended-int8, attended-int4: over --short tokens of the target's own cache; "
    "quoting, prose: plain decoding that copies from a text with the answer in it, or from one without; "
    "/int8 behind any of them rounds the target's keys and values"
)


@dataclass(frozen=True)
class Sizes:
    """What is measured where nothing else is asked for."""

    shape: str
    contexts: tuple[int, ...]
    tokens: int
    short: int
    chunk: int


def sizes_of(platform: str) -> Sizes:
    """On a CPU what takes seconds, else what the project is for."""
    if platform == "cpu":
        return Sizes("small", (512,), 24, 128, 128)
    return Sizes("llama-3.1-8b", (131072,), 128, 8192, 16384)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `bench`."""
    number = {"type": _count, "metavar": "N"}
    parser.add_argument("--shape", metavar="NAME", help=f"small, {', '.join(SHAPES)}; by default small on a CPU")
    parser.add_argument("--layers", help="only so many of its layers", **number)
    parser.add_argument(
        "--contexts", type=_counts, metavar="LIST", help="tokens of the target's prompt, as 32768,131072"
    )
    parser.add_argument("--short", help="tokens that the drafter reads", **number)
    parser.add_argument("--batch", type=_counts, default=(1,), metavar="LIST", help="prompts at once, as 1,4,8")
    parser.add_argument(
        "--documents", help="that the prompts are about, equally many about each; by default one each", **number
    )
    parser.add_argument("--mesh", metavar="AXES",
                        help="devices that share the work, as context=2 or context=2,model=4")  # fmt: skip
    parser.add_argument("--cases", default=CASES, metavar="LIST", help=f"what decodes: {GRAMMAR}; by default {CASES}")
    parser.add_argument("--acceptance", type=float, default=0.9, metavar="A", help="of the drafts, by turning the dial")
    parser.add_argument("--dial", type=float, default=FIRST_DIAL, metavar="D",
                        help="where it is tried first, as an earlier run has found it")  # fmt: skip
    parser.add_argument("--tokens", help="to decode, a prompt", **number)
    parser.add_argument("--repeats", default=3, help="timings of everything: medians are told; by default 3", **number)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="by default float32 on a CPU")
    parser.add_argument("--parts", metavar="LIST", help=f"of {', '.join(PARTS)}; by default all that the mesh allows")
    parser.add_argument("--tpu-hour", action="store_true",
                        help="instead of all parts: the three numbers that `rapid plan` assumes of a TPU")  # fmt: skip
    parser.add_argument("--json", action=Place, metavar="FILE", help="write every row there, a JSON object a line")
    parser.add_argument("--with", action=Place, many=True, default=[], dest="others", metavar="FILE",
                        help="rows measured elsewhere in the same form, for the figure")  # fmt: skip
    parser.add_argument("--plot", action=Place, metavar="FILE.png", help="draw milliseconds a token against context")


def run(options: argparse.Namespace) -> int:
    """Measures and prints; 0, or 1 if something did not decode the baseline's tokens."""
    options.mesh = None if options.mesh is None else _mesh(options)
    allowed = PARTS if options.mesh is None else PARTS[1:]
    parts = [_known(part, allowed, "--parts") for part in (options.parts or ",".join(allowed)).split(",")]
    kinds = [_kind(text) for text in options.cases.split(",")]
    if options.mesh is not None and options.mesh.context > 1 and any(kind.attends for kind in kinds):
        raise InputError(f"--cases: attended is for documents on one device, got {options.mesh}")
    if not 0 < options.acceptance < 1:
        raise InputError(f"--acceptance: expected a share between 0 and 1, got {options.acceptance}")
    if not 0 < options.dial < 1e4:
        raise InputError(f"--dial: expected a number above 0 and below 10,000, got {options.dial}")
    others: list[dict[str, Any]] = []
    if options.plot is not None:
        from rapid_jax.bench.figure import rows_of
        from rapid_jax.evaluate.plotting import require

        require()
        others = [row for path in options.others for row in rows_of(path)]
    if options.documents is not None and any(batch % options.documents for batch in options.batch):
        raise InputError(f"--documents: expected a divisor of every --batch, got {options.documents}")
    prepare_jax(programs=True, cache=None)
    import jax

    platform = jax.devices()[0]
    sizes = sizes_of(platform.platform)
    config = _config(options.shape or sizes.shape, options.layers)
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
        good = _decoding(rows, config, options, sizes, rate, kinds)
    if "prefill" in parts:
        _prefill(rows, config, options, contexts, sizes)
    if options.plot is not None:
        from rapid_jax.bench.figure import draw

        draw([*rows.kept, *others], options.plot)
    return 0 if good else DIFFERENT


def _mesh(options: argparse.Namespace) -> MeshConfig:
    mesh = MeshConfig.named(options.mesh)
    if mesh.data * mesh.fsdp > 1:
        raise InputError(f"--mesh: expected context and model alone, got {mesh}")
    if options.tpu_hour:
        raise InputError(f"--tpu-hour: expected one device, got {mesh}")
    given = {"--contexts": options.contexts or (), "--short": () if options.short is None else (options.short,)}
    for option, tokens in given.items():
        for count in tokens:
            if count % mesh.context:
                raise InputError(f"{option}: expected a multiple of context = {mesh.context}, got {count}")
    return mesh


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
    from rapid_jax.model.fused import fused
    from rapid_jax.runtime.mesh import make_meshes

    mesh = None if options.mesh is None else make_meshes(options.mesh, None)[0]
    decoder = fused(random_decoder(config, _dtype(options), mesh=mesh), spent=True)
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


def _decoding(rows: Rows, config: ModelConfig, options, sizes: Sizes, rate: float, kinds: list[Case]) -> bool:
    from rapid_jax.bench.decoding import Decoding

    tokens, short = options.tokens or sizes.tokens, options.short or sizes.short
    rules = {"memory_rate": rate, "over": options.mesh, "first_dial": options.dial, "tell": say}
    bench = Decoding(config, _dtype(options), short, tokens, options.repeats, **rules)
    good, lines = True, 0
    for context in options.contexts or sizes.contexts:
        for batch in options.batch:
            turned: set[Drafter] = set()
            for kind in kinds:
                case = replace(kind, context=context, batch=batch, documents=options.documents)
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


def _kind(text: str) -> Case:
    """A case of `GRAMMAR`, of no context yet."""
    name, _, kv = text.partition("/")
    name, _, gamma = name.partition(":")
    plain = Case(0, kv=_known(kv or "full", get_args(KvBits), f"--cases: {text}: keys and values"))
    if name in ("plain", "quoting", "prose") and not gamma:
        return replace(plain, quoting={"quoting": True, "prose": False}.get(name))
    if (
        name not in get_args(Drafter)
        or name == "none"
        or not (gamma == "auto" or (gamma.isdigit() and 0 < int(gamma) <= 64))
    ):
        raise InputError(f"--cases: expected {GRAMMAR}; got {text!r}")
    return replace(plain, drafter=name, gamma=gamma if gamma == "auto" else int(gamma))


def _config(shape: str, layers: int | None) -> ModelConfig:
    if shape != "small" and shape not in SHAPES:
        raise InputError(f"unknown shape {shape!r}: expected one of small, {', '.join(SHAPES)}")
    config = from_hf(_SMALL if shape == "small" else SHAPES[shape])
    return config if layers is None else replace(config, num_layers=min(layers, config.num_layers))


def _dtype(options: argparse.Namespace) -> Any:
    import jax
    import jax.numpy as jnp

    return jnp.dtype(options.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16"))


def _peak() -> int:
    """Bytes of the device's memory in use at most so far; 0 where the device does not say."""
    import jax

    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)


def _known(name: str, names: tuple[str, ...], option: str) -> Any:
    if name not in names:
        raise InputError(f"{option}: expected of {', '.join(names)}, got {name!r}")
    return name


def _count(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def _counts(text: str) -> tuple[int, ...]:
    return tuple(map(_count, text.split(",")))
