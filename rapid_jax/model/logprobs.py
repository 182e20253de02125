# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities of given tokens without the full logits: a chunk of the sequence at a time, forward and backward.

With full logits a row of 131,072 tokens and a vocabulary of 128,256 takes 62 GiB in float32; chunks of 1,024 tokens
take half a GiB. The backward pass makes each chunk's logits again from the hidden states and adds up the gradient of
the weights in float32.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rapid_jax.runtime.axes import ACT


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def token_log_probs(
    hidden_BTD: jax.Array,
    weight: jax.Array,
    targets_BT: jax.Array,
    counts_BT: jax.Array,
    axes: str,
    chunk: int,
    mesh: Mesh | None = None,
) -> jax.Array:
    """float32 [B, T]: log softmax(hidden . weight)[target] where `counts_BT` is True, else 0.

    `weight` is laid out as `axes` says, "VD" or "DV". On a mesh each device goes through its own part of the sequence,
    `chunk` tokens at a time; a chunk in which nothing counts on any device is left out. Differentiable in hidden and
    weight, whose gradient is added up once for each row and device of the context axis. Sums are float32 whatever the
    inputs are.
    """
    return _forward(hidden_BTD, weight, targets_BT, counts_BT, axes, chunk, mesh)[0]


def _parts(mesh: Mesh | None) -> int:
    return 1 if mesh is None else mesh.shape["context"]


def _logits(hidden_BPCD: jax.Array, weight: jax.Array, axes: str) -> jax.Array:
    precision = lax.Precision.HIGHEST if weight.dtype == jnp.float32 else None
    spec = f"BPCD,{axes}->BPCV"
    return jnp.einsum(spec, hidden_BPCD, weight, precision=precision, preferred_element_type=jnp.float32)


def _chunked(x: jax.Array, chunk: int, parts: int) -> jax.Array:
    """[B, T, ...] -> [chunks, B, parts, chunk, ...], each part padded to whole chunks with zeros."""
    B, T = x.shape[:2]
    x = x.reshape(B, parts, T // parts, *x.shape[2:])
    x = jnp.pad(x, ((0, 0), (0, 0), (0, -(T // parts) % chunk), *[(0, 0)] * (x.ndim - 3)))
    return jnp.moveaxis(x.reshape(B, parts, -1, chunk, *x.shape[3:]), 2, 0)


def _whole(x: jax.Array, time: int) -> jax.Array:
    """The inverse of `_chunked`."""
    count, B, parts, chunk = x.shape[:4]
    x = jnp.moveaxis(x, 0, 2).reshape(B, parts, count * chunk, *x.shape[4:])
    return x[:, :, : time // parts].reshape(B, time, *x.shape[3:])


def _forward(hidden_BTD, weight, targets_BT, counts_BT, axes: str, chunk: int, mesh: Mesh | None):
    parts = _parts(mesh)
    chunk = min(chunk, targets_BT.shape[1] // parts)

    def of_chunk(_, item):
        hidden, targets, counts = item

        def made():
            logits = _logits(hidden, weight, axes)
            log_sum = jax.nn.logsumexp(logits, axis=-1)
            log_prob = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0] - log_sum
            return jnp.where(counts, log_prob, 0.0), log_sum

        def none():
            zero = jnp.zeros(targets.shape, jnp.float32)
            return zero, zero

        return None, lax.cond(jnp.any(counts), made, none)

    items = tuple(_chunked(x, chunk, parts) for x in (hidden_BTD, targets_BT, counts_BT))
    _, (log_prob, log_sum) = lax.scan(of_chunk, None, items)
    time = targets_BT.shape[1]
    return _whole(log_prob, time), (hidden_BTD, weight, targets_BT, counts_BT, log_sum)


def _backward(axes: str, chunk: int, mesh: Mesh | None, residuals, d_log_prob_BT: jax.Array):
    parts = _parts(mesh)
    hidden_BTD, weight, targets_BT, counts_BT, log_sum = residuals
    chunk = min(chunk, targets_BT.shape[1] // parts)
    precision = lax.Precision.HIGHEST if weight.dtype == jnp.float32 else None

    def product(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.einsum(spec, a, b, precision=precision, preferred_element_type=jnp.float32)

    def own(d_weight: jax.Array) -> jax.Array:
        if mesh is None:
            return d_weight
        letters = PartitionSpec(ACT["B"], "context", *(ACT[letter] for letter in axes))
        return lax.with_sharding_constraint(d_weight, NamedSharding(mesh, letters))

    def of_chunk(d_weight, item):
        hidden, targets, counts, log_sum, d_log_prob = item

        def made():
            share = jnp.exp(_logits(hidden, weight, axes) - log_sum[..., None])
            hit = targets[..., None] == jnp.arange(share.shape[-1])
            d_logits = (hit - share) * jnp.where(counts, d_log_prob, 0.0)[..., None]
            d_logits = d_logits.astype(hidden.dtype)
            more = product(f"BPCD,BPCV->BP{axes}", hidden, d_logits)
            return own(d_weight + more), product(f"BPCV,{axes}->BPCD", d_logits, weight).astype(hidden.dtype)

        return lax.cond(jnp.any(counts), made, lambda: (d_weight, jnp.zeros_like(hidden)))

    items = tuple(_chunked(x, chunk, parts) for x in (hidden_BTD, targets_BT, counts_BT))
    items = (*items, log_sum, _chunked(d_log_prob_BT, chunk, parts))
    # Every device adds to a sum of its own: one sum over devices after the loop, not one a chunk.
    d_weight = own(jnp.zeros((targets_BT.shape[0], parts, *weight.shape), jnp.float32))
    d_weight, d_hidden = lax.scan(of_chunk, d_weight, items)
    return _whole(d_hidden, targets_BT.shape[1]), jnp.sum(d_weight, (0, 1)).astype(weight.dtype), None, None


token_log_probs.defvjp(_forward, _backward)
