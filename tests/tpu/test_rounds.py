# SPDX-License-Identifier: Apache-2.0
"""Rounds of whole runs as the TPU compiler leaves them, at full depth: the layers are scanned.

Four slices, and every rule of sampling on each. Of copies on and off, drafters in full and in 8 bits, keys and values
in full and in 8 bits each pair is met, also with every slice and with every rule: `CASES`. By default five are
compiled, in which each slice and each rule is, and both values of the last three; with `--fuzz 2` all are.
"""

import math
from dataclasses import dataclass
from functools import cache

import jax
import pytest

from rapid_jax.attention.cache import KV, Prefix
from rapid_jax.config import RapidConfig
from rapid_jax.plan.architectures import architecture_of
from rapid_jax.plan.hlo import collectives, copied, gathered_kv, largest_copy, made, widest_sort
from rapid_jax.plan.programs import Program, programs_of
from rapid_jax.plan.report import Result, examine
from rapid_jax.plan.topologies import GIB, topology_of
from rapid_jax.runtime import settings
from rapid_jax.speculative.initial_state import gamma_bucket
from tests.tpu import heads

CONFIGS = heads.CONFIGS / "rapid"
SLICES = {
    "llama31_8b_128k_v5p_2x2x1": "v5p:2x2x1",
    "llama31_8b_512k_v5p_4x4x4": "v5p:4x4x4",
    "llama31_8b_128k_v6e_4x4": "v6e:4x4",
    "llama31_70b_128k_v5p_4x4x4": "v5p:4x4x4",  # kv heads copied
}
RULES = {
    "top-k": {"temperature": 0.1, "top_k": 50, "top_p": 1.0},
    "top-p": {"temperature": 0.7, "top_k": 0, "top_p": 0.9},
    "greedy": {"temperature": 0.0},
    "neither": {"temperature": 1.0, "top_k": 0, "top_p": 1.0},
}
HEAD_DIM = 128
FEW = 8  # rows that a row alone is filled up to before it meets weights in full


@dataclass(frozen=True)
class Case:
    name: str
    rule: str
    copies: bool
    drafter: str
    kv: str

    def config(self) -> RapidConfig:
        sampling = [f"sampling.{key}={value}" for key, value in RULES[self.rule].items()]
        if self.name.startswith("llama31_70b"):  # else its tail is as long as a device's part of the drafter's prompt
            sampling.append("sampling.max_new_tokens=1536")
        rest = [f"speculation.lookup={'auto' if self.copies else 'off'}", f"models.drafter_weights={self.drafter}"]
        return settings.load(RapidConfig, CONFIGS / f"{self.name}.yaml", [*sampling, *rest, f"compute.kv={self.kv}"])

    def __str__(self) -> str:
        copies = "copies" if self.copies else "no copies"
        return f"{self.name}, {self.rule}, {copies}, drafter {self.drafter}, kv {self.kv}"


def cases() -> list[Case]:
    """A covering set: the last three of each follow from the parity of what slice and rule are numbered by."""
    found = []
    for place, name in enumerate(SLICES):
        for number, rule in enumerate(RULES):
            high, low, late = number >> 1, number & 1, place >> 1
            odd = [late ^ low, late ^ high, late ^ low ^ high]
            found.append(Case(name, rule, not odd[0], ("int8", "full")[odd[1]], ("full", "int8")[odd[2]]))
    return found


CASES = cases()
FEWER = [CASES[at] for at in (0, 5, 10, 15)] + [CASES[2]]  # slice by slice another rule; and a drafter in full


@cache
def compiled(case: Case) -> tuple[Program, Result]:
    config, slice_ = case.config(), topology_of(SLICES[case.name])
    assert config.models.max_context is not None
    target = architecture_of(config.models.target)
    programs = programs_of(config, slice_.devices, target, None, config.models.max_context)
    (program,) = [program for program in programs if program.name == "round"]
    return program, examine(program, slice_)


