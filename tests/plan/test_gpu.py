# SPDX-License-Identifier: Apache-2.0
"""Plans of one GPU: counted from shapes, nothing is compiled."""

import argparse
import json
import re
from pathlib import Path

import jax
import pytest
from flax import nnx

from rapid_jax.model.decoder import Decoder
from rapid_jax.model.fused import quantize
from rapid_jax.plan import command
from rapid_jax.plan.architectures import Architecture
from rapid_jax.plan.report import dense_bytes
from rapid_jax.plan.topologies import FRACTION, FRACTION_NAMES, GIB, GPUS, card_of, topology_of
from rapid_jax.runtime.errors import InputError
from tests.speculative.models import Weights, config_of

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "rapid"
SELF = str(CONFIGS / "llama31_8b_128k_self.yaml")
LONG = ("--context", "524288", "--set", "models.drafter_weights=int8", "--set", "retrieval.compression=64")
# 524,288 tokens of Llama-3.1-8B's shape, its int8 copy over 8,192: `rapid bench` on an H200, less 1.0 of its dial.
MEASURED = (89.5 - 1.0) * GIB


@pytest.fixture(autouse=True)
def no_fraction(monkeypatch):
    for name in FRACTION_NAMES:
        monkeypatch.delenv(name, raising=False)


def status_of(*words: str, config: str = SELF, topology: str = "h200") -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args(["--config", config, "--topology", topology, *words]))


@pytest.fixture
def plan(capsys):
    """The bytes of each program by kind, and the exit status."""

    def of(*words: str, **where: str) -> tuple[dict[str, dict[str, int]], int]:
        status = status_of("--json", *words, **where)
        rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert all(row["compile_seconds"] is None and row["chips"] == 1 for row in rows)
        assert all(sum(row["bytes_per_chip"].values()) == 2 * row["bytes_per_chip"]["peak"] for row in rows)
        return {row["program"]: row["bytes_per_chip"] for row in rows}, status

    return of


def test_the_longest_prompt_within_a_tenth_of_what_was_measured(plan):
    found, status = plan(*LONG)
    assert status == 0
    assert list(found) == ["drafter quantisation", "prefill", "drafter prefill", "round"]
    for peak in (found["round"]["peak"], max(kinds["peak"] for kinds in found.values())):
        assert abs(peak - MEASURED) < 0.1 * MEASURED
    weights = found["round"]["weights"] / GIB
    assert weights == pytest.approx(15.0 + 7.0, abs=0.1)
    assert found["round"]["cache"] / GIB == pytest.approx(64.0 + 0.8, abs=0.5)  # and what both generate


def test_four_bits_are_half_of_eight_and_scales(plan):
    eight, four = (
        plan("--set", f"models.drafter_weights={kind}", "--program", "round")[0]["round"] for kind in ("int8", "int4")
    )
    full = plan("--program", "round")[0]["round"]
    copies = [kinds["weights"] - full["weights"] for kinds in (eight, four)]
    assert copies[1] / copies[0] == pytest.approx(0.5 + 4 / 128, rel=1e-3)
    assert eight["cache"] < full["cache"]  # the copy's prompt is in 8 bits


def test_a_rounded_document_takes_half_only_after_prefill(plan):
    found, _ = plan("--set", "compute.kv=int8", "--set", "speculation.mode=target")
    assert list(found) == ["prefill", "prefix quantisation", "round"]
    full = found["prefill"]["cache"]
    assert found["prefix quantisation"]["cache"] == full
    assert found["round"]["cache"] == pytest.approx(full * (128 + 4) / 256, rel=0.03)  # and the tail
    assert found["prefix quantisation"]["temporaries"] < full / 32  # a layer at a time


def test_a_copy_in_few_bits_is_what_a_run_holds():
    """Of arrays and of shapes alike, what is shared with the original counted once."""
    from rapid_jax.config import ComputeConfig, ModelsConfig, RapidConfig
    from rapid_jax.plan.programs import programs_of

    decoder = Weights.lively(64).decoder("unrolled")
    copy = quantize(decoder, 8)
    models = ModelsConfig(dtype="float32", drafter_weights="int8")
    config = RapidConfig(models=models, compute=ComputeConfig(prefill_chunk=64))
    architecture = Architecture(config_of(64), "the test")
    card = card_of("h100")
    assert card is not None
    for drafter, shared in ((None, True), (architecture, False)):
        program = programs_of(config, card.devices, architecture, drafter, 2048)[-1]
        assert dense_bytes(program.resident["weights"]) == held(decoder) + held(copy, decoder if shared else None)


