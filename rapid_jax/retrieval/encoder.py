# SPDX-License-Identifier: Apache-2.0
"""One text encoder for BERT (MiniLM) and XLM-RoBERTa (BGE-M3): parameters only.

The two differ in where positions begin, in pooling and in sizes, all of which `EncoderConfig` states. Letters: B batch,
T token (S as key), L layer, E embedding, N heads, H head dim, F ffn, V vocab, P positions.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from rapid_jax.retrieval.pooling import Linear, SentenceConfig, unit_vectors

_ACTIVATIONS = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": jax.nn.gelu,
    "gelu_pytorch_tanh": jax.nn.gelu,
    "relu": jax.nn.relu,
}
ACTIVATION_NAMES = tuple(_ACTIVATIONS)


@dataclass(frozen=True, kw_only=True)
class EncoderConfig(SentenceConfig):
    """What an encoder is made of. No default for a number that a checkpoint decides."""

    num_layers: int
    num_heads: int
    ffn_dim: int
    num_positions: int  # rows of the position table
    position_offset: int  # row of the first token: 0 in BERT, padding id + 1 in RoBERTa and XLM-RoBERTa
    norm_eps: float
    activation: str  # one of ACTIVATION_NAMES

    @property
    def head_dim(self) -> int:
        """Size of one attention head."""
        return self.embed_dim // self.num_heads


def layer_norm(x: jax.Array, scale_E: jax.Array, bias_E: jax.Array, eps: float) -> jax.Array:
    """(x - mean) / sqrt(variance + eps) * scale + bias over the last axis; float32 inside, the result in x's dtype."""
    x32 = x.astype(jnp.float32)
    centred = x32 - x32.mean(axis=-1, keepdims=True)
    variance = jnp.square(centred).mean(axis=-1, keepdims=True)
    return (centred * jax.lax.rsqrt(variance + eps) * scale_E + bias_E).astype(x.dtype)


