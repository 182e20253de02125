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
from rapid_jax.attention.order import zigzag
from rapid_jax.attention.strategy import Strategy
from rapid_jax.attention.verbs import attend_chunk, attend_prefix_tail, layers_of
from rapid_jax.model.decoder import Block, Decoder
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.mesh import placed, replicated
from rapid_jax.runtime.progress import Progress

LARGEST_BLOCK = 1024  # slots attended at once, however large a chunk is


def bucket(count: int, least: int = 1) -> int:
    """The smallest size of a short ladder (8 steps an octave, multiples of `least`) that holds `count`.

    Programs are compiled for these sizes only; at most 1/8 of the slots is empty once count >= 8 least.
    """
    units = max(-(-count // least), 1)
    step = max(1, 1 << max(units.bit_length() - 4, 0))
    return -(-units // step) * step * least


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


@partial(jax.jit, static_argnames="strategy")
def _chunk_layer(block: Block, x_BTD, cos, sin, kv: KV, pos_BS, used, pos_BT, *, strategy: Strategy):
    return block(x_BTD, cos, sin, attend_chunk(pos_BT, _so_far(pos_BS, used, strategy), strategy), kv)


@partial(jax.jit, static_argnames="strategy")
def _chunk_stacked(decoder: Decoder, tokens_BT, layers: KV, pos_BS, used, pos_BT, *, strategy: Strategy):
    attend = attend_chunk(pos_BT, _so_far(pos_BS, used, strategy), strategy)
    return decoder.hidden(tokens_BT, pos_BT, attend, layers)[1]


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
    return decoder.embed(tokens_BT), *decoder.rotation(pos_BT)


@dataclass(frozen=True)
class ChunkLayout:
    """Where the tokens of prompts go: chunks in zigzag order over the context devices, one behind the other on each.

    2 devices, 2 chunks of 8 tokens   device 0: 0 1 6 7  8 9 14 15   device 1: 2 3 4 5  10 11 12 13
    """

    chunk: int
    chunks: int
    slots: int  # of all devices together
    devices: int  # along the context axis

    @classmethod
    def of(cls, longest: int, chunk: int, devices: int) -> "ChunkLayout":
        """The layout for prompts of up to `longest` tokens, `chunk` at a time."""
        unit = 1 if devices == 1 else 2 * devices
        if chunk % unit:
            raise InputError(f"a prefill chunk must be a multiple of {unit} (2 x context {devices}), got {chunk}")
        chunk = min(chunk, bucket(longest, unit))
        chunks = -(-longest // chunk)
        return cls(chunk, chunks, bucket(chunks * chunk, chunk), devices)

    def chunked(self, rows: Sequence[Sequence[int]], fill: int) -> np.ndarray:
        """int32 [chunks, B, chunk]: the rows' items by chunk in zigzag order, `fill` behind their ends."""
        grid = np.full((len(rows), self.chunks * self.chunk), fill, np.int32)
        for index, row in enumerate(rows):
            grid[index, : len(row)] = row
        order = zigzag(self.chunk, self.devices)
        return grid.reshape(len(rows), self.chunks, self.chunk).swapaxes(0, 1)[:, :, order]

    def slotted(self, chunked: np.ndarray, fill: int) -> np.ndarray:
        """int32 [B, slots]: what `chunked` gave, where the prefix has it."""
        batch = chunked.shape[1]
        shares = chunked.reshape(self.chunks, batch, self.devices, -1).transpose(1, 2, 0, 3)
        slots = np.full((batch, self.devices, self.slots // self.devices), fill, np.int32)
        slots[:, :, : shares.shape[2] * shares.shape[3]] = shares.reshape(batch, self.devices, -1)
        return slots.reshape(batch, self.slots)


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
    """The keys and values of every prompt (one a row), on the decoder's devices. Slots are found by their positions.

    `chunk` tokens of every row are computed at a time (fewer when the longest prompt is shorter). Without `progress`
    it returns as soon as the work is under way.
    """
    if not prompts or min(len(prompt) for prompt in prompts) == 0:
        raise InputError("prefill needs at least one token in every prompt, got an empty prompt")
    longest = max(len(prompt) for prompt in prompts)
    devices = 1 if decoder.mesh is None else decoder.mesh.shape["context"]
    layout = ChunkLayout.of(longest, chunk, devices)
    strategy = serving(decoder, min(layout.chunk, LARGEST_BLOCK), kernel, over)
    tokens = layout.chunked(prompts, 0)
    positions = layout.chunked([range(len(prompt)) for prompt in prompts], -1)
    layers = empty_cache(decoder, len(prompts), layout.slots, dtype, letter="S")
    pos_BS = placed(decoder.mesh, strategy.spec("pos_BS"), layout.slotted(positions, -1))
    for index in range(layout.chunks):
        used = replicated(decoder.mesh, np.int32(index * layout.chunk))
        tokens_BT, pos_BT = placed(decoder.mesh, strategy.spec("tokens_BT"), (tokens[index], positions[index]))
        if isinstance(decoder.blocks, Block):
            new = _chunk_stacked(decoder, tokens_BT, layers, pos_BS, used, pos_BT, strategy=strategy)
            layers = _written(layers, new, used, strategy=strategy)
        else:
            x_BTD, cos, sin = _embedded(decoder, tokens_BT, pos_BT)
            done = []
            for layer, kv in zip(decoder.blocks, each_layer(layers), strict=True):
                x_BTD, new = _chunk_layer(layer, x_BTD, cos, sin, kv, pos_BS, used, pos_BT, strategy=strategy)
                done.append(_written(kv, new, used, strategy=strategy))
            layers = tuple(done)
        if progress is not None:
            jax.block_until_ready(layers)
            progress.advance(min(layout.chunk, longest - index * layout.chunk))
    return Prefix(layers, pos_BS, replicated(decoder.mesh, np.int32(longest)))


@partial(jax.jit, donate_argnames=("x_BTD", "near"), static_argnames="strategy")
def _tail_layer(block: Block, x_BTD, cos, sin, far: KV, near: KV, prefix: Prefix, tail: Tail, pos_BG, *, strategy):
    attend = attend_prefix_tail(prefix, replace(tail, layers=(near,)), pos_BG, strategy)
    return block(x_BTD, cos, sin, attend, (far, near))


@partial(jax.jit, donate_argnames="layers", static_argnames="strategy")
def _tail_stacked(decoder: Decoder, tokens_BG, prefix: Prefix, tail: Tail, layers: KV, pos_BG, *, strategy):
    tail = replace(tail, layers=layers)
    attend = attend_prefix_tail(prefix, tail, pos_BG, strategy)
    return decoder.hidden(tokens_BG, pos_BG, attend, layers_of(prefix, tail, strategy))[1]


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
            x_BTD, cos, sin = _embedded(decoder, tokens_BG, pos_BG)
            outline, done = (replace(prefix, layers=()), replace(tail, layers=())), []
            caches = zip(each_layer(prefix.layers), each_layer(tail.layers), strict=True)
            for block, (far, near) in zip(decoder.blocks, caches, strict=True):
                x_BTD, near = _tail_layer(block, x_BTD, cos, sin, far, near, *outline, pos_BG, strategy=strategy)
                done.append(near)
            layers = tuple(done)
        length_B = first_B + np.minimum(lengths_B, start + width)
        tail = Tail(layers, tail.start_B, replicated(decoder.mesh, length_B.astype(np.int32)))
    return tail
