# SPDX-License-Identifier: Apache-2.0
"""Prompts into caches, chunk by chunk, with memory that does not grow with the square of anything.

In the unrolled layout one program, of one layer, is compiled and called for every layer; in the stacked layout one
program scans over the layers. Either way the compile time does not grow with depth or with the prompt's length.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from rapid_jax.attention.cache import KV, Layers, Prefix, Tail, each_layer, empty_layers
from rapid_jax.attention.config import KernelName, Over
from rapid_jax.attention.strategy import Strategy
from rapid_jax.attention.verbs import attend_chunk, attend_prefix_tail, layers_of, with_kept
from rapid_jax.model.decoder import Block, Decoder, windowed
from rapid_jax.model.rope import Rotation
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.mesh import placed, replicated
from rapid_jax.runtime.progress import Progress
from rapid_jax.speculative.chunk_layout import ChunkLayout

LARGEST_BLOCK = 1024  # slots attended at once, however large a chunk is


def serving(decoder: Decoder, block: int, kernel: KernelName = "auto", over: Over = "ring") -> Strategy:
    """How a decoder that answers attends: on its own mesh, a batch split over `data` alone."""
    return Strategy(block=block, mesh=decoder.mesh, kernel=kernel, over=over, batch=("data",))


def empty_cache(decoder: Decoder, batch: int, slots: int, dtype: jnp.dtype, *, letter: str) -> Layers:
    """Zeroed keys and values on the decoder's devices; `letter` is S for a prefix, G for a tail."""
    config, strategy = decoder.config, serving(decoder, block=1)
    return empty_layers(
        num_layers=config.num_layers,
        batch=batch,
        kv_heads=strategy.kv_heads(config.num_kv_heads),
        slots=slots,
        head_dim=config.head_dim,
        dtype=dtype,
        stacked=decoder.layout == "stacked",
        sharding=cache_sharding(decoder, letter),
    )


def cache_sharding(decoder: Decoder, letter: str) -> NamedSharding | None:
    """How the keys or values of a cache lie on the decoder's devices."""
    if decoder.mesh is None:
        return None
    name = f"kv_{'L' * (decoder.layout == 'stacked')}BK{letter}H"
    return NamedSharding(decoder.mesh, serving(decoder, block=1).spec(name))


def new_tail(decoder: Decoder, start_B: Sequence[int], slots: int, dtype: jnp.dtype) -> Tail:
    """An empty tail whose slot 0 is at position `start_B` of each row."""
    layers = empty_cache(decoder, len(start_B), slots, dtype, letter="G")
    rows = np.asarray(start_B, np.int32), np.zeros(len(start_B), np.int32)
    return Tail(layers, *replicated(decoder.mesh, rows))


def _so_far(pos_BS: jax.Array, used: jax.Array, strategy: Strategy) -> Prefix:
    """The prefix's positions when each device has used its share of `used` slots."""
    size = pos_BS.shape[1] // strategy.context
    seen_S = jnp.arange(pos_BS.shape[1]) % size < used // strategy.context
    return Prefix((), jnp.where(seen_S, pos_BS, -1), used)


@partial(jax.jit, static_argnames=("strategy", "window"))
def _chunk_layer(block: Block, x_BTD, turn: Rotation, kv: KV, pos_BS, used, pos_BT, *, strategy, window: int | None):
    attend = attend_chunk(pos_BT, _so_far(pos_BS, used, strategy), strategy)
    return block(x_BTD, *turn, windowed(attend, window), kv)


@partial(jax.jit, static_argnames="strategy")
def _chunk_stacked(decoder: Decoder, tokens_BT, layers: KV, pos_BS, used, pos_BT, *, strategy: Strategy):
    attend = attend_chunk(pos_BT, _so_far(pos_BS, used, strategy), strategy)
    return decoder.hidden(tokens_BT, pos_BT, attend, layers)


# A program of its own: on a CPU the layer's program takes a third longer when its cache is donated to it.
@partial(jax.jit, donate_argnames="kv", static_argnames="strategy")
def _written(kv: KV, chunk: KV, used: jax.Array, *, strategy: Strategy) -> KV:
    """The prefix with the chunk: each device writes its own part behind what it has used."""

    def put(old_BKSH, new_BKSH, used):
        new_BKSH = new_BKSH.astype(old_BKSH.dtype)
        at = used // strategy.context
        return (jax.lax.dynamic_update_slice_in_dim(old_BKSH, new_BKSH, at, axis=old_BKSH.ndim - 2),)

    name = f"kv_{'L' * (kv.k_BKSH.ndim - 4)}BKSH"
    put = strategy.per_device(put, (name, name, ""), (name,))
    return KV(put(kv.k_BKSH, chunk.k_BKSH, used)[0], put(kv.v_BKSH, chunk.v_BKSH, used)[0])


