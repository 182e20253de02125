# SPDX-License-Identifier: Apache-2.0
"""The table of embeddings: its rows, and a gradient that a token of any frequency gets whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rapid_jax.model.decoder import _rows

VOCABULARY, WIDTH, LENGTH = 37, 8, 8192


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 5e-3)])
def test_a_common_token_s_gradient_is_the_sum_of_all_its_places(dtype, tolerance):
    random = np.random.default_rng(0)
    tokens_BT = random.integers(VOCABULARY, size=(2, LENGTH))
    tokens_BT[:, ::5] = 3  # each fifth of 16,384 tokens
    gradient_BTD = (1 + 0.1 * random.normal(size=(2, LENGTH, WIDTH))).astype(jnp.dtype(dtype))
    table_VD = jnp.asarray(random.normal(size=(VOCABULARY, WIDTH)), dtype)
    rows_BTD, pull = jax.vjp(lambda table: _rows(table, jnp.asarray(tokens_BT)), table_VD)
    np.testing.assert_array_equal(rows_BTD, np.asarray(table_VD)[tokens_BT])
    (got_VD,) = pull(jnp.asarray(gradient_BTD))
    expected_VD = np.zeros((VOCABULARY, WIDTH))
    np.add.at(expected_VD, tokens_BT, gradient_BTD.astype(np.float64))
    assert got_VD.dtype == jnp.dtype(dtype)
    np.testing.assert_allclose(np.asarray(got_VD, np.float64), expected_VD, rtol=tolerance)
