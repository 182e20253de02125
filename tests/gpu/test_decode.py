# SPDX-License-Identifier: Apache-2.0
"""The decoding kernel compiled for a GPU, over a grid of shapes, against dense attention in float64."""

from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rapid_jax.attention.decoding import by_kernel
from rapid_jax.attention.flash_decode import MOST_BYTES, MOST_ROWS, fits, flash_decode
from rapid_jax.attention.partial import attend_block, finish, merge
from tests.attention.decode_cases import FLOAT16, Case, Side, made, truth

HEADS = ((1, 1), (2, 4), (4, 4), (1, 7), (3, 3))  # kv heads, query heads of each
HEAD_DIMS = (16, 32, 64, 128, 256)
# Slots, used, empty ones among them; the first three alone under more than 4 rows, for the truth's memory.
SLOTS = ((1000, 777, (0, 0)), (131, 130, (20, 90)), (1, 1, (0, 0)), (4096, 4096, (0, 0)), (6000, 4500, (64, 640)))
TAILS = ((8, 3), (64, 0), (200, 133), (1, 1))
BATCHES = ((1, False), (3, False), (4, True), (9, True), (16, True))  # rows; whether over the prefix of one


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
        rows = f"{batch}{' over one' if shared else ''} x {time} of {group}"
        cases[f"{rows}, {kv_heads} x {head_dim}, {slots} {'int8' if int8 else 'full'}"] = Case(
            (far, Side(*TAILS[at % len(TAILS)])), batch, kv_heads, group, time, head_dim, blind=at % 4
        )
    return cases


CASES = grid()
FLOAT32 = list(CASES)[::3]


def error(got: jax.Array, want: np.ndarray) -> float:
    """The difference's size by the truth's."""
    got = np.asarray(got.astype(jnp.float32), np.float64)
    assert np.all(np.isfinite(got))
    return float(np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-30))


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


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 64, 65, MOST_ROWS])
@pytest.mark.parametrize("head_dim, dtype", [(128, "bfloat16"), (256, "bfloat16"), (128, "float32")])
def test_every_number_of_rows(rows, head_dim, dtype):
    """Of one kv head; what is shared out differently, and what no longer fits the fast memory of a multiprocessor."""
    for int8 in (False, True):
        case = Case((Side(2100, 2099, int8=int8), Side(40, 33)), 2, 2, time=rows, head_dim=head_dim)
        given = made(case, jnp.dtype(dtype))
        assert fits(given.rows, given.sides[0])
        call = jax.jit(lambda rows, sides, used: by_kernel(rows, sides, used, case.scale, None, block=1024))  # noqa: B023
        assert error(call(given.rows, given.sides, given.used), truth(given)) <= 7e-3


@pytest.mark.parametrize("shared", [False, True])
def test_unfinished_it_is_the_algebra_s_partial(shared):
    """What is merged over devices: the peaks and sums too."""
    case = Case((Side(3000, 2500, shared=shared), Side(64, 50)), batch=4, group=4, time=3, head_dim=64, blind=2)
    given = made(case)

    @jax.jit
    def both(rows, sides, used):
        plain = [attend_block(rows, replace_batch(side, 4), scale=case.scale) for side in sides]
        return flash_decode(rows, sides, used, scale=case.scale), merge(*plain)

    got, want = both(given.rows, given.sides, given.used)
    for field in ("max_BKR", "sum_BKR", "out_BKRH"):
        np.testing.assert_allclose(getattr(got, field), getattr(want, field), atol=1e-4, rtol=1e-5, err_msg=field)
    np.testing.assert_allclose(finish(got, jnp.float32), truth(given), atol=2e-5, rtol=0)


def replace_batch(side, batch: int):
    """The slots with a copy for every row."""
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (batch, *x.shape[1:])), side)


@pytest.mark.parametrize("kind", ["full", "int8"])
def test_a_shared_prefix_is_that_prefix_copied(kind):
    """The very case of questions about one document: rows 1 and up read what row 0 reads."""
    case = Case((Side(4096, 4096, int8=kind == "int8", shared=True), Side(64, 11)), 4, 8, 4, head_dim=128)
    given = made(case, jnp.bfloat16)
    call = jax.jit(partial(by_kernel, scale=case.scale, axis=None, block=1024))
    one = call(given.rows, given.sides, given.used)
    many = call(given.rows, (replace_batch(given.sides[0], 4), given.sides[1]), given.used)
    for row in range(4):
        assert error(one[row], np.asarray(many[row].astype(jnp.float32), np.float64)) <= 4e-3, row
