# SPDX-License-Identifier: Apache-2.0
"""Tiny random decoders whose answers are lively, drafters that agree with them sometimes, and their plain forward."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rapid_jax.attention.attend import attend_self
from rapid_jax.attention.quantized_kv import quantize_kv
from rapid_jax.attention.strategy import Strategy
from rapid_jax.model.config import ModelConfig, Rope
from rapid_jax.model.decoder import Decoder, Layout
from rapid_jax.model.hf_names import EMBEDDING, HEAD, weights
from rapid_jax.model.layer_kinds import LayerKind
from rapid_jax.model.placement import build
from rapid_jax.runtime.axes import PARAM, Table
from rapid_jax.speculative.generate import Prompted
from rapid_jax.speculative.prefill import prefill, serving
from rapid_jax.speculative.prefix_heads import Place

PADDED = 96  # tokens of a plain forward: one shape for every length


def config_of(vocabulary: int) -> ModelConfig:
    return ModelConfig(
        family="llama",
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        norm_eps=1e-5,
        rope=Rope(10000.0),
        max_positions=4096,
        tie_embeddings=False,
    )


@dataclass(frozen=True)
class Weights:
    """A checkpoint in memory."""

    config: ModelConfig
    arrays: Mapping[str, np.ndarray]

    @classmethod
    def lively(
        cls, vocabulary: int, *, seed: int = 1, sharpness: float = 3.0, pattern: Sequence[LayerKind] = (LayerKind(),)
    ) -> "Weights":
        """Random weights whose logits have about this standard deviation.

        Small embeddings and sharp attention make the next token depend on more than the last one, so that greedy
        answers do not settle on one token or a short cycle at once.
        """
        rng, config = np.random.default_rng(seed), config_of(vocabulary)
        config = replace(config, num_layers=max(config.num_layers, len(pattern)), pattern=tuple(pattern))
        arrays = {}
        for weight in weights(config):
            shape = weight.stored_shape
            spread = shape[-1] ** -0.5
            spread = {"embed_VD": 0.3, "head_DV": sharpness * spread, "q_DNH": 2.5 * spread}.get(weight.name, spread)
            noise = rng.normal(size=shape)
            arrays[weight.key] = (noise * spread if len(shape) > 1 else 1 + 0.2 * noise).astype(np.float32)
        return cls(config, arrays)

    def perturbed(self, amount: float, *, seed: int = 1) -> "Weights":
        """The same with noise on everything: a model that agrees with this one sometimes."""
        rng = np.random.default_rng(seed)
        noisy = {
            key: (array + amount * array.std() * rng.normal(size=array.shape)).astype(np.float32)
            for key, array in self.arrays.items()
        }
        return Weights(self.config, noisy)

    def padded(self, vocabulary: int, row_D: np.ndarray) -> "Weights":
        """The same with a larger vocabulary: every further token has the given row of the head."""
        extra = vocabulary - self.config.vocab_size
        arrays = dict(self.arrays)
        arrays[EMBEDDING] = np.concatenate([arrays[EMBEDDING], np.zeros((extra, row_D.size), np.float32)])
        arrays[HEAD] = np.concatenate([arrays[HEAD], np.tile(row_D.astype(np.float32), (extra, 1))])
        return Weights(replace(self.config, vocab_size=vocabulary), arrays)

    def decoder(
        self,
        layout: Layout = "unrolled",
        dtype: jnp.dtype = jnp.float32,
        mesh: Mesh | None = None,
        table: Table = PARAM,
    ) -> Decoder:
        read = self.arrays.__getitem__
        return build(self.config, read, layout=layout, dtype=dtype, mesh=mesh, table=table, quiet=True)


@jax.jit
def _forward(decoder: Decoder, tokens_BT: jax.Array) -> jax.Array:
    pos_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    hidden_BTD, _ = decoder.hidden(tokens_BT, pos_BT, attend_self(pos_BT, Strategy(block=1024)))
    return decoder.logits(hidden_BTD)


def logits_of(decoder: Decoder, tokens_BT: np.ndarray) -> np.ndarray:
    """float32 [B, T, V]: the logits after every token of whole sequences, no cache."""
    width = PADDED if tokens_BT.shape[0] == 1 else tokens_BT.shape[1]
    padded = np.zeros((tokens_BT.shape[0], width), np.int32)
    padded[:, : tokens_BT.shape[1]] = tokens_BT
    return np.asarray(_forward(decoder, jnp.asarray(padded)))[:, : tokens_BT.shape[1]]


def next_logits(decoder: Decoder) -> Callable[[Sequence[int]], np.ndarray]:
    """sequence -> the logits after it."""
    return lambda sequence: logits_of(decoder, np.asarray([sequence], np.int32))[0, -1]


def place_of(decoder: Decoder, prompt: Sequence[int], *, keep: int = 2, chunk: int = 16) -> Place:
    """Where `prompted` has the prompt."""
    tokens = len(prompt) - keep
    return Place.of(tokens, tokens, chunk, serving(decoder, block=1).context)


def prompted(
    decoder: Decoder, prompts: Sequence[Sequence[int]], *, keep: int = 2, chunk: int = 16, int8: bool = False
) -> Prompted:
    """The prompts, all but the last `keep` tokens of each in the prefix, `int8`: rounded."""
    heads = [prompt[: len(prompt) - keep] for prompt in prompts]
    prefix = prefill(decoder, heads, chunk=chunk, dtype=jnp.float32)
    return Prompted(decoder, prompts, quantize_kv(prefix) if int8 else prefix, [len(h) for h in heads])
