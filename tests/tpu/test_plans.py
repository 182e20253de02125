# SPDX-License-Identifier: Apache-2.0
"""The programs of whole runs: each fits its chip, keys and values stay where they are, transfers run under kernels."""

import json
import re
from pathlib import Path

import pytest

from rapid_jax.attention.cache import KV
from rapid_jax.attention.quantized_kv import quantize_array
from rapid_jax.cli import main
from rapid_jax.config import RapidConfig
from rapid_jax.plan import command
from rapid_jax.plan.architectures import architecture_of
from rapid_jax.plan.hlo import collectives, gathered_kv, schedule, under_kernels
from rapid_jax.plan.programs import models_of, programs_of
from rapid_jax.plan.report import Result, examine
from rapid_jax.plan.speed import predicted
from rapid_jax.plan.topologies import GIB, topology_of
from rapid_jax.runtime import settings
from tests.tpu import heads

CONFIGS = heads.CONFIGS / "rapid"
HEAD_DIM = 128


def planned(name: str, topology: str, program: str, *overrides: str) -> tuple[Result, int]:
    """(the program's plan, a device's share of the document's slots), at full depth: the layers are scanned."""
    config = settings.load(RapidConfig, CONFIGS / f"{name}.yaml", list(overrides))
    devices, context = topology_of(topology), config.models.max_context
    assert context is not None
    programs = programs_of(config, devices.devices, architecture_of(config.models.target), None, context)
    (found,) = [item for item in programs if item.name == program]
    return examine(found, devices), context // config.mesh.context


# The most GiB that a chip may need: what was planned, and a tenth. The last is compiled with `--fuzz 2`: it is of the
# kind of the first.
PREFILLS = [
    ("llama31_8b_128k_v5p_2x2x1", "v5p:2x2x1", 11.1),
    ("llama31_8b_512k_v5p_4x4x4", "v5p:4x4x4", 4.4),
    ("llama31_8b_128k_v6e_4x4", "v6e:4x4", 4.6),
]


def pytest_generate_tests(metafunc: pytest.Metafunc):
    if "most" in metafunc.fixturenames:
        every = metafunc.config.getoption("--fuzz") > 1
        metafunc.parametrize(("name", "topology", "most"), PREFILLS if every else PREFILLS[:-1])


def test_a_prefill_fits_and_no_key_or_value_is_gathered(name: str, topology: str, most: float):
    result, slots = planned(name, topology, "prefill")
    assert result.text
    assert result.fits
    assert result.bytes_per_chip["peak"] < most * GIB
    said = heads.programs_of(CONFIGS / f"{name}.yaml")["prefill"]
    assert result.bytes_per_chip["peak"] / GIB == pytest.approx(said, rel=0.05)
    assert gathered_kv(result.text, slots=slots, head_dim=HEAD_DIM) == []
    # Nor is a matrix of weights, or the table of embeddings.
    assert max((item.bytes for item in collectives(result.text) if item.kind == "all-gather"), default=0) < 8 * 2**20
    assert "all-to-all" not in result.collectives
    loops = schedule(result.text)
    if result.chips > 16:  # more than two devices share the document: hops in a loop
        hops = [events for events in loops.values() if sum(event.kind == "kernel" for event in events) == 2]
        assert hops
        # The prefix's keys and values; those of the chunk itself, a sixteenth of them, may come after.
        assert all(under_kernels(events, 4 * 2**20) for events in hops)


