# SPDX-License-Identifier: Apache-2.0
"""The programs of training on whole slices: they fit, no key or value is gathered, weights one layer at a time."""

import re
from pathlib import Path

import pytest

from longpo_jax import plan
from longpo_jax.config import LongPOConfig
from rapid_jax.plan.architectures import architecture_of
from rapid_jax.plan.hlo import collectives, gathered_kv
from rapid_jax.plan.report import examine
from rapid_jax.plan.topologies import GIB, topology_of
from rapid_jax.runtime import settings
from tests.tpu import heads

CONFIGS = heads.CONFIGS / "longpo"
HEAD_DIM = 128


def test_the_gradients_of_mistral_s_first_round():
    """At full depth, since the layers are scanned; a quarter of the slice and of the length compiles in less time."""
    path, slice_ = CONFIGS / "mistral_7b_128k_v5p_2x2x4.yaml", topology_of("v5p:2x2x1")
    config = settings.load(LongPOConfig, path, ["mesh.context=4", "train.lengths=[32768]"])
    result = examine(plan.programs_of(config, slice_, architecture_of(config.model.source))[0], slice_)
    assert result.text
    assert result.fits
    share = config.train.lengths[-1] // config.mesh.context
    assert gathered_kv(result.text, slots=share, head_dim=HEAD_DIM) == []
    # The largest of a layer's matrices in bfloat16, and once the table of embeddings and the head.
    layer, table = 2 * 4096 * 14336, 2 * 4096 * 32000
    largest = sorted({item.bytes for item in collectives(result.text) if item.kind == "all-gather"}, reverse=True)
    assert all(size <= layer or size == table for size in largest)
    assert "all-to-all" not in result.collectives and "collective-permute" in result.collectives


def test_the_update_of_mistral_s_first_round_is_as_its_head_says():
    path, slice_ = CONFIGS / "mistral_7b_128k_v5p_2x2x4.yaml", topology_of("v5p:2x2x4")
    config = settings.load(LongPOConfig, path)
    update = examine(plan.programs_of(config, slice_, architecture_of(config.model.source))[1], slice_)
    assert update.bytes_per_chip["peak"] / GIB == pytest.approx(heads.programs_of(path)["update"], rel=0.02)
    assert "all-gather" not in update.collectives  # moments lie where their weights do


@pytest.mark.parametrize("path", heads.slices_in(CONFIGS), ids=lambda path: path.stem)
def test_the_settings_of_a_slice_can_be_split_over_it(path: Path, monkeypatch):
    monkeypatch.chdir(CONFIGS.parents[1])
    options = heads.options_of(path, "longpo", plan.add_arguments)
    config, slice_ = settings.load(LongPOConfig, path), topology_of(options.topology)
    assert settings.load(LongPOConfig, Path(options.config)) == config
    assert config.mesh.devices == config.generation.mesh.devices == len(slice_.devices)
    programs = plan.programs_of(config, slice_, architecture_of(config.model.source))
    said, text = heads.programs_of(path), path.read_text(encoding="utf-8")
    assert list(said) == [program.name for program in programs] == ["gradients", "update"]
    peak = re.search(
        rf"^# Hardware: +{options.topology}, {len(slice_.devices)} chips; ([\d.]+) GiB", text, re.MULTILINE
    )
    assert peak and float(peak[1]) == max(said.values())
