# SPDX-License-Identifier: Apache-2.0
"""What every attention kernel is given: rows and slots whose shapes and dtypes go together."""

import chex
import jax.numpy as jnp

from rapid_jax.attention.kernels import Cotangent
from rapid_jax.attention.online_softmax import Rows, Slots
from rapid_jax.runtime.contract import contract


def check_contract(kernel: str, rows: Rows, slots: Slots, *, shared: bool = False, quantized: bool = False) -> None:
    """Raises ValueError, while tracing, for arrays that do not go together.

    Slots have a sequence for each of the rows', or, where a kernel takes `shared` ones, for each of equal runs of them;
    `quantized` ones are int8, with scales.
    """
    floats = (jnp.float32, jnp.bfloat16, jnp.float16)
    with contract(kernel):
        chex.assert_rank([rows.q_BKRH, slots.k_BKSH, slots.pos_BS], [4, 4, 2])
        B, K, R, H = rows.q_BKRH.shape
        batch, S = slots.pos_BS.shape
        assert batch == B or (shared and B % batch == 0), f"expected slots of {B} sequences as the rows, got {batch}"
        scaled = slots.k_scale_BKS is not None
        assert quantized or not scaled, "expected keys and values in full, got quantised ones"
        flat = [(rows.pos_BR, (B, R)), (rows.branch_BR, (B, R)), (rows.reach_BR, (B, R))]
        flat += [(rows.first_BR, (B, R))]
        flat += [(slots.pos_BS, (batch, S)), (slots.branch_BS, (batch, S))]
        heads = [(slots.k_BKSH, (batch, K, S, H)), (slots.v_BKSH, (batch, K, H, S) if scaled else (batch, K, S, H))]
        scales = [(slots.k_scale_BKS, (batch, K, S)), (slots.v_scale_BKS, (batch, K, S))] if scaled else []
        flat = [(array, shape) for array, shape in flat if array is not None]
        for array, shape in (*flat, *heads, *scales):
            chex.assert_shape(array, shape)
        chex.assert_type([array for array, _ in flat], [jnp.int32] * len(flat))
        chex.assert_type([array for array, _ in scales], [jnp.float32] * len(scales))
        for array in (rows.q_BKRH, slots.k_BKSH, slots.v_BKSH):
            right = array.dtype in floats if array is rows.q_BKRH or not scaled else array.dtype == jnp.int8
            assert right, f"expected float32, bfloat16 or float16{' and int8' if scaled else ''}, got {array.dtype}"


def check_backward(kernel: str, rows: Rows, slots: Slots, cotangent: Cotangent) -> None:
    """As `check_contract` for a backward pass: `cotangent` is of these rows."""
    check_contract(kernel, rows, slots)
    shape = rows.q_BKRH.shape
    with contract(kernel):
        chex.assert_shape([cotangent.out_BKRH, cotangent.d_out_BKRH], shape)
        chex.assert_shape([cotangent.delta_BKR, cotangent.log_sum_BKR], shape[:-1])
        chex.assert_type([cotangent.delta_BKR, cotangent.log_sum_BKR], jnp.float32)
