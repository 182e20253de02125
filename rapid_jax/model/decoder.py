# SPDX-License-Identifier: Apache-2.0
"""A Llama-like decoder in Flax NNX: parameters only. What attends to what is an argument.

One definition, two layouts of the same weights. `stacked`: every layer's weights in one array with a leading layer
axis, run by `lax.scan`; the compiled program does not grow with depth (training, prefill on a pod). `unrolled`: one
array a layer, run by a Python loop; a decoding step then reads each weight once, where a scan on a GPU or a CPU first
copies the layer out of the stack.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from rapid_jax.model.config import ModelConfig
from rapid_jax.model.einsum32 import einsum32
from rapid_jax.model.experts import Grouped, mixture
from rapid_jax.model.families import Activation
from rapid_jax.model.layer_kinds import LayerKind
from rapid_jax.model.quantized import WeightBits
from rapid_jax.model.rope import Rotation, chosen, inverse_frequencies, rotate, rotation, standstill
from rapid_jax.model.rope_config import Rope
from rapid_jax.runtime.errors import InputError

Layout: TypeAlias = Literal["stacked", "unrolled"]
# (q_BTNH, k_BTKH, v_BTKH, layer) -> (out_BTNH, kept): `layer` is this layer's slice of what the caller passed, `kept`
# whatever the caller wants back of it. q and k are already rotated. For a layer with a window also `window=`: how many
# positions a query sees, its own the last; an int32 scalar in the stacked layout.
Attend: TypeAlias = Callable[..., tuple[jax.Array, Any]]
# A stacked layer's (x_BTD, (its weights, the rest)) -> (x_BTD, kept), and one that does the same otherwise.
Wrap: TypeAlias = Callable[[Callable[..., Any]], Callable[..., Any]]


NO_WINDOW = 2**30  # positions: more than any sequence has, and a difference of two is an int32


def with_window(attend: Attend, window: int | jax.Array | None) -> Attend:
    """`attend` for a layer with this window, or with none."""
    return attend if window is None else partial(attend, window=window)


def _parameter(rngs: nnx.Rngs, shape: tuple[int, ...], fan_in: int, dtype: jnp.dtype) -> nnx.Param:
    return nnx.Param((jax.random.normal(rngs.params(), shape, jnp.float32) * fan_in**-0.5).astype(dtype))


def rms_norm(x: jax.Array, weight_D: jax.Array, eps: float, offset: float = 0.0) -> jax.Array:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis; statistics in float32, result in x's dtype.

    With an `offset` the factor is the weight and that, and nothing is rounded before. Where the mean overflows the
    result is NaN: zero, which the equation would give, passes for an answer.
    """
    x32 = x.astype(jnp.float32)
    mean = jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps
    normed = x32 * jnp.where(jnp.isinf(mean), jnp.nan, jax.lax.rsqrt(mean))
    if offset:
        return (normed * (weight_D.astype(jnp.float32) + offset)).astype(x.dtype)
    return weight_D * normed.astype(x.dtype)


def activate(gate: jax.Array, activation: Activation) -> jax.Array:
    """The MLP's gate after its activation, in its dtype: silu as it is, gelu (its tanh form) computed in float32."""
    if activation == "silu":
        return jax.nn.silu(gate)
    return jax.nn.gelu(gate.astype(jnp.float32), approximate=True).astype(gate.dtype)


def _project(spec: str, x: jax.Array, weight: jax.Array, bias: nnx.Param | None = None) -> jax.Array:
    out = einsum32(spec, x, weight).astype(x.dtype)
    return out if bias is None else out + bias[...]


