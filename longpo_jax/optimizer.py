# SPDX-License-Identifier: Apache-2.0
"""The optimizer: Optax's adamw, or rmsprop as torch computes it, on a schedule of linear warmup and cosine decay.

torch.optim.RMSprop, which the released code of LongPO (arXiv 2502.13922) trains with, adds eps outside of the root and
starts from zero without a correction for that; Optax's own defaults add it inside, which for gradients of 1e-6 makes
the first updates hundreds of times smaller.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from longpo_jax.config import OptimizerConfig


def transform_of(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """What makes updates of float32 gradients: clipped, rescaled, decayed, times the learning rate of `schedule_of`.

    The moments are stored in `config.moments_dtype` and computed in float32.
    """
    if config.name == "adamw":
        scale = optax.scale_by_adam(config.b1, config.b2, config.eps)
    else:
        scale = optax.scale_by_rms(config.decay, config.eps, eps_in_sqrt=False)
    parts = [_stored_as(scale, jnp.dtype(config.moments_dtype))]
    if config.clip_norm is not None:
        parts.insert(0, optax.clip_by_global_norm(config.clip_norm))
    if config.name == "adamw" and config.weight_decay:
        parts.append(optax.add_decayed_weights(config.weight_decay))
    return optax.chain(*parts, optax.scale_by_learning_rate(schedule_of(config, steps)))


def schedule_of(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """The learning rate of the update that follows `count` others, of `steps` in all; above 0 for each of them.

    Update k of the first W = ceil(warmup_ratio * steps) has k / W of the peak. Then it stays, or falls as half a cosine
    that would be 0 after the last update, as in transformers' get_cosine_schedule_with_warmup, whose warmup counts from
    0 instead: its first update changes nothing, and a run of one update trains nothing.
    """
    warmup = math.ceil(round(config.warmup_ratio * steps, 6))  # 0.1 * 30 is above 3 in floating point
    peak = config.learning_rate

    def rate(count: jax.typing.ArrayLike) -> jax.Array:
        count = jnp.asarray(count, jnp.float32)
        after = jnp.full_like(count, peak)
        if config.schedule == "cosine":
            left = jnp.clip((steps - count) / max(steps - warmup, 1), 0.0, 1.0)
            after = peak * jnp.sin(0.5 * jnp.pi * left) ** 2  # (1 - cos(pi left)) / 2 rounds to 0 for the last of many
        return jnp.where(count < warmup, peak * (count + 1) / max(warmup, 1), after)

    return rate


def _stored_as(inner: optax.GradientTransformation, dtype: jnp.dtype) -> optax.GradientTransformation:
    """`inner` computed in float32, its moments kept in `dtype`; counters stay as they are."""

    def cast(tree: Any, to: jnp.dtype) -> Any:
        return jax.tree.map(lambda x: x.astype(to) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)

    def init(weights: optax.Params) -> optax.OptState:
        return cast(inner.init(weights), dtype)

    def update(gradient: optax.Updates, state: optax.OptState, weights: optax.Params | None = None):
        gradient, state = inner.update(gradient, cast(state, jnp.dtype(jnp.float32)), weights)
        return gradient, cast(state, dtype)

    return optax.GradientTransformation(init, update)  # type: ignore[arg-type]