@jax.jit
def _embedded(decoder: Decoder, tokens_BT, pos_BT):
    return decoder.embed(tokens_BT), decoder.rotations(pos_BT)


@jax.jit
def _normed(decoder: Decoder, x_BTD):
    return decoder.final_norm(x_BTD)


@dataclass(frozen=True)
class PrefillSettings:
    """How prompts are read."""

    chunk: int  # tokens of every row computed at a time
    kernel: KernelName = "auto"
    over: Over = "ring"
    coarse: bool = False  # sizes are few: for prompts of many lengths that share programs
    room: int = 0  # tokens that there are slots for at least

    def layout(self, decoder: Decoder, longest: int) -> ChunkLayout:
        """Where the tokens of prompts of up to `longest` go, or of as many as there is to be room for."""
        devices = 1 if decoder.mesh is None else decoder.mesh.shape["context"]
        return ChunkLayout.of(max(longest, self.room), self.chunk, devices, coarse=self.coarse)


class Prefill:
    """The keys and values of prompts being computed, a chunk at a time; slots are found by their positions.

    `begun` has, in as many slots as the layout asks for, the first `known` tokens of every prompt, a multiple of the
    chunk; it is used up.
    """

    def __init__(
        self,
        decoder: Decoder,
        prompts: Sequence[Sequence[int]],
        settings: PrefillSettings,
        *,
        dtype: jnp.dtype,
        begun: Prefix | None = None,
        known: int = 0,
    ):
        if not prompts or min(len(prompt) for prompt in prompts) == 0:
            raise InputError("prefill needs at least one token in every prompt, got an empty prompt")
        self.longest = max(len(prompt) for prompt in prompts)
        self._decoder, self._layout = decoder, settings.layout(decoder, self.longest)
        layout = self._layout
        if known % layout.chunk or known >= self.longest:
            raise ValueError(f"expected fewer than {self.longest} tokens, whole chunks of {layout.chunk}, got {known}")
        self._strategy = serving(decoder, min(layout.chunk, LARGEST_BLOCK), settings.kernel, settings.over)
        self._tokens = layout.chunked(prompts, 0)
        self._positions = layout.chunked([range(len(prompt)) for prompt in prompts], -1)
        if begun is None:
            self._layers = empty_cache(decoder, len(prompts), layout.slots, dtype, letter="S")
        else:
            self._layers = begun.layers
        positions = layout.slotted(self._positions, -1)
        self._pos_BS = placed(decoder.mesh, self._strategy.spec("pos_BS"), positions)
        self._index = known // layout.chunk

    @property
    def left(self) -> int:
        """Tokens of the longest prompt that are not computed yet."""
        return max(self.longest - self._index * self._layout.chunk, 0)

    def step(self) -> tuple[jax.Array, np.ndarray]:
        """One chunk more; it returns as soon as the work is under way.

        What `Decoder.logits` takes of its tokens, and their positions, -1 where there is none: on a mesh not in order.
        """
        decoder, strategy, index = self._decoder, self._strategy, self._index
        used = replicated(decoder.mesh, np.int32(index * self._layout.chunk))
        new = self._tokens[index], self._positions[index]
        tokens_BT, pos_BT = placed(decoder.mesh, strategy.spec("tokens_BT"), new)
        layers, pos_BS = self._layers, self._pos_BS
        if isinstance(decoder.blocks, Block):
            hidden_BTD, chunk = _chunk_stacked(decoder, tokens_BT, layers, pos_BS, used, pos_BT, strategy=strategy)
            self._layers = _written(layers, chunk, used, strategy=strategy)
        else:
            x_BTD, rotations = _embedded(decoder, tokens_BT, pos_BT)
            done = []
            kinds, kind_of = decoder.config.kinds, decoder.config.kind_of
            for layer, kv, kind in zip(decoder.blocks, each_layer(layers), kind_of, strict=True):
                given = x_BTD, rotations[kind], kv, pos_BS, used, pos_BT
                x_BTD, chunk = _chunk_layer(layer, *given, strategy=strategy, window=kinds[kind].window)
                done.append(_written(kv, chunk, used, strategy=strategy))
            self._layers = tuple(done)
            hidden_BTD = _normed(decoder, x_BTD)
        self._index += 1
        return hidden_BTD, self._positions[index]

    def wait(self) -> None:
        """Until what is under way is done."""
        jax.block_until_ready(self._layers)

    @property
    def prefix(self) -> Prefix:
        """Everything, once nothing is left."""
        if self.left:
            raise ValueError(f"expected a finished prefill, got one with {self.left} tokens to go")
        return Prefix(self._layers, self._pos_BS, replicated(self._decoder.mesh, np.int32(self.longest)))