class Block(nnx.Module):
    """One layer, or with `stack=(L,)` all L of them, each array with a leading layer axis."""

    def __init__(
        self,
        config: ModelConfig,
        kind: LayerKind,
        *,
        stack: tuple[int, ...],
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
        mesh: Mesh | None = None,
    ):
        D, F, H = config.hidden_size, config.intermediate_size, config.head_dim
        N, K = config.num_heads, config.num_kv_heads
        self.norm_eps, self.norm_offset, self.mesh = config.norm_eps, config.norm_offset, mesh
        self.activation: Activation = config.activation
        self.query_scale = config.query_scale

        def norm(size: int) -> nnx.Param:
            return nnx.Param(jnp.full((*stack, size), 1 - config.norm_offset, dtype))

        self.attention_norm_D = norm(D)
        self.q_DNH = _parameter(rngs, (*stack, D, N, H), D, dtype)
        self.k_DKH = _parameter(rngs, (*stack, D, K, H), D, dtype)
        self.v_DKH = _parameter(rngs, (*stack, D, K, H), D, dtype)
        self.o_NHD = _parameter(rngs, (*stack, N, H, D), N * H, dtype)
        self.q_bias_NH = nnx.Param(jnp.zeros((*stack, N, H), dtype)) if config.qkv_bias else None
        self.k_bias_KH = nnx.Param(jnp.zeros((*stack, K, H), dtype)) if config.qkv_bias else None
        self.v_bias_KH = nnx.Param(jnp.zeros((*stack, K, H), dtype)) if config.qkv_bias else None
        self.q_norm_H = norm(H) if config.qk_norm else None
        self.k_norm_H = norm(H) if config.qk_norm else None
        self.attention_post_norm_D = norm(D) if config.post_norms else None
        self.mlp_norm_D = norm(D)
        self.experts = config.experts if kind.experts else None
        mlp = self.experts is None
        self.gate_DF: Any = _parameter(rngs, (*stack, D, F), D, dtype) if mlp else None
        self.up_DF: Any = _parameter(rngs, (*stack, D, F), D, dtype) if mlp else None
        self.down_FD: Any = _parameter(rngs, (*stack, F, D), F, dtype) if mlp else None
        X, F = (0, 0) if self.experts is None else (self.experts.count, self.experts.ffn)
        self.router_DX = None if mlp else _parameter(rngs, (*stack, D, X), D, dtype)
        self.gate_XDF: Any = None if mlp else _parameter(rngs, (*stack, X, D, F), D, dtype)
        self.up_XDF: Any = None if mlp else _parameter(rngs, (*stack, X, D, F), D, dtype)
        self.down_XFD: Any = None if mlp else _parameter(rngs, (*stack, X, F, D), F, dtype)
        self.mlp_post_norm_D = norm(D) if config.post_norms else None

    def __call__(self, x_BTD: jax.Array, cos: jax.Array, sin: jax.Array, attend: Attend, layer: Any):
        """(x after this layer, what `attend` kept)."""
        q_BTNH, k_BTKH, v_BTKH = self.project_qkv(self.normed(x_BTD, self.attention_norm_D))
        attended_BTNH, kept = attend(*self.compared(q_BTNH, k_BTKH, cos, sin), v_BTKH, layer)
        x_BTD = x_BTD + self.normed(self.attention_output(attended_BTNH), self.attention_post_norm_D)
        return x_BTD + self.normed(self.mlp(self.normed(x_BTD, self.mlp_norm_D)), self.mlp_post_norm_D), kept

    def normed(self, x: jax.Array, norm: nnx.Param | None) -> jax.Array:
        """x after one of the layer's norms; as it is where the model has none there."""
        return x if norm is None else rms_norm(x, norm[...], self.norm_eps, self.norm_offset)

    def project_qkv(self, h_BTD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(q_BTNH, k_BTKH, v_BTKH), neither normalised nor rotated."""
        return (
            _project("BTD,DNH->BTNH", h_BTD, self.q_DNH[...], self.q_bias_NH),
            _project("BTD,DKH->BTKH", h_BTD, self.k_DKH[...], self.k_bias_KH),
            _project("BTD,DKH->BTKH", h_BTD, self.v_DKH[...], self.v_bias_KH),
        )

    def compared(self, q_BTNH: jax.Array, k_BTKH: jax.Array, cos: jax.Array, sin: jax.Array):
        """(q, k) as attention compares them: each head normalised where the model has norms for that, and rotated.

        Where the model's scores are not divided by the root of a head's size, q makes up for it.
        """
        q_BTNH, k_BTKH = self.normed(q_BTNH, self.q_norm_H), self.normed(k_BTKH, self.k_norm_H)
        return rotate(q_BTNH, cos, sin, self.query_scale), rotate(k_BTKH, cos, sin)

    def attention_output(self, attended_BTNH: jax.Array) -> jax.Array:
        """[B, T, D]."""
        return _project("BTNH,NHD->BTD", attended_BTNH, self.o_NHD[...])

    def mlp(self, h_BTD: jax.Array) -> jax.Array:
        """[B, T, D]."""
        if self.experts is not None:
            return self.routed(h_BTD, *(Grouped(w[...]) for w in (self.gate_XDF, self.up_XDF, self.down_XFD)))
        gated = _project("BTD,DF->BTF", h_BTD, self.gate_DF[...])
        gated = activate(gated, self.activation) * _project("BTD,DF->BTF", h_BTD, self.up_DF[...])
        return _project("BTF,FD->BTD", gated, self.down_FD[...])

    def routed(self, h_BTD: jax.Array, *matrices: Grouped, bits: WeightBits | None = None) -> jax.Array:
        """[B, T, D] of the experts, whose gates, ups and downs are these."""
        assert self.experts is not None and self.router_DX is not None
        how = {"experts": self.experts, "bits": bits, "mesh": self.mesh}
        return mixture(h_BTD, self.router_DX[...], *matrices, **how)


def _rows(embed_VD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
    """embed_VD[tokens_BT], whose gradient is summed in float32.

    A common token occurs thousands of times in a document: in bfloat16 a sum stops growing at 256 equal addends.
    """
    shape, dtype = embed_VD.shape, embed_VD.dtype

    @jax.custom_vjp
    def rows(embed_VD, tokens_BT):
        return embed_VD[tokens_BT]

    def backward(tokens_BT, gradient_BTD):
        total_VD = jnp.zeros(shape, jnp.float32).at[tokens_BT].add(gradient_BTD.astype(jnp.float32))
        return total_VD.astype(dtype), None

    rows.defvjp(lambda embed_VD, tokens_BT: (embed_VD[tokens_BT], tokens_BT), backward)
    return rows(embed_VD, tokens_BT)


class Decoder(nnx.Module):
    """Token ids to hidden states to logits."""

    def __init__(
        self, config: ModelConfig, *, layout: Layout, dtype: jnp.dtype, rngs: nnx.Rngs, mesh: Mesh | None = None
    ):
        self.config = config
        self.layout = layout
        self.mesh = mesh  # that the parameters lie on; None: one device
        V, D = config.vocab_size, config.hidden_size
        self.embed_VD = nnx.Param(jax.random.normal(rngs.params(), (V, D), jnp.float32).astype(dtype) * 0.02)
        kinds = [config.kinds[kind] for kind in config.kind_of]
        make = partial(Block, config, dtype=dtype, rngs=rngs, mesh=mesh)
        if layout == "stacked":
            if len({kind.experts for kind in kinds}) > 1:
                raise InputError(
                    "layout stacked: expected layers that all have experts, or none, got some with and some without; "
                    "the layout unrolled takes them"
                )
            self.blocks: Block | nnx.List[Block] = make(kinds[0], stack=(config.num_layers,))
        else:
            self.blocks = nnx.List([make(kind, stack=()) for kind in kinds])
        self.norm_D = nnx.Param(jnp.full((D,), 1 - config.norm_offset, dtype))
        self.head_DV = None if config.tie_embeddings else _parameter(rngs, (D, V), D, dtype)

    def embed(self, tokens_BT: jax.Array) -> jax.Array:
        """The input of the first layer, [B, T, D]."""
        return self.scaled(_rows(self.embed_VD[...], tokens_BT))

    def scaled(self, x_BTD: jax.Array) -> jax.Array:
        """Rows of the embedding as the first layer takes them."""
        scale = self.config.embedding_scale
        return x_BTD if scale == 1 else x_BTD * jnp.float32(scale).astype(x_BTD.dtype)

    def rotations(self, pos_BT: jax.Array) -> tuple[Rotation, ...]:
        """What queries and keys at these positions are turned by, for each of the config's kinds of layers."""
        config = self.config

        @cache
        def turned(rope: Rope) -> Rotation:
            return rotation(pos_BT, *inverse_frequencies(rope, config.rotary_dim, config.context_size))

        each = ((kind, turned(kind.rope or config.rope)) for kind in config.kinds)
        return tuple(rotated if kind.rotated else standstill(rotated) for kind, rotated in each)

    def hidden(
        self, tokens_BT: jax.Array, pos_BT: jax.Array, attend: Attend, layers: Any = None, wrap: Wrap | None = None
    ):
        """(final-norm hidden states [B, T, D], what `attend` kept of every layer).

        `layers` is None or holds one item a layer: a tuple in the unrolled layout, a pytree of arrays with a leading
        layer axis in the stacked one. The kept items come back in the same form. `wrap` makes of a stacked layer's
        function the one that is scanned: what training recomputes, and how weights and activations lie.
        """
        x_BTD = self.embed(tokens_BT)
        rotations, kind_of, window_of = self.rotations(pos_BT), self.config.kind_of, self.config.window_of
        if isinstance(self.blocks, Block):
            graph, stacked = nnx.split(self.blocks)

            def one_layer(x_BTD, item):
                weights, (kind, window, layer) = item
                seeing = with_window(attend, window_of[0] if window is None else window)
                return nnx.merge(graph, weights)(x_BTD, *chosen(rotations, kind), seeing, layer)

            windows = None  # where all layers have the same, it is known while tracing
            if len(set(window_of)) > 1:
                windows = jnp.asarray([window or NO_WINDOW for window in window_of], jnp.int32)
            items = jnp.asarray(kind_of, jnp.int32) if len(rotations) > 1 else None, windows, layers
            x_BTD, kept = jax.lax.scan(one_layer if wrap is None else wrap(one_layer), x_BTD, (stacked, items))
        else:
            collected = []
            for index, block in enumerate(self.blocks):
                layer = None if layers is None else layers[index]
                seeing = with_window(attend, window_of[index])
                x_BTD, item = block(x_BTD, *rotations[kind_of[index]], seeing, layer)
                collected.append(item)
            kept = tuple(collected)
        return self.final_norm(x_BTD), kept

    def final_norm(self, x_BTD: jax.Array) -> jax.Array:
        """The last layer's output, normalised: what `logits` takes."""
        return rms_norm(x_BTD, self.norm_D[...], self.config.norm_eps, self.config.norm_offset)

    @property
    def head(self) -> tuple[jax.Array, str]:
        """(the weights that make logits of hidden states, their axes): DV, or VD of an embedding that is tied."""
        return (self.embed_VD[...], "VD") if self.head_DV is None else (self.head_DV[...], "DV")

    @property
    def bits(self) -> int | None:
        """That weights were quantised to; None: in full."""
        return None

    @property
    def vocabulary(self) -> int:
        """Logits of a token."""
        return self.config.vocab_size

    def logits(self, hidden_BTD: jax.Array) -> jax.Array:
        """float32 [B, T, V]; take the rows you need first, V is large."""
        weight, axes = self.head
        return einsum32(f"BTD,{axes}->BTV", hidden_BTD, weight)
