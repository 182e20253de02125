# SPDX-License-Identifier: Apache-2.0
"""What the TPU's kernel does not take, read by plain XLA out of the stack of all layers: dense attention in float64."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rapid_jax.attention.decoding import by_blocks
from rapid_jax.attention.tpu_decode import Stack
from tests.attention.decode_cases import Case, Made, Side, made, truth

BLOCK = 300  # the last one is short
CASES = {
    "8 bits": Case((Side(1000, 700, int8=True), Side(8, 3)), group=4, time=2, head_dim=64),
    "8 bits, one prefix under 3 rows": Case((Side(700, 650, shared=1, int8=True), Side(8, 3)), batch=3, head_dim=64),
    "in full, of several sequences": Case((Side(500, 430), Side(8, 3)), batch=2, head_dim=64),
}


@pytest.mark.parametrize("name", CASES)
def test_a_layer_in_the_stack_is_that_layer(name):
    case, given = CASES[name], made(CASES[name])

    def stacked(side):
        fields = {field: x for field, x in vars(side).items() if x is not None and field != "pos_BS"}
        return replace(side, **{field: jnp.stack([x * 0, x, x + 1]) for field, x in fields.items()})

    every = tuple(map(stacked, given.sides))

    def attended(given: Made, layer: jax.Array):
        sides = tuple(Stack(side, layer) for side in every)
        return by_blocks(given.rows, sides, given.used, case.scale, None, block=BLOCK)

    got = np.asarray(jax.jit(attended)(given, jnp.int32(1)))
    np.testing.assert_allclose(got, truth(given), atol=1e-5, rtol=0)
