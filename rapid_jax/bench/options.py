# SPDX-License-Identifier: Apache-2.0
"""The options of `rapid bench`, and what they say."""

import argparse
from dataclasses import dataclass, replace
from typing import Any, get_args

from rapid_jax.bench.cases import FIRST_DIAL, Case, Drafter, KvBits
from rapid_jax.model.config import ModelConfig, from_hf
from rapid_jax.plan.architectures import SHAPES
from rapid_jax.runtime.command_line import Place
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.mesh_config import MeshConfig

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
    parser.add_argument(
        "--drafter", metavar="NAME", help="a shape that drafts, of random weights; by default the target's own draft"
    )
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
    parser.add_argument(
        "--plot",
        action=Place,
        metavar="FILE.png",
        help="draw milliseconds a token against context; an SVG and a CSV come beside it",
    )


def mesh_of(options: argparse.Namespace) -> MeshConfig:
    """The devices of --mesh. Raises InputError where the work cannot be shared out so."""
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


def check(options: argparse.Namespace, kinds: list[Case]) -> None:
    """Raises InputError where options do not go together or are out of range."""
    if options.mesh is not None and options.mesh.context > 1 and any(kind.attends for kind in kinds):
        raise InputError(f"--cases: attended is for documents on one device, got {options.mesh}")
    if options.drafter is not None and any(kind.attends for kind in kinds):
        raise InputError(f"--cases: attended drafts by the target's own weights, got --drafter {options.drafter}")
    if not 0 < options.acceptance < 1:
        raise InputError(f"--acceptance: expected a share between 0 and 1, got {options.acceptance}")
    if not 0 < options.dial < 1e4:
        raise InputError(f"--dial: expected a number above 0 and below 10,000, got {options.dial}")
    if options.documents is not None and any(batch % options.documents for batch in options.batch):
        raise InputError(f"--documents: expected a divisor of every --batch, got {options.documents}")


def case_of(text: str) -> Case:
    """A case of `GRAMMAR`, of no context yet."""
    name, _, kv = text.partition("/")
    name, _, gamma = name.partition(":")
    plain = Case(0, kv=known(kv or "full", get_args(KvBits), f"--cases: {text}: keys and values"))
    if name in ("plain", "quoting", "prose") and not gamma:
        return replace(plain, quoting={"quoting": True, "prose": False}.get(name))
    if (
        name not in get_args(Drafter)
        or name == "none"
        or not (gamma == "auto" or (gamma.isdigit() and 0 < int(gamma) <= 64))
    ):
        raise InputError(f"--cases: expected {GRAMMAR}; got {text!r}")
    return replace(plain, drafter=name, gamma=gamma if gamma == "auto" else int(gamma))


def shape_of(shape: str, layers: int | None) -> ModelConfig:
    """The architecture of that name, with at most so many of its layers. Raises InputError for an unknown one."""
    if shape != "small" and shape not in SHAPES:
        raise InputError(f"unknown shape {shape!r}: expected one of small, {', '.join(SHAPES)}")
    config = from_hf(_SMALL if shape == "small" else SHAPES[shape])
    return config if layers is None else replace(config, num_layers=min(layers, config.num_layers))


def known(name: str, names: tuple[str, ...], option: str) -> Any:
    """The name. Raises InputError where it is none of the names."""
    if name not in names:
        raise InputError(f"{option}: expected of {', '.join(names)}, got {name!r}")
    return name


def _count(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def _counts(text: str) -> tuple[int, ...]:
    return tuple(map(_count, text.split(",")))
