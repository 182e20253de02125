# SPDX-License-Identifier: Apache-2.0
"""One sequence's keys and values under the rows of many: as if each had a copy, and no program of its own for each."""

from dataclasses import replace
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from rapid_jax.attention.decoding import by_blocks
from rapid_jax.attention.flash_decode import flash_decode
from rapid_jax.attention.online_softmax import attend_block, finish
from rapid_jax.attention.shared_prefix import is_shared, over_shared
from tests.attention.decode_cases import Case, Side, made, truth

CASE = Case((Side(60, 50, (7, 12), shared=1), Side(20, 9)), batch=5, group=2, time=3, blind=4)
SEVERAL = Case((Side(60, 50, (7, 12), shared=2), Side(20, 9)), batch=6, group=2, time=3, blind=4)


class Shared(chex.TestCase):
    """With and without jit."""

    @chex.variants(with_jit=True, without_jit=True)  # type: ignore[untyped-decorator]
    @parameterized.product(most=(6, 12, 13, 30, 1000), case=(CASE, SEVERAL))
    def test_however_many_rows_go_at_once(self, most: int, case: Case):
        given = made(case)
        rows, far = given.rows, given.sides[0]
        assert is_shared(rows, far) and not is_shared(rows, given.sides[1])

        @self.variant
        def attended(rows, far):
            return over_shared(rows, far, partial(attend_block, slots=far, scale=case.scale), most=most)

        copied = jax.tree.map(lambda x: jnp.repeat(x, case.batch // x.shape[0], axis=0), far)
        chex.assert_trees_all_close(
            attended(rows, far), attend_block(rows, copied, scale=case.scale), atol=1e-5, rtol=1e-5
        )


def test_rows_that_sequences_do_not_divide_are_refused():
    given = made(SEVERAL)
    with pytest.raises(ValueError, match="a multiple of the 4 sequences of slots, got 6"):
        is_shared(given.rows, made(replace(SEVERAL, batch=8, sides=(replace(SEVERAL.sides[0], shared=4),))).sides[0])


@pytest.mark.parametrize("case", [CASE, SEVERAL])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_plain_xla_takes_it_too(dtype, case):
    given = made(case, jnp.dtype(dtype))
    got = jax.jit(partial(by_blocks, scale=case.scale, axis=None, block=32))(given.rows, given.sides, given.used)
    np.testing.assert_allclose(got.astype(jnp.float32), truth(given), atol=1e-5 if dtype == jnp.float32 else 0.03)


def test_how_much_of_a_prefix_is_used_is_no_other_program():
    given = made(CASE)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def attended(rows, sides, used):
        return finish(flash_decode(rows, sides, used, scale=CASE.scale, interpret=True), jnp.float32)

    np.testing.assert_allclose(attended(given.rows, given.sides, given.used), truth(given), atol=1e-5)
    attended(given.rows, given.sides, (jnp.int32(32), jnp.int32(1)))
