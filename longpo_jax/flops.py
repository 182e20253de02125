# SPDX-License-Identifier: Apache-2.0
"""The arithmetic that rows need, whatever a program recomputes: what model FLOPs utilisation is measured by.

Of a matrix product 2 FLOPs a weight and token forward, twice that backward; of experts, the weights of those that a
token goes to. Of attention 4 H FLOPs a query head and seen pair forward, twice that backward.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from longpo_jax.rows import REJECTED
from rapid_jax.model.config import ModelConfig
from rapid_jax.plan.cost import matrices


def tokens_of(batch: Mapping[str, Any]) -> jax.Array:
    """How many places of all rows hold a token, float32."""
    return sum((jnp.sum(batch[name] >= 0, dtype=jnp.float32) for name in _positions(batch)), jnp.float32(0))


def logits_of(batch: Mapping[str, Any], nll: str) -> jax.Array:
    """How many places of all rows need logits, float32; `nll` is as in `step.row_log_probs`."""
    found = jnp.float32(0)
    for name in _positions(batch):
        prefix = name.removesuffix("pos_BT")
        counts_BT = batch[f"{prefix}turn_BT"] > 0
        if nll == "full" and not prefix:
            counts_BT |= (batch["branch_BT"] != REJECTED) & (batch["turn_BT"] >= 0)
        found += jnp.sum(counts_BT & (batch[name] >= 0), dtype=jnp.float32)
    return found


def flops_of(config: ModelConfig, nll: str, batch: Mapping[str, Any]) -> jax.Array:
    """FLOPs of forward and backward over all rows, float32."""
    D, V, H = config.hidden_size, config.vocab_size, config.head_dim
    weights = matrices(config)
    windows = Counter(config.window_of)  # of how many layers each
    pairs = jnp.float32(0)
    for name in _positions(batch):
        prefix = name.removesuffix("pos_BT")
        filled_BT, tail_BT = batch[name] >= 0, batch[f"{prefix}branch_BT"] == REJECTED
        trunk_B = jnp.sum(filled_BT & ~tail_BT, axis=1).astype(jnp.float32)
        tail_B = jnp.sum(filled_BT & tail_BT, axis=1).astype(jnp.float32)
        shared_B = (batch[f"{prefix}reach_B"] + 1).astype(jnp.float32)
        for window, layers in windows.items():
            pairs += layers * jnp.sum(_pairs(trunk_B, jnp.float32(0), window) + _pairs(tail_B, shared_B, window))
    attention = 12 * H * config.num_heads * pairs
    return 6.0 * weights * tokens_of(batch) + 6.0 * D * V * logits_of(batch, nll) + attention


def _pairs(count: jax.Array, before: jax.Array, window: int | None) -> jax.Array:
    """Of a token and one that it sees, itself too, of `count` tokens behind `before` others."""
    growing = count if window is None else jnp.clip(window - before, 0, count)
    return growing * before + growing * (growing + 1) / 2 + (count - growing) * (window or 0)


def _positions(batch: Mapping[str, Any]) -> list[str]:
    return [name for name in batch if name.endswith("pos_BT")]