@pytest.mark.parametrize("name", ["llama31_8b_512k_v5p_4x4x4", "llama31_70b_128k_v5p_4x4x4"])
def test_a_prefix_is_rounded_where_it_lies_beside_a_quarter_of_it(name: str):
    """The keys of all layers at once; the 70B's kv heads are copied to the devices."""
    result, _ = planned(name, "v5p:4x4x4", "prefix quantisation", "compute.kv=int8")
    assert result.text and result.fits and result.collectives == {}
    cache, made = result.bytes_per_chip["cache"], result.bytes_per_chip["activations"]
    assert 0.25 * cache < made < 0.26 * cache + 2**20
    assert result.bytes_per_chip["temporaries"] < 2**20
    # Of values, turned a layer at a time when the keys in full are gone.
    config = settings.load(RapidConfig, CONFIGS / f"{name}.yaml")
    devices, target = topology_of("v5p:4x4x4").devices, architecture_of(config.models.target)
    assert config.models.max_context is not None
    model, _ = models_of(config, devices, target, None, config.models.max_context)
    layers = model.prefix().layers
    assert isinstance(layers, KV)
    turned = quantize_array.lower(layers.v_BKSH, turned=True, mesh=model.mesh).compile()
    assert collectives(turned.as_text()) == []
    memory = turned.memory_analysis()
    assert memory.peak_memory_in_bytes - memory.argument_size_in_bytes < 0.28 * cache


SLICES = heads.slices_in(CONFIGS)


@pytest.mark.parametrize("path", SLICES, ids=lambda path: path.stem)
def test_the_settings_of_a_slice_can_be_split_over_it(path: Path, monkeypatch):
    monkeypatch.chdir(CONFIGS.parents[1])
    options = heads.options_of(path, "rapid", command.add_arguments)
    config, slice_ = settings.load(RapidConfig, path), topology_of(options.topology)
    assert settings.load(RapidConfig, Path(options.config)) == config
    wanted = config.mesh.devices + (config.drafter_mesh.devices if config.drafter_mesh else 0)
    assert wanted == len(slice_.devices)
    models = command._architectures(config, options)
    context = config.models.max_context
    assert context is not None
    programs = programs_of(config, slice_.devices, *models, context)
    assert list(heads.programs_of(path)) == [program.name for program in programs]
    speed = predicted(config, slice_.devices, *models, context, slice_.generation)
    assert speed is not None
    best = speed.best[0]  # at 0.9 accepted
    assert config.speculation.gamma == best.gamma
    words = r"predicted: ([\d.]+) to ([\d.]+) ms plain, ([\d.]+) to ([\d.]+) by"
    told = re.search(words, path.read_text(encoding="utf-8"))
    seconds = speed.plain.least, speed.plain.most, best.token.least, best.token.most
    assert told and [float(number) for number in told.groups()] == [round(1e3 * second, 1) for second in seconds]
    rounding = settings.load(RapidConfig, path, ["compute.kv=int8"])
    speed = predicted(rounding, slice_.devices, *models, context, slice_.generation)
    assert speed is not None
    best = speed.best[0]
    words = r"^  kv: full .* lossy, predicted ([\d.]+) to ([\d.]+) ms a token with (\d+) draft"
    told = re.search(words, path.read_text(encoding="utf-8"), re.MULTILINE)
    seconds = best.token.least, best.token.most
    assert told and [float(number) for number in told.groups()[:2]] == [round(1e3 * second, 1) for second in seconds]
    assert int(told[3]) == best.gamma


def test_the_small_settings_are_planned_whole_by_the_command(capfd):
    """In the stacked layout, which compiles faster; the architecture is read from the model's own file."""
    arguments = ["--topology", "v5e:2x2", "--set", "models.layout=stacked", "--set", "models.target=smollm2", "--json"]
    assert main(["plan", "--config", str(CONFIGS / "lossless.yaml"), *arguments]) == 0
    *found, speed = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [item["program"] for item in found] == ["prefill", "round"]
    assert speed["predicted"]["plain_token_seconds"][0] > 0 and len(speed["predicted"]["best"]) == 3
    for item in found:
        assert item["fits"] and item["topology"] == "v5e:2x2" and item["chips"] == 4
        kinds = item["bytes_per_chip"]
        assert 0.25 < kinds["weights"] / GIB < 0.4  # 135M parameters of 2 bytes, in whole tiles
        assert kinds["peak"] < 2 * GIB < item["hbm_bytes"]
        assert item["flops_per_chip"] > 0 and item["roofline_seconds"] > 0


def test_there_are_settings_for_slices():
    assert len(SLICES) >= 10
