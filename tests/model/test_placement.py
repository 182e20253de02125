# SPDX-License-Identifier: Apache-2.0
"""What is read of a checkpoint's files: of each array the rows that this process's devices hold, once."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import transformers
from flax import nnx

from rapid_jax.model.hf_io import HfCheckpoint, load_hf
from rapid_jax.model.hf_names import Weight, weights
from rapid_jax.model.placement import build
from rapid_jax.runtime.axes import PARAM, TRAINED
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.mesh import MeshConfig, make_mesh
from tests.model.conftest import SIZES

# What the letters of a stored array's first axis are split over, on the mesh of the test.
WITHIN = {"V": "model", "N": "model", "K": "model", "F": "model", "D": "fsdp", "X": None, "H": None}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Sizes that eight devices can share, and biases."""
    path = tmp_path_factory.mktemp("even")
    sizes: dict[str, Any] = SIZES | {"vocab_size": 104, "num_attention_heads": 4, "num_key_value_heads": 4}
    transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**sizes)).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> Path:
    """Experts in the first layer, an MLP in the second."""
    path = tmp_path_factory.mktemp("mixed")
    sizes: dict[str, Any] = SIZES | {"vocab_size": 104, "head_dim": 16, "num_experts": 3, "num_experts_per_tok": 2}
    config = transformers.Qwen3MoeConfig(**sizes, moe_intermediate_size=24, mlp_only_layers=[1])
    transformers.Qwen3MoeForCausalLM(config).save_pretrained(path)
    return path


class Recorder:
    """A checkpoint's `read` that remembers the ranges of rows it was asked for."""

    def __init__(self, folder: Path):
        self.checkpoint = HfCheckpoint(folder)
        self.ranges: dict[str, list[range]] = {}

    def read(self, key: str, rows: range | None = None):
        array = self.checkpoint.read(key, rows)
        start = 0 if rows is None else rows.start
        self.ranges.setdefault(key, []).append(range(start, start + array.shape[0]))
        return array


def leaves(decoder) -> dict:
    return dict(nnx.to_flat_state(nnx.split(decoder)[1]))


def expected_parts(weight: Weight, mesh: dict[str, int], trained: bool) -> int:
    axis = WITHIN[weight.stored_axes[0]]
    return mesh.get(str(axis), 1) * (mesh.get("context", 1) if trained and axis == "fsdp" else 1)


@pytest.mark.parametrize(
    ("layout", "mesh", "trained"),
    [
        ("stacked", {"fsdp": 2, "model": 4}, False),
        ("unrolled", {"data": 8}, False),
        ("unrolled", {"fsdp": 2, "context": 2, "model": 2}, True),
    ],
)
def test_each_row_is_read_once_and_in_the_parts_that_devices_hold(layout, mesh, trained, folder):
    recorder = Recorder(folder)
    config = recorder.checkpoint.config
    options: dict[str, Any] = {"layout": layout, "dtype": jnp.dtype("float32"), "quiet": True}
    on_mesh = build(
        config,
        recorder.read,
        read_rows=recorder.read,
        mesh=make_mesh(MeshConfig(**mesh), jax.devices()[: MeshConfig(**mesh).devices]),
        table=TRAINED if trained else PARAM,
        **options,
    )
    for weight in weights(config):
        parts = sorted(recorder.ranges[weight.key], key=lambda rows: rows.start)
        assert len(parts) == expected_parts(weight, mesh, trained), weight.key
        assert [row for rows in parts for row in rows] == list(range(weight.stored_shape[0])), weight.key
    alone = leaves(build(config, recorder.checkpoint.read, **options))
    assert all((leaf[...] == alone[path][...]).all() for path, leaf in leaves(on_mesh).items())


def test_of_each_expert_a_device_is_given_its_part(mixed):
    test_each_row_is_read_once_and_in_the_parts_that_devices_hold("unrolled", {"fsdp": 2, "model": 2}, False, mixed)


def test_layers_of_both_kinds_are_not_stacked(mixed):
    with pytest.raises(InputError, match="layout stacked: expected layers that all have experts, or none"):
        load_hf(mixed, layout="stacked", dtype=jnp.dtype("float32"), quiet=True)


def test_an_array_that_is_only_read_whole_is_read_once(folder):
    recorder = Recorder(folder)
    mesh = make_mesh(MeshConfig(fsdp=2, model=4))
    options: dict[str, Any] = {"layout": "unrolled", "dtype": jnp.dtype("float32"), "quiet": True}
    build(recorder.checkpoint.config, recorder.read, mesh=mesh, **options)
    assert all(len(parts) == 1 for parts in recorder.ranges.values())


TWO = """
import json, sys
from pathlib import Path
import jax
jax.distributed.initialize(sys.argv[2], 2, int(sys.argv[3]), initialization_timeout=60)
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rapid_jax.model import safetensors_file
from rapid_jax.model.hf_io import load_hf
from rapid_jax.runtime.mesh import MeshConfig, make_mesh
options = {"layout": "stacked", "dtype": jnp.float32, "quiet": True}
alone = jax.tree.leaves(nnx.split(load_hf(Path(sys.argv[1]), **options))[1])
real, counts = safetensors_file.read, {}
def read(tensor, rows=None):
    array = real(tensor, rows)
    counts[tensor.name] = counts.get(tensor.name, 0) + array.nbytes / tensor.size
    return array
safetensors_file.read = read
said = []
for mesh in ({"model": 4}, {"fsdp": 2, "model": 2}, {"data": 2, "context": 2}):
    counts.clear()
    loaded = load_hf(Path(sys.argv[1]), mesh=make_mesh(MeshConfig(**mesh)), **options)
    for leaf, whole in zip(jax.tree.leaves(nnx.split(loaded)[1]), alone, strict=True):
        for shard in leaf.addressable_shards:
            np.testing.assert_array_equal(shard.data, whole[shard.index])
    said.append(dict(counts))
print(json.dumps(said))
"""


def test_two_processes_read_every_matrix_once_whatever_their_devices_hold(folder):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    pair = [
        subprocess.Popen(
            [sys.executable, "-c", TWO, str(folder), address, str(index)],
            env=os.environ | {"JAX_NUM_CPU_DEVICES": "2", "JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for index in (0, 1)
    ]
    for process in pair:
        lines = process.communicate(timeout=120)[0].splitlines()  # before the last, of what connects the processes
        for read in json.loads(lines[-1]):
            for weight in weights(HfCheckpoint(folder).config):
                if len(weight.stored_shape) == 2:
                    assert read[weight.key] == 0.5, weight.key
                else:
                    assert read[weight.key] <= 1, weight.key
