# SPDX-License-Identifier: Apache-2.0
"""Ring attention over half a million tokens, forward and backward, on 64 and 128 v5p chips."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding

from rapid_jax.attention.attend import attend_self
from rapid_jax.attention.strategy import Strategy
from rapid_jax.plan.hlo import collectives, gathered_kv, schedule, totals, under_kernels
from rapid_jax.plan.topologies import GIB, topology_of
from rapid_jax.runtime.mesh import make_mesh
from rapid_jax.runtime.mesh_config import MeshConfig

TOKENS, HEADS, KV_HEADS, HEAD_DIM = 524288, 32, 8, 128


def test_keys_and_values_that_are_gathered_are_found():
    """What no program may do is what over="all_gather" does."""
    mesh = make_mesh(MeshConfig(context=4), topology_of("v5p:2x2x1").devices)
    strategy = Strategy(block=1024, mesh=mesh, kernel="splash", over="all_gather")

    def given(letters: str, *shape: int, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, strategy.spec(letters)))

    def attend(q_BTNH, k_BTKH, v_BTKH, pos_BT):
        return attend_self(pos_BT, strategy, runs=2)(q_BTNH, k_BTKH, v_BTKH, None)[0]

    q_BTNH, kv_BTKH = (given("x_BTNH", 1, 16384, heads, HEAD_DIM) for heads in (HEADS, KV_HEADS))
    compiled = jax.jit(attend).lower(q_BTNH, kv_BTKH, kv_BTKH, given("x_BT", 1, 16384, dtype=jnp.int32)).compile()
    assert len(gathered_kv(compiled.as_text(), slots=4096, head_dim=HEAD_DIM)) >= 2


# Chips, and the most GiB a chip may need: a layer's q, k, v and their gradients, two visitors and their gradients.
SLICES = [("v5p:4x4x8", 128, 0.6), ("v5p:4x4x4", 64, 1.2)]


def pytest_generate_tests(metafunc: pytest.Metafunc):
    """The larger slice, where a chip's share is shortest; with `--fuzz 2` both."""
    if "chips" in metafunc.fixturenames:
        every = metafunc.config.getoption("--fuzz") > 1
        metafunc.parametrize(("name", "chips", "most"), SLICES if every else SLICES[:1])


def test_transfers_run_under_the_kernels_and_memory_is_a_share_of_the_sequence(name: str, chips: int, most: float):
    topology = topology_of(name)
    mesh = make_mesh(MeshConfig(context=chips), topology.devices)
    strategy = Strategy(block=1024, mesh=mesh, kernel="splash")

    def given(letters: str, *shape: int, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, strategy.spec(letters)))

    def loss(q_BTNH, k_BTKH, v_BTKH, pos_BT):
        out_BTNH, _ = attend_self(pos_BT, strategy, runs=2)(q_BTNH, k_BTKH, v_BTKH, None)
        return jnp.sum(jnp.square(out_BTNH.astype(jnp.float32)))

    q_BTNH, kv_BTKH = (given("x_BTNH", 1, TOKENS, heads, HEAD_DIM) for heads in (HEADS, KV_HEADS))
    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
    compiled = step.lower(q_BTNH, kv_BTKH, kv_BTKH, given("x_BT", 1, TOKENS, dtype=jnp.int32)).compile()
    text, share = compiled.as_text(), TOKENS // chips

    assert compiled.memory_analysis().peak_memory_in_bytes < most * GIB
    assert gathered_kv(text, slots=share, head_dim=HEAD_DIM) == []
    found = collectives(text)
    assert set(totals(found)) == {"collective-permute", "all-reduce"}  # the sum of the loss
    # Keys and values go round once in each direction, each with the hops between its first and its last visitor.
    one_way = 2 * KV_HEADS * share * HEAD_DIM * 2
    keys = sum(item.times * item.bytes for item in found if item.kind == "collective-permute")
    assert keys >= 2 * (chips - 1) * one_way
    loops = [events for computation, events in schedule(text).items() if "main" not in computation]
    assert len(loops) == 2  # forward, backward
    assert all(map(under_kernels, loops))