def held(program: Program) -> set[tuple[int, ...]]:
    """Shapes of a device's parts of all weights and prefixes, of all layers and of one; of 64 Ki elements and more."""
    kept = [program.resident["weights"], [x.layers for x in program.resident["cache"] if isinstance(x, Prefix)]]
    whole = {x.sharding.shard_shape(x.shape) for x in jax.tree.leaves(kept)}
    shapes = whole | {(1, *shape[1:]) for shape in whole} | {shape[1:] for shape in whole}
    return {shape for shape in shapes if math.prod(shape) >= 2**16}


def document(program: Program) -> tuple[int, int]:
    """(Slots, kv heads) of the document's prefix on a device: of the longest."""
    kept = [x.layers.k_BKSH for x in program.resident["cache"] if isinstance(x, Prefix) and isinstance(x.layers, KV)]
    shapes = [x.sharding.shard_shape(x.shape) for x in kept]
    return max((shape[-2], shape[-3]) for shape in shapes)


def kv_made(text: str, program: Program, config: RapidConfig) -> set[tuple[int, ...]]:
    """Shapes of what a device makes, in whatever type, that has a head's dimensions and a block of its slots."""
    slots = min(document(program)[0], config.compute.attention_block)
    return {dims for dims in made(text) if HEAD_DIM in dims[-2:] and max(dims[-2:]) >= slots}


def most_bytes(case: Case, program: Program) -> int:
    """What devices may exchange in a round: for each pass the outputs of attention and ffn of every layer are summed
    over `model`; over `context` attention's of a device's own heads, and sums and maxima of softmax, in float32. A
    tenth on top, and 64 KiB a pass: embeddings, and what is looked for over the vocabulary.
    """
    config = case.config()
    model, mesh = architecture_of(config.models.target).config, config.mesh
    gamma = config.speculation.gamma
    assert isinstance(gamma, int)
    gamma = gamma_bucket(gamma)
    drafts = [2 + config.speculation.lookup_width] * gamma if case.copies else [2] + [1] * (gamma - 1)
    total = 0
    for tokens in (*drafts, gamma + 1):
        rows = FEW if tokens == 1 and case.drafter == "full" else tokens
        total += model.num_layers * rows * 2 * model.hidden_size * 2
        if mesh.context > 1:
            total += model.num_layers * tokens * model.num_heads // mesh.model * (model.head_dim + 2) * 4
    return int(1.1 * total) + (len(drafts) + 1) * 2**16


def test_every_pair_of_settings_is_met():
    """And all eight of the last three; of those that are always compiled each value."""
    fields = ("name", "rule", "copies", "drafter", "kv")
    sizes = {field: {getattr(case, field) for case in CASES} for field in fields}
    for first in fields:
        for second in fields:
            if first != second:
                pairs = {(getattr(case, first), getattr(case, second)) for case in CASES}
                assert len(pairs) == len(sizes[first]) * len(sizes[second])
    assert len({(case.copies, case.drafter, case.kv) for case in CASES}) == 8
    assert all({getattr(case, field) for case in FEWER} == sizes[field] for field in fields)


def pytest_generate_tests(metafunc: pytest.Metafunc):
    if "case" in metafunc.fixturenames:
        every = metafunc.config.getoption("--fuzz") > 1
        metafunc.parametrize("case", CASES if every else FEWER, ids=str)


def test_a_round_sorts_gathers_and_copies_nothing_large(case: Case):
    program, result = compiled(case)
    text, config = result.text, case.config()
    assert text and result.fits
    assert widest_sort(text) <= 8192
    found = collectives(text, program.loops)
    assert [item for item in found if any(max(x, default=0) > 8192 for x in item.arrays)] == []  # of the vocabulary
    assert largest_copy(text) < 2**20  # as it begins
    assert copied(text) & held(program) == set()  # a weight, a prefix, or a layer's of either
    assert kv_made(text, program, config) == set()
    assert gathered_kv(text, slots=document(program)[0], head_dim=HEAD_DIM) == []
    moved = sum(item.bytes * item.times for item in found)
    assert 0 < moved <= most_bytes(case, program), (moved, most_bytes(case, program))
    if config == settings.load(RapidConfig, CONFIGS / f"{case.name}.yaml"):
        said = heads.programs_of(CONFIGS / f"{case.name}.yaml")["round"]
        assert result.bytes_per_chip["peak"] / GIB == pytest.approx(said, rel=0.05)
