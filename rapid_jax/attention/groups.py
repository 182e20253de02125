# SPDX-License-Identifier: Apache-2.0
"""Layers of one model that keep different slots of a prefix: those with a window and those without."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from rapid_jax.attention.cache import KV, Layers


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Grouped:
    """Layers of a stack, to be scanned over: the keys and values of each group are a stack of their own."""

    at_L: jax.Array  # int32, which of its group a layer is
    is_near_L: jax.Array  # bool, whether it has a window
    rest: Any  # what else `attend` takes of a layer, with a leading layer axis


def grouped(near_at: Sequence[int], rest: Any) -> Grouped:
    """All layers, of which those at these places have a window."""
    is_near = [layer in near_at for layer in range(jax.tree.leaves(rest)[0].shape[0])]
    at = [is_near[:layer].count(one) for layer, one in enumerate(is_near)]
    return Grouped(jnp.asarray(at, jnp.int32), jnp.asarray(is_near), rest)


def by_group(window: int, full: Callable, near: Callable) -> Callable:
    """An `attend` for layers of which some have the window: that is `near` for those and `full` for the others.

    Of an unrolled model's layer its window says which. In a stack both take (which of its group a layer is, the rest).
    """

    def attend(q_BTNH, k_BTKH, v_BTKH, layer, **given):
        q_and_kv = q_BTNH, k_BTKH, v_BTKH
        if isinstance(layer, Grouped):
            rest = layer.at_L, layer.rest
            return lax.cond(layer.is_near_L, partial(near, window=window), full, *q_and_kv, rest)
        return near(*q_and_kv, layer, **given) if given.get("window") is not None else full(*q_and_kv, layer)

    return attend


def layer_at(stack: Layers, index: jax.Array) -> KV:
    """One layer of a stack."""
    assert isinstance(stack, KV)
    return jax.tree.map(partial(lax.dynamic_index_in_dim, index=index, keepdims=False), stack)
