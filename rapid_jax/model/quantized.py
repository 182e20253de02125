# SPDX-License-Identifier: Apache-2.0
"""A copy of a decoder whose matrices are stored in 8 or 4 bits: a drafter that reads a half or a quarter of the bytes.

What the copy says is its own distribution q, so verification by the target stays exact. Weights alone are rounded here;
on a GPU the few rows of a decoding step meet them as fixed-point numbers of 15 bits (`skinny.py`). 8 bits: one scale a
column, the largest weight is 127 steps. 4 bits: one scale for every `GROUP` weights of a column, the largest weight is
-8 steps.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, Literal, TypeAlias, cast

import jax
import jax.numpy as jnp
from flax import nnx

from rapid_jax.model import skinny
from rapid_jax.model.decoder import Attend, Block, Decoder
from rapid_jax.model.rope import rotate
from rapid_jax.model.skinny import GROUP, MOST_ROWS, FixedPoint, fixed_point, skinny_matmul
from rapid_jax.runtime.errors import InputError

WeightBits: TypeAlias = Literal[8, 4]
BITS: Mapping[str, WeightBits] = MappingProxyType({"int8": 8, "int4": 4})  # by the names of settings
FEW = 4 * MOST_ROWS  # rows: reading the rounded weights once for every `MOST_ROWS` still beats restoring them


@partial(jax.jit, static_argnames="bits")
def rounded(weight_DN: jax.Array, bits: WeightBits) -> tuple[jax.Array, jax.Array]:
    """(int8 values, float32 scales) as `skinny_matmul` takes them, the depth D padded with zeros to whole groups."""
    w_ND = jnp.pad(weight_DN.astype(jnp.float32).T, ((0, 0), (0, -weight_DN.shape[0] % GROUP)))
    if bits == 8:
        scale_N = jnp.max(jnp.abs(w_ND), axis=1) / 127
        return jnp.round(w_ND / jnp.where(scale_N == 0, 1.0, scale_N)[:, None]).astype(jnp.int8), scale_N
    N, D = w_ND.shape
    w = w_ND.reshape(N, D // GROUP, GROUP)
    lowest, highest = jnp.min(w, axis=2), jnp.max(w, axis=2)
    scale_NG = jnp.where(-lowest > highest, lowest, highest) / -8
    steps = jnp.round(w / jnp.where(scale_NG == 0, 1.0, scale_NG)[..., None])
    halves = jnp.clip(steps, -8, 7).astype(jnp.int8).reshape(N, D // GROUP, 2, GROUP // 2)
    return ((halves[:, :, 0] & 15) | (halves[:, :, 1] << 4)).reshape(N, D // 2), scale_NG.T


def restored(values: jax.Array, scale: jax.Array, bits: WeightBits) -> jax.Array:
    """The float32 [N, D] that `rounded` stored."""
    if bits == 8:
        return values.astype(jnp.float32) * scale[:, None]
    (groups, N), four = scale.shape, jnp.int8(4)
    pairs = values.reshape(N, groups, 1, GROUP // 2)
    low, high = ((pairs << four) >> four, pairs >> four)  # arithmetic shifts: the sign goes along
    steps = jnp.concatenate([low, high], axis=2).reshape(N, groups, GROUP)
    return (steps.astype(jnp.float32) * scale.T[..., None]).reshape(N, groups * GROUP)


class Packed(nnx.Module):
    """A matrix [D, N] in few bits."""

    def __init__(self, weight_DN: jax.Array, bits: WeightBits):
        values, scale = rounded(weight_DN, bits)
        self.values, self.scale = nnx.Param(values), nnx.Param(scale)
        self.bits: WeightBits = bits
        self.depth = weight_DN.shape[0]

    def fits(self, rows: int) -> bool:
        """Whether the kernels take so many rows."""
        return self.depth % GROUP == 0 and skinny.fits(rows, self.depth, self.values.shape[0])

    def times(self, x: FixedPoint) -> jax.Array:
        """float32 [S, T, N], to be summed over S."""
        return skinny_matmul(x, self.values[...], self.scale[...], bits=self.bits)

    def gated(self, x: FixedPoint, dtype: jnp.dtype) -> jax.Array:
        """[T, N / 2], silu of the first half of the columns times the second."""
        return skinny_matmul(x, self.values[...], self.scale[...], bits=self.bits, gated=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., D] times the matrix, float32 [..., N]."""
        x_TD = x.reshape(-1, x.shape[-1])
        if jax.default_backend() == "gpu" and len(x_TD) <= FEW and self.fits(1):
            some = (x_TD[start : start + MOST_ROWS] for start in range(0, len(x_TD), MOST_ROWS))
            out_TN = jnp.concatenate([jnp.sum(self.times(fixed_point(rows)[0]), axis=0) for rows in some])
            return out_TN.reshape(*x.shape[:-1], -1)
        precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
        weight_ND = restored(self.values[...], self.scale[...], self.bits).astype(x.dtype)[:, : self.depth]
        return jnp.einsum("...D,ND->...N", x, weight_ND, precision=precision, preferred_element_type=jnp.float32)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Pending:
    """What a layer gives the next as fixed-point arithmetic leaves it: x and the addends of its last product."""

    x_BTD: jax.Array
    parts_STD: jax.Array  # float32

    def summed(self) -> jax.Array:
        """[B, T, D] in x's dtype."""
        total_TD = jnp.sum(self.parts_STD, axis=0).reshape(self.x_BTD.shape)
        return (self.x_BTD + total_TD).astype(self.x_BTD.dtype)


