# SPDX-License-Identifier: Apache-2.0
"""A prefix in 8 bits: how far each element may be off, and that attention reads what it stands for."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from rapid_jax.attention.attend import attend_prefix_tail
from rapid_jax.attention.cache import KV, Prefix, Tail
from rapid_jax.attention.quantized_kv import quantize_array, quantize_kv
from rapid_jax.attention.strategy import Strategy
from rapid_jax.plan.hlo import collectives
from rapid_jax.runtime.mesh import MeshConfig, make_mesh

B, N, K, H = 2, 4, 2, 16
SLOTS, USED, TAIL, NEW = 48, 40, 8, 2
ZERO, LARGE = 3, 5  # slots of zeros, and of one large element
MESHES = {
    "context 2": MeshConfig(context=2),
    "context 4, model 2": MeshConfig(context=4, model=2),
    "data 2, context 2, model 2": MeshConfig(data=2, context=2, model=2),
}
PLAIN = Strategy(block=20)  # several blocks, the last of which is short


def layer_of(seed: int, dtype=jnp.float32, spread: float | None = None) -> KV:
    """Keys and values of one size, or without it, slots of very different ones."""
    rng = np.random.default_rng(seed)
    k, v = (rng.normal(size=(B, K, SLOTS, H)) for _ in range(2))
    for x in (k, v):
        x *= spread or rng.uniform(0.01, 10, (B, K, SLOTS, 1))
        if spread is None:
            x[:, :, ZERO] = 0
            x[:, :, LARGE, 7] = -1e4
    return KV(jnp.asarray(k.astype(dtype)), jnp.asarray(v.astype(dtype)))


def prefix_of(layers: tuple[KV, ...] | KV) -> Prefix:
    """Two prompts, the second of which is shorter."""
    ends = np.array([[USED], [USED - 13]])
    pos_BS = np.where(np.arange(SLOTS) < ends, np.arange(SLOTS), -1).astype(np.int32)
    return Prefix(layers, jnp.asarray(pos_BS), jnp.asarray(np.int32(USED)))


def stack(*layers: KV) -> KV:
    return jax.tree.map(lambda *x: jnp.stack(x), *layers)


def in_full(kv: KV) -> tuple[np.ndarray, np.ndarray]:
    """What the steps stand for, in float64; rounded values lie as [.., H, S]."""
    k, v, *scales = (np.asarray(x, np.float64) for x in (kv.k_BKSH, kv.v_BKSH, kv.k_scale_BKS, kv.v_scale_BKS))
    return k * scales[0][..., None], v.swapaxes(-1, -2) * scales[1][..., None]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("stacked", [False, True])
def test_every_element_is_off_by_half_a_step_at_most(stacked, dtype):
    layers = tuple(layer_of(seed, dtype) for seed in range(3))
    layers = stack(*layers) if stacked else layers
    given = prefix_of(layers)
    before = jax.tree.map(lambda x: np.asarray(x, np.float64), layers)
    got = quantize_kv(given)
    assert isinstance(got.layers, KV) == stacked
    assert got.pos_BS is given.pos_BS and got.used is given.used
    pairs = [(got.layers, before)] if stacked else list(zip(got.layers, before, strict=True))
    assert len(pairs) == (1 if stacked else 3)
    for new, old in pairs:
        assert new.k_BKSH.dtype == new.v_BKSH.dtype == jnp.int8
        assert new.k_scale_BKS.dtype == new.v_scale_BKS.dtype == jnp.float32
        steps = new.k_BKSH, new.v_BKSH.swapaxes(-1, -2)
        for restored, x, step in zip(in_full(new), (old.k_BKSH, old.v_BKSH), steps, strict=True):
            assert restored.shape == x.shape
            largest = np.max(np.abs(x), axis=-1, keepdims=True)
            assert np.all(np.abs(restored - x) <= largest / 127 * 0.5001)
            assert np.all(restored[x == 0] == 0)
            np.testing.assert_array_equal(np.max(np.abs(step), axis=-1), np.where(largest[..., 0] == 0, 0, 127))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("mesh", MESHES)
def test_each_device_rounds_its_own_part(mesh, stacked, dtype):
    """To the same bits as one device rounds, lying as their letters say; nothing moves."""
    strategy = Strategy(block=1, mesh=make_mesh(MESHES[mesh], jax.devices()[: MESHES[mesh].devices]), batch=("data",))
    layers = tuple(layer_of(seed, dtype) for seed in range(2))
    layers = stack(*layers) if stacked else layers
    lead = "L" if stacked else ""
    placed = jax.device_put(layers, NamedSharding(strategy.mesh, strategy.spec(f"kv_{lead}BKSH")))
    x = jax.tree.leaves(placed)[0]
    programs = [quantize_array.lower(x, turned=turned, mesh=strategy.mesh).compile() for turned in (False, True)]
    assert [collectives(program.as_text()) for program in programs] == [[], []]
    got = quantize_kv(prefix_of(placed))
    chex.assert_trees_all_equal(got.layers, quantize_kv(prefix_of(layers)).layers)
    names = {"k_BKSH": "BKSH", "v_BKSH": "BKHS", "k_scale_BKS": "BKS", "v_scale_BKS": "BKS"}
    for kv in [got.layers] if stacked else got.layers:
        for field, letters in names.items():
            array, spec = getattr(kv, field), strategy.spec(f"x_{lead}{letters}")
            assert array.sharding.is_equivalent_to(NamedSharding(strategy.mesh, spec), array.ndim)
            parts = MESHES[mesh].devices
            assert all(shard.data.size == array.size // parts for shard in array.addressable_shards)


def test_a_rounded_prefix_stays_as_it_is():
    prefix = quantize_kv(prefix_of((layer_of(0),)))
    assert quantize_kv(prefix) is prefix and not prefix.layers[0].k_BKSH.is_deleted()


@pytest.mark.parametrize("stacked", [False, True])
def test_the_given_arrays_are_deleted(stacked):
    layers = tuple(layer_of(seed) for seed in range(2))
    given = prefix_of(stack(*layers) if stacked else layers)
    got = quantize_kv(given)
    assert all(x.is_deleted() for x in jax.tree.leaves(given.layers))
    assert not any(x.is_deleted() for x in jax.tree.leaves((got, given.pos_BS, given.used)))


@partial(jax.jit, static_argnames="strategy")
def attended(layer: KV, strategy: Strategy = PLAIN) -> tuple[jax.Array, KV]:
    """(attention of two new tokens over a layer and a tail in which there are 3 and 0 already, the tail's KV)."""
    keys = iter(jax.random.split(jax.random.key(0), 5))
    near = KV(*(jax.random.normal(next(keys), (B, K, TAIL, H)) for _ in range(2)))
    tail = Tail((near,), jnp.asarray([USED, USED - 13]), jnp.asarray([3, 0]))
    pos_BG = (tail.start_B + tail.length_B)[:, None] + jnp.arange(NEW)
    q, k, v = (jax.random.normal(next(keys), (B, NEW, heads, H)) for heads in (N, K, K))
    return attend_prefix_tail(prefix_of((layer,)), tail, pos_BG, strategy)(q, k, v, (layer, near))


@pytest.mark.parametrize("stacked", [False, True])
def test_attention_reads_what_the_steps_stand_for(stacked):
    layers = tuple(layer_of(seed, spread=1.5) for seed in range(2))
    full_BGNH = np.asarray(attended(layers[1])[0])
    prefix = quantize_kv(prefix_of(stack(*layers) if stacked else layers))
    layer = jax.tree.map(lambda x: x[1], prefix.layers) if stacked else prefix.layers[1]
    got_BGNH, tail = attended(layer)
    want_BGNH, want_tail = attended(KV(*(jnp.asarray(np.float32(x)) for x in in_full(layer))))
    np.testing.assert_allclose(got_BGNH, want_BGNH, atol=1e-5, rtol=0)
    chex.assert_trees_all_equal(tail, want_tail)
    far = np.sqrt(np.mean(np.square(got_BGNH - full_BGNH)) / np.mean(np.square(full_BGNH)))
    assert 1e-4 < far < 0.012, far


def test_a_rounded_prefix_that_is_split_over_devices():
    """The scales lie as their slots and heads do."""
    (layer,) = quantize_kv(prefix_of((layer_of(0, spread=1.5),))).layers
    want_BGNH, _ = attended(layer)
    mesh = make_mesh(MeshConfig(context=2, model=2), jax.devices()[:4])
    got_BGNH, _ = attended(layer, Strategy(block=20, mesh=mesh))
    np.testing.assert_allclose(got_BGNH, want_BGNH, atol=1e-5, rtol=0)
