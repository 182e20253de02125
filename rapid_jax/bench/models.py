# SPDX-License-Identifier: Apache-2.0
"""Models and prompts of a real shape without a checkpoint: random weights, random keys and values.

The head is the embedding moved on by one token, so that every token votes for the next id, against all that the layers
add at random: a little above the largest of that noise, and models that differ a little mostly agree. Drafter and
target are the same weights over different contexts, so they differ by what attention brings. The acceptance dial scales
every layer's attention output: at 0 they agree but for rounding; the larger, the less often.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from rapid_jax.attention.cache import KV, Prefix
from rapid_jax.model.config import ModelConfig
from rapid_jax.model.decoder import Decoder
from rapid_jax.model.placement import abstract

SIGNAL = 1.35  # the vote for the next id, in units of the largest of as many random logits as there are ids


@partial(jax.jit, static_argnums=(1, 2))
def _normal(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype, std: float) -> jax.Array:
    return (jax.random.normal(key, shape, jnp.float32) * std).astype(dtype)


def random_decoder(config: ModelConfig, dtype: jnp.dtype, seed: int = 0) -> Decoder:
    """A decoder in the unrolled layout with weights of variance 1 / inputs, norms of 1 and no biases."""
    graph, state = nnx.split(abstract(config, layout="unrolled", dtype=dtype))
    keys = iter(jax.random.split(jax.random.key(seed), len(jax.tree.leaves(state))))
    votes = next(keys)
    noise = 0.6 * math.sqrt(config.num_layers)  # of a residual: silu(gate) up has a mean square of 0.36
    vote = SIGNAL * noise * math.sqrt(2 * math.log(config.vocab_size) / config.hidden_size)

    def fill(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name, shape = jax.tree_util.keystr(path), leaf.shape
        if "norm" in name:
            return jnp.ones(shape, dtype)
        if "bias" in name:
            return jnp.zeros(shape, dtype)
        if "embed_VD" in name:
            return _normal(votes, shape, dtype, vote)
        if "head_DV" in name:
            return _head(votes, shape, dtype)
        return _normal(next(keys), shape, dtype, (shape[0] * shape[1] if "o_NHD" in name else shape[0]) ** -0.5)

    return nnx.merge(graph, jax.tree_util.tree_map_with_path(fill, state))


@partial(jax.jit, static_argnums=(1, 2))
def _head(key: jax.Array, shape: tuple[int, int], dtype: jnp.dtype) -> jax.Array:
    embedding_VD = jax.random.normal(key, shape[::-1], jnp.float32)
    return (jnp.roll(embedding_VD, 1, axis=0).T * shape[0] ** -0.5).astype(dtype)


def dialled(decoder: Decoder, dial: float) -> Decoder:
    """The decoder with every layer's attention output scaled; all other arrays are its own."""
    graph, state = nnx.split(decoder)

    def scaled(path: tuple, leaf: jax.Array) -> jax.Array:
        name = jax.tree_util.keystr(path)
        return leaf * jnp.asarray(dial, leaf.dtype) if "o_NHD" in name or "'out'" in name else leaf

    return nnx.merge(graph, jax.tree_util.tree_map_with_path(scaled, state))


def random_prefix(config: ModelConfig, *, batch: int, tokens: int, dtype: jnp.dtype, seed: int = 0) -> Prefix:
    """The keys and values of a prompt of so many random tokens."""
    shape = (batch, config.num_kv_heads, tokens, config.head_dim)
    keys = jax.random.split(jax.random.key(seed), (config.num_layers, 2))
    layers = tuple(KV(_normal(k, shape, dtype, 1.0), _normal(v, shape, dtype, 1.0)) for k, v in keys)
    pos_BS = jnp.broadcast_to(jnp.arange(tokens, dtype=jnp.int32), (batch, tokens))
    return Prefix(layers, pos_BS, jnp.int32(tokens))