class QuantizedBlock(Block):
    """One layer of the copy; matrices that read the same input are one."""

    def __init__(self, block: Block, head_dim: int, bits: WeightBits):
        self.norm_eps, self.head_dim = block.norm_eps, head_dim
        self.attention_norm_D, self.mlp_norm_D = block.attention_norm_D, block.mlp_norm_D
        self.q_bias_NH, self.k_bias_KH, self.v_bias_KH = block.q_bias_NH, block.k_bias_KH, block.v_bias_KH
        heads = [weight[...] for weight in (block.q_DNH, block.k_DKH, block.v_DKH)]
        self.kv_heads = heads[1].shape[1]
        self.qkv = Packed(_joined(heads), bits)
        self.o = Packed(block.o_NHD[...].reshape(-1, block.o_NHD.shape[-1]), bits)
        self.gate_up = Packed(_joined([block.gate_DF[...], block.up_DF[...]]), bits)
        self.down = Packed(block.down_FD[...], bits)

    def __call__(self, x: jax.Array | Pending, cos: jax.Array, sin: jax.Array, attend: Attend, layer: Any):  # type: ignore[override]
        """As of any block. A few rows on a GPU stay fixed-point numbers from norm to product: fewer, larger kernels."""
        x_BTD, parts = (x.x_BTD, x.parts_STD) if isinstance(x, Pending) else (x, None)
        B, T, D = x_BTD.shape
        packed = (self.qkv, self.o, self.gate_up, self.down)
        if jax.default_backend() != "gpu" or not all(matrix.fits(B * T) for matrix in packed):
            return super().__call__(x.summed() if isinstance(x, Pending) else x, cos, sin, attend, layer)
        x_TD = x_BTD.reshape(B * T, D)
        fixed, x_TD = fixed_point(x_TD, parts_STD=parts, norm_D=self.attention_norm_D[...], eps=self.norm_eps)
        q_BTNH, k_BTKH, v_BTKH = self.heads(jnp.sum(self.qkv.times(fixed), axis=0).reshape(B, T, -1), x_TD.dtype)
        attended_BTNH, kept = attend(rotate(q_BTNH, cos, sin), rotate(k_BTKH, cos, sin), v_BTKH, layer)
        fixed, _ = fixed_point(attended_BTNH.reshape(B * T, -1))
        parts, norm_D = self.o.times(fixed), self.mlp_norm_D[...]
        fixed, x_TD = fixed_point(x_TD, parts_STD=parts, norm_D=norm_D, eps=self.norm_eps)
        fixed, _ = fixed_point(self.gate_up.gated(fixed, x_TD.dtype))
        return Pending(x_TD.reshape(B, T, D), self.down.times(fixed)), kept

    def heads(self, out: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(q_BTNH, k_BTKH, v_BTKH), not rotated, of what the joined matrix gave."""
        heads = out.astype(dtype).reshape(*out.shape[:-1], -1, self.head_dim)
        parts = jnp.split(heads, [heads.shape[2] - 2 * self.kv_heads, heads.shape[2] - self.kv_heads], axis=2)
        biases = (self.q_bias_NH, self.k_bias_KH, self.v_bias_KH)
        q, k, v = (x if bias is None else x + bias[...] for x, bias in zip(parts, biases, strict=True))
        return q, k, v

    def projected(self, h_BTD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(q_BTNH, k_BTKH, v_BTKH), not rotated."""
        return self.heads(self.qkv(h_BTD), h_BTD.dtype)

    def attention_output(self, attended_BTNH: jax.Array) -> jax.Array:
        """[B, T, D]."""
        return self.o(attended_BTNH.reshape(*attended_BTNH.shape[:2], -1)).astype(attended_BTNH.dtype)

    def mlp(self, h_BTD: jax.Array) -> jax.Array:
        """[B, T, D]."""
        gate, up = jnp.split(self.gate_up(h_BTD).astype(h_BTD.dtype), 2, axis=-1)
        return self.down(jax.nn.silu(gate) * up).astype(h_BTD.dtype)


class QuantizedDecoder(Decoder):
    """The copy. Its norms, and an embedding that is not also the head, are the original's own arrays."""

    def __init__(self, decoder: Decoder, bits: WeightBits):
        self.config, self.layout, self.mesh = decoder.config, "unrolled", None
        self.embed_VD, self.norm_D, self.head_DV = decoder.embed_VD, decoder.norm_D, None
        blocks = cast(Any, decoder.blocks)
        self.blocks = nnx.List([QuantizedBlock(block, decoder.config.head_dim, bits) for block in blocks])
        weight, axes = decoder.head
        self.packed_head = Packed(weight if axes == "DV" else weight.T, bits)

    @property
    def head(self) -> tuple[jax.Array, str]:
        """(what the copy's head stands for, its axes)."""
        packed = self.packed_head
        weight_VD = restored(packed.values[...], packed.scale[...], packed.bits)[:, : packed.depth]
        return weight_VD.astype(self.embed_VD[...].dtype), "VD"

    def final_norm(self, x_BTD: jax.Array | Pending) -> jax.Array:
        """The last layer's output, normalised: what `logits` takes."""
        return super().final_norm(x_BTD.summed() if isinstance(x_BTD, Pending) else x_BTD)

    def logits(self, hidden_BTD: jax.Array) -> jax.Array:
        """float32 [B, T, V]."""
        return self.packed_head(hidden_BTD)


def quantized(decoder: Decoder, bits: WeightBits) -> QuantizedDecoder:
    """The decoder's copy in so many bits, on the same device; the original stays as it is.

    Raises InputError for a decoder on a mesh, in the stacked layout, or quantised already.
    """
    if isinstance(decoder, QuantizedDecoder):
        raise InputError("quantised weights: expected a decoder in full, got one that is quantised already")
    if decoder.mesh is not None or isinstance(decoder.blocks, Block):
        raise InputError("quantised weights: expected one device and layout unrolled, got a mesh or layout stacked")
    return QuantizedDecoder(decoder, bits)


def _joined(weights: list[jax.Array]) -> jax.Array:
    """Matrices that read the same input side by side, [D, N]."""
    return jnp.concatenate([weight.reshape(weight.shape[0], -1) for weight in weights], axis=1)
