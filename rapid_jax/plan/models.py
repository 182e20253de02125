# SPDX-License-Identifier: Apache-2.0
"""A model on its devices with one prompt, with shapes in place of arrays: what the programs of a plan are given."""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rapid_jax.attention.cache import KV, Layers, Near, Prefix, Tail
from rapid_jax.attention.quantized_kv import quantize_array
from rapid_jax.config import RapidConfig
from rapid_jax.model.fused import FusedDecoder, fuse, quantize
from rapid_jax.model.placement import abstract
from rapid_jax.model.quantized import GROUP, WeightBits
from rapid_jax.plan.architectures import Architecture
from rapid_jax.plan.cost import Pass, Work, work_of
from rapid_jax.runtime.axes import PARAM, with_copied_kv
from rapid_jax.runtime.mesh_config import MeshConfig
from rapid_jax.speculative import prefill
from rapid_jax.speculative.initial_state import RECENT, Sizes
from rapid_jax.speculative.prefix_heads import layer_names
from rapid_jax.speculative.state import Side
from rapid_jax.speculative.window_layout import WindowLayout


@dataclass(frozen=True)
class PlannedModel:
    """A model on its devices with one prompt."""

    decoder: FusedDecoder
    full: FusedDecoder  # the decoder, or what it is a quantised copy of
    held: Any  # what is in memory of its weights while it runs
    mesh: Mesh | None  # None: the one device of a GPU
    sizes: MeshConfig
    dtype: jnp.dtype
    prompt: int  # tokens in the prefix
    layout: prefill.ChunkLayout
    bits: WeightBits | None = None  # of a quantised copy
    quantizes_prefix: bool = False

    def quantize_to(self, bits: WeightBits, *, shared: bool) -> "PlannedModel":
        """Its copy in so many bits; if `shared`, without what the copy has of the original."""
        copy = quantize(self.decoder, bits)
        held = copy.matrices if shared else copy
        return replace(self, decoder=copy, held=held, bits=bits, quantizes_prefix=True)

    def whole(self, tree: Any) -> Any:
        """Shapes that are the same on every device."""
        sharding = None if self.mesh is None else NamedSharding(self.mesh, PartitionSpec())
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)

    def int32(self, *shape: int, name: str = "") -> Any:
        """Integers that lie as their name says."""
        spec = prefill.serving(self.decoder, block=1).spec(name)
        sharding = None if self.mesh is None else NamedSharding(self.mesh, spec)
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding)

    def cache(self, slots: int, letter: str, layers: int | None = None) -> Layers:
        """Keys and values, of all layers or so many."""
        if layers == 0:
            return ()
        how: Any = {"letter": letter, "layers": layers}
        made = jax.eval_shape(lambda: prefill.empty_cache(self.decoder, 1, slots, self.dtype, **how))
        sharding = prefill.cache_sharding(self.decoder, letter)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), made)

    def prefix(self, *, filling: bool = False) -> Prefix:
        """The prompt's keys and values as prefill leaves them; `filling`: while its last chunk is computed."""
        window, near_at = prefill.windows_of(self.decoder.config)

        def of(layers: int, slots: int) -> Prefix:
            return Prefix(self.cache(slots, "S", layers), self.int32(1, slots, name="pos_BS"), self.int32())

        full = of(self.decoder.config.num_layers - len(near_at), self.layout.slots)
        if window is None:
            return full
        kept = WindowLayout(window, self.layout)
        near = of(len(near_at), (kept.before if filling else kept.kept).slots)
        return replace(full, near=Near(near, near_at, window))

    def kept_beside(self) -> Prefix | None:
        """What stays of layers with a window, where it lies apart from what is there of them while a prompt is read."""
        window, near = prefill.windows_of(self.decoder.config)[0], self.prefix().near
        if window is None or near is None or WindowLayout(window, self.layout).is_whole:
            return None
        return near.prefix

    def read_prefix(self) -> Prefix:
        """The prompt's keys and values as rounds read them."""
        prefix = self.prefix()
        return prefix.with_groups(list(map(self._read, prefix.groups)))

    def _read(self, group: Prefix) -> Prefix:
        if not self.quantizes_prefix:
            return group
        if isinstance(group.layers, tuple):
            return replace(group, layers=tuple(map(self._quantized, group.layers)))
        return replace(group, layers=self._quantized(group.layers))

    def _quantized(self, kv: KV) -> KV:
        """Shapes of one layer, or of the stack, as `quantize_weights` leaves them."""
        k_BKSH, k_scale_BKS = jax.eval_shape(partial(quantize_array, turned=False, mesh=self.mesh), kv.k_BKSH)
        v_BKHS, v_scale_BKS = jax.eval_shape(partial(quantize_array, turned=True, mesh=self.mesh), kv.v_BKSH)
        found = KV(k_BKSH, v_BKHS, k_scale_BKS, v_scale_BKS)
        if self.mesh is None:
            return found
        lying = {}
        for field, (name, _) in layer_names(found).items():
            x, spec = getattr(found, field), prefill.serving(self.decoder, block=1).spec(name)
            lying[field] = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(self.mesh, spec))
        return KV(**lying)

    def tail(self, sizes: Sizes, suffix: int) -> Tail:
        """Of a run whose prompt has `suffix` tokens behind the prefix."""
        return Tail(self.cache(sizes.tail(suffix), "G"), self.int32(1), self.int32(1))

    def side(self) -> Side:
        """What a round reads."""
        return Side(self.decoder, self.read_prefix(), self.int32(1, RECENT), self.int32(1))

    def work(self, run: Pass, *, split_tokens: bool = False) -> Work:
        """Of one device. `split_tokens`: of prefill, whose cache is in full."""
        config, item = self.decoder.config, jnp.dtype(self.dtype).itemsize
        weight = {None: item, 8: 1.0, 4: 0.5 + 4 / GROUP}[self.bits]
        rounded = self.quantizes_prefix and not split_tokens
        cached = 1 + 4 / config.head_dim if rounded else item
        return work_of(config, self.sizes, run, weight, cached, split_tokens=split_tokens)


def own_bytes(tree: Any) -> int:
    """Bytes of one device's parts of all arrays, one element behind the other."""

    def of(x: Any) -> int:
        shape = x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)
        return math.prod(shape) * x.dtype.itemsize

    return sum(map(of, jax.tree.leaves(tree)))


def layout_of(config: RapidConfig, mesh: MeshConfig, prompt: int, *, coarse: bool) -> prefill.ChunkLayout:
    """How a prompt of so many tokens is prefilled; `coarse`: one of retrieved text, which is kept for nobody."""
    return prefill.ChunkLayout.of(prompt, config.compute.prefill_chunk, mesh.context, coarse=coarse)


def planned(
    config: RapidConfig,
    architecture: Architecture,
    mesh: Mesh | None,
    sizes: MeshConfig,
    prompt: int,
    *,
    retrieved: bool,
) -> PlannedModel:
    """The model as the settings have it loaded, with a prompt of a document or of `retrieved` text; that of a document
    is quantised where the settings say so."""
    table = with_copied_kv(PARAM, sizes.replicate_kv)
    dtype = jnp.dtype("bfloat16" if config.models.dtype == "auto" else config.models.dtype)
    canonical = abstract(architecture.config, layout=config.models.layout, dtype=dtype, mesh=mesh, table=table)
    decoder = fuse(canonical)
    layout = layout_of(config, sizes, prompt, coarse=retrieved)
    rounds = config.compute.kv != "full" and not retrieved
    return PlannedModel(decoder, decoder, decoder, mesh, sizes, dtype, prompt, layout, quantizes_prefix=rounds)
