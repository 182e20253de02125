# SPDX-License-Identifier: Apache-2.0
"""The programs of training on whole slices: they fit, no key or value is gathered, weights one layer at a time."""

import argparse
import json
import re
import shlex
from pathlib import Path

import pytest

from longpo_jax import plan
from longpo_jax.cli import main
from longpo_jax.config import LongPOConfig
from rapid_jax.plan.architectures import architecture_of
from rapid_jax.plan.hlo import collectives, gathered_kv
from rapid_jax.plan.report import examined
from rapid_jax.plan.topologies import GIB, topology_of
from rapid_jax.runtime import settings

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "longpo"
SLICES = [path for path in sorted(CONFIGS.glob("*.yaml")) if "\n# Plan: " in path.read_text(encoding="utf-8")]
HEAD_DIM = 128


def said_of(path: Path, program: str) -> float:
    """GiB a chip, as the head of the settings says."""
    (said,) = re.findall(rf"^# +{program}: ([\d.]+) GiB", path.read_text(encoding="utf-8"), re.MULTILINE)
    return float(said)


def test_the_gradients_of_mistral_s_first_round():
    """At full depth and length: the layers are scanned."""
    path, slice_ = CONFIGS / "mistral_7b_128k_v5p_2x2x4.yaml", topology_of("v5p:2x2x4")
    config = settings.load(LongPOConfig, path)
    model = architecture_of(config.model.source)
    gradients = plan.programs_of(config, slice_, model)[0]
    result = examined(gradients, slice_)
    assert result.text
    assert result.fits
    assert result.bytes_per_chip["peak"] / GIB == pytest.approx(said_of(path, "gradients"), rel=0.05)
    share = config.train.lengths[-1] // config.mesh.context
    assert gathered_kv(result.text, slots=share, head_dim=HEAD_DIM) == []
    # The largest of a layer's matrices in bfloat16, and once the table of embeddings and the head.
    layer, table = 2 * 4096 * 14336, 2 * 4096 * 32000
    largest = sorted({item.bytes for item in collectives(result.text) if item.kind == "all-gather"}, reverse=True)
    assert all(size <= layer or size == table for size in largest)
    assert "all-to-all" not in result.collectives and "collective-permute" in result.collectives


@pytest.mark.parametrize("path", SLICES, ids=lambda path: path.stem)
def test_the_settings_of_a_slice_can_be_split_over_it(path: Path, monkeypatch):
    monkeypatch.chdir(CONFIGS.parents[1])
    text = path.read_text(encoding="utf-8")
    parser = argparse.ArgumentParser()
    plan.add_arguments(parser)
    (words,) = re.findall(r"^# Plan: +longpo plan (.+)$", text, re.MULTILINE)
    options = parser.parse_args(shlex.split(words))
    config, slice_ = settings.load(LongPOConfig, path), topology_of(options.topology)
    assert settings.load(LongPOConfig, Path(options.config)) == config
    assert config.mesh.devices == config.generation.mesh.devices == len(slice_.devices)
    programs = plan.programs_of(config, slice_, architecture_of(config.model.source))
    said = re.findall(r"^# +([a-z ]+): [\d.]+ GiB", text, re.MULTILINE)
    assert said == [program.name for program in programs] == ["gradients", "update"]
    peak = re.search(
        rf"^# Hardware: +{options.topology}, {len(slice_.devices)} chips; ([\d.]+) GiB", text, re.MULTILINE
    )
    assert peak and float(peak[1]) == max(said_of(path, name) for name in said)


def test_the_command_plans_the_small_settings(capfd):
    arguments = ["--topology", "v5e:2x2", "--set", "mesh.fsdp=2", "--set", "mesh.context=2", "--layers", "2", "--json"]
    assert main(["plan", "--config", str(CONFIGS / "smollm2_h200.yaml"), *arguments]) == 0
    found = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [item["program"] for item in found] == ["gradients", "update"]
    assert all(item["fits"] and item["chips"] == 4 for item in found)
