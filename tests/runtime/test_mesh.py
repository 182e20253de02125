# SPDX-License-Identifier: Apache-2.0
"""Axis letters, the two sharding tables, and the mesh's own errors."""

import jax
import pytest
from jax.sharding import PartitionSpec

from rapid_jax.runtime.axes import ACT, PARAM, letters_of, spec_of
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.mesh import MeshConfig, make_mesh, sharding_of


def test_the_letters_of_a_name_give_its_spec():
    assert spec_of("gate_DF", PARAM) == PartitionSpec("fsdp", "model")
    assert spec_of("q_LDNH", PARAM) == PartitionSpec(None, "fsdp", "model", None)
    assert spec_of("q_bias_NH", PARAM) == PartitionSpec("model", None)
    assert spec_of("q_BTNH", ACT) == PartitionSpec(("data", "fsdp"), "context", "model", None)
    assert spec_of("k_BKSH", ACT) == PartitionSpec(("data", "fsdp"), "model", "context", None)


def test_names_without_letters_unknown_letters_and_clashes_are_errors():
    assert letters_of("attention_norm_D") == "D"
    for name in ("weight", "q_bias", "x_", "D"):
        with pytest.raises(ValueError, match="axis letters"):
            spec_of(name, PARAM)
    with pytest.raises(ValueError, match="letter 'Z'"):
        spec_of("x_ZD", PARAM)
    with pytest.raises(ValueError, match="'N' and 'F' are both split over 'model'"):
        spec_of("x_NF", PARAM)


def test_the_product_of_the_axes_must_be_the_number_of_devices():
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    assert dict(mesh.shape) == {"data": 1, "fsdp": 1, "context": 1, "model": 1}
    with pytest.raises(InputError, match="data 1 x fsdp 2 x context 1 x model 3 needs 6 devices, got 1"):
        make_mesh(MeshConfig(fsdp=2, model=3), jax.devices()[:1])
    with pytest.raises(InputError, match="context"):
        MeshConfig(context=0)


def test_an_axis_that_does_not_divide_is_an_error_with_both_numbers():
    mesh = jax.sharding.AbstractMesh((1, 2, 1, 16), ("data", "fsdp", "context", "model"))
    with pytest.raises(InputError, match="k_DKH: axis K of size 8 cannot be split over model = 16"):
        sharding_of(mesh, "k_DKH", (64, 8, 128), PARAM)
    assert sharding_of(mesh, "k_DKH", (64, 16, 128), PARAM).spec == PartitionSpec("fsdp", "model", None)
