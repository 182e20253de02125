# SPDX-License-Identifier: Apache-2.0
"""The decoding kernel compiled for a GPU: every number of rows, unfinished, and a prefix of many rows.

Its grid of shapes has a file of its own, so that two workers compile.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from rapid_jax.attention.decoding import by_kernel
from rapid_jax.attention.flash_decode import MOST_ROWS, fits, flash_decode, flash_decoded
from rapid_jax.attention.online_softmax import Slots, attend_block, finish, merge
from tests.attention.decode_cases import Case, Side, error, made, truth


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


@pytest.mark.parametrize("shared", [0, 1])
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


@pytest.mark.parametrize("window", [1, 64, 1000, 5000])
@pytest.mark.parametrize("shared, int8", [(0, False), (1, True)])
def test_windows(window, shared, int8):
    case = Case((Side(3000, 2500, (2300, 2400), int8, shared), Side(64, 50)), 4, 2, 4, 3, 64, 2, window)
    given = made(case, jnp.bfloat16)
    assert fits(given.rows, given.sides[0])
    call = jax.jit(lambda rows, sides, used: by_kernel(rows, sides, used, case.scale, None, block=1024))
    assert error(call(given.rows, given.sides, given.used), truth(given)) <= 7e-3


def replace_batch(side, batch: int):
    """The slots with a copy for every row."""
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (batch, *x.shape[1:])), side)


@pytest.mark.parametrize("kind", ["full", "int8"])
def test_a_shared_prefix_is_that_prefix_copied(kind):
    """The very case of questions about one document: rows 1 and up read what row 0 reads."""
    case = Case((Side(4096, 4096, int8=kind == "int8", shared=1), Side(64, 11)), 4, 8, 4, head_dim=128)
    given = made(case, jnp.bfloat16)
    call = jax.jit(partial(by_kernel, scale=case.scale, axis=None, block=1024))
    one = call(given.rows, given.sides, given.used)
    many = call(given.rows, (replace_batch(given.sides[0], 4), given.sides[1]), given.used)
    for row in range(4):
        assert error(one[row], np.asarray(many[row].astype(jnp.float32), np.float64)) <= 4e-3, row


@pytest.mark.parametrize("shared", [0, 1])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_prefix_split_over_all_devices_of_the_machine(shared, dtype):
    """Finished outputs and logs of sums, gathered; over one device, too."""
    devices = jax.devices("gpu")
    case = Case((Side(4096 * len(devices), 4000, shared=shared), Side(64, 11)), 4, 2, 4, 3, head_dim=128, blind=2)
    given, whole, part = made(case, jnp.dtype(dtype)), PartitionSpec(), PartitionSpec(None, None, "context")
    far = Slots(part, part, PartitionSpec(None, "context"))
    call = jax.shard_map(
        partial(flash_decoded, scale=case.scale, axis="context"),
        mesh=Mesh(devices, ("context",)),
        in_specs=(whole, (far, whole), whole),
        out_specs=whole,
        check_vma=False,
    )
    got = jax.jit(call)(given.rows, given.sides, (jnp.int32(4096), given.used[1]))
    assert error(got, truth(given)) <= (1e-5 if dtype == "float32" else 7e-3)
