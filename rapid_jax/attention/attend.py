# SPDX-License-Identifier: Apache-2.0
"""What a decoder layer may do with its queries, keys and values: short compositions of the algebra.

Each returns an `attend(q_BTNH, k_BTKH, v_BTKH, layer, window=None) -> (out_BTNH, kept)` for `Decoder.hidden`. On a
mesh the time axis of queries and of the prefix is split over `context`, heads over `model`; a tail is whole on every
context device. With a window, a number or an int32 scalar, a query at position p sees p - window + 1 to p.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from rapid_jax.attention.cache import KV, Layers, Prefix, Tail, each_layer, write, write_layers
from rapid_jax.attention.forked import Forked
from rapid_jax.attention.groups import by_group, grouped, layer_at
from rapid_jax.attention.online_softmax import Slots, block_of, finish, fold, merge, unfold
from rapid_jax.attention.ring import attend_before, attend_visitors, before, fits_neighbours, ring_attention
from rapid_jax.attention.strategy import Strategy
from rapid_jax.attention.tpu_decode import Stack

Attend = Callable[..., tuple[jax.Array, Any]]
Window = int | jax.Array | None


def _marks(pos: jax.Array, window: Window, branch: jax.Array | None = None) -> dict[str, jax.Array]:
    """What else than their positions says which slots queries see, by letters as `pos`: `fold`'s arguments."""
    marks = {} if branch is None else {"branch_BT": branch}
    return marks if window is None else marks | {"first_BT": pos - window + 1}


def _known(function: Callable, window: Window) -> Callable:
    """`function` of a window that is known while tracing, or of None."""
    return partial(function, window=window if isinstance(window, int) else None)


def attend_self(pos_BT: jax.Array, strategy: Strategy, *, branch_BT: jax.Array | None = None, runs: int = 0) -> Attend:
    """Causal attention of a sequence over itself; nothing is kept. Differentiable.

    `runs` is what `Kernel` is promised of each device's positions: 2 for the zigzag order without branches.
    """
    kernel = strategy.chosen_kernel()

    def local(q_BTNH, k_BTKH, v_BTKH, pos_BT, marks, *, window: int | None):
        rows = fold(q_BTNH, pos_BT, k_BTKH.shape[2], **marks, window=window)
        slots = Slots(k_BTKH.swapaxes(1, 2), v_BTKH.swapaxes(1, 2), pos_BT, marks.get("branch_BT"))
        scale = q_BTNH.shape[-1] ** -0.5
        out_BKRH = ring_attention(rows, slots, kernel=kernel, scale=scale, runs=runs, hops=strategy.hops)
        return (unfold(out_BKRH, q_BTNH.shape[1]),)

    names = ("q_BTNH", "k_BTKH", "v_BTKH", "pos_BT", "marks_BT")

    def attend(q_BTNH, k_BTKH, v_BTKH, layer, window: Window = None):
        call = strategy.per_device(_known(local, window), names, ("out_BTNH",))
        k_BTKH, v_BTKH = strategy.with_copies(k_BTKH), strategy.with_copies(v_BTKH)
        return call(q_BTNH, k_BTKH, v_BTKH, pos_BT, _marks(pos_BT, window, branch_BT))[0], None

    return attend


