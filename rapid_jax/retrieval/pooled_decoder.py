# SPDX-License-Identifier: Apache-2.0
"""Encoders that are decoders whose hidden states are pooled: Qwen3-Embedding, EmbeddingGemma.

The layers are those of `rapid_jax.model`; what is here is what their tokens see, and how a text's vector is made.
Letters: B batch, T token, N query heads, K kv heads, H head dim, E embedding.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from rapid_jax.attention.attend import Attend, Window
from rapid_jax.attention.online_softmax import Slots, attend_block, attend_tiled, finish, fold, unfold
from rapid_jax.model.config import ModelConfig, from_hf
from rapid_jax.model.decoder import NO_WINDOW, Decoder
from rapid_jax.model.hf_io import HfCheckpoint
from rapid_jax.model.placement import build
from rapid_jax.retrieval.pooling import Linear, Pooling, SentenceConfig, unit_vectors
from rapid_jax.retrieval.sentence_files import fill_dense, read_sentence_settings
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.json_input import Fields
from rapid_jax.runtime.storage import AnyPlace

_BLOCK = 512  # queries, and keys, whose scores are in memory at once


@dataclass(frozen=True, kw_only=True)
class PooledDecoderConfig(SentenceConfig):
    """A decoder and how its hidden states become one vector."""

    decoder: ModelConfig


def read_pooled_config(folder: AnyPlace, stated: Fields, pooling: Pooling | None) -> PooledDecoderConfig:
    """What the folder, whose config.json is `stated`, says about an encoder that is a decoder.

    Pooling has no default: a decoder whose files do not state one may be no encoder at all.
    """
    decoder = from_hf(stated, encodes=True)
    if not stated.truth("is_causal", True):
        raise stated.error("is_causal", "true: a family says by use_bidirectional_attention that it is not")
    said = read_sentence_settings(folder, decoder.hidden_size, pooling)
    if said.pooling is None:
        raise InputError(
            f"encoder {folder}: expected modules.json or 1_Pooling/config.json, which say how the hidden states of a "
            "decoder become one vector; found neither"
        )
    return PooledDecoderConfig(
        vocab_size=decoder.vocab_size,
        embed_dim=decoder.hidden_size,
        pooling=said.pooling,
        max_tokens=min(decoder.max_positions, said.max_tokens or decoder.max_positions),
        lower_case=said.lower_case,
        dense=said.dense,
        prompts=said.prompts,
        decoder=decoder,
    )


def attend_texts(pos_BT: jax.Array, *, bidirectional: bool) -> Attend:
    """Attention of texts over themselves, causal or over all their tokens; position -1 is padding.

    A window reaches as far back as in a causal decoder, and in a bidirectional one as far ahead.
    """

    def attend(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, layer: None, window: Window = None):
        # Masks are positions: a row's is the last one it sees.
        last_BT = jnp.where(pos_BT < 0, -1, pos_BT + ((NO_WINDOW if window is None else window) - 1))
        first_BT = None if window is None else pos_BT - window + 1
        K, T = k_BTKH.shape[2], q_BTNH.shape[1]
        rows = fold(q_BTNH, last_BT if bidirectional else pos_BT, K, first_BT=first_BT)
        slots = Slots(k_BTKH.swapaxes(1, 2), v_BTKH.swapaxes(1, 2), pos_BT)
        scale = q_BTNH.shape[-1] ** -0.5
        if T <= _BLOCK:
            state = attend_block(rows, slots, scale=scale)
        else:
            state = attend_tiled(rows, slots, scale=scale, tile=_BLOCK * rows.group, block=_BLOCK)
        return unfold(finish(state, q_BTNH.dtype), T), None

    return attend


class PooledDecoder(nnx.Module):
    """Token ids in, one unit vector a text out."""

    def __init__(self, config: PooledDecoderConfig, decoder: Decoder, *, rngs: nnx.Rngs):
        self.config = config
        self.decoder = decoder
        self.dense = nnx.List([Linear(dense, rngs=rngs) for dense in config.dense])

    def hidden(self, ids_BT: jax.Array, mask_BT: jax.Array) -> jax.Array:
        """Last hidden states [B, T, E] of right-padded ids; those of padding (mask False) mean nothing."""
        pos_BT = jnp.where(mask_BT, jnp.arange(ids_BT.shape[1], dtype=jnp.int32), -1)
        attend = attend_texts(pos_BT, bidirectional=self.config.decoder.bidirectional)
        return self.decoder.hidden(ids_BT, pos_BT, attend)[0]

    def __call__(self, ids_BT: jax.Array, mask_BT: jax.Array) -> jax.Array:
        """Unit vectors [B, E] in float32 (`unit_vectors`)."""
        return unit_vectors(self.hidden(ids_BT, mask_BT), mask_BT, self.config.pooling, self.dense)


def load_pooled_decoder(folder: AnyPlace, config: PooledDecoderConfig, dtype: jnp.dtype) -> PooledDecoder:
    """The encoder with the folder's weights: the decoder's in `dtype`, those behind the pooling in float32.

    InputError names a tensor that is missing, of another shape, or no part of it.
    """
    checkpoint = HfCheckpoint(folder, encodes=True)
    read = checkpoint.read
    # Many shapes are compiled, each once: stacked layers compile in a fraction of the time.
    decoder = build(checkpoint.config, read, read_rows=read, layout="stacked", dtype=dtype, quiet=True)
    encoder = PooledDecoder(config, decoder, rngs=nnx.Rngs(0))
    fill_dense(encoder.dense, folder, config.dense)
    return encoder