class EncoderLayers(nnx.Module):
    """The parameters of all layers, stacked on a leading axis L that the forward pass scans over."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        L, E, N, H, F = config.num_layers, config.embed_dim, config.num_heads, config.head_dim, config.ffn_dim

        def matrix(*shape: int) -> nnx.Param:
            return nnx.Param(0.02 * jax.random.normal(rngs.params(), (L, *shape), dtype))

        def bias(*shape: int) -> nnx.Param:
            return nnx.Param(jnp.zeros((L, *shape), dtype))

        def scale(*shape: int) -> nnx.Param:
            return nnx.Param(jnp.ones((L, *shape), jnp.float32))

        self.query_LENH, self.query_bias_LNH = matrix(E, N, H), bias(N, H)
        self.key_LENH, self.key_bias_LNH = matrix(E, N, H), bias(N, H)
        self.value_LENH, self.value_bias_LNH = matrix(E, N, H), bias(N, H)
        self.out_LNHE, self.out_bias_LE = matrix(N, H, E), bias(E)
        self.attention_norm_scale_LE, self.attention_norm_bias_LE = scale(E), nnx.Param(jnp.zeros((L, E), jnp.float32))
        self.up_LEF, self.up_bias_LF = matrix(E, F), bias(F)
        self.down_LFE, self.down_bias_LE = matrix(F, E), bias(E)
        self.ffn_norm_scale_LE, self.ffn_norm_bias_LE = scale(E), nnx.Param(jnp.zeros((L, E), jnp.float32))


def _attend(x_BTE: jax.Array, mask_BS: jax.Array, layers: EncoderLayers) -> jax.Array:
    """Bidirectional attention of one layer's weights (no L axis any more) over the tokens of the mask.

    Plain: the scores [B, N, T, S] exist in float32. For the 256 to 1024 tokens of a chunk they are a few megabytes a
    row; one row of 8192 tokens and 16 heads takes 4 GiB, and `Embedder` makes its batches smaller accordingly.
    """
    q_BTNH = jnp.einsum("BTE,ENH->BTNH", x_BTE, layers.query_LENH[...]) + layers.query_bias_LNH[...]
    k_BSNH = jnp.einsum("BSE,ENH->BSNH", x_BTE, layers.key_LENH[...]) + layers.key_bias_LNH[...]
    v_BSNH = jnp.einsum("BSE,ENH->BSNH", x_BTE, layers.value_LENH[...]) + layers.value_bias_LNH[...]
    scale = q_BTNH.shape[-1] ** -0.5
    scores_BNTS = jnp.einsum("BTNH,BSNH->BNTS", q_BTNH * scale, k_BSNH, preferred_element_type=jnp.float32)
    # The least finite number, not -inf: a row without any token then yields an average, not NaN.
    scores_BNTS = jnp.where(mask_BS[:, None, None, :], scores_BNTS, jnp.finfo(jnp.float32).min)
    weights_BNTS = jnp.exp(scores_BNTS - scores_BNTS.max(axis=-1, keepdims=True))
    # Divided by the sum after the product with v, where there are fewer numbers: 1.5 times as fast on a CPU.
    sums_BTN = weights_BNTS.sum(axis=-1).transpose(0, 2, 1)
    out_BTNH = jnp.einsum(
        "BNTS,BSNH->BTNH", weights_BNTS.astype(x_BTE.dtype), v_BSNH, preferred_element_type=jnp.float32
    )
    out_BTNH = (out_BTNH / sums_BTN[..., None]).astype(x_BTE.dtype)
    return jnp.einsum("BTNH,NHE->BTE", out_BTNH, layers.out_LNHE[...]) + layers.out_bias_LE[...]


def _feed_forward(x_BTE: jax.Array, layers: EncoderLayers, activation: str) -> jax.Array:
    hidden_BTF = jnp.einsum("BTE,EF->BTF", x_BTE, layers.up_LEF[...]) + layers.up_bias_LF[...]
    hidden_BTF = _ACTIVATIONS[activation](hidden_BTF)
    return jnp.einsum("BTF,FE->BTE", hidden_BTF, layers.down_LFE[...]) + layers.down_bias_LE[...]


class Encoder(nnx.Module):
    """A post-norm transformer encoder and its pooling: token ids in, one unit vector a text out."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        V, P, E = config.vocab_size, config.num_positions, config.embed_dim
        self.config = config
        self.word_VE = nnx.Param(0.02 * jax.random.normal(rngs.params(), (V, E), dtype))
        self.position_PE = nnx.Param(0.02 * jax.random.normal(rngs.params(), (P, E), dtype))
        self.type_E = nnx.Param(jnp.zeros((E,), dtype))  # row 0 of the token types: retrieval has no second segment
        self.embedding_norm_scale_E = nnx.Param(jnp.ones((E,), jnp.float32))
        self.embedding_norm_bias_E = nnx.Param(jnp.zeros((E,), jnp.float32))
        self.layers = EncoderLayers(config, rngs=rngs, dtype=dtype)
        self.dense = nnx.List([Linear(dense, rngs=rngs) for dense in config.dense])

    def hidden(self, ids_BT: jax.Array, mask_BT: jax.Array) -> jax.Array:
        """Last hidden states [B, T, E] of right-padded ids; those of padding (mask False) mean nothing.

        x = LN(word + position + type); per layer x = LN(x + attention(x)), x = LN(x + ffn(x)): BERT,
        arXiv 1810.04805.
        """
        config = self.config
        eps = config.norm_eps
        first = config.position_offset
        x_BTE = self.word_VE[...][ids_BT] + self.position_PE[...][first : first + ids_BT.shape[1]] + self.type_E[...]
        x_BTE = layer_norm(x_BTE, self.embedding_norm_scale_E[...], self.embedding_norm_bias_E[...], eps)
        graph, stacked = nnx.split(self.layers)

        def step(x_BTE: jax.Array, sliced: nnx.State) -> tuple[jax.Array, None]:
            layer = nnx.merge(graph, sliced)
            x_BTE += _attend(x_BTE, mask_BT, layer)
            x_BTE = layer_norm(x_BTE, layer.attention_norm_scale_LE[...], layer.attention_norm_bias_LE[...], eps)
            x_BTE += _feed_forward(x_BTE, layer, config.activation)
            return layer_norm(x_BTE, layer.ffn_norm_scale_LE[...], layer.ffn_norm_bias_LE[...], eps), None

        return jax.lax.scan(step, x_BTE, stacked)[0]

    def __call__(self, ids_BT: jax.Array, mask_BT: jax.Array) -> jax.Array:
        """Unit vectors [B, E] in float32 (`unit_vectors`)."""
        return unit_vectors(self.hidden(ids_BT, mask_BT), mask_BT, self.config.pooling, self.dense)
