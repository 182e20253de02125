# SPDX-License-Identifier: Apache-2.0
"""How a layer runs while training: where its weights and input lie, and what is kept of it for the backward pass."""

from functools import partial
from typing import Any

import jax
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, NamedSharding

from longpo_jax.config import Remat
from rapid_jax.attention.ring import ATTENDED
from rapid_jax.attention.strategy import Strategy
from rapid_jax.model.decoder import Wrap
from rapid_jax.runtime.axes import TRAINED, spec_of

LAYER = "layer_input"


def wrapping(remat: Remat, *, offload: bool, mesh: Mesh | None) -> Wrap:
    """What training makes of a layer: its weights whole while it runs, its rows in place, what is kept by name."""

    def wrap(layer):
        def laid(x_BTD, item):
            weights, rest = item
            x_BTD = checkpoint_name(_constrain(x_BTD, mesh, "x_BTD"), LAYER)
            x_BTD, kept = layer(x_BTD, (_gather(weights, mesh), rest))
            return _constrain(x_BTD, mesh, "x_BTD"), kept

        if remat == "none":
            return laid
        policies, kept = jax.checkpoint_policies, [ATTENDED] if remat == "attention" else []
        if offload:
            policy = policies.save_and_offload_only_these_names(
                names_which_can_be_saved=kept,
                names_which_can_be_offloaded=[LAYER],
                offload_src="device",
                offload_dst="pinned_host",
            )
        else:
            policy = policies.save_only_these_names(*kept)
        return jax.checkpoint(laid, policy=policy, prevent_cse=False)

    return wrap


def _constrain(x: jax.Array, mesh: Mesh | None, name: str) -> jax.Array:
    if mesh is None:
        return x
    return lax.with_sharding_constraint(x, NamedSharding(mesh, Strategy(block=1, mesh=mesh).spec(name)))


def _gather(weights: Any, mesh: Mesh | None) -> Any:
    """A layer's weights split over `model` alone."""
    if mesh is None:
        return weights
    home = dict(TRAINED)
    kv_heads = next(x.shape[-2] for path, x in jax.tree.leaves_with_path(weights) if _name(path) == "k_DKH")
    if kv_heads % mesh.shape["model"]:
        home["K"] = None  # each device has all of them
    table = {**home, "D": None}

    def gather(path, x):
        name = _name(path)
        places = (NamedSharding(mesh, spec_of(name, each)) for each in (table, home))
        return _gather_whole(x, *places)

    return jax.tree.map_with_path(gather, weights)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather_whole(x: jax.Array, where: NamedSharding, home: NamedSharding) -> jax.Array:
    """`x` as `where` says; its gradient is brought home at once, so that no device ever holds the whole of it."""
    del home
    return lax.with_sharding_constraint(x, where)


_gather_whole.defvjp(
    lambda x, where, home: (_gather_whole(x, where, home), None),
    lambda where, home, _, gradient: (lax.with_sharding_constraint(gradient, home),),
)


def _name(path: tuple) -> str:
    """Of a parameter: the last key that is a name."""
    words = jax.tree_util.keystr(path, simple=True, separator=".").split(".")
    return next(word for word in reversed(words) if "_" in word)
