# SPDX-License-Identifier: Apache-2.0
"""What a decoder layer may do with its queries, keys and values: short compositions of the algebra.

Each returns an `attend(q_BTNH, k_BTKH, v_BTKH, layer) -> (out_BTNH, kept)` for `Decoder.hidden`. On a mesh the time
axis of queries and of the prefix is split over `context`, heads over `model`; a tail is whole on every context device.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from rapid_jax.attention.cache import KV, Prefix, Tail, write
from rapid_jax.attention.forked import Forked
from rapid_jax.attention.partial import Slots, finish, fold, merge, unfold
from rapid_jax.attention.ring import attend_visitors, ring_attention
from rapid_jax.attention.splash_decode import Stack
from rapid_jax.attention.strategy import Strategy

Attend = Callable[[jax.Array, jax.Array, jax.Array, Any], tuple[jax.Array, Any]]


def attend_self(pos_BT: jax.Array, strategy: Strategy, *, branch_BT: jax.Array | None = None, runs: int = 0) -> Attend:
    """Causal attention of a sequence over itself; nothing is kept. Differentiable.

    `runs` is what `Kernel` is promised of each device's positions: 2 for the zigzag order without branches.
    """
    kernel = strategy.chosen_kernel()
    tags = () if branch_BT is None else (branch_BT,)

    def local(q_BTNH, k_BTKH, v_BTKH, pos_BT, *tags):
        branch_BT = tags[0] if tags else None
        rows = fold(q_BTNH, pos_BT, k_BTKH.shape[2], branch_BT)
        slots = Slots(k_BTKH.swapaxes(1, 2), v_BTKH.swapaxes(1, 2), pos_BT, branch_BT)
        scale = q_BTNH.shape[-1] ** -0.5
        out_BKRH = ring_attention(rows, slots, kernel=kernel, scale=scale, runs=runs, hops=strategy.hops)
        return (unfold(out_BKRH, q_BTNH.shape[1]),)

    names = ("q_BTNH", "k_BTKH", "v_BTKH", "pos_BT", "branch_BT")
    call = strategy.per_device(local, names[: 4 + len(tags)], ("out_BTNH",))

    def attend(q_BTNH, k_BTKH, v_BTKH, layer):
        k_BTKH, v_BTKH = strategy.with_copies(k_BTKH), strategy.with_copies(v_BTKH)
        return call(q_BTNH, k_BTKH, v_BTKH, pos_BT, *tags)[0], None

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

    def local(q_BTNH, k_BTKH, v_BTKH, pos_BT, reach_B):
        rows = fold(q_BTNH, pos_BT, k_BTKH.shape[2])
        rows = replace(rows, reach_BR=jnp.broadcast_to(reach_B[:, None], rows.pos_BR.shape))
        slots = Slots(k_BTKH.swapaxes(1, 2), v_BTKH.swapaxes(1, 2), pos_BT)
        scale = q_BTNH.shape[-1] ** -0.5
        out_BKRH = ring_attention(rows, slots, kernel=Forked(kernel, tail), scale=scale, runs=runs, hops=strategy.hops)
        return (unfold(out_BKRH, q_BTNH.shape[1]),)

    call = strategy.per_device(local, ("q_BTNH", "k_BTKH", "v_BTKH", "pos_BT", "reach_B"), ("out_BTNH",))

    def attend(q_BTNH, k_BTKH, v_BTKH, layer):
        k_BTKH, v_BTKH = strategy.with_copies(k_BTKH), strategy.with_copies(v_BTKH)
        return call(q_BTNH, k_BTKH, v_BTKH, pos_BT, reach_B)[0], None

    return attend


def attend_chunk(pos_BT: jax.Array, written: Prefix, strategy: Strategy) -> Attend:
    """A prompt's next chunk over the prefix written so far and over itself; `layer` is the prefix's KV.

    The chunk is in zigzag order over the context axis. Kept: the chunk's own KV, for the caller to write into the
    prefix.
    """
    kernel = strategy.chosen_kernel()
    used = written.used // strategy.context
    runs = 1 if strategy.context == 1 else 2

    def local(q_BTNH, k_BTKH, v_BTKH, pos_BT, far_k_BKSH, far_v_BKSH, far_pos_BS):
        scale = q_BTNH.shape[-1] ** -0.5
        near = Slots(k_BTKH.swapaxes(1, 2), v_BTKH.swapaxes(1, 2), pos_BT)

        def visit(rows, visitor: tuple[Slots, Slots]):
            far, near = visitor
            return merge(
                kernel.forward(rows, far, scale=scale, runs=1, used=used),
                kernel.forward(rows, near, scale=scale, runs=runs),
            )

        rows = fold(q_BTNH, pos_BT, k_BTKH.shape[2])
        home = (Slots(far_k_BKSH, far_v_BKSH, far_pos_BS), near)
        partial = attend_visitors(rows, home, visit, strategy.hops)
        return unfold(finish(partial, q_BTNH.dtype), q_BTNH.shape[1]), near.k_BKSH, near.v_BKSH

    names = ("q_BTNH", "k_BTKH", "v_BTKH", "pos_BT", "far_k_BKSH", "far_v_BKSH", "far_pos_BS")
    call = strategy.per_device(local, names, ("out_BTNH", "k_BKSH", "v_BKSH"))

    def attend(q_BTNH, k_BTKH, v_BTKH, layer: KV):
        k_BTKH, v_BTKH = strategy.with_copies(k_BTKH), strategy.with_copies(v_BTKH)
        out_BTNH, *chunk = call(q_BTNH, k_BTKH, v_BTKH, pos_BT, layer.k_BKSH, layer.v_BKSH, written.pos_BS)
        return out_BTNH, KV(*chunk)

    return attend


def layers_of(prefix: Prefix, tail: Tail, strategy: Strategy) -> Any:
    """What `attend_prefix_tail` wants of every layer, for `Decoder.hidden`: (the prefix's KV, the tail's KV).

    In the stacked layout the layer's number may stand for the first: what is scanned over would be copied for a kernel.
    """
    if isinstance(prefix.layers, tuple) and isinstance(tail.layers, tuple):
        return tuple(zip(prefix.layers, tail.layers, strict=True))
    if isinstance(prefix.layers, KV) and strategy.decodes_from_stack:
        return jnp.arange(prefix.layers.k_BKSH.shape[0], dtype=jnp.int32), tail.layers
    return prefix.layers, tail.layers


def attend_prefix_tail(prefix: Prefix, tail: Tail, pos_BG: jax.Array, strategy: Strategy) -> Attend:
    """A few new tokens over the prefix and the tail, themselves included; `layer` is one of `layers_of`.

    Every device attends to its own part of the prefix, and the parts are summed: no key or value moves. Kept: the
    tail's KV with the new tokens written from slot `length_B` on. The tail's length is the caller's to move.
    """
    extra = pos_BG.shape[1]
    tail_pos_BG = tail.slot_positions(extra=extra)
    # What a device has used of a prefix that is split over several is not told: empty slots are found by position.
    far_used = prefix.used if strategy.context == 1 else jnp.int32(prefix.pos_BS.shape[1])
    near_used = jnp.max(tail.length_B) + extra
    over_both = strategy.chosen_decode()

    def local(q_BGNH, k_BGKH, v_BGKH, pos_BG, near_k_BKGH, near_v_BKGH, near_pos_BG, slot_B, used, far_pos_BS, *far):
        rows = fold(q_BGNH, pos_BG, k_BGKH.shape[2])
        near_kv = write(KV(near_k_BKGH, near_v_BKGH), k_BGKH.swapaxes(1, 2), v_BGKH.swapaxes(1, 2), slot_B)
        k_BKSH, v_BKSH, *scales = far
        *used, layer = used
        prefix_slots = Slots(k_BKSH, v_BKSH, far_pos_BS, None, *scales)
        far_side = prefix_slots if k_BKSH.ndim == 4 else Stack(prefix_slots, layer)
        sides = (far_side, Slots(near_kv.k_BKSH, near_kv.v_BKSH, near_pos_BG))
        out_BKRH = over_both(rows, sides, tuple(used), q_BGNH.shape[-1] ** -0.5, strategy.hops.axis)
        return unfold(out_BKRH, q_BGNH.shape[1]), near_kv.k_BKSH, near_kv.v_BKSH

    def attend(q_BGNH, k_BGKH, v_BGKH, layer: tuple[KV | jax.Array, KV]):
        far, near = layer
        index, letter = jnp.int32(0), ""
        if not isinstance(far, KV):
            assert isinstance(prefix.layers, KV)
            index, letter, far = far, "L", prefix.layers
        k_BGKH, v_BGKH = strategy.with_copies(k_BGKH), strategy.with_copies(v_BGKH)
        given = {
            "q_BGNH": q_BGNH,
            "k_BGKH": k_BGKH,
            "v_BGKH": v_BGKH,
            "pos_BG": pos_BG,
            "near_k_BKGH": near.k_BKSH,
            "near_v_BKGH": near.v_BKSH,
            "near_pos_BG": tail_pos_BG,
            "slot_B": tail.length_B,
            "": (far_used, near_used, index),
            "far_pos_BS": prefix.pos_BS,
            f"far_k_{letter}BKSH": far.k_BKSH,
            f"far_v_{letter}{'BKSH' if far.v_scale_BKS is None else 'BKHS'}": far.v_BKSH,
        }
        if far.k_scale_BKS is not None:
            given |= {f"far_k_scale_{letter}BKS": far.k_scale_BKS, f"far_v_scale_{letter}BKS": far.v_scale_BKS}
        call = strategy.per_device(local, tuple(given), ("out_BGNH", "k_BKGH", "v_BKGH"))
        out_BGNH, *tail_kv = call(*given.values())
        return out_BGNH, KV(*tail_kv)

    return attend
