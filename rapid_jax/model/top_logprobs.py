# SPDX-License-Identifier: Apache-2.0
"""Distributions over the vocabulary kept as their k most probable tokens, and the reverse KL divergence to them.

    top_log_probs   of hidden states: ids and log-probabilities of the k tokens, and of all others together
    reverse_kl      of hidden states to such distributions, differentiable

As in `logprobs` the logits exist a chunk at a time, forward and backward.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from rapid_jax.model.logprobs import by_chunks, gradients_by_chunks
from rapid_jax.runtime.axes import ACT


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TopLogProbs:
    """At each place a distribution over k tokens and one bucket for the rest of the vocabulary."""

    ids_BTJ: jax.Array  # int32, the most probable first
    log_probs_BTJ: jax.Array  # float32
    rest_BT: jax.Array  # float32: log of the probability of all other tokens together


def top_log_probs(
    hidden_BTD: jax.Array,
    weight: jax.Array,
    counts_BT: jax.Array,
    axes: str,
    chunk: int,
    mesh: Mesh | None,
    *,
    k: int,
) -> TopLogProbs:
    """softmax(hidden . weight) at the places that count, by its k most probable tokens; k is less than the vocabulary.

    Of the rest the logarithm is exact where 1 - sum would round to 0: it is a sum over the other tokens. Other
    arguments are those of `logprobs.token_log_probs`.
    """

    def of_logits(logits):
        ids = _most_probable(logits, k, mesh)
        log_probs, rest, _ = _coarse(logits, ids)
        return TopLogProbs(ids, log_probs, rest)

    return by_chunks(of_logits, hidden_BTD, weight, counts_BT, (), axes, chunk, mesh)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def reverse_kl(
    hidden_BTD: jax.Array,
    weight: jax.Array,
    teacher: TopLogProbs,
    counts_BT: jax.Array,
    axes: str,
    chunk: int,
    mesh: Mesh | None = None,
) -> jax.Array:
    """float32 [B, T]: KL(P || Q) of softmax(hidden . weight) to the teacher where `counts_BT` is True, else 0.

        KL = sum_j P_j (log P_j - log Q_j)        j over the teacher's k tokens and the bucket of all others

    P is the softmax on the teacher's own buckets, Q the teacher. Both sum to 1, so that this is a true divergence: at
    least 0, 0 where the two agree, and at most the divergence over the whole vocabulary (data processing). Left
    without the bucket, sum_j over k tokens alone is smallest where the softmax has left all k of them. With c(v) =
    log P_j - log Q_j of the bucket j of token v the gradient at its logit is p_v (c(v) - KL). Differentiable in hidden
    and weight; arguments as in `logprobs.token_log_probs`.
    """
    return _forward(hidden_BTD, weight, teacher, counts_BT, axes, chunk, mesh)[0]


def _most_probable(logits_BPCV: jax.Array, k: int, mesh: Mesh | None) -> jax.Array:
    """int32 [B, parts, chunk, k]: the tokens of the largest logits; of equal ones the first come first.

    On a mesh each device sorts its own part of the vocabulary, and the devices exchange k of each.
    """

    def of_device(logits_BPCV):
        size = logits_BPCV.shape[-1]
        values, ids = lax.top_k(logits_BPCV, min(k, size))
        if mesh is not None and mesh.shape["model"] > 1:
            ids = ids + size * lax.axis_index("model")
            values, ids = (lax.all_gather(x, "model", axis=-1, tiled=True) for x in (values, ids))
            ids = jnp.take_along_axis(ids, lax.top_k(values, k)[1], axis=-1)
        return ids

    if mesh is None:
        return of_device(logits_BPCV)
    places = ACT["B"], "context", None
    given, found = PartitionSpec(*places, "model"), PartitionSpec(*places, None)
    return jax.shard_map(of_device, mesh=mesh, in_specs=given, out_specs=found, check_vma=False)(logits_BPCV)


def _coarse(logits: jax.Array, ids: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(log P of the ids [..., k], log P of all others together [...], log of the sum of exp [...])."""
    of_ids = jnp.take_along_axis(logits, ids, axis=-1)
    others = jnp.put_along_axis(logits, ids, -jnp.inf, axis=-1, inplace=False)
    log_others = jax.nn.logsumexp(others, axis=-1)
    log_sum = jnp.logaddexp(jax.nn.logsumexp(of_ids, axis=-1), log_others)
    return of_ids - log_sum[..., None], log_others - log_sum, log_sum


def _compared(logits: jax.Array, teacher: TopLogProbs) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """(KL [...], log P - log Q of the ids [..., k], of the rest [...], log of the sum of exp [...])."""
    log_probs, rest, log_sum = _coarse(logits, teacher.ids_BTJ)
    of_ids, of_rest = log_probs - teacher.log_probs_BTJ, rest - teacher.rest_BT
    return jnp.sum(jnp.exp(log_probs) * of_ids, axis=-1) + jnp.exp(rest) * of_rest, of_ids, of_rest, log_sum


def _forward(hidden_BTD, weight, teacher: TopLogProbs, counts_BT, axes: str, chunk: int, mesh: Mesh | None):
    def of_logits(logits, *parts):
        return _compared(logits, TopLogProbs(*parts))[0]

    kl_BT = by_chunks(of_logits, hidden_BTD, weight, counts_BT, _parts_of(teacher), axes, chunk, mesh)
    return jnp.where(counts_BT, kl_BT, 0.0), (hidden_BTD, weight, teacher, counts_BT)


def _backward(axes: str, chunk: int, mesh: Mesh | None, residuals, d_kl_BT: jax.Array):
    hidden_BTD, weight, teacher, counts_BT = residuals

    def d_logits_of(logits, d_kl, *parts):
        top = TopLogProbs(*parts)
        kl, of_ids, of_rest, log_sum = _compared(logits, top)
        rest = jnp.broadcast_to((of_rest - kl)[..., None], logits.shape)
        excess = jnp.put_along_axis(rest, top.ids_BTJ, of_ids - kl[..., None], axis=-1, inplace=False)
        return jnp.exp(logits - log_sum[..., None]) * excess * d_kl[..., None]

    items = d_kl_BT, *_parts_of(teacher)
    d_hidden, d_weight = gradients_by_chunks(d_logits_of, hidden_BTD, weight, counts_BT, items, axes, chunk, mesh)
    return d_hidden, d_weight, None, None


def _parts_of(teacher: TopLogProbs) -> tuple[jax.Array, jax.Array, jax.Array]:
    return teacher.ids_BTJ, teacher.log_probs_BTJ, teacher.rest_BT


reverse_kl.defvjp(_forward, _backward)
