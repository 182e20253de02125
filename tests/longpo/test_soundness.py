# SPDX-License-Identifier: Apache-2.0
"""Which arrays have numbers that are none."""

import jax.numpy as jnp
import numpy as np

from longpo_jax.soundness import all_finite, finite_each


def tree() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    half = random.normal(size=(8, 4)).astype(jnp.bfloat16)
    return {"a": random.normal(size=(16, 8)).astype(np.float32), "b": half, "n": np.int32(3)}


def test_what_is_not_finite_is_found():
    assert bool(all_finite(tree()))
    for value in (np.nan, np.inf, -np.inf):
        wrong = tree()
        wrong["b"][7, 3] = value
        assert not bool(all_finite(wrong))
        assert {name: bool(x) for name, x in finite_each(wrong).items()} == {"a": True, "b": False, "n": True}
