# SPDX-License-Identifier: Apache-2.0
"""Prompts into caches, chunk by chunk, with memory that does not grow with the square of anything.

In the unrolled layout one program, of one layer, is compiled and called for every layer; in the stacked layout one
program scans over the layers. Either way the compile time does not grow with depth or with the prompt's length.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from rapid_jax.attention.cache import KV, Prefix, Tail, each_layer, empty_layers
from rapid_jax.attention.verbs import attend_chunk, attend_prefix_tail
from rapid_jax.model.decoder import Block, Decoder
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.progress import Progress

LARGEST_BLOCK = 1024  # slots attended at once, however large a chunk is


def bucket(count: int, least: int = 1) -> int:
    """The smallest size of a short ladder (8 steps an octave, multiples of `least`) that holds `count`.

    Programs are compiled for these sizes only; at most 1/8 of the slots is empty once count >= 8 least.
    """
    units = max(-(-count // least), 1)
    step = max(1, 1 << max(units.bit_length() - 4, 0))
    return -(-units // step) * step * least


def new_tail(decoder: Decoder, start_B: Sequence[int], slots: int, dtype: jnp.dtype) -> Tail:
    """An empty tail whose slot 0 is at position `start_B` of each row."""
    config = decoder.config
    layers = empty_layers(
        num_layers=config.num_layers,
        batch=len(start_B),
        kv_heads=config.num_kv_heads,
        slots=slots,
        head_dim=config.head_dim,
        dtype=dtype,
        stacked=decoder.layout == "stacked",
    )
    return Tail(layers, jnp.asarray(start_B, jnp.int32), jnp.zeros(len(start_B), jnp.int32))


@partial(jax.jit, static_argnames="block_size")
def _chunk_layer(block: Block, x_BTD, cos, sin, kv: KV, pos_BS, used, pos_BT, *, block_size: int):
    return block(x_BTD, cos, sin, attend_chunk(pos_BT, Prefix((), pos_BS, used), block=block_size), kv)


@partial(jax.jit, static_argnames="block_size")
def _chunk_stacked(decoder: Decoder, tokens_BT, layers: KV, pos_BS, used, pos_BT, *, block_size: int):
    attend = attend_chunk(pos_BT, Prefix(layers, pos_BS, used), block=block_size)
    return decoder.hidden(tokens_BT, pos_BT, attend, layers)[1]


# A program of its own: on a CPU the layer's program takes a third longer when its cache is donated to it.
@partial(jax.jit, donate_argnames="kv")
def _written(kv: KV, chunk: KV, used: jax.Array) -> KV:
    def put(old, new):
        return jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), used, axis=old.ndim - 2)

    return KV(put(kv.k_BKSH, chunk.k_BKSH), put(kv.v_BKSH, chunk.v_BKSH))


@jax.jit
def _embedded(decoder: Decoder, tokens_BT, pos_BT):
    return decoder.embed(tokens_BT), *decoder.rotation(pos_BT)


def prefill(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    chunk: int,
    dtype: jnp.dtype,
    progress: Progress | None = None,
) -> Prefix:
    """The keys and values of every prompt (one a row), with slot s of a row at position s.

    `chunk` tokens of every row are computed at a time (fewer when the longest prompt is shorter). Rows shorter than the
    longest leave empty slots at their end.
    """
    if not prompts or min(len(prompt) for prompt in prompts) == 0:
        raise InputError("prefill needs at least one token in every prompt, got an empty prompt")
    longest = max(len(prompt) for prompt in prompts)
    chunk = min(chunk, bucket(longest))
    block = min(chunk, LARGEST_BLOCK)
    chunks = -(-longest // chunk)
    slots = bucket(chunks * chunk, chunk)
    tokens_BS = np.zeros((len(prompts), chunks * chunk), np.int32)
    pos_BS = np.full((len(prompts), slots), -1, np.int32)
    for row, prompt in enumerate(prompts):
        tokens_BS[row, : len(prompt)] = prompt
        pos_BS[row, : len(prompt)] = np.arange(len(prompt))

    layers = new_tail(decoder, [0] * len(prompts), slots, dtype).layers
    all_pos_BS = jnp.asarray(pos_BS)
    for index in range(chunks):
        used = jnp.asarray(index * chunk, jnp.int32)
        span = slice(index * chunk, (index + 1) * chunk)
        tokens_BT, pos_BT = jnp.asarray(tokens_BS[:, span]), jnp.asarray(pos_BS[:, span])
        seen_BS = jnp.where(jnp.arange(slots) < used, all_pos_BS, -1)
        if isinstance(decoder.blocks, Block):
            new = _chunk_stacked(decoder, tokens_BT, layers, seen_BS, used, pos_BT, block_size=block)
            layers = _written(layers, new, used)
        else:
            x_BTD, cos, sin = _embedded(decoder, tokens_BT, pos_BT)
            done = []
            for layer, kv in zip(decoder.blocks, each_layer(layers), strict=True):
                x_BTD, new = _chunk_layer(layer, x_BTD, cos, sin, kv, seen_BS, used, pos_BT, block_size=block)
                done.append(_written(kv, new, used))
            layers = tuple(done)
        jax.block_until_ready(layers)
        if progress is not None:
            progress.advance(min(chunk, longest - index * chunk))
    return Prefix(layers, all_pos_BS, jnp.asarray(longest, jnp.int32))


@partial(jax.jit, donate_argnames=("x_BTD", "near"), static_argnames="block_size")
def _tail_layer(block: Block, x_BTD, cos, sin, far: KV, near: KV, prefix: Prefix, tail: Tail, pos_BT, *, block_size):
    attend = attend_prefix_tail(prefix, replace(tail, layers=(near,)), pos_BT, block=block_size)
    return block(x_BTD, cos, sin, attend, (far, near))


@partial(jax.jit, donate_argnames="layers", static_argnames="block_size")
def _tail_stacked(decoder: Decoder, tokens_BT, prefix: Prefix, tail: Tail, layers: KV, pos_BT, *, block_size):
    attend = attend_prefix_tail(prefix, replace(tail, layers=layers), pos_BT, block=block_size)
    return decoder.hidden(tokens_BT, pos_BT, attend, (prefix.layers, layers))[1]


def extend(
    decoder: Decoder, prefix: Prefix, tail: Tail, suffixes: Sequence[Sequence[int]], *, width: int, block_size: int
) -> Tail:
    """The tail after each row's further prompt tokens, `width` at a time; the given tail is used up.

    The tail must have room for the longest suffix rounded up to a multiple of `width`.
    """
    longest = max(len(suffix) for suffix in suffixes)
    tokens = np.zeros((len(suffixes), -(-longest // width) * width), np.int32)
    for row, suffix in enumerate(suffixes):
        tokens[row, : len(suffix)] = suffix
    lengths = jnp.asarray([len(suffix) for suffix in suffixes], jnp.int32)
    first_B = tail.length_B
    for start in range(0, tokens.shape[1], width):
        tokens_BT = jnp.asarray(tokens[:, start : start + width])
        pos_BT = (tail.start_B + tail.length_B)[:, None] + jnp.arange(width, dtype=jnp.int32)
        if isinstance(decoder.blocks, Block):
            outline = replace(tail, layers=())
            layers = _tail_stacked(decoder, tokens_BT, prefix, outline, tail.layers, pos_BT, block_size=block_size)
        else:
            x_BTD, cos, sin = _embedded(decoder, tokens_BT, pos_BT)
            outline, done = (replace(prefix, layers=()), replace(tail, layers=())), []
            caches = zip(each_layer(prefix.layers), each_layer(tail.layers), strict=True)
            for block, (far, near) in zip(decoder.blocks, caches, strict=True):
                x_BTD, near = _tail_layer(block, x_BTD, cos, sin, far, near, *outline, pos_BT, block_size=block_size)
                done.append(near)
            layers = tuple(done)
        tail = Tail(layers, tail.start_B, first_B + jnp.minimum(lengths, start + width))
    return tail
