# SPDX-License-Identifier: Apache-2.0
"""From the hidden states of a text to its one vector: pooling, linear layers behind it, and the norm.

Letters: B batch, T token, E embedding, before and after a linear layer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

import jax
import jax.numpy as jnp
from flax import nnx

Pooling = Literal["mean", "cls", "last"]
DenseActivation = Literal["identity", "tanh"]
_ACTIVATIONS: Final = {"identity": lambda x: x, "tanh": jnp.tanh}


@dataclass(frozen=True)
class Dense:
    """A linear layer behind the pooling."""

    folder: str  # inside the encoder's
    inputs: int
    outputs: int
    bias: bool
    activation: DenseActivation


@dataclass(frozen=True)
class Prompts:
    """What stands before a text, by what the text is."""

    query: str = ""
    document: str = ""


@dataclass(frozen=True, kw_only=True)
class SentenceConfig:
    """What makes an encoder of texts of a model that gives hidden states of tokens."""

    vocab_size: int
    embed_dim: int  # of the hidden states
    pooling: Pooling
    max_tokens: int  # tokens of one input, special ones and its prompt included
    lower_case: bool  # text is lower-cased before its tokenizer sees it
    dense: tuple[Dense, ...] = ()
    prompts: Prompts = Prompts()

    @property
    def dim(self) -> int:
        """The length of a text's vector."""
        return self.dense[-1].outputs if self.dense else self.embed_dim


class Linear(nnx.Module):
    """x W + b and an activation, in float32."""

    def __init__(self, dense: Dense, *, rngs: nnx.Rngs):
        shape = dense.inputs, dense.outputs
        self.activation: DenseActivation = dense.activation
        self.matrix_EE = nnx.Param(dense.inputs**-0.5 * jax.random.normal(rngs.params(), shape, jnp.float32))
        self.bias_E = nnx.Param(jnp.zeros((dense.outputs,), jnp.float32)) if dense.bias else None

    def __call__(self, x_BE: jax.Array) -> jax.Array:
        """[B, E]."""
        y_BE = jnp.einsum("BE,EF->BF", x_BE, self.matrix_EE[...], precision=jax.lax.Precision.HIGHEST)
        if self.bias_E is not None:
            y_BE += self.bias_E[...]
        return _ACTIVATIONS[self.activation](y_BE)


def pooled(hidden_BTE: jax.Array, mask_BT: jax.Array, pooling: Pooling) -> jax.Array:
    """float32 [B, E]: the mean of the tokens of the mask, or the first or last of them; of none, zeros.

    The mask is True from the first token of a row to its last.
    """
    hidden_BTE = hidden_BTE.astype(jnp.float32)
    if pooling == "mean":
        weights_BT = mask_BT.astype(jnp.float32)
        total_BE = jnp.einsum("BTE,BT->BE", hidden_BTE, weights_BT, precision=jax.lax.Precision.HIGHEST)
        return total_BE / jnp.maximum(weights_BT.sum(axis=1, keepdims=True), 1.0)
    at_B = jnp.zeros(mask_BT.shape[0], jnp.int32) if pooling == "cls" else jnp.maximum(mask_BT.sum(axis=1) - 1, 0)
    chosen_BE = jnp.take_along_axis(hidden_BTE, at_B[:, None, None], axis=1)[:, 0]
    return chosen_BE * mask_BT[:, :1]


def unit_vectors(
    hidden_BTE: jax.Array, mask_BT: jax.Array, pooling: Pooling, dense: Sequence[Linear] = ()
) -> jax.Array:
    """float32 [B, E]: the hidden states pooled, through the linear layers, over the norm. No tokens: zeros."""
    vector_BE = pooled(hidden_BTE, mask_BT, pooling)
    for layer in dense:
        vector_BE = layer(vector_BE)
    vector_BE *= mask_BT[:, :1]  # a bias would make a vector of a row without tokens
    return vector_BE / jnp.maximum(jnp.linalg.norm(vector_BE, axis=1, keepdims=True), 1e-12)
