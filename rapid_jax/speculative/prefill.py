# SPDX-License-Identifier: Apache-2.0
"""Prompts into caches, chunk by chunk, with memory that does not grow with the square of anything.

In the unrolled layout one program, of one layer, is compiled and called for every layer; in the stacked layout one
program scans over the layers. Either way the compile time does not grow with depth or with the prompt's length.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import itemgetter

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from rapid_jax.attention.attend import attend_chunk
from rapid_jax.attention.cache import KV, Layers, Near, Prefix, Tail, empty_layers
from rapid_jax.attention.config import KernelName, Over
from rapid_jax.attention.groups import by_group, grouped, layer_at
from rapid_jax.attention.strategy import Strategy
from rapid_jax.model.config import ModelConfig
from rapid_jax.model.decoder import Block, Decoder, with_window
from rapid_jax.model.rope import Rotation
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.mesh import put_on_mesh, replicate
from rapid_jax.runtime.progress import Progress
from rapid_jax.speculative.chunk_layout import ChunkLayout
from rapid_jax.speculative.prefill_groups import Group
from rapid_jax.speculative.window_layout import WindowLayout

LARGEST_BLOCK = 1024  # slots attended at once, however large a chunk is


def serving(decoder: Decoder, block: int, kernel: KernelName = "auto", over: Over = "ring") -> Strategy:
    """How a decoder that answers attends: on its own mesh, a batch split over `data` alone."""
    return Strategy(block=block, mesh=decoder.mesh, kernel=kernel, over=over, batch=("data",))


def empty_cache(
    decoder: Decoder, batch: int, slots: int, dtype: jnp.dtype, *, letter: str, layers: int | None = None
) -> Layers:
    """Zeroed keys and values on the decoder's devices, of all its layers or so many.

    `letter` is S for a prefix, G for a tail.
    """
    config, strategy = decoder.config, serving(decoder, block=1)
    return empty_layers(
        num_layers=config.num_layers if layers is None else layers,
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
    return Tail(layers, *replicate(decoder.mesh, rows))


def _so_far(pos_BS: jax.Array, used: jax.Array, strategy: Strategy) -> Prefix:
    """The prefix's positions when each device has used its share of `used` slots."""
    size = pos_BS.shape[1] // strategy.context
    seen_S = jnp.arange(pos_BS.shape[1]) % size < used // strategy.context
    return Prefix((), jnp.where(seen_S, pos_BS, -1), used)


@partial(jax.jit, static_argnames=("strategy", "window"))
def _chunk_layer(block: Block, x_BTD, turn: Rotation, kv: KV, pos_BS, used, pos_BT, *, strategy, window: int | None):
    attend = attend_chunk(pos_BT, _so_far(pos_BS, used, strategy), strategy)
    return block(x_BTD, *turn, with_window(attend, window), kv)


@partial(jax.jit, static_argnames=("strategy", "at", "window"))
def _chunk_stacked(
    decoder: Decoder, tokens_BT, stacks, fars, pos_BT, *, strategy: Strategy, at: tuple[int, ...], window: int | None
):
    """(hidden states, the chunk's keys and values by group); a window is given where only the layers `at` have it."""
    attends = [attend_chunk(pos_BT, _so_far(pos_BS, used, strategy), strategy) for pos_BS, used in fars]
    if window is None:
        hidden_BTD, kept = decoder.hidden(tokens_BT, pos_BT, attends[0], stacks[0])
        return hidden_BTD, (kept,)

    def of_stack(attend, stack: KV):
        return lambda q, k, v, layer, **how: attend(q, k, v, layer_at(stack, layer[0]), **how)

    attend = by_group(window, *map(of_stack, attends, stacks))
    numbers = jnp.arange(decoder.config.num_layers)
    hidden_BTD, kept = decoder.hidden(tokens_BT, pos_BT, attend, grouped(at, numbers))
    others = [layer for layer in range(decoder.config.num_layers) if layer not in at]
    return hidden_BTD, tuple(jax.tree.map(itemgetter(jnp.asarray(group)), kept) for group in (others, at))


@jax.jit
def embed_chunk(decoder: Decoder, tokens_BT: jax.Array, pos_BT: jax.Array) -> tuple[jax.Array, tuple[Rotation, ...]]:
    """(the first layer's input, what queries and keys of each kind of layers are turned by)."""
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


