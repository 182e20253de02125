# SPDX-License-Identifier: Apache-2.0
"""A decoder whose matrices lie as decoding reads them, in full or in few bits: `fused.py` makes it."""

from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec

from rapid_jax.model.decoder import Attend, Block, Decoder, activate
from rapid_jax.model.experts import Grouped
from rapid_jax.model.matrix import MODEL, Matrix, Place, sum_over_model, times
from rapid_jax.model.quantized import WeightBits, dequantize, kernels_fit
from rapid_jax.model.skinny import FixedPoint, fixed_point, skinny_matmul


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


@dataclass(frozen=True)
class Heads:
    """The columns of q, k and v on a device, one behind the other."""

    query: int
    kv: int
    dim: int
    place: Place
    copied: bool  # k and v are whole on every device
    stacked: bool  # the block is of all layers: what one gives the next is an array

    def split(self, qkv_BTJ: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(q_BTNH, k_BTKH, v_BTKH)."""

        def local(qkv_BTJ: jax.Array) -> tuple[jax.Array, ...]:
            heads = qkv_BTJ.reshape(*qkv_BTJ.shape[:2], -1, self.dim)
            return tuple(jnp.split(heads, [self.query, self.query + self.kv], axis=2))

        own = PartitionSpec(None, None, MODEL)
        kv = PartitionSpec() if self.copied else own
        return self.place.per_device(local, (own,), (own, kv, kv))(qkv_BTJ)


class FusedBlock(Block):
    """One layer, or all of a stack."""

    def __init__(
        self,
        block: Block,
        qkv: Matrix,
        qkv_bias: Any,
        out: Matrix,
        mlp: tuple[Matrix, Matrix] | tuple[Matrix, Matrix, Matrix],
        how: Heads,
    ):
        self.norm_eps, self.norm_offset, self.mesh, self.how = block.norm_eps, block.norm_offset, block.mesh, how
        self.activation, self.query_scale, self.experts = block.activation, block.query_scale, block.experts
        self.attention_norm_D, self.mlp_norm_D = block.attention_norm_D, block.mlp_norm_D
        self.attention_post_norm_D, self.mlp_post_norm_D = block.attention_post_norm_D, block.mlp_post_norm_D
        self.q_norm_H, self.k_norm_H = block.q_norm_H, block.k_norm_H
        self.qkv, self.out = qkv, out
        self.router_DX: Any = block.router_DX
        if len(mlp) == 2:
            self.gate_up, self.down = mlp
        else:
            self.gate_XDF, self.up_XDF, self.down_XFD = mlp
        self.qkv_bias_J = None if qkv_bias is None else nnx.Param(qkv_bias)

    def __call__(self, x: jax.Array | Pending, cos: jax.Array, sin: jax.Array, attend: Attend, layer: Any):  # type: ignore[override]
        """As of any block. A few rows of a copy in few bits stay fixed-point numbers on a GPU from norm to product:
        fewer, larger kernels.
        """
        x_BTD, parts = (x.x_BTD, x.parts_STD) if isinstance(x, Pending) else (x, None)
        B, T, D = x_BTD.shape
        if not self._runs_in_kernels(B * T, D):
            return super().__call__(x.summed() if isinstance(x, Pending) else x, cos, sin, attend, layer)
        x_TD = x_BTD.reshape(B * T, D)
        norm = partial(fixed_point, eps=self.norm_eps, offset=self.norm_offset)
        fixed, x_TD = norm(x_TD, parts_STD=parts, norm_D=self.attention_norm_D[...])
        qkv_BTJ = jnp.sum(_times(self.qkv, fixed), axis=0).reshape(B, T, -1).astype(x_TD.dtype)
        q_BTNH, k_BTKH, v_BTKH = self._heads(qkv_BTJ)
        attended_BTNH, kept = attend(*self.compared(q_BTNH, k_BTKH, cos, sin), v_BTKH, layer)
        fixed, _ = fixed_point(attended_BTNH.reshape(B * T, -1))
        x_TD, parts = self._added(x_TD, _times(self.out, fixed), self.attention_post_norm_D)
        fixed, x_TD = norm(x_TD, parts_STD=parts, norm_D=self.mlp_norm_D[...])
        fixed, _ = fixed_point(_times(self.gate_up, fixed, gated=x_TD.dtype, activation=self.activation))
        x_TD, parts = self._added(x_TD, _times(self.down, fixed), self.mlp_post_norm_D)
        if parts is None:
            return x_TD.reshape(B, T, D), kept
        out = Pending(x_TD.reshape(B, T, D), parts)
        return out.summed() if self.how.stacked else out, kept

    def _added(self, x_TD: jax.Array, parts_STD: jax.Array, norm: nnx.Param | None):
        """(x, what is still to be added to it): nothing where the sum of the addends is normalised first."""
        if norm is None:
            return x_TD, parts_STD
        return x_TD + self.normed(jnp.sum(parts_STD, axis=0).astype(x_TD.dtype), norm), None

    def _runs_in_kernels(self, rows: int, depth: int) -> bool:
        if jax.default_backend() != "gpu" or self.qkv.bits is None or self.how.place.mesh is not None:
            return False
        if self.experts is not None:
            return False
        heads, ffn = self.how.query * self.how.dim, self.gate_up.columns // 2
        deep = (self.qkv, depth), (self.out, heads), (self.gate_up, depth), (self.down, ffn)
        return all(kernels_fit(rows, depth, matrix.values[...]) for matrix, depth in deep)

    def _heads(self, qkv_BTJ: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        return self.how.split(qkv_BTJ if self.qkv_bias_J is None else qkv_BTJ + self.qkv_bias_J[...])

    @property
    def _mlp(self) -> tuple[Any, ...]:
        return (self.gate_up, self.down) if self.experts is None else (self.gate_XDF, self.up_XDF, self.down_XFD)

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        """All of them; of a mixture the last three are of every expert."""
        return self.qkv, self.out, *self._mlp

    def project_qkv(self, h_BTD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(q_BTNH, k_BTKH, v_BTKH), neither normalised nor rotated."""
        return self._heads(self.qkv(h_BTD))

    def attention_output(self, attended_BTNH: jax.Array) -> jax.Array:
        """[B, T, D]."""
        return self.out(attended_BTNH.reshape(*attended_BTNH.shape[:2], -1))

    def mlp(self, h_BTD: jax.Array) -> jax.Array:
        """[B, T, D]."""
        if self.experts is not None:
            three = (Grouped(w.values[...], None if w.scale is None else w.scale[...]) for w in self._mlp)
            return self.routed(h_BTD, *three, bits=self._mlp[0].bits)

        def gated(both_BTJ: jax.Array) -> jax.Array:
            gate_BTF, up_BTF = jnp.split(both_BTJ, 2, axis=-1)
            return activate(gate_BTF, self.activation) * up_BTF

        own = PartitionSpec(None, None, MODEL)
        return self.down(self.how.place.per_device(gated, (own,), own)(self.gate_up(h_BTD)))

    def part_at(self, name: str, column: int) -> str:
        """The parameter of a `Block` that a column of this block's array of that name came from."""
        if name.startswith("qkv"):
            heads = column // self.how.dim % (self.how.query + 2 * self.how.kv)
            which = "q" if heads < self.how.query else "k" if heads < self.how.query + self.how.kv else "v"
            letters = "NH" if which == "q" else "KH"
            return f"{which}_bias_{letters}" if "bias" in name else f"{which}_D{letters}"
        if name == "gate_up":
            width = self.gate_up.columns // self.how.place.parts
            return "gate_DF" if column % width < width // 2 else "up_DF"
        return {"out": "o_NHD", "down": "down_FD"}.get(name, name)

    def in_bits(self, bits: WeightBits) -> "FusedBlock":
        """Its copy in so many bits; norms and biases are its own arrays."""
        qkv, out, *mlp = (matrix.in_bits(bits) for matrix in self.matrices)
        bias = None if self.qkv_bias_J is None else self.qkv_bias_J.get_value()
        return FusedBlock(self, qkv, bias, out, cast(Any, tuple(mlp)), self.how)


def _times(matrix: Matrix, x: FixedPoint, **how: Any) -> jax.Array:
    """float32 [S, T, J], to be summed over S; `gated`: [T, J / 2], as `skinny_matmul` says."""
    assert matrix.bits is not None and matrix.scale is not None
    return skinny_matmul(x, matrix.values[...], matrix.scale[...], bits=matrix.bits, **how)


class FusedDecoder(Decoder):
    """The decoder. Its norms and its embedding are the original's own arrays."""

    def __init__(self, decoder: Decoder, blocks: Any, lm_head: Matrix | None):
        self.config, self.layout, self.mesh = decoder.config, decoder.layout, decoder.mesh
        self.embed_VD, self.norm_D, self.head_DV = decoder.embed_VD, decoder.norm_D, None
        self.blocks = blocks
        self.lm_head = lm_head  # None: the embedding, in full

    @property
    def _every(self) -> list[FusedBlock]:
        blocks: Any = self.blocks
        return [blocks] if isinstance(blocks, FusedBlock) else list(blocks)

    def part_at(self, name: str, column: int) -> str:
        """The parameter of a `Decoder` that a column of an array came from."""
        return "head_DV" if name == "lm_head" else self._every[0].part_at(name, column)

    @property
    def bits(self) -> WeightBits | None:
        """Of its weights; None: in full."""
        return self._every[0].qkv.bits

    @property
    def matrices(self) -> list[Matrix]:
        """Those of the layers, and the head where it is not the embedding."""
        found = [x for block in self._every for x in block.matrices]
        return found if self.lm_head is None else [*found, self.lm_head]

    @property
    def vocabulary(self) -> int:
        """Logits of a token; those behind the model's own vocabulary are -inf."""
        return self.config.vocab_size if self.lm_head is None else self.lm_head.columns

    def embed(self, tokens_BT: jax.Array) -> jax.Array:
        """[B, T, D], of ids in range. Over devices along `model`, in a program, each looks up what it has: XLA for GPUs
        gathers the whole embedding.
        """
        place = Place(self.mesh)
        if place.parts == 1:
            return super().embed(tokens_BT)

        def local(embed_VD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
            at_BT = tokens_BT - lax.axis_index(MODEL) * embed_VD.shape[0]
            own_BT = (at_BT >= 0) & (at_BT < embed_VD.shape[0])
            x_BTD = jnp.where(own_BT[..., None], embed_VD[jnp.where(own_BT, at_BT, 0)], 0)
            return sum_over_model(x_BTD, x_BTD.dtype, self.mesh)

        given = PartitionSpec(MODEL, None), PartitionSpec()
        return self.scaled(place.per_device(local, given, PartitionSpec())(self.embed_VD[...], tokens_BT))

    @property
    def head(self) -> tuple[jax.Array, str]:
        """(the weights that make logits of hidden states, their axes)."""
        head = self.lm_head
        if head is None or head.bits is None:
            return super().head if head is None else (head.values[...], "DV")
        assert head.scale is not None
        weight_VD = dequantize(head.values[...], head.scale[...], head.bits)[:, : self.config.hidden_size]
        return weight_VD.astype(self.embed_VD[...].dtype), "VD"

    def final_norm(self, x_BTD: jax.Array | Pending) -> jax.Array:
        """The last layer's output, normalised: what `logits` takes."""
        return super().final_norm(x_BTD.summed() if isinstance(x_BTD, Pending) else x_BTD)

    def logits(self, hidden_BTD: jax.Array) -> jax.Array:
        """float32 [B, T, vocabulary]."""
        if self.lm_head is None:
            return times(hidden_BTD, self.embed_VD[...], "JD")
        logits_BTV = self.lm_head(hidden_BTD, jnp.float32)
        if self.vocabulary == self.config.vocab_size:
            return logits_BTV
        index_V = jnp.arange(self.vocabulary)
        return jnp.where(index_V < self.config.vocab_size, logits_BTV, -jnp.inf)
