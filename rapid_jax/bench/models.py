# SPDX-License-Identifier: Apache-2.0
"""Models and prompts of a real shape without a checkpoint: random weights, random keys and values.

The head is the embedding moved on by one token, so that every token votes for the next id, against all that the layers
add at random: a little above the largest of that noise, and models that differ a little mostly agree. Drafter and
target are the same weights over different contexts, so they differ by what attention brings. The acceptance dial scales
every layer's attention output: at 0 they agree but for rounding; the larger, the less often.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, Sharding

from rapid_jax.attention.cache import KV, Near, Prefix
from rapid_jax.attention.strategy import Strategy
from rapid_jax.model.config import ModelConfig
from rapid_jax.model.decoder import Decoder
from rapid_jax.model.placement import abstract
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.mesh import put_on_mesh, replicate
from rapid_jax.speculative.chunk_layout import ChunkLayout
from rapid_jax.speculative.prefill import windows_of
from rapid_jax.speculative.window_layout import WindowLayout

SIGNAL = 1.35  # the vote for the next id, in units of the largest of as many random logits as there are ids


def _normal(key: jax.Array, like: jax.ShapeDtypeStruct, std: float) -> jax.Array:
    return _fill(key, like.shape, like.dtype, like.sharding, std)


@partial(jax.jit, static_argnums=(1, 2, 3))
def _fill(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype, sharding: Sharding | None, std: float):
    return _lying((jax.random.normal(key, shape, jnp.float32) * std).astype(dtype), sharding)


def _lying(array: jax.Array, sharding: Sharding | None) -> jax.Array:
    return array if sharding is None else jax.lax.with_sharding_constraint(array, sharding)


def random_decoder(config: ModelConfig, dtype: jnp.dtype, seed: int = 0, mesh: Mesh | None = None) -> Decoder:
    """A decoder in the unrolled layout with weights of variance 1 / inputs, norms of 1 and no biases."""
    graph, state = nnx.split(abstract(config, layout="unrolled", dtype=dtype, mesh=mesh))
    keys = iter(jax.random.split(jax.random.key(seed), len(jax.tree.leaves(state))))
    votes = next(keys)
    # Of a residual: silu(gate) up has a mean square of 0.36; where a layer's two addends are normalised each has 1.
    noise = (math.sqrt(2) if config.post_norms else 0.6) * math.sqrt(config.num_layers)
    vote = SIGNAL * noise * math.sqrt(2 * math.log(config.vocab_size) / config.hidden_size) / config.embedding_scale

    def fill(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name, shape = jax.tree_util.keystr(path), leaf.shape
        if "norm" in name:
            return jnp.full(shape, 1 - config.norm_offset, dtype, device=leaf.sharding)
        if "bias" in name:
            return jnp.zeros(shape, dtype, device=leaf.sharding)
        if "embed_VD" in name:
            return _normal(votes, leaf, vote)
        if "head_DV" in name:
            return _head(votes, shape, dtype, leaf.sharding)
        inputs = shape[0] * shape[1] if "o_NHD" in name else shape[1] if "_X" in name else shape[0]
        return _normal(next(keys), leaf, inputs**-0.5)

    return nnx.merge(graph, jax.tree_util.tree_map_with_path(fill, state))


@partial(jax.jit, static_argnums=(1, 2, 3))
def _head(key: jax.Array, shape: tuple[int, int], dtype: jnp.dtype, sharding: Sharding | None) -> jax.Array:
    embedding_VD = jax.random.normal(key, shape[::-1], jnp.float32)
    return _lying((jnp.roll(embedding_VD, 1, axis=0).T * shape[0] ** -0.5).astype(dtype), sharding)


def scale_attention_outputs(decoder: Decoder, dial: float) -> Decoder:
    """The decoder with every layer's attention output scaled; all other arrays are its own."""
    graph, state = nnx.split(decoder)
    offset = decoder.config.norm_offset

    def scaled(path: tuple, leaf: jax.Array) -> jax.Array:
        name = jax.tree_util.keystr(path)
        if decoder.config.post_norms:  # a scale of what is normalised changes nothing
            return (leaf + offset) * jnp.asarray(dial, leaf.dtype) - offset if "attention_post_norm" in name else leaf
        return leaf * jnp.asarray(dial, leaf.dtype) if "o_NHD" in name or "'out'" in name else leaf

    return nnx.merge(graph, jax.tree_util.tree_map_with_path(scaled, state))


def random_prefix(
    config: ModelConfig, *, batch: int, tokens: int, dtype: jnp.dtype, seed: int = 0, mesh: Mesh | None = None
) -> Prefix:
    """The keys and values of a prompt of so many random tokens, as a decoder on the mesh keeps them.

    Raises InputError where the context devices cannot have equal parts of it.
    """
    strategy = Strategy(block=1, mesh=mesh, batch=("data",))
    if tokens % strategy.context:
        raise InputError(f"prompts of {tokens} tokens: expected a multiple of context = {strategy.context}")
    sharding = None if mesh is None else NamedSharding(mesh, strategy.spec("kv_BKSH"))
    keys = jax.random.split(jax.random.key(seed), (config.num_layers, 2))

    def of(layers: Sequence[int], pos_BS: np.ndarray, used: int) -> Prefix:
        shape = (batch, strategy.kv_heads(config.num_kv_heads), pos_BS.shape[1], config.head_dim)
        like = jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
        made = tuple(KV(*(_normal(key, like, 1.0) for key in keys[layer])) for layer in layers)
        return Prefix(made, put_on_mesh(mesh, strategy.spec("pos_BS"), pos_BS), replicate(mesh, np.int32(used)))

    window, near_at = windows_of(config)
    full = [layer for layer in range(config.num_layers) if layer not in near_at]
    pos_BS = np.broadcast_to(np.arange(tokens, dtype=np.int32), (batch, tokens))
    found = of(full, pos_BS, tokens)
    if window is None:
        return found
    layout = WindowLayout(window, ChunkLayout(tokens, 1, tokens, strategy.context))
    if not layout.is_whole:
        pos_BS = layout.positions([tokens] * batch)
    near = of(near_at, pos_BS, tokens - layout.first_kept(tokens))
    return replace(found, near=Near(near, near_at, window))
