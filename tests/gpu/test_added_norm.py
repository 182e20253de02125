# SPDX-License-Identifier: Apache-2.0
"""A sum and its norm by one kernel, compiled for a GPU, against the decoder's own."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rapid_jax.model.added_norm import MOST_ROWS, added_norm
from rapid_jax.model.decoder import rms_norm
from tests.model.skinny_cases import EPS, normal


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("count, depth", [(1, 4096), (MOST_ROWS, 4096), (3, 576), (2, 8192), (5, 16384), (1, 96)])
def test_it_is_the_sum_and_its_norm(count, depth, dtype):
    shapes = (count, depth), (count, depth), (depth,)
    x_TD, added_TD, norm_D = (normal(seed, *shape, dtype=jnp.dtype(dtype)) for seed, shape in enumerate(shapes))
    sum_TD, normed_TD = jax.jit(partial(added_norm, eps=EPS))(x_TD, added_TD, norm_D)
    np.testing.assert_array_equal(sum_TD, x_TD + added_TD)
    want_TD = rms_norm(x_TD + added_TD, norm_D, EPS)
    np.testing.assert_allclose(np.float64(normed_TD), np.float64(want_TD), rtol=1e-5 if dtype == "float32" else 2**-7)
