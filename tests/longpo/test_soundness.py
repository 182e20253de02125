# SPDX-License-Identifier: Apache-2.0
"""Sums of arrays' bits: the same wherever they lie, another for one flipped bit or two values that changed places."""

import jax
import jax.numpy as jnp
import numpy as np

from longpo_jax.soundness import all_finite, checksum, finite_each
from rapid_jax.runtime.mesh import make_mesh
from rapid_jax.runtime.mesh_config import MeshConfig


def tree() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    half = random.normal(size=(8, 4)).astype(jnp.bfloat16)
    return {"a": random.normal(size=(16, 8)).astype(np.float32), "b": half, "n": np.int32(3)}


def test_the_sum_is_that_of_the_values_wherever_they_lie():
    expected = int(checksum(tree()))
    assert expected == int(checksum(tree())) and 0 <= expected < 2**32
    mesh = make_mesh(MeshConfig(fsdp=2, context=4))
    spread = {
        name: jax.device_put(x, jax.NamedSharding(mesh, jax.P("fsdp") if x.ndim else jax.P()))
        for name, x in tree().items()
    }
    assert int(checksum(spread)) == expected


def test_another_value_is_another_sum():
    expected, found = int(checksum(tree())), set()
    for bit in range(32):
        changed = tree()
        changed["a"].view(np.uint32)[bit % 16, 3] ^= np.uint32(1 << bit)
        found.add(int(checksum(changed)))
    for name in ("a", "b"):
        changed = tree()
        changed[name][[0, 1]] = changed[name][[1, 0]]
        found.add(int(checksum(changed)))
        changed = tree()
        changed[name][0, 0] = -changed[name][0, 0]
        found.add(int(checksum(changed)))
    changed = tree()
    changed["n"] = np.int32(4)
    found.add(int(checksum(changed)))
    assert expected not in found and len(found) >= 36


def test_what_is_not_finite_is_found():
    assert bool(all_finite(tree()))
    for value in (np.nan, np.inf, -np.inf):
        wrong = tree()
        wrong["b"][7, 3] = value
        assert not bool(all_finite(wrong))
        assert {name: bool(x) for name, x in finite_each(wrong).items()} == {"a": True, "b": False, "n": True}
