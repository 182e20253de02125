# SPDX-License-Identifier: Apache-2.0
"""A decoder with its matrices as decoding reads them, and its copies in few bits.

Matrices that read the same input are one: q, k and v, and gate and up. All have two axes, and the columns of the head
are padded to whole tiles of every device: a TPU otherwise copies q, k, v and the head at each call. On a mesh each
device has its own parts side by side, so the order of columns is not the checkpoint's: what is trained, saved and
exported is a `Decoder`, and this is made of it.

What a copy in few bits says is its own distribution q, so verification by the target stays exact.
"""

from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from rapid_jax.attention.kernels import platform_of
from rapid_jax.model.decoder import Block, Decoder
from rapid_jax.model.fused_decoder import FusedBlock, FusedDecoder, Heads
from rapid_jax.model.matrix import MODEL, Matrix, Place, in_bits, made
from rapid_jax.model.quantized import WeightBits
from rapid_jax.runtime.axes import MeshAxes
from rapid_jax.runtime.errors import InputError

LANES = 128  # columns of a tile


def fuse(decoder: Decoder, *, spent: bool = False) -> FusedDecoder:
    """The decoder as decoding reads it. `spent`: the given one's matrices are deleted as soon as they are joined.

    One layer is joined after the other, or all at once where they are one array.

    Shapes in the place of arrays give shapes.
    """
    if isinstance(decoder, FusedDecoder):
        return decoder
    make = partial(_fused_block, decoder, spent=spent)
    blocks = make(decoder.blocks) if isinstance(decoder.blocks, Block) else nnx.List(map(make, decoder.blocks))
    return FusedDecoder(decoder, blocks, _head(decoder, spent))


def quantize(decoder: Decoder, bits: WeightBits) -> FusedDecoder:
    """The decoder's copy in so many bits, on the same devices; the original stays as it is.

    Raises InputError for a decoder that is quantised already, and for 4 bits on a TPU or over devices.
    """
    if bits == 4 and (Place(decoder.mesh).parts > 1 or platform_of(decoder.mesh) == "tpu"):
        raise InputError("weights in 4 bits are for one device that is no TPU: expected 8 bits")
    if decoder.bits is not None:
        raise InputError("quantised weights: expected a decoder in full, got one that is quantised already")
    whole = fuse(decoder)
    if isinstance(whole.blocks, Block):
        blocks: Any = cast(FusedBlock, whole.blocks).in_bits(bits)
    else:
        blocks = nnx.List([cast(FusedBlock, block).in_bits(bits) for block in whole.blocks])
    if whole.lm_head is not None:
        return FusedDecoder(whole, blocks, whole.lm_head.in_bits(bits))
    place = Place(whole.mesh, other=_split(whole.embed_VD.get_value(), 1))
    return FusedDecoder(whole, blocks, in_bits(whole.embed_VD.get_value(), "JD", bits, place))


