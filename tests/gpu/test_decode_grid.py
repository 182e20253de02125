# SPDX-License-Identifier: Apache-2.0
"""The decoding kernel compiled for a GPU, over a grid of shapes, against dense attention in float64."""

from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rapid_jax.attention.decoding import by_kernel
from rapid_jax.attention.flash_decode import MOST_BYTES, fits
from tests.attention.decode_cases import FLOAT16, Case, Side, error, made, truth

HEADS = ((1, 1), (2, 4), (4, 4), (1, 7), (3, 3))  # kv heads, query heads of each
HEAD_DIMS = (16, 32, 64, 128, 256)
# Slots, used, empty ones among them; the first three alone under more than 4 rows, for the truth's memory.
SLOTS = ((1000, 777, (0, 0)), (131, 130, (20, 90)), (1, 1, (0, 0)), (4096, 4096, (0, 0)), (6000, 4500, (64, 640)))
TAILS = ((8, 3), (64, 0), (200, 133), (1, 1))
BATCHES = ((1, 0), (3, 0), (4, 1), (9, 1), (16, 1), (8, 2), (6, 3))  # rows; over how many prefixes, 0: one each


def grid() -> dict[str, Case]:
    """Every pair of a batch with heads, a batch with a head size and heads with a head size stands in some case."""
    cases = {}
    every = product(enumerate(BATCHES), enumerate(HEADS), enumerate(HEAD_DIMS))
    for at, ((i, (batch, shared)), (j, (kv_heads, group)), (k, head_dim)) in enumerate(every):
        if (i + j + k) % 2:
            continue
        slots, used, hole = SLOTS[at % (3 if batch > 4 else 5)]
        time, int8 = (1, 5, 2, 9)[(at // 2) % 4], at % 3 == 0
        far = Side(slots, used, hole, int8=int8, shared=shared)
        rows = f"{batch}{f' over {shared}' if shared else ''} x {time} of {group}"
        cases[f"{rows}, {kv_heads} x {head_dim}, {slots} {'int8' if int8 else 'full'}"] = Case(
            (far, Side(*TAILS[at % len(TAILS)])), batch, kv_heads, group, time, head_dim, blind=at % 4
        )
    return cases


CASES = grid()
FLOAT32 = list(CASES)[::3]


@pytest.mark.parametrize(
    "name, dtype", [*((name, "bfloat16") for name in CASES), *((name, "float32") for name in FLOAT32)]
)
def test_the_grid(name, dtype):
    case = CASES[name]
    given = made(case, jnp.dtype(dtype))
    assert fits(given.rows, given.sides[0]) == (case.head_dim * given.rows.q_BKRH.dtype.itemsize <= MOST_BYTES)
    call = jax.jit(lambda rows, sides, used: by_kernel(rows, sides, used, case.scale, None, block=1024))
    got, want = call(given.rows, given.sides, given.used), truth(given)
    if dtype == "float32":
        np.testing.assert_allclose(got, want, atol=FLOAT16 if case.sides[0].int8 else 2e-5, rtol=0)
    assert error(got, want) <= {"bfloat16": 6e-3, "float32": 2e-5}[dtype] + (1e-3 if case.sides[0].int8 else 0)
