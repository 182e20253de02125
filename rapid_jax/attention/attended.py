# SPDX-License-Identifier: Apache-2.0
"""The part of a prefix that queries attended to most, for each layer and kv head: a small prefix of its own.

As Quest (arXiv 2406.10774) slots are chosen a block at a time; a block's score is the softmax weight that falls on it,
summed over the queries of a kv head, not a bound of it. Keys are rotated already, so blocks stay right wherever they
lie; they keep their order, and the first and the last block that a prompt uses are always among them.
"""

import jax
import jax.numpy as jnp
from jax import lax

from rapid_jax.attention.cache import KV, Prefix, capacity, each_layer
from rapid_jax.attention.strategy import Strategy

BLOCK = 64  # slots that are chosen together


def attended_slots(prefix: Prefix, slots: int) -> int:
    """Of what is chosen from a prefix: whole blocks, at most `slots` (two blocks at the least) and at most all."""
    return min(max(slots // BLOCK, 2), -(-capacity(prefix.layers) // BLOCK)) * BLOCK


def attended_prefix(prefix: Prefix, chosen: Prefix, q_BGLNH: jax.Array, due_B: jax.Array, strategy: Strategy) -> Prefix:
    """`chosen` with another choice, as large, from the prefix, in the rows that are due, by their latest G queries.

    A prefix of fewer sequences than rows is shared evenly, as in decoding. Which positions a head's slots have differs
    by head: `pos_BS` is 0 where a slot is filled. A query of zeros has no say. The sequence must lie on one device of
    the context axis, in order.
    """
    lengths_D = jnp.sum(prefix.pos_BS >= 0, axis=1)
    count = capacity(chosen.layers) // BLOCK
    stacked = isinstance(prefix.layers, KV)

    def local(q_BGLNH, pos_DS, due_B, *arrays):
        far, near = KV(*arrays[: len(arrays) // 2]), KV(*arrays[len(arrays) // 2 :])

        def of_layer(item):
            q_BGNH, far, near = item
            new = _gather(far, _best_slots(q_BGNH, far, pos_DS, count))
            return jax.tree.map(lambda new, old: jnp.where(_beside(due_B, old), new, old), new, near)

        if stacked:
            return tuple(jax.tree.leaves(lax.map(of_layer, (jnp.moveaxis(q_BGLNH, 2, 0), far, near))))
        return tuple(jax.tree.leaves(of_layer((q_BGLNH[:, :, 0], far, near))))

    def of(q_BGLNH: jax.Array, far: KV, near: KV) -> KV:
        names = _names(far, stacked)
        call = strategy.per_device(local, ("q_BGLNH", "pos_BS", "due_B", *names, *names), names)
        return KV(*call(q_BGLNH, prefix.pos_BS, due_B, *jax.tree.leaves(far), *jax.tree.leaves(near)))

    if isinstance(prefix.layers, KV) and isinstance(chosen.layers, KV):
        layers = of(q_BGLNH, prefix.layers, chosen.layers)
    else:
        pairs = zip(each_layer(prefix), each_layer(chosen), strict=True)
        layers = tuple(of(q_BGLNH[:, :, at : at + 1], *pair) for at, pair in enumerate(pairs))
    # All but the last block are full, and the last is among the chosen, behind the others.
    filled_D = jnp.minimum(lengths_D, count * BLOCK - -lengths_D % BLOCK)
    filled_B = jnp.repeat(filled_D, due_B.shape[0] // filled_D.shape[0])
    pos_BS = jnp.where(jnp.arange(count * BLOCK) < filled_B[:, None], 0, -1).astype(jnp.int32)
    pos_BS = jnp.where(due_B[:, None], pos_BS, chosen.pos_BS)
    return Prefix(layers, pos_BS, jnp.max(jnp.sum(pos_BS >= 0, axis=1)).astype(jnp.int32))


def _names(kv: KV, stacked: bool) -> tuple[str, ...]:
    """Of a layer's arrays, or of those of all."""
    letter = "L" * stacked
    if kv.k_scale_BKS is None:
        return f"k_{letter}BKSH", f"v_{letter}BKSH"
    return f"k_{letter}BKSH", f"v_{letter}BKHS", f"k_scale_{letter}BKS", f"v_scale_{letter}BKS"


def _beside(due_B: jax.Array, array: jax.Array) -> jax.Array:
    return due_B.reshape(-1, *[1] * (array.ndim - 1))


def _best_slots(q_BGNH: jax.Array, far: KV, pos_DS: jax.Array, count: int) -> jax.Array:
    """int32 [D, K, E, S]: the slots of the `count` best blocks, in order, for each of a sequence's E rows."""
    (D, S), (B, G, N, H), K = pos_DS.shape, q_BGNH.shape, far.k_BKSH.shape[1]
    M = -(-S // BLOCK)
    q_EDGKH = q_BGNH.reshape(D, B // D, G, K, N // K, H).swapaxes(0, 1)

    def scored(q_DGKH):
        """[D, K, M]: the weight on each block."""
        exact = {"preferred_element_type": jnp.float32, "precision": lax.Precision.HIGHEST}
        scores = jnp.einsum("DGKRH,DKSH->DKGRS", q_DGKH, far.k_BKSH.astype(q_DGKH.dtype), **exact) * H**-0.5
        if far.k_scale_BKS is not None:
            scores *= far.k_scale_BKS[:, :, None, None]
        weights = jax.nn.softmax(jnp.where((pos_DS >= 0)[:, None, None, None], scores, -jnp.inf), axis=-1)
        weights_DKS = jnp.pad(weights.sum(axis=(2, 3)), ((0, 0), (0, 0), (0, M * BLOCK - S)))
        return weights_DKS.reshape(D, K, M, BLOCK).sum(axis=-1)

    score_EDKM = lax.map(scored, q_EDGKH)  # a row at a time: scores are of every slot
    blocks_D1 = -(-jnp.sum(pos_DS >= 0, axis=1, keepdims=True) // BLOCK)
    at_M = jnp.arange(M)
    ends_DM, used_DM = (at_M == 0) | (at_M == blocks_D1 - 1), at_M < blocks_D1
    score_EDKM = jnp.where(used_DM[:, None], jnp.where(ends_DM[:, None], jnp.inf, score_EDKM), -1.0)
    best_EDKC = jnp.sort(lax.top_k(score_EDKM, count)[1], axis=-1)  # what is not in use lies behind
    slots = best_EDKC[..., None] * BLOCK + jnp.arange(BLOCK)
    return jnp.minimum(jnp.moveaxis(slots, 0, 2).reshape(D, K, B // D, count * BLOCK), S - 1)


def _gather(far: KV, at_DKES: jax.Array) -> KV:
    """Those slots of a layer, a sequence a row."""
    D, K, E, S = at_DKES.shape

    def of(x: jax.Array, axis: int) -> jax.Array:
        at = at_DKES.reshape(D, K, E * S)
        at = at[..., None] if axis == 2 and x.ndim == 4 else at[:, :, None] if axis == 3 else at
        found = jnp.take_along_axis(x, at, axis=axis)
        found = found.reshape(*found.shape[:axis], E, S, *found.shape[axis + 1 :])
        return jnp.moveaxis(found, axis, 1).reshape(D * E, *x.shape[1:axis], S, *x.shape[axis + 1 :])

    if far.k_scale_BKS is None or far.v_scale_BKS is None:
        return KV(of(far.k_BKSH, 2), of(far.v_BKSH, 2))
    return KV(of(far.k_BKSH, 2), of(far.v_BKSH, 3), of(far.k_scale_BKS, 2), of(far.v_scale_BKS, 2))
