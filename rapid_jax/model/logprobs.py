# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities of given tokens without the full logits: a chunk of the sequence at a time, forward and backward.

With full logits a row of 131,072 tokens and a vocabulary of 128,256 takes 62 GiB in float32; chunks of 1,024 tokens
take half a GiB. The backward pass makes each chunk's logits again from the hidden states and adds up the gradient of
the weights in float32.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

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


def by_chunks(
    of_logits: Callable[..., Any],
    hidden_BTD: jax.Array,
    weight: jax.Array,
    counts_BT: jax.Array,
    items: Sequence[jax.Array],
    axes: str,
    chunk: int,
    mesh: Mesh | None,
) -> Any:
    """What `of_logits` makes of each chunk's logits [B, parts, chunk, V] and of the same places of the items.

    Each array of it is [B, T, ...] in the end, 0 in the chunks in which nothing counts. `items` are [B, T, ...].
    """
    parts = _parts(mesh)
    chunk = min(chunk, counts_BT.shape[1] // parts)

    def made(hidden, *given):
        return of_logits(_logits(hidden, weight, axes), *given)

    def of_chunk(_, item):
        counts, *given = item
        shapes = jax.eval_shape(made, *given)
        none = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        return None, lax.cond(jnp.any(counts), lambda: made(*given), lambda: none)

    chunks = tuple(_into_chunks(x, chunk, parts) for x in (counts_BT, hidden_BTD, *items))
    _, found = lax.scan(of_chunk, None, chunks)
    return jax.tree.map(lambda x: _whole(x, counts_BT.shape[1]), found)


def gradients_by_chunks(
    d_logits_of: Callable[..., jax.Array],
    hidden_BTD: jax.Array,
    weight: jax.Array,
    counts_BT: jax.Array,
    items: Sequence[jax.Array],
    axes: str,
    chunk: int,
    mesh: Mesh | None,
) -> tuple[jax.Array, jax.Array]:
    """(gradient of hidden, gradient of weight), of what has the gradient `d_logits_of(logits, *items)` at the logits.

    Of a place that does not count it is 0, whatever `d_logits_of` says. Arguments are those of `by_chunks`.
    """
    parts = _parts(mesh)
    chunk = min(chunk, counts_BT.shape[1] // parts)
    precision = lax.Precision.HIGHEST if weight.dtype == jnp.float32 else None

    def product(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.einsum(spec, a, b, precision=precision, preferred_element_type=jnp.float32)

    def own(d_weight: jax.Array) -> jax.Array:
        if mesh is None:
            return d_weight
        letters = PartitionSpec(ACT["B"], "context", *(ACT[letter] for letter in axes))
        return lax.with_sharding_constraint(d_weight, NamedSharding(mesh, letters))

    def of_chunk(d_weight, item):
        counts, hidden, *given = item

        def made():
            d_logits = d_logits_of(_logits(hidden, weight, axes), *given)
            d_logits = jnp.where(counts[..., None], d_logits, 0.0).astype(hidden.dtype)
            more = product(f"BPCD,BPCV->BP{axes}", hidden, d_logits)
            return own(d_weight + more), product(f"BPCV,{axes}->BPCD", d_logits, weight).astype(hidden.dtype)

        return lax.cond(jnp.any(counts), made, lambda: (d_weight, jnp.zeros_like(hidden)))

    chunks = tuple(_into_chunks(x, chunk, parts) for x in (counts_BT, hidden_BTD, *items))
    # Every device adds to a sum of its own: one sum over devices after the loop, not one a chunk.
    d_weight = own(jnp.zeros((counts_BT.shape[0], parts, *weight.shape), jnp.float32))
    d_weight, d_hidden = lax.scan(of_chunk, d_weight, chunks)
    return _whole(d_hidden, counts_BT.shape[1]), jnp.sum(d_weight, (0, 1)).astype(weight.dtype)


def _parts(mesh: Mesh | None) -> int:
    return 1 if mesh is None else mesh.shape["context"]


def _logits(hidden_BPCD: jax.Array, weight: jax.Array, axes: str) -> jax.Array:
    precision = lax.Precision.HIGHEST if weight.dtype == jnp.float32 else None
    spec = f"BPCD,{axes}->BPCV"
    return jnp.einsum(spec, hidden_BPCD, weight, precision=precision, preferred_element_type=jnp.float32)


def _into_chunks(x: jax.Array, chunk: int, parts: int) -> jax.Array:
    """[B, T, ...] -> [chunks, B, parts, chunk, ...], each part padded to whole chunks with zeros."""
    B, T = x.shape[:2]
    x = x.reshape(B, parts, T // parts, *x.shape[2:])
    x = jnp.pad(x, ((0, 0), (0, 0), (0, -(T // parts) % chunk), *[(0, 0)] * (x.ndim - 3)))
    return jnp.moveaxis(x.reshape(B, parts, -1, chunk, *x.shape[3:]), 2, 0)


def _whole(x: jax.Array, time: int) -> jax.Array:
    """The inverse of `_into_chunks`."""
    count, B, parts, chunk = x.shape[:4]
    x = jnp.moveaxis(x, 0, 2).reshape(B, parts, count * chunk, *x.shape[4:])
    return x[:, :, : time // parts].reshape(B, time, *x.shape[3:])


def _forward(hidden_BTD, weight, targets_BT, counts_BT, axes: str, chunk: int, mesh: Mesh | None):
    def of_logits(logits, targets):
        log_sum = jax.nn.logsumexp(logits, axis=-1)
        return jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0] - log_sum, log_sum

    how = axes, chunk, mesh
    log_prob_BT, log_sum_BT = by_chunks(of_logits, hidden_BTD, weight, counts_BT, (targets_BT,), *how)
    return jnp.where(counts_BT, log_prob_BT, 0.0), (hidden_BTD, weight, targets_BT, counts_BT, log_sum_BT)


def _backward(axes: str, chunk: int, mesh: Mesh | None, residuals, d_log_prob_BT: jax.Array):
    hidden_BTD, weight, targets_BT, counts_BT, log_sum_BT = residuals

    def d_logits_of(logits, targets, log_sum, d_log_prob):
        share = jnp.exp(logits - log_sum[..., None])
        hit = targets[..., None] == jnp.arange(share.shape[-1])
        return (hit - share) * d_log_prob[..., None]

    items = targets_BT, log_sum_BT, d_log_prob_BT
    d_hidden, d_weight = gradients_by_chunks(d_logits_of, hidden_BTD, weight, counts_BT, items, axes, chunk, mesh)
    return d_hidden, d_weight, None, None


token_log_probs.defvjp(_forward, _backward)