def _fused_block(decoder: Decoder, block: Block, *, spent: bool) -> FusedBlock:
    mesh, config, stack = decoder.mesh, decoder.config, (None,) * (block.mlp_norm_D.get_value().ndim - 1)
    mlp: Any = (block.gate_DF, block.up_DF, block.down_FD)
    if block.experts is not None:
        mlp = (block.gate_XDF, block.up_XDF, block.down_XFD)
    q, k, v, o, gate, up, down = (
        weight.get_value() for weight in (block.q_DNH, block.k_DKH, block.v_DKH, block.o_NHD, *mlp)
    )
    columns, depth = Place(mesh, "columns", _split(gate, -2)), Place(mesh, "depth", _split(down, -1))
    parts = columns.parts
    copied = parts > 1 and _split(k, -2) is None
    kv = config.num_kv_heads if copied else config.num_kv_heads // parts
    how = Heads(config.num_heads // parts, kv, config.head_dim, columns, copied, bool(stack))
    beside = columns.sharding(*stack, *columns.spec)
    join = partial(_side_by_side, lead=len(stack) + 1, place=columns)
    lanes = 1 if mesh is None else LANES
    lead = stack if block.experts is None else (*stack, None)
    narrow = down.shape[-2] // parts % lanes
    if narrow:
        deepened = partial(_deepen, lanes=lanes, place=depth)
        down = _made(deepened, depth.sharding(*lead, *depth.spec), down, spent=spent)
    if block.experts is None:
        mlp = (Matrix(_made(partial(join, lanes=lanes), beside, gate, up, spent=spent), place=columns),)
    else:  # an expert's gate and up are read one behind the other
        if narrow:
            wide = partial(_side_by_side, lead=len(lead) + 1, place=columns, lanes=lanes)
            where = columns.sharding(*lead, *columns.spec)
            gate, up = (_made(wide, where, one, spent=spent) for one in (gate, up))
        mlp = Matrix(gate, place=columns), Matrix(up, place=columns)
    bias = None
    if block.q_bias_NH is not None:
        assert block.k_bias_KH is not None and block.v_bias_KH is not None
        biases = (bias.get_value() for bias in (block.q_bias_NH, block.k_bias_KH, block.v_bias_KH))
        along = partial(_side_by_side, lead=len(stack), place=columns, copied=copied)
        bias = made(along, columns.sharding(*stack, MODEL), *biases)
    return FusedBlock(
        block,
        Matrix(_made(partial(join, copied=copied), beside, q, k, v, spent=spent), place=columns),
        bias,
        Matrix(_made(_flat, depth.sharding(*stack, *depth.spec), o, spent=spent), place=depth),
        (*mlp, Matrix(down, place=depth)),
        how,
    )


def _head(decoder: Decoder, spent: bool) -> Matrix | None:
    """The head, its columns padded; None where it is the embedding."""
    if decoder.head_DV is None:
        return None
    head = decoder.head_DV.get_value()
    place = Place(decoder.mesh, other=_split(head, 0))
    lanes = 1 if place.parts == 1 else place.parts * LANES
    if head.shape[1] % lanes:
        head = _made(partial(_fill, axis=1, lanes=lanes), place.sharding(*place.spec), head, spent=spent)
    return Matrix(head, place=place)


def _split(array: Any, axis: int) -> MeshAxes:
    """What an axis of an array is split over; None for one that is whole."""
    if not isinstance(array.sharding, NamedSharding):
        return None
    spec, mesh = array.sharding.spec, array.sharding.mesh
    entry = (*spec, *(None,) * (array.ndim - len(spec)))[axis]
    some = tuple(name for name in ((entry,) if isinstance(entry, str) else entry or ()) if mesh.shape[name] > 1)
    return some[0] if len(some) == 1 else some or None


def _made(function: Any, sharding: Any, *arrays: Any, spent: bool) -> Any:
    """What a program makes of arrays, which are deleted then if `spent`."""
    found = made(function, sharding, *arrays)
    if spent and not isinstance(found, jax.ShapeDtypeStruct):
        jax.block_until_ready(found)
        for array in arrays:
            array.delete()
    return found


@partial(jax.jit, static_argnames=("lead", "place", "copied", "lanes"))
def _side_by_side(*parts: jax.Array, lead: int, place: Place, copied: bool = False, lanes: int = 1) -> jax.Array:
    """Arrays side by side along all axes behind the `lead` first, which are one then; on a mesh each device's own.

    `copied`: all but the first are whole on every device. `lanes`: each is filled up with zeros to so many columns.
    """

    def local(*parts: jax.Array) -> jax.Array:
        flat = (part.reshape(*part.shape[:lead], -1) for part in parts)
        return jnp.concatenate([_fill(part, axis=lead, lanes=lanes) for part in flat], axis=lead)

    own = PartitionSpec(*(None,) * lead, MODEL)
    given = tuple(PartitionSpec() if copied and at else own for at in range(len(parts)))
    return place.per_device(local, given, own)(*parts)


@partial(jax.jit, static_argnames=("lanes", "place"))
def _deepen(down_FD: jax.Array, lanes: int, place: Place) -> jax.Array:
    """With zeros for the columns that gate and up were filled up with."""
    axis = down_FD.ndim - 2
    own = PartitionSpec(*(None,) * axis, MODEL)
    return place.per_device(partial(_fill, axis=axis, lanes=lanes), (own,), own)(down_FD)


@partial(jax.jit, static_argnames=("axis", "lanes"))
def _fill(array: jax.Array, axis: int, lanes: int) -> jax.Array:
    """An axis with zeros up to a multiple of `lanes`."""
    lacking = [(0, 0)] * array.ndim
    lacking[axis] = (0, -array.shape[axis] % lanes)
    return jnp.pad(array, lacking)


@jax.jit
def _flat(o_NHD: jax.Array) -> jax.Array:
    """Heads and what is in them as one axis."""
    return o_NHD.reshape(*o_NHD.shape[:-3], -1, o_NHD.shape[-1])