def test_a_target_in_few_bits_drafts_for_itself(plan):
    """Weights are there once, and in full only while the copy is made."""
    full = plan("--set", "models.drafter_weights=full", "--program", "round")[0]["round"]["weights"]
    found = plan("--set", "models.target_weights=int8")[0]
    assert list(found) == ["quantisation", "prefill", "round"]
    assert found["round"]["weights"] == found["prefill"]["weights"] < 0.6 * full < found["quantisation"]["weights"]


def held(decoder: Decoder, other: Decoder | None = None) -> int:
    """Bytes of the arrays that are not the other's."""
    known = set() if other is None else {id(x) for x in jax.tree.leaves(nnx.state(other))}
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(nnx.state(decoder)) if id(x) not in known)


def test_what_does_not_fit_says_what_would_help(capsys):
    assert status_of("--context", "524288", topology="h100") == command.DOES_NOT_FIT
    prefill, decode = capsys.readouterr().err.splitlines()
    assert "prefill needs 19." in prefill and "cache (64.00 GiB): a lower models.max_context" in prefill
    assert "compute.kv int8" in decode and "compute.kv int8" not in prefill


def test_a_card_that_jax_takes_too_little_of(monkeypatch, capsys):
    words = ("--context", "393216", "--program", "round")
    assert status_of(*words, topology="h100") == command.DOES_NOT_FIT
    assert "XLA_CLIENT_MEM_FRACTION=0.84 or more" in capsys.readouterr().err
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "0.9")
    assert status_of(*words, topology="h100") == 0
    assert "90% of 79.65, as JAX takes it" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "topology", "said"),
    [
        (("--set", "mesh.context=2"), "h200", "expected 2 devices, got 1"),
        (("--set", "compute.kernel=splash"), "h200", "kernel splash is for TPUs, got a GPU"),
        ((), "h200:8", "plans are of one GPU, expected one of h100, h200"),
        (
            ("--set", "models.drafter_weights=int4"),
            "v5p:2x2x1",
            "models.drafter_weights: TPUs take full and int8, got int4",
        ),
        (("--program", "verify"), "h200", "expected one of prefill, round, got verify"),
    ],
)
def test_what_a_run_would_refuse_is_one_line(words: tuple[str, ...], topology: str, said: str):
    with pytest.raises(InputError, match=said) as caught:
        status_of(*words, topology=topology)
    assert "\n" not in str(caught.value)


def test_names_of_cards(monkeypatch):
    card = card_of("H200")
    assert card is not None and card.generation.hbm_bytes == int(FRACTION * GPUS["h200"].hbm_bytes)
    assert card_of("v5p:2x2x1") is None
    monkeypatch.setenv(FRACTION_NAMES[1], "many")
    with pytest.raises(InputError, match=r"XLA_PYTHON_CLIENT_MEM_FRACTION: expected a share .* got 'many'"):
        card_of("h100")
    with pytest.raises(InputError, match="expected GENERATION:SHAPE"):
        topology_of("h200")  # of a slice alone: training is not planned for GPUs


def test_people_are_told_that_nothing_was_compiled(capsys):
    assert status_of(*LONG) == 0
    out = capsys.readouterr().out
    assert "the target itself, in int8" in out
    assert "round: fits h200 (1 chip)" in out and "temporaries by rule, not compiled" in out
    # A prompt's last chunk sees all before it: what is said of it is not said of the others.
    told = dict(re.findall(r"^(\S.*): fits.*\n.*\n  at the least +(.*)", out, re.M))
    longest, count, total = re.fullmatch(
        r"([\d.]+) ms the longest call, .*; all (\d+) calls ([\d.]+) s, the earlier ones attend to fewer tokens",
        told["prefill"],
    ).groups()
    assert 0.5 * float(longest) * int(count) < 1000 * float(total) < float(longest) * int(count)
    assert " ms a call, bound by hbm" in told["round"] and "calls" not in told["round"]
