# SPDX-License-Identifier: Apache-2.0
"""`rapid plan` as it is called: what it prints, as people and as programs read it, and its exit status."""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import jax
import pytest

from rapid_jax.plan import command, report
from rapid_jax.plan.cost import Work
from rapid_jax.plan.programs import Program
from rapid_jax.plan.report import advice, examine, table
from rapid_jax.plan.topologies import GENERATIONS, GIB, Topology
from rapid_jax.runtime.errors import InputError

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "rapid"
SMALL = str(CONFIGS / "llama31_8b_128k_v5p_2x2x1.yaml")
KEYS = {"program", "topology", "chips", "hbm_bytes", "bytes_per_chip", "flops_per_chip", "collectives"}
KEYS |= {"roofline_seconds", "roofline", "calls", "total_seconds", "compile_seconds", "fits"}
KINDS = ["weights", "optimizer", "cache", "activations", "temporaries", "peak"]


def options(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(words)


@pytest.fixture
def four_devices(monkeypatch):
    """Four devices of this machine in place of a slice, with as much memory as a test says."""

    def of(hbm_bytes: int) -> None:
        chip = replace(GENERATIONS["v5p"], hbm_bytes=hbm_bytes)
        monkeypatch.setattr(command, "topology_of", lambda name: Topology(name, chip, tuple(jax.devices()[:4])))

    return of


TINY = ("--config", SMALL, "--topology", "v5p:2x2x1", "--layers", "1", "--context", "2048", "--program", "prefill")
TINY += ("--set", "compute.kernel=xla", "--set", "compute.prefill_chunk=64")


def test_what_fits_exits_with_0_and_prints_json(four_devices, capsys):
    four_devices(96 * GIB)
    assert command.run(options(*TINY, "--json")) == 0
    captured = capsys.readouterr()
    (line,) = captured.out.splitlines()
    found = json.loads(line)
    assert found.keys() == KEYS
    assert list(found["bytes_per_chip"]) == KINDS
    assert (
        sum(size for kind, size in found["bytes_per_chip"].items() if kind != "peak")
        == (found["bytes_per_chip"]["peak"])
    )
    assert (found["program"], found["topology"], found["chips"], found["fits"]) == ("prefill", "v5p:2x2x1", 4, True)
    assert all(row.keys() == {"count", "bytes"} for row in found["collectives"].values())
    assert captured.err == ""


def test_what_does_not_fit_exits_with_3_and_says_what_to_change(four_devices, capsys):
    four_devices(GIB // 4)
    assert command.run(options(*TINY)) == command.DOES_NOT_FIT == 3
    captured = capsys.readouterr()
    assert "the published llama-3.1-8b, since there is no models/Llama-3.1-8B-Instruct/config.json" in captured.out
    assert "1 of its 32 layers" in captured.out
    assert "prefill: DOES NOT FIT v5p:2x2x1 (4 chips)" in captured.out
    (line,) = captured.err.splitlines()
    assert "split them over more chips: mesh.model (or mesh.fsdp)" in line
    assert line.endswith("(now data 1 x fsdp 1 x context 1 x model 4)")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--program", "train"), "expected one of drafter quantisation, prefill, drafter prefill, round, got train"),
        (("--drafter-shape", "llama-3.1-70b"), "models.drafter is same"),
        (("--context", "100"), "expected more than the 1024 tokens of the answer, got 100"),
        (
            ("--set", "mesh.model=2", "--set", "mesh.context=4", "--set", "compute.prefill_chunk=64"),
            "expected 8 devices",
        ),
    ],
)
def test_mistakes_are_one_line(four_devices, more: tuple[str, ...], said: str):
    four_devices(GIB)
    with pytest.raises(InputError, match=said):
        command.run(options(*TINY, *more))


def result_of(chip=GENERATIONS["v5p"], **resident):
    """A plan of a program that does next to nothing, beside arrays that it does not take."""

    def lower():
        return jax.jit(lambda x: x + 1).lower(jax.ShapeDtypeStruct((8, 128), "float32"))

    program = Program("round", lower, resident, Work(chip.flops, chip.hbm_rate * 2), Work(chip.flops, chip.hbm_rate))
    return examine(program, Topology("v5p:2x2x1", chip, tuple(jax.devices()[:4])))


def test_what_a_program_does_not_take_counts_too():
    big = jax.ShapeDtypeStruct((1024, 1024, 128), "bfloat16")
    result = result_of(weights=[big], cache=[big, big])
    assert result.bytes_per_chip["weights"] == big.size * 2
    assert result.bytes_per_chip["cache"] == big.size * 4
    assert result.roofline_seconds == result.roofline["hbm"] == 2.0
    assert "bound by hbm" in table([result])


def test_advice_names_the_largest_part():
    big = jax.ShapeDtypeStruct((4096, 1024, 128), "bfloat16")
    chip = replace(GENERATIONS["v5p"], hbm_bytes=GIB // 2)
    assert "mesh.context 3 times" in advice(result_of(chip, cache=[big]), "mesh")


def test_a_program_too_large_for_the_compiler_is_a_result(monkeypatch):
    def lower():
        raise jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (400.00G) "
            "exceeds available HBM (95.74G)."
        )

    program = Program("round", lower, {}, Work(), Work())
    result = examine(program, Topology("v5p:2x2x1", GENERATIONS["v5p"], tuple(jax.devices()[:4])))
    assert (result.fits, result.text, result.bytes_per_chip["temporaries"]) == (False, "", 400 * GIB)
    assert report.advice(result, "mesh").startswith("round needs 304.26 GiB")
