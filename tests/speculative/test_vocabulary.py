# SPDX-License-Identifier: Apache-2.0
"""What sampling asks of rows over the vocabulary, against sorting them."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from rapid_jax.runtime.mesh import MeshConfig, make_mesh
from rapid_jax.speculative import vocabulary
from rapid_jax.speculative.vocabulary import _edge_by, _order, at, best, kth_largest, largest, nucleus

SIZES = [1, 2, 64, 1000]


@pytest.fixture(params=[1, 4])
def bits(request, monkeypatch) -> int:
    """Bits found a pass: as on a CPU, as on GPUs and TPUs."""
    monkeypatch.setattr(vocabulary, "_edge", partial(_edge_by, request.param))
    return request.param


@cache
def compiled(function, bits: int):
    """The function with as many bits a pass as there are when it is first called."""
    return jax.jit(lambda *given: function(*given))


KINDS = ["normal", "many equal", "all equal", "some impossible", "far apart", "zeros of either sign"]


def rows(kind: str, size: int, seed: int = 0) -> np.ndarray:
    """float32 [2, 3, size]."""
    rng = np.random.default_rng([seed, size, KINDS.index(kind)])
    z = rng.normal(size=(2, 3, size)) * 3
    if kind == "many equal":
        z = np.round(z)
    elif kind == "all equal":
        z = np.full_like(z, -1.5)
    elif kind == "some impossible":
        z = np.where(rng.random(z.shape) < 0.3, -np.inf, z)
        z[..., size // 2] = 0.25
    elif kind == "far apart":
        z = z * 1e30
    elif kind == "zeros of either sign":
        z = np.where(rng.random(z.shape) < 0.5, rng.choice([-0.0, 0.0], z.shape), z)
    return z.astype(np.float32)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_the_largest(kind, size):
    z = rows(kind, size)
    np.testing.assert_array_equal(jax.jit(best)(z), np.argmax(z, axis=-1))
    for count in sorted({1, min(7, size), min(40, size)}):
        for got, want in zip(jax.jit(largest, static_argnums=1)(z, count), lax.top_k(z, count), strict=True):
            np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_the_kth_largest(kind, size, bits):
    """Of each row another one, and of all of them the first and the last."""
    z, ranked = rows(kind, size), -np.sort(-rows(kind, size), axis=-1)
    each = np.random.default_rng(size).integers(1, size + 1, (2, 3, 1))
    for k in (each, np.ones_like(each), np.full_like(each, size)):
        got = compiled(kth_largest, bits)(z, k)
        np.testing.assert_array_equal(got, np.take_along_axis(ranked, k - 1, axis=-1))


def removed(z_V: np.ndarray, outside: float) -> np.ndarray:
    """The nucleus by sorting, in float64: of equal numbers those of lower ids go first."""
    order = np.argsort(z_V, kind="stable")
    weight = np.exp(z_V.astype(np.float64) - z_V.max())[order]
    out = order[(np.cumsum(weight) / weight.sum() <= outside)[:-1].nonzero()[0]]
    found = z_V.copy()
    found[out] = -np.inf
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("outside", [1e-6, 0.05, 0.3, 1.0])
def test_the_nucleus(kind, size, outside, bits):
    """The same tokens, but for one at the edge where float32 rounds the mass to the other side of it."""
    z = rows(kind, size)
    got = np.asarray(compiled(nucleus, bits)(z, np.full((2, 1, 1), outside, np.float32)))
    for mine, row in zip(got.reshape(-1, size), z.reshape(-1, size), strict=True):
        assert np.isfinite(mine[np.argmax(mine)]) and mine.max() == row.max()
        np.testing.assert_array_equal(mine[np.isfinite(mine)], row[np.isfinite(mine)])
        low, high = (removed(row, np.float32(outside) * factor) for factor in (1 - 1e-5, 1 + 1e-5))
        assert np.all(np.isfinite(mine) <= np.isfinite(low)) and np.all(np.isfinite(mine) >= np.isfinite(high))


def test_each_row_has_a_nucleus_of_its_own():
    z = rows("normal", 1000)
    outside = np.asarray([0.02, 0.5], np.float32)[:, None, None]
    both = np.asarray(jax.jit(nucleus)(z, outside))
    for row in range(2):
        np.testing.assert_array_equal(both[row], nucleus(z[row : row + 1], outside[row : row + 1])[0])
    assert np.isfinite(both[0]).sum() > 2 * np.isfinite(both[1]).sum()


@pytest.mark.parametrize("size", [3, 1000])
def test_the_number_at_an_index(size):
    z = rows("some impossible", size)
    index = np.random.default_rng(0).integers(0, size, (2, 3))
    np.testing.assert_array_equal(jax.jit(at)(z, index), np.take_along_axis(z, index[..., None], axis=-1)[..., 0])


@pytest.mark.parametrize("many", [2, 4, 8])
def test_however_many_bits_are_found_at_once_the_edge_is_the_same(many):
    z = rows("many equal", 1000)
    key, weight = _order(jnp.asarray(z)), jnp.ones_like(z)
    for bound in (0.0, 10.0, 999.0):
        whole = np.full((2, 3, 1), bound, np.float32)
        np.testing.assert_array_equal(_edge_by(many, key, weight, whole), _edge_by(1, key, weight, whole))


def test_over_a_mesh_it_is_the_same_and_no_row_is_gathered(bits):
    z = rows("normal", 4096)
    mesh = make_mesh(MeshConfig(data=2, model=4))
    placed = jax.device_put(z, NamedSharding(mesh, PartitionSpec(None, None, "model")))
    k, outside = np.full((2, 1, 1), 50), np.full((2, 1, 1), 0.1, np.float32)

    @jax.jit
    def filtered(z_V):
        cut = nucleus(jnp.where(z_V < kth_largest(z_V, k), -jnp.inf, z_V), outside)
        return best(cut), at(cut, best(cut)), cut

    for got, want in zip(filtered(placed), filtered(z), strict=True):
        np.testing.assert_array_equal(got, want)
    text = filtered.lower(placed).compile().as_text()
    assert "all-reduce" in text and "all-gather" not in text and "sort(" not in text
