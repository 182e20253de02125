# SPDX-License-Identifier: Apache-2.0
"""The end of `flash_decode.py`: the sum of what programs have seen of the keys, and over a mesh of what devices have.

A device's sum is made by a kernel. Devices then exchange finished outputs and the logs of their softmax sums in one
array, by one gather: for a few rows a collective takes as long as it takes to start, however small it is.
"""

from functools import partial, reduce
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from rapid_jax.attention.online_softmax import SoftmaxState, finish, log_sum

# The fields of the shares' `SoftmaxState`s, all float32: [B, K, shares, R, H], [B, K, shares, R] and the same again.
Shares: TypeAlias = tuple[jax.Array, jax.Array, jax.Array]


def summed(shares: Shares) -> SoftmaxState:
    """The shares' sum."""
    out, peak, total = shares
    top_BKR = jnp.max(peak, axis=2)
    finite_BKR = jnp.where(top_BKR == -jnp.inf, 0.0, top_BKR)
    weight = jnp.exp(peak - finite_BKR[:, :, None])
    return SoftmaxState(jnp.sum(out * weight[..., None], axis=2), top_BKR, jnp.sum(total * weight, axis=2))


def finished(shares: Shares, dtype: Any, *, interpret: bool = False) -> jax.Array:
    """The shares' sum, finished: [B, K, R, H], 0 for a row that saw nothing."""
    return _finish(shares, dtype, with_log_sum=False, interpret=interpret)


def finish_over(seen: Shares | SoftmaxState, axis: str, dtype: Any, *, interpret: bool = False) -> jax.Array:
    """What all devices along a mesh axis have seen, finished: [B, K, R, H], the same on each."""
    if isinstance(seen, SoftmaxState):
        logs_BKRH = jnp.broadcast_to(log_sum(seen)[..., None], seen.out_BKRH.shape)
        own = jnp.concatenate([finish(seen, jnp.dtype("float32")), logs_BKRH], axis=-1)
    else:
        own = _finish(seen, jnp.float32, with_log_sum=True, interpret=interpret)
    every = lax.all_gather(own, axis)
    # Device by device, elementwise: one kernel.
    outs, logs = zip(*(jnp.split(every[device], 2, axis=-1) for device in range(every.shape[0])), strict=True)
    peak = reduce(jnp.maximum, logs)
    weights = [jnp.exp(log - jnp.where(peak == -jnp.inf, 0.0, peak)) for log in logs]
    total = reduce(jnp.add, weights)
    out = reduce(jnp.add, (out * weight for out, weight in zip(outs, weights, strict=True)))
    return (out / jnp.where(total == 0, 1.0, total)).astype(dtype)


def _finish(shares: Shares, dtype: Any, *, with_log_sum: bool, interpret: bool) -> jax.Array:
    """`with_log_sum`: [B, K, R, 2 H], the log of the softmax sum H times behind the output."""
    B, K, count, R, H = shares[0].shape
    padded = pl.next_power_of_2(count)
    width = 2 * H if with_log_sum else H
    return pl.pallas_call(
        partial(_finish_kernel, shares=count, with_log_sum=with_log_sum),
        grid=(R, K, B),
        in_specs=[
            pl.BlockSpec((None, None, padded, None, H), lambda r, k, b: (b, k, 0, r, 0)),
            pl.BlockSpec((None, None, padded, None), lambda r, k, b: (b, k, 0, r)),
            pl.BlockSpec((None, None, padded, None), lambda r, k, b: (b, k, 0, r)),
        ],
        out_specs=pl.BlockSpec((None, None, None, width), lambda r, k, b: (b, k, r, 0)),
        out_shape=jax.ShapeDtypeStruct((B, K, R, width), dtype),
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="flash_decode_finish",
    )(*shares)


def _finish_kernel(out_ref, max_ref, sum_ref, finished_ref, *, shares, with_log_sum):
    inside = jnp.arange(max_ref.shape[0]) < shares
    peak_J = triton.load(max_ref.at[:], mask=inside, other=-jnp.inf)
    top = jnp.max(peak_J)
    weight_J = jnp.exp(peak_J - jnp.where(top == -jnp.inf, 0.0, top))
    total = jnp.sum(triton.load(sum_ref.at[:], mask=inside, other=0.0) * weight_J)
    out_JH = triton.load(out_ref.at[:, :], mask=jnp.broadcast_to(inside[:, None], out_ref.shape), other=0.0)
    out_H = jnp.sum(out_JH * weight_J[:, None], axis=0)
    H = out_H.shape[0]
    finished_ref[pl.ds(0, H)] = (out_H / jnp.where(total == 0, 1.0, total)).astype(finished_ref.dtype)
    if with_log_sum:
        finished_ref[pl.ds(H, H)] = jnp.broadcast_to(top + jnp.log(total), (H,)).astype(finished_ref.dtype)
