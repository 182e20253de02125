# SPDX-License-Identifier: Apache-2.0
"""Sums of arrays' bits: the same wherever they lie, another for one flipped bit or two values that changed places."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rapid_jax.runtime.mesh import make_mesh
from rapid_jax.runtime.mesh_config import MeshConfig
from rapid_jax.runtime.value_sums import array_sums, mixed, places, row_sums, seed_of

WORD = 2**32


def tree() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    half = random.normal(size=(8, 4)).astype(jnp.bfloat16)
    return {"a": random.normal(size=(16, 8)).astype(np.float32), "b": half, "n": np.int32(3)}


def sums_of(arrays) -> tuple[int, ...]:
    return tuple(int(total) for total in array_sums(arrays).values())


def mixed_one(x: int) -> int:
    """MurmurHash3's finalizer, in Python's own numbers."""
    x = (x ^ x >> 16) * 0x85EBCA6B % WORD
    x = (x ^ x >> 13) * 0xC2B2AE35 % WORD
    return x ^ x >> 16


def test_a_sum_is_what_a_loop_over_the_words_makes_of_them():
    bits = tree()["a"].view(np.uint32)
    expected = sum(
        mixed_one((int(word) + int(seed_of("a")) + at * 0xC2B2AE3D) % WORD) for at, word in enumerate(bits.flat)
    )
    assert sums_of(tree())[0] == expected % WORD
    rows = np.uint32([7, 9])
    pairs = tree()["b"].view(np.uint16)[:2].astype(int)  # two elements a word, of the halves of a row
    words = pairs[:, :2] + (pairs[:, 2:] << 16)
    by_row = [
        sum(mixed_one((int(words[row, at]) + start + at * 0xC2B2AE3D) % WORD) for at in (0, 1)) % WORD
        for row, start in enumerate((7, 9))
    ]
    assert row_sums(tree()["b"][:2], -1, rows).tolist() == by_row


def test_mixing_is_murmurs_and_loses_nothing():
    known = {0: 0, 1: 0x514E28B7, 2: 0x30F4C306}  # of the reference implementation
    assert {x: int(mixed(np.uint32([x]))[0]) for x in known} == known
    assert np.unique(mixed(np.arange(1 << 16, dtype=np.uint32) << np.uint32(16))).size == 1 << 16


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize("size", [16, 12, 5])
def test_rows_have_the_same_sums_by_numpy_and_by_a_program(dtype, axis, size):
    x = (100 * np.random.default_rng(1).normal(size=(3, size, size))).astype(dtype)
    numbers = (np.arange(3), np.arange(size))
    by_numpy = row_sums(x, axis, places(seed_of("x"), *numbers))
    program = jax.jit(lambda x, seed, *numbers: row_sums(x, axis, places(seed, *numbers)))
    by_program = program(x, seed_of("x"), *numbers)
    assert by_numpy.shape == (3, size) and by_numpy.dtype == by_program.dtype == np.uint32
    np.testing.assert_array_equal(by_numpy, by_program)
    assert np.unique(by_numpy).size == by_numpy.size


def test_an_arrays_sum_is_that_of_its_values_wherever_they_lie():
    mesh = make_mesh(MeshConfig(fsdp=2, context=4))
    spread = {
        name: jax.device_put(x, jax.NamedSharding(mesh, jax.P("fsdp") if x.ndim else jax.P()))
        for name, x in tree().items()
    }
    assert sums_of(spread) == sums_of(tree())
    assert sums_of({"b": tree()["b"]}) == sums_of(tree())[1:2]


def test_another_value_is_another_sum():
    found = [sums_of(tree())]
    for bit in range(32):
        changed = tree()
        changed["a"].view(np.uint32)[bit % 16, 3] ^= np.uint32(1 << bit)
        found.append(sums_of(changed))
    for name in ("a", "b"):
        changed = tree()
        changed[name][[0, 1]] = changed[name][[1, 0]]
        found.append(sums_of(changed))
        changed = tree()
        changed[name][0, :2] = -changed[name][0, :2]  # where products are added, two of the highest bits cancel
        found.append(sums_of(changed))
    found.append(sums_of(tree() | {"n": np.int32(4)}))
    assert len(set(found)) == len(found)
    assert sums_of({"other": tree()["a"]}) != (found[0][0],), "its name is in it"