def windows_of(config: ModelConfig) -> tuple[int | None, tuple[int, ...]]:
    """(the window of the layers that have one, which layers those are)."""
    at = tuple(layer for layer, window in enumerate(config.window_of) if window is not None)
    return (config.window_of[at[0]] if at else None), at


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
        self._window, self._near_at = windows_of(decoder.config)
        if begun is not None and self._window is not None:
            raise ValueError("expected a prompt from its beginning where layers have a window, got one that is begun")
        self._groups = self._made(dtype, begun)
        self._index = known // layout.chunk

    def _made(self, dtype: jnp.dtype, begun: Prefix | None) -> list[Group]:
        """Layers without a window, of which there may be none, then those with one where there are any."""
        decoder, positions, strategy = self._decoder, self._positions, self._strategy

        def empty(layers: int, slots: int) -> list[KV]:
            made = empty_cache(decoder, positions.shape[1], slots, dtype, letter="S", layers=layers)
            return [made] if isinstance(made, KV) else list(made)

        near = len(self._near_at)
        full = decoder.config.num_layers - near
        held = (empty(full, self._layout.slots) if full else []) if begun is None else begun.layers
        groups = [Group([held] if isinstance(held, KV) else held, self._layout, positions, strategy)]
        if self._window is not None:
            window = WindowLayout(self._window, self._layout)
            kept = [] if window.is_whole else empty(near, window.kept.slots)
            groups.append(Group(empty(near, window.before.slots), window, positions, strategy, kept))
        return groups

    @property
    def left(self) -> int:
        """Tokens of the longest prompt that are not computed yet."""
        return max(self.longest - self._index * self._layout.chunk, 0)

    def step(self) -> tuple[jax.Array, np.ndarray]:
        """One chunk more; it returns as soon as the work is under way.

        What `Decoder.logits` takes of its tokens, and their positions, -1 where there is none: on a mesh not in order.
        """
        decoder, strategy, index = self._decoder, self._strategy, self._index
        new = self._tokens[index], self._positions[index]
        tokens_BT, pos_BT = put_on_mesh(decoder.mesh, strategy.spec("tokens_BT"), new)
        fars = [group.begin(index) for group in self._groups]
        if isinstance(decoder.blocks, Block):
            groups = [group for group in self._groups if group.layers]
            stacks = tuple(group.layers[0] for group in groups)
            fars = tuple(far for group, far in zip(self._groups, fars, strict=True) if group.layers)
            how = {"at": self._near_at, "window": self._window if len(groups) > 1 else None}
            hidden_BTD, chunks = _chunk_stacked(decoder, tokens_BT, stacks, fars, pos_BT, strategy=strategy, **how)
            for group, chunk in zip(groups, chunks, strict=True):
                group.add(0, chunk)
        else:
            x_BTD, rotations = embed_chunk(decoder, tokens_BT, pos_BT)
            kinds, added = decoder.config.kinds, [0] * len(self._groups)
            for layer, kind in zip(decoder.blocks, decoder.config.kind_of, strict=True):
                window = kinds[kind].window
                which = 0 if window is None else 1
                group, place = self._groups[which], added[which]
                given = x_BTD, rotations[kind], group.layers[place], *fars[which], pos_BT
                x_BTD, chunk = _chunk_layer(layer, *given, strategy=strategy, window=window)
                group.add(place, chunk)
                added[which] += 1
            hidden_BTD = _normed(decoder, x_BTD)
        self._index += 1
        return hidden_BTD, self._positions[index]

    def wait(self) -> None:
        """Until what is under way is done."""
        jax.block_until_ready([group.pending for group in self._groups])

    @property
    def prefix(self) -> Prefix:
        """Everything, once nothing is left."""
        if self.left:
            raise ValueError(f"expected a finished prefill, got one with {self.left} tokens to go")
        stacked = isinstance(self._decoder.blocks, Block)
        first, *others = (group.prefix(stacked=stacked) for group in self._groups)
        if not others:
            return first
        assert self._window is not None
        return replace(first, near=Near(others[0], self._near_at, self._window))


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
