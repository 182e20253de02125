# SPDX-License-Identifier: Apache-2.0
"""What a forward pass does on one device, counted from the architecture: the least that it can take.

Of the compiled program this cannot be read: its own cost analysis counts the body of every loop once.
"""

from dataclasses import dataclass

from rapid_jax.model.config import ModelConfig
from rapid_jax.runtime.mesh_config import MeshConfig


@dataclass(frozen=True)
class Work:
    """Of one device."""

    flops: float = 0.0
    hbm_bytes: float = 0.0  # read, weights and cache alone

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.hbm_bytes + other.hbm_bytes)

    def times(self, count: int) -> "Work":
        """The same `count` times."""
        return Work(self.flops * count, self.hbm_bytes * count)


@dataclass(frozen=True)
class Pass:
    """A forward pass of a model over `tokens` tokens that see `seen` slots before them and half of one another."""

    tokens: int
    seen: int
    rows: int  # logits


def matrices(config: ModelConfig) -> int:
    """Weights of all layers that every token is multiplied with: of experts, those it goes to, and the router."""
    return round(_matrices(config, 0 if config.experts is None else config.experts.per_token))


def matrices_read(config: ModelConfig, tokens: float) -> float:
    """Weights of all layers that are read for so many tokens.

    Of experts those that the tokens are expected to touch, if each goes to any of them alike: the least that is read
    where each is read once. Tokens of one text touch fewer.
    """
    return _matrices(config, 0 if config.experts is None else config.experts.touched(tokens))


def _matrices(config: ModelConfig, experts: float) -> float:
    """Weights of all layers, with so many experts in each layer that has some."""
    heads = (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    sparse = sum(config.kinds[kind].experts for kind in config.kind_of)
    width = (config.num_layers - sparse) * 3 * config.intermediate_size
    if config.experts is not None:
        width += sparse * (experts * 3 * config.experts.ffn + config.experts.count)
    return config.hidden_size * (config.num_layers * heads + width)


def slots_seen(config: ModelConfig, slots: int) -> int:
    """Slots of all layers that a token behind so many sees: of a layer with a window no more than that."""
    return sum(slots if window is None else min(slots, window) for window in config.window_of)


def _pairs(run: Pass, window: int | None) -> float:
    """Of a token and a slot that it sees, in one layer."""
    growing = run.tokens if window is None else min(max(window - run.seen, 0), run.tokens)
    return growing * (run.seen + growing / 2) + (run.tokens - growing) * (window or 0)


def work_of(
    config: ModelConfig,
    mesh: MeshConfig,
    run: Pass,
    item: float,
    cache_item: float | None = None,
    *,
    split_tokens: bool,
) -> Work:
    """The work of a pass on one device.

    `item`: bytes of a weight, and of an element of the cache unless `cache_item` says otherwise.
    `split_tokens`: tokens are split over the context axis (prefill); else every context device has all of them, and
    its own part of the slots.
    """
    head = config.hidden_size * config.vocab_size
    share = run.tokens / (mesh.context if split_tokens else 1)
    pairs = sum(_pairs(run, window) for window in config.window_of) / mesh.context
    width = config.num_heads * config.head_dim
    flops = (2 * matrices(config) * share + 2 * head * run.rows + 4 * width * pairs) / mesh.model
    weights = (matrices_read(config, share) + head * (run.rows > 0)) / (mesh.model * mesh.fsdp)
    kv_heads = max(config.num_kv_heads, mesh.model) / mesh.model
    slots = slots_seen(config, run.seen) / (1 if split_tokens else mesh.context)
    cache = 2 * kv_heads * config.head_dim * slots
    return Work(flops, item * weights + (item if cache_item is None else cache_item) * cache)