def attend_fork(pos_BT: jax.Array, reach_B: jax.Array, strategy: Strategy, *, tail: int) -> Attend:
    """Causal attention of a trunk over itself, and of a tail over the trunk up to `reach_B` and itself. Differentiable.

    The last `tail` places of every context device are the tail, those before are the trunk, each in zigzag order. The
    same as `attend_self` with branch tags, in kernels that know no tags and leave out what no branch sees.
    """
    kernel = strategy.chosen_kernel()
    runs = 1 if strategy.context == 1 else 2
    if tail == 0:
        return attend_self(pos_BT, strategy, runs=runs)

    def local(q_BTNH, k_BTKH, v_BTKH, pos_BT, reach_B, marks):
        # The window is not told as known: rows of the tail see trunk slots that need not be their neighbours'.
        rows = fold(q_BTNH, pos_BT, k_BTKH.shape[2], **marks)
        rows = replace(rows, reach_BR=jnp.broadcast_to(reach_B[:, None], rows.pos_BR.shape))
        slots = Slots(k_BTKH.swapaxes(1, 2), v_BTKH.swapaxes(1, 2), pos_BT)
        scale = q_BTNH.shape[-1] ** -0.5
        out_BKRH = ring_attention(rows, slots, kernel=Forked(kernel, tail), scale=scale, runs=runs, hops=strategy.hops)
        return (unfold(out_BKRH, q_BTNH.shape[1]),)

    names = ("q_BTNH", "k_BTKH", "v_BTKH", "pos_BT", "reach_B", "marks_BT")
    call = strategy.per_device(local, names, ("out_BTNH",))

    def attend(q_BTNH, k_BTKH, v_BTKH, layer, window: Window = None):
        k_BTKH, v_BTKH = strategy.with_copies(k_BTKH), strategy.with_copies(v_BTKH)
        return call(q_BTNH, k_BTKH, v_BTKH, pos_BT, reach_B, _marks(pos_BT, window))[0], None

    return attend


