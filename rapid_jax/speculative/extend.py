# SPDX-License-Identifier: Apache-2.0
"""Further tokens of prompts behind their prefixes: the question behind a document."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import jax
import numpy as np

from rapid_jax.attention.attend import attend_prefix_tail, layers_of, with_kept
from rapid_jax.attention.cache import KV, Prefix, Tail, each_layer
from rapid_jax.model.decoder import Block, Decoder, with_window
from rapid_jax.model.rope import Rotation
from rapid_jax.runtime.mesh import replicate
from rapid_jax.speculative.prefill import embed_chunk, serving


@partial(jax.jit, donate_argnames=("x_BTD", "near"), static_argnames=("strategy", "window"))
def _tail_layer(
    block: Block, x_BTD, turn: Rotation, far: KV, near: KV, prefix: Prefix, tail: Tail, pos_BG, *, strategy, window
):
    attend = attend_prefix_tail(prefix, replace(tail, layers=(near,)), pos_BG, strategy)
    return block(x_BTD, *turn, with_window(attend, window), (far, near))


@partial(jax.jit, donate_argnames="layers", static_argnames="strategy")
def _tail_stacked(decoder: Decoder, tokens_BG, prefix: Prefix, tail: Tail, layers: KV, pos_BG, *, strategy):
    tail = replace(tail, layers=layers)
    attend = attend_prefix_tail(prefix, tail, pos_BG, strategy)
    kept = decoder.hidden(tokens_BG, pos_BG, attend, layers_of(prefix, tail, strategy))[1]
    return with_kept(tail, kept, strategy)


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
        tokens_BG, pos_BG = replicate(decoder.mesh, (tokens[:, start : start + width], pos_BG))
        if isinstance(decoder.blocks, Block):
            outline = replace(tail, layers=())
            layers = _tail_stacked(decoder, tokens_BG, prefix, outline, tail.layers, pos_BG, strategy=strategy)
        else:
            x_BTD, rotations = embed_chunk(decoder, tokens_BG, pos_BG)
            done, full = [], replace(prefix, layers=(), near=None)
            near = full if prefix.near is None else replace(prefix.near.prefix, layers=())
            caches = zip(each_layer(prefix), each_layer(tail), strict=True)
            kinds, kind_of = decoder.config.kinds, decoder.config.kind_of
            for block, (far, own), kind in zip(decoder.blocks, caches, kind_of, strict=True):
                window = kinds[kind].window
                outline = full if window is None else near, replace(tail, layers=())
                given = x_BTD, rotations[kind], far, own, *outline, pos_BG
                x_BTD, own = _tail_layer(block, *given, strategy=strategy, window=window)
                done.append(own)
            layers = tuple(done)
        length_B = first_B + np.minimum(lengths_B, start + width)
        tail = Tail(layers, tail.start_B, replicate(decoder.mesh, length_B.astype(np.int32)))
    return tail
