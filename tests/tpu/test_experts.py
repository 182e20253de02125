# SPDX-License-Identifier: Apache-2.0
"""A mixture of experts as the TPU compiler leaves it: no expert is copied, and devices exchange sums alone."""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from rapid_jax.model.experts import Grouped, mixture
from rapid_jax.model.experts_config import Experts
from rapid_jax.plan.hlo import collectives
from rapid_jax.plan.topologies import topology_of
from rapid_jax.runtime.mesh import make_mesh
from rapid_jax.runtime.mesh_config import MeshConfig

D, F = 2048, 1024  # Qwen3-30B-A3B's on four chips: 768, filled up to whole tiles of each
EXPERTS = Experts(count=128, per_token=8, ffn=768, normalized=True)


def test_a_few_rows_read_experts_where_they_lie():
    mesh = make_mesh(MeshConfig(model=4), topology_of("v5p:2x2x1").devices)

    def given(*shape: int, split: int | None = None) -> jax.ShapeDtypeStruct:
        spec = PartitionSpec(*("model" if axis == split else None for axis in range(len(shape))))
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec))

    def mixed(h_BTD, router_DX, gate, up, down):
        return mixture(h_BTD, router_DX, *map(Grouped, (gate, up, down)), experts=EXPERTS, mesh=mesh)

    columns, depth = given(128, D, F, split=2), given(128, F, D, split=1)
    compiled = jax.jit(mixed).lower(given(1, 4, D), given(D, 128), columns, columns, depth).compile()
    text = compiled.as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 3  # gate, up and down: megablox
    assert compiled.memory_analysis().temp_size_in_bytes < 2**23  # an expert's matrix alone has 1 MiB on a chip
    assert {item.kind for item in collectives(text)} == {"all-reduce"}
