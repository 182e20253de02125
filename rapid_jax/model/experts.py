# SPDX-License-Identifier: Apache-2.0
"""A mixture of experts (arXiv 1701.06538): each token through the few MLPs that its router chooses, and no other.

Every token has its experts, whoever else is there: there is no capacity, and nothing is dropped. On a mesh an expert
lies as an MLP does, its width split over `model`: each device has a part of every expert, and what they give is summed.
Tokens stay on the devices that have them.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from rapid_jax.attention.kernels import platform_of
from rapid_jax.model.einsum32 import einsum32
from rapid_jax.model.experts_config import Experts
from rapid_jax.model.grouped import FEW_ROWS, Grouping, grouped_product
from rapid_jax.model.quantized import WeightBits


class Grouped(NamedTuple):
    """A matrix of every expert, as `grouped_product` takes it."""

    values: jax.Array
    scale: jax.Array | None = None


def route(h_TD: jax.Array, router_DX: jax.Array, experts: Experts) -> tuple[jax.Array, jax.Array]:
    """(weights float32 [T, K], experts int32 [T, K]) of each token: the K largest of a softmax over all experts.

    `normalized`: those weights over their sum, which is the softmax of the K largest alone.
    """
    probabilities_TX = jax.nn.softmax(einsum32("TD,DX->TX", h_TD, router_DX))
    weights_TK, ids_TK = lax.top_k(probabilities_TX, experts.per_token)
    if experts.normalized:
        weights_TK = weights_TK / jnp.sum(weights_TK, axis=-1, keepdims=True)
    return weights_TK, ids_TK


def mixture(
    h_BTD: jax.Array,
    router_DX: jax.Array,
    gate: Grouped,
    up: Grouped,
    down: Grouped,
    *,
    experts: Experts,
    bits: WeightBits | None = None,
    mesh: Mesh | None = None,
) -> jax.Array:
    """[B, T, D]: sum over a token's experts of weight * down(silu(gate h) * up h), in float32 until the end.

    `gate` and `up` are [X, D, F], `down` is [X, F, D], or each in few bits as `quantize_weights` gives it.
    """
    platform = platform_of(mesh)

    def local(h_BTD: jax.Array, router_DX: jax.Array, *matrices: Grouped) -> jax.Array:
        rows_TD = h_BTD.reshape(-1, h_BTD.shape[-1])
        out_TD = routed(rows_TD, router_DX, *matrices, experts=experts, bits=bits, platform=platform)
        if mesh is not None and mesh.shape["model"] > 1:
            out_TD = lax.psum(out_TD, "model")
        return out_TD.astype(h_BTD.dtype).reshape(h_BTD.shape)

    if mesh is None:
        return local(h_BTD, router_DX, gate, up, down)
    rows = _rows_over(mesh, *h_BTD.shape[:2])
    columns = _spec(gate, 2 if bits is None else 1, None if bits is None else 2 if bits == 4 else 1)
    depth = _spec(down, 1 if bits is None else 2, 1 if bits == 4 else None)
    given = rows, PartitionSpec(), columns, columns, depth
    return jax.shard_map(local, mesh=mesh, in_specs=given, out_specs=rows, check_vma=False)(
        h_BTD, router_DX, gate, up, down
    )


@partial(jax.jit, static_argnames=("experts", "bits", "platform"))
def routed(
    h_TD: jax.Array,
    router_DX: jax.Array,
    gate: Grouped,
    up: Grouped,
    down: Grouped,
    *,
    experts: Experts,
    bits: WeightBits | None,
    platform: str,
) -> jax.Array:
    """`mixture` of one device's rows, float32 [T, D]."""
    rows = h_TD.shape[0] * experts.per_token
    how = Grouping.of(platform, rows, experts.count)
    weights_TK, ids_TK = route(h_TD, router_DX, experts)
    order_P = jnp.argsort(ids_TK.reshape(-1), stable=True)  # the (token, expert) pairs, by expert
    place_TK = jnp.zeros(rows, jnp.int32).at[order_P].set(jnp.arange(rows, dtype=jnp.int32)).reshape(ids_TK.shape)
    sizes_X = jnp.bincount(ids_TK.reshape(-1), length=experts.count).astype(jnp.int32)
    token_P = jnp.pad(order_P // experts.per_token, (0, how.padded(rows) - rows))
    times = partial(grouped_product, sizes_X=sizes_X, how=how, bits=bits)
    x_PD = _spread(h_TD, token_P, place_TK)
    gate_PF, up_PF = (times(x_PD, values=one.values, scale=one.scale, dtype=h_TD.dtype) for one in (gate, up))
    gated_PF = jax.nn.silu(gate_PF) * up_PF
    out_PD = times(gated_PF, values=down.values, scale=down.scale, dtype=jnp.float32)
    return jnp.sum(out_PD[place_TK] * weights_TK[..., None], axis=1)


@jax.custom_vjp
def _spread(h_TD: jax.Array, token_P: jax.Array, place_TK: jax.Array) -> jax.Array:
    """h_TD[token_P]; the gradient of a token is the float32 sum of those at its places, and takes no junk."""
    return h_TD[token_P]


_spread.defvjp(
    lambda h_TD, token_P, place_TK: (h_TD[token_P], place_TK),
    lambda place_TK, gradient_PD: (
        jnp.sum(gradient_PD[place_TK].astype(jnp.float32), axis=1).astype(gradient_PD.dtype),
        None,
        None,
    ),
)


def _rows_over(mesh: Mesh, batch: int, time: int) -> PartitionSpec:
    """How tokens [B, T, D] lie: the few of a decoding round are whole along `context`, as in attention."""
    over_B: Any = next((axes for axes in (("data", "fsdp"), "data") if batch % _size(mesh, axes) == 0), None)
    many = time % mesh.shape["context"] == 0 and time // mesh.shape["context"] >= FEW_ROWS
    return PartitionSpec(over_B, "context" if many else None, None)


def _size(mesh: Mesh, axes: Any) -> int:
    return mesh.shape[axes] if isinstance(axes, str) else mesh.shape["data"] * mesh.shape["fsdp"]


def _spec(of: Grouped, values_axis: int, scale_axis: int | None) -> Grouped:
    """Of arrays of which this axis is split over `model`."""

    def split(ndim: int, axis: int | None) -> PartitionSpec:
        return PartitionSpec(*("model" if at == axis else None for at in range(ndim)))

    scale: Any = None if of.scale is None else split(of.scale.ndim, scale_axis)
    return Grouped(split(of.values.ndim, values_axis), scale)  # type: ignore[arg-type]