def _reached(far: Slots, used: jax.Array, window: int, chunk: int, devices: int) -> Slots:
    """Of a device's slots, of which so many are used, those of its parts of the chunks that a window reaches back to.

    `chunk` is a device's part; one device has the slots in order, and needs no whole chunks.
    """
    size = window - 1 if devices == 1 else -(-(window - 1) // (chunk * devices)) * chunk
    size = min(max(size, 1), far.pos_BS.shape[1])
    return block_of(far, jnp.maximum(used - size, 0), size)


def attend_chunk(pos_BT: jax.Array, written: Prefix, strategy: Strategy) -> Attend:
    """A prompt's next chunk over the prefix written so far and over itself; `layer` is the prefix's KV.

    The chunk is in zigzag order over the context axis, and so are those of the prefix, which are as long and lie one
    behind the other. Of a window that is known while tracing no other slots of the prefix are looked at, or sent, than
    those of the chunks that it reaches. Kept: the chunk's own KV, for the caller to write into the prefix.
    """
    kernel = strategy.chosen_kernel()
    used = written.used // strategy.context
    runs = 1 if strategy.context == 1 else 2

    def local(q_BTNH, k_BTKH, v_BTKH, pos_BT, far_k_BKSH, far_v_BKSH, far_pos_BS, marks, *, window: int | None):
        scale = q_BTNH.shape[-1] ** -0.5
        near = Slots(k_BTKH.swapaxes(1, 2), v_BTKH.swapaxes(1, 2), pos_BT)

        def visit(rows, visitor: tuple[Slots, Slots]):
            far, near = visitor
            return merge(
                kernel.forward(rows, far, scale=scale, runs=1, used=jnp.minimum(used, far.pos_BS.shape[1])),
                kernel.forward(rows, near, scale=scale, runs=runs),
            )

        rows = fold(q_BTNH, pos_BT, k_BTKH.shape[2], **marks, window=window)
        far = Slots(far_k_BKSH, far_v_BKSH, far_pos_BS)
        if window is not None:
            far = _reached(far, used, window, pos_BT.shape[1], strategy.context)
        home = (far, near)
        if window is not None and fits_neighbours(pos_BT.shape[1], window, runs, strategy.hops):
            # The end of the chunk before this one is where this one begins: on the first device.
            attend = partial(kernel.forward, scale=scale, runs=1)
            seen = attend_before(visit(rows, home), rows, before(near, window, "context"), attend)
        else:
            seen = attend_visitors(rows, home, visit, strategy.hops)
        return unfold(finish(seen, q_BTNH.dtype), q_BTNH.shape[1]), near.k_BKSH, near.v_BKSH

    names = ("q_BTNH", "k_BTKH", "v_BTKH", "pos_BT", "far_k_BKSH", "far_v_BKSH", "far_pos_BS", "marks_BT")

    def attend(q_BTNH, k_BTKH, v_BTKH, layer: KV, window: Window = None):
        call = strategy.per_device(_known(local, window), names, ("out_BTNH", "k_BKSH", "v_BKSH"))
        k_BTKH, v_BTKH = strategy.with_copies(k_BTKH), strategy.with_copies(v_BTKH)
        far = layer.k_BKSH, layer.v_BKSH, written.pos_BS
        out_BTNH, *chunk = call(q_BTNH, k_BTKH, v_BTKH, pos_BT, *far, _marks(pos_BT, window))
        return out_BTNH, KV(*chunk)

    return attend


def layers_of(prefix: Prefix, tail: Tail, strategy: Strategy) -> Any:
    """What `attend_prefix_tail` wants of every layer, for `Decoder.hidden`: (the prefix's KV, the tail's KV).

    In the stacked layout the layer's number may stand for both: what is scanned over would be copied for a kernel.
    """
    if isinstance(tail.layers, tuple):
        return tuple(zip(each_layer(prefix), each_layer(tail), strict=True))
    numbers, groups = jnp.arange(tail.layers.k_BKSH.shape[0], dtype=jnp.int32), prefix.groups
    if len(groups) > 1:
        assert prefix.near is not None
        return grouped(prefix.near.at, numbers if strategy.decodes_from_stack else tail.layers)
    return numbers if strategy.decodes_from_stack else (*(group.layers for group in groups), tail.layers)


def with_kept(tail: Tail, kept: Any, strategy: Strategy) -> Layers:
    """The tail's layers with the new tokens: of what `attend_prefix_tail` kept of every layer.

    Where that read from stacks it kept the new tokens alone, and all layers are written at once, in place.
    """
    stack = tail.layers
    if not isinstance(stack, KV) or not strategy.decodes_from_stack:
        return kept

    def local(*arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
        new = write_layers(KV(*arrays[:2]), *arrays[2:])
        return new.k_BKSH, new.v_BKSH

    names = ("k_LBKGH", "v_LBKGH")
    call = strategy.per_device(local, (*names, *names, "slot_B"), names)
    return KV(*call(stack.k_BKSH, stack.v_BKSH, kept.k_BKSH, kept.v_BKSH, tail.length_B))


def _far_used(prefix: Prefix, strategy: Strategy) -> tuple[str, jax.Array]:
    """(letters, slots of the prefix that may be used: one number, or that of each sequence on each device)."""
    if strategy.context == 1:
        return "", prefix.used

    def local(pos_BS: jax.Array) -> tuple[jax.Array]:
        behind = jnp.arange(1, pos_BS.shape[1] + 1, dtype=jnp.int32)
        return (jnp.max(jnp.where(pos_BS >= 0, behind, 0), axis=1, keepdims=True),)

    return "used_BS", strategy.per_device(local, ("pos_BS",), ("used_BS",))(prefix.pos_BS)[0]


def attend_prefix_tail(prefix: Prefix, tail: Tail, pos_BG: jax.Array, strategy: Strategy) -> Attend:
    """A few new tokens over the prefix and the tail, themselves included; `layer` is one of `layers_of`.

    Every device attends to its own part of the prefix, and the parts are summed: no key or value moves. Kept, for
    `with_kept`: the tail's KV with the new tokens written from slot `length_B` on, or beside stacks the new tokens'
    alone. The tail's length is the caller's to move.
    """
    if prefix.near is None:
        return _attend_group(prefix, tail, pos_BG, strategy)
    attends = [_attend_group(group, tail, pos_BG, strategy) for group in prefix.groups]
    return attends[0] if len(attends) == 1 else by_group(prefix.near.window, *attends)


def _attend_group(prefix: Prefix, tail: Tail, pos_BG: jax.Array, strategy: Strategy) -> Attend:
    """`attend_prefix_tail` of layers that keep the same slots."""
    stacked = isinstance(prefix.layers, KV) and strategy.decodes_from_stack
    extra = 0 if stacked else pos_BG.shape[1]
    tail_pos_BG = tail.slot_positions(extra=extra)
    used_name, far_used = _far_used(prefix, strategy)
    near_used = jnp.max(tail.length_B) + extra
    if stacked:  # XLA would rather make them anew in every layer
        pos_BG, tail_pos_BG, near_used = lax.optimization_barrier((pos_BG, tail_pos_BG, near_used))
    over_both = strategy.chosen_decode()

    def local(q_BGNH, new, pos_BG, marks, near, near_pos_BG, slot_B, far_used, scalars, far_pos_BS, *far):
        near_used, layer, far_layer = scalars
        rows = fold(q_BGNH, pos_BG, new[0].shape[2], **marks)
        near, new = KV(*near), KV(*(x_BGKH.swapaxes(1, 2).astype(near[0].dtype) for x_BGKH in new))
        k_BKSH, v_BKSH, *scales = far
        prefix_slots = Slots(k_BKSH, v_BKSH, far_pos_BS, None, *scales)
        if stacked:
            kept, tail_slots = new, Slots(near.k_BKSH, near.v_BKSH, near_pos_BG)
            sides = Stack(prefix_slots, far_layer), Stack(tail_slots, layer), Slots(new.k_BKSH, new.v_BKSH, pos_BG)
            used = far_used, near_used, jnp.int32(pos_BG.shape[1])
        else:
            kept = write(near, new.k_BKSH, new.v_BKSH, slot_B)
            sides = prefix_slots, Slots(kept.k_BKSH, kept.v_BKSH, near_pos_BG)
            used = jnp.max(far_used), near_used
        out_BKRH = over_both(rows, sides, used, q_BGNH.shape[-1] ** -0.5, strategy.hops.axis)
        return unfold(out_BKRH, q_BGNH.shape[1]), kept.k_BKSH, kept.v_BKSH

    def attend(q_BGNH, k_BGKH, v_BGKH, layer: tuple[Any, Any] | jax.Array, window: Window = None):
        # Of a stack in groups: (the layer's number in its group, its number or the tail's KV).
        far, near = layer if isinstance(layer, tuple) else (layer, layer)
        index, far_index, letter = jnp.int32(0), jnp.int32(0), ""
        if stacked:
            far_index, index, letter, far, near = far, near, "L", prefix.layers, tail.layers
        elif not isinstance(far, KV):
            far = layer_at(prefix.layers, far)
        assert isinstance(far, KV) and isinstance(near, KV)
        given = [
            ("q_BGNH", q_BGNH),
            ("new_BGKH", (strategy.with_copies(k_BGKH), strategy.with_copies(v_BGKH))),
            ("pos_BG", pos_BG),
            ("marks_BG", _marks(pos_BG, window)),
            (f"near_{letter}BKGH", (near.k_BKSH, near.v_BKSH)),
            ("near_pos_BG", tail_pos_BG),
            ("slot_B", tail.length_B),
            (used_name, far_used),
            ("", (near_used, index, far_index)),
            ("far_pos_BS", prefix.pos_BS),
            (f"far_k_{letter}BKSH", far.k_BKSH),
            (f"far_v_{letter}{'BKSH' if far.v_scale_BKS is None else 'BKHS'}", far.v_BKSH),
        ]
        if far.k_scale_BKS is not None:
            given += [(f"far_k_scale_{letter}BKS", far.k_scale_BKS), (f"far_v_scale_{letter}BKS", far.v_scale_BKS)]
        call = strategy.per_device(local, tuple(name for name, _ in given), ("out_BGNH", "k_BKGH", "v_BKGH"))
        out_BGNH, *kept = call(*(x for _, x in given))
        return out_BGNH, KV(*kept)

    return attend
