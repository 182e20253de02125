# SPDX-License-Identifier: Apache-2.0
"""One sequence's keys and values under the rows of many: as if each had a copy, and no program of its own for each."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from rapid_jax.attention.decoding import by_blocks
from rapid_jax.attention.flash_decode import flash_decode
from rapid_jax.attention.partial import attend_block, finish
from rapid_jax.attention.shared_prefix import is_shared, over_shared
from tests.attention.decode_cases import Case, Side, made, truth

CASE = Case((Side(60, 50, (7, 12), shared=True), Side(20, 9)), batch=5, group=2, time=3, blind=4)


class Shared(chex.TestCase):
    """With and without jit."""

    @chex.variants(with_jit=True, without_jit=True)  # type: ignore[untyped-decorator]
    @parameterized.parameters(6, 12, 13, 30, 1000)
    def test_however_many_rows_go_at_once(self, most: int):
        given = made(CASE)
        rows, far = given.rows, given.sides[0]
        assert is_shared(rows, far) and not is_shared(rows, given.sides[1])

        @self.variant
        def attended(rows, far):
            return over_shared(rows, partial(attend_block, slots=far, scale=CASE.scale), most=most)

        copied = jax.tree.map(lambda x: jnp.broadcast_to(x, (CASE.batch, *x.shape[1:])), far)
        chex.assert_trees_all_close(
            attended(rows, far), attend_block(rows, copied, scale=CASE.scale), atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_plain_xla_takes_it_too(dtype):
    given = made(CASE, jnp.dtype(dtype))
    got = jax.jit(partial(by_blocks, scale=CASE.scale, axis=None, block=32))(given.rows, given.sides, given.used)
    np.testing.assert_allclose(got.astype(jnp.float32), truth(given), atol=1e-5 if dtype == jnp.float32 else 0.03)


def test_how_much_of_a_prefix_is_used_is_no_other_program():
    given = made(CASE)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def attended(rows, sides, used):
        return finish(flash_decode(rows, sides, used, scale=CASE.scale, interpret=True), jnp.float32)

    np.testing.assert_allclose(attended(given.rows, given.sides, given.used), truth(given), atol=1e-5)
    attended(given.rows, given.sides, (jnp.int32(32), jnp.int32(1)))