def prefill(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    chunk: int,
    dtype: jnp.dtype,
    kernel: KernelName = "auto",
    over: Over = "ring",
    progress: Progress | None = None,
) -> Prefix:
    """The keys and values of every prompt (one a row), on the decoder's devices.

    Without `progress` it returns as soon as the work is under way.
    """
    work = Prefill(decoder, prompts, PrefillSettings(chunk, kernel, over), dtype=dtype)
    while work.left:
        before = work.left
        work.step()
        if progress is not None:
            work.wait()
            progress.advance(before - work.left)
    return work.prefix


@partial(jax.jit, donate_argnames=("x_BTD", "near"), static_argnames=("strategy", "window"))
def _tail_layer(
    block: Block, x_BTD, turn: Rotation, far: KV, near: KV, prefix: Prefix, tail: Tail, pos_BG, *, strategy, window
):
    attend = attend_prefix_tail(prefix, replace(tail, layers=(near,)), pos_BG, strategy)
    return block(x_BTD, *turn, windowed(attend, window), (far, near))


@partial(jax.jit, donate_argnames="layers", static_argnames="strategy")
def _tail_stacked(decoder: Decoder, tokens_BG, prefix: Prefix, tail: Tail, layers: KV, pos_BG, *, strategy):
    tail = replace(tail, layers=layers)
    attend = attend_prefix_tail(prefix, tail, pos_BG, strategy)
    kept = decoder.hidden(tokens_BG, pos_BG, attend, layers_of(prefix, tail, strategy))[1]
    return with_kept(prefix, tail, kept, strategy)


def extend(
    decoder: Decoder, prefix: Prefix, tail: Tail, suffixes: Sequence[Sequence[int]], *, width: int, block_size: int
) -> Tail:
    """The tail after each row's further prompt tokens, `width` at a time; the given tail is used up.

    The tail must have room for the longest suffix rounded up to a multiple of `width`.
    """
    strategy = serving(decoder, block_size)
    longest = max(len(suffix) for suffix in suffixes)
    tokens = np.zeros((len(suffixes), -(-longest // width) * width), np.int32)
    for row, suffix in enumerate(suffixes):
        tokens[row, : len(suffix)] = suffix
    lengths_B = np.asarray([len(suffix) for suffix in suffixes], np.int32)
    start_B, first_B = (np.asarray(rows) for rows in (tail.start_B, tail.length_B))
    for start in range(0, tokens.shape[1], width):
        pos_BG = (start_B + first_B + np.minimum(lengths_B, start))[:, None] + np.arange(width, dtype=np.int32)
        tokens_BG, pos_BG = replicated(decoder.mesh, (tokens[:, start : start + width], pos_BG))
        if isinstance(decoder.blocks, Block):
            outline = replace(tail, layers=())
            layers = _tail_stacked(decoder, tokens_BG, prefix, outline, tail.layers, pos_BG, strategy=strategy)
        else:
            x_BTD, rotations = _embedded(decoder, tokens_BG, pos_BG)
            outline, done = (replace(prefix, layers=()), replace(tail, layers=())), []
            caches = zip(each_layer(prefix.layers), each_layer(tail.layers), strict=True)
            kinds, kind_of = decoder.config.kinds, decoder.config.kind_of
            for block, (far, near), kind in zip(decoder.blocks, caches, kind_of, strict=True):
                given = x_BTD, rotations[kind], far, near, *outline, pos_BG
                x_BTD, near = _tail_layer(block, *given, strategy=strategy, window=kinds[kind].window)
                done.append(near)
            layers = tuple(done)
        length_B = first_B + np.minimum(lengths_B, start + width)
        tail = Tail(layers, tail.start_B, replicated(decoder.mesh, length_B.astype(np.int32)))
    return tail
