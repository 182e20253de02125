# SPDX-License-Identifier: Apache-2.0
"""Prefixes whose every key and value says which head it belongs to, without a model's prefill."""

from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from rapid_jax.attention.cache import KV, Prefix
from rapid_jax.config import CacheConfig, ComputeConfig
from rapid_jax.engine.prefixes import PrefixCache
from rapid_jax.model.decoder import Decoder, Layout
from rapid_jax.runtime.axes import PARAM
from rapid_jax.runtime.mesh import make_meshes, put_on_mesh
from rapid_jax.runtime.mesh_config import MeshConfig
from rapid_jax.speculative.prefill import serving
from rapid_jax.speculative.prefix_heads import Place
from tests.speculative.models import Weights

CHUNK = 16
LENGTH = 5 * CHUNK + 3
MESHES = {
    "one device": MeshConfig(),
    "context 2": MeshConfig(context=2),
    "context 4, model 2": MeshConfig(context=4, model=2),
    "kv heads copied": MeshConfig(context=2, model=4, replicate_kv=True),
}


def decoder_on(config: MeshConfig, layout: Layout = "unrolled") -> Decoder:
    mesh = make_meshes(config, None)[0]
    table = {**PARAM, "K": None} if config.replicate_kv else PARAM
    return Weights.lively(64).decoder(layout, mesh=mesh, table=table)


def tokens(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(1, 60, count).tolist()


def values(head: Sequence[int], seed: int, heads: int, size: int) -> np.ndarray:
    """float32 [1, heads, len(head), size]: each slot follows from all tokens up to its own."""
    so_far = np.cumsum(np.asarray(head, np.float64) * np.arange(1, len(head) + 1))
    grid = np.arange(1, heads * size + 1).reshape(heads, 1, size) + seed
    return np.sin(so_far[None, :, None] * grid)[None].astype(np.float32)


def spread(place: Place, array: np.ndarray) -> np.ndarray:
    """What lies in order of position along the third axis, in its slots; empty ones are zeros."""
    pos_S = place.positions()[0]
    out = np.zeros((*array.shape[:2], pos_S.size, *array.shape[3:]), array.dtype)
    out[:, :, pos_S >= 0] = array[:, :, pos_S[pos_S >= 0]]
    return out


def prefix_of(decoder: Decoder, head: Sequence[int]) -> Prefix:
    """A made-up prefix that lies as `prefill` would have left it."""
    config, strategy = decoder.config, serving(decoder, block=1)
    place = Place.of(len(head), len(head), CHUNK, strategy.context)
    copies = strategy.kv_heads(config.num_kv_heads) // config.num_kv_heads
    each = []
    for layer in range(config.num_layers):
        pair = [values(head, 100 * layer + seed, config.num_kv_heads, config.head_dim) for seed in (0, 50)]
        each.append(KV(*(np.repeat(spread(place, array), copies, axis=1) for array in pair)))
    if decoder.layout == "stacked":
        stack = jax.tree.map(lambda *arrays: np.stack(arrays), *each)
        return place.prefix(put_on_mesh(decoder.mesh, strategy.spec("kv_LBKSH"), stack), decoder.mesh)
    return place.prefix(tuple(put_on_mesh(decoder.mesh, strategy.spec("kv_BKSH"), each)), decoder.mesh)


def cache_of(decoder: Decoder, folder: Path, *, kv: str = "full", aside: bool = False, **settings) -> PrefixCache:
    compute = ComputeConfig(prefill_chunk=CHUNK, kv=kv)  # type: ignore[arg-type]
    cache = CacheConfig(**{"disk_gib": 0.0, "device_gib": 1.0, "host_gib": 1.0} | settings)
    return PrefixCache(decoder, compute, cache, folder, weights_hash=lambda: "w", aside=aside, quiet=True)


def check_head(got: Prefix | None, decoder: Decoder, head: Sequence[int], longest: int) -> None:
    """`got` is the prefix of this head in the slots of a longer one, its empty slots zeros, and lies as it should."""
    assert got is not None
    strategy = serving(decoder, block=1)
    place = Place.of(len(head), longest, CHUNK, strategy.context)
    want = prefix_of(decoder, head)
    np.testing.assert_array_equal(got.pos_BS, place.positions())
    assert int(got.used) == len(head)
    pos_S, own_S = place.positions()[0], np.asarray(want.pos_BS)[0]
    filled = np.flatnonzero(pos_S >= 0)
    slot_of = np.argsort(np.where(own_S < 0, own_S.size, own_S), kind="stable")
    for one, other in zip(jax.tree.leaves(got.layers), jax.tree.leaves(want.layers), strict=True):
        one_host, other_host = np.asarray(one), np.asarray(other)
        assert one.sharding.is_equivalent_to(other.sharding, one.ndim) and one.committed == other.committed
        np.testing.assert_array_equal(one_host[..., filled, :], other_host[..., slot_of[pos_S[filled]], :])
        assert not np.any(one_host[..., pos_S < 0, :])


def check_same(got: Prefix | None, want: Prefix) -> None:
    """Bit for bit, lying alike."""
    assert got is not None and jax.tree.structure(got) == jax.tree.structure(want)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert (one.dtype, one.sharding, one.committed) == (other.dtype, other.sharding, other.committed)
        np.testing.assert_array_equal(one, other)
