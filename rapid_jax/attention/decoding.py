# SPDX-License-Identifier: Apache-2.0
"""Attention of a few new tokens over a prefix and a tail, on one device's parts of them: by platform.

gpu    `flash_decode.py`: a kernel that reads every key once
tpu    `splash_decode.py`: the same, and the tail in plain XLA
else   plain XLA, a block of the prefix at a time; the reference

Each takes a prefix of one sequence under the rows of many, and reads it once for all of them.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from rapid_jax.attention.flash_decode import fits, flash_decode, flash_decoded
from rapid_jax.attention.partial import (
    Partial,
    Rows,
    Slots,
    attend_block,
    attend_blockwise,
    finish,
    merge,
    nothing_seen,
)
from rapid_jax.attention.ring import merged_over
from rapid_jax.attention.shared_prefix import is_shared, over_shared
from rapid_jax.attention.splash_decode import Stack, splash_decode
from rapid_jax.attention.splash_decode import fits as splash_fits

Sides: TypeAlias = tuple[Slots, Slots]  # this device's part of the prefix; the tail, whole on every device
StackSides: TypeAlias = tuple[Slots | Stack, Slots]
Used: TypeAlias = tuple[jax.Array, jax.Array]  # slots from there on are empty
# (rows, `Sides`, or `StackSides` for `by_splash`, used, scale, mesh axis that the prefix is split over) -> softmax over
# the keys of both times the values, [B, K, R, H] in the queries' dtype
Decode: TypeAlias = Callable[[Rows, Any, Used, float, str | None], jax.Array]


def by_blocks(rows: Rows, sides: StackSides, used: Used, scale: float, axis: str | None, *, block: int) -> jax.Array:
    """In plain XLA."""
    del used  # a loop of unknown length would be no faster: a prefix has few empty slots
    far, near = sides
    if isinstance(far, Stack):
        slots, attend = far.every, partial(attend_stack, stack=far, scale=scale, block=block)
    else:
        slots, attend = far, partial(attend_blockwise, slots=far, scale=scale, block=block)
    seen = over_shared(rows, slots, attend, most=rows.pos_BR.size) if is_shared(rows, slots) else attend(rows)
    if axis is not None:
        seen = merged_over(seen, axis)
    return finish(merge(seen, attend_blockwise(rows, near, scale=scale, block=block)), rows.q_BKRH.dtype)


def attend_stack(rows: Rows, stack: Stack, *, scale: float, block: int) -> Partial:
    """`attend_blockwise` over a layer in the stack of all: each block is read where it lies, rounded ones as int8.

    The layer taken out first would be a copy of it, written and read again.
    """
    size = stack.every.pos_BS.shape[1]
    whole, rest = divmod(size, min(block, size))

    def add(seen: Partial, start: jax.Array | int, count: int) -> Partial:
        return merge(seen, attend_block(rows, stack.block(start, count), scale=scale))

    def step(index: jax.Array, seen: Partial) -> Partial:
        return add(seen, index * min(block, size), min(block, size))

    seen = lax.fori_loop(0, whole, step, nothing_seen(rows))
    return add(seen, jnp.int32(size - rest), rest) if rest else seen


def by_kernel(
    rows: Rows, sides: Sides, used: Used, scale: float, axis: str | None, *, block: int, interpret: bool = False
) -> jax.Array:
    """By the kernel for NVIDIA GPUs where it takes the shapes."""
    far, near = sides
    if not (fits(rows, far) and fits(rows, near)):
        return by_blocks(rows, sides, used, scale, axis, block=block)
    if axis is None:
        return flash_decoded(rows, sides, used, scale=scale, interpret=interpret)
    over = partial(flash_decode, rows, scale=scale, interpret=interpret)
    both = merge(merged_over(over((far,), used[:1]), axis), over((near,), used[1:]))
    return finish(both, rows.q_BKRH.dtype)


def by_splash(
    rows: Rows, sides: StackSides, used: Used, scale: float, axis: str | None, *, block: int, interpret: Any = False
) -> jax.Array:
    """The prefix by the kernel for TPUs where it takes the shapes, the tail in plain XLA.

    Empty slots of the prefix are last, and every query is behind it: how much is used is told by its positions.
    """
    far, near = sides
    if not splash_fits(rows, far.every if isinstance(far, Stack) else far):
        return by_blocks(rows, (far, near), used, scale, axis, block=block)
    seen = splash_decode(rows, far, scale=scale, interpret=interpret)
    if axis is not None:
        seen = merged_over(seen, axis)
    return finish(merge(seen, attend_blockwise(rows, near, scale=scale, block=block)), rows.q_BKRH.dtype)


def takes_stack(kernel: str, platform: str) -> bool:
    """Whether what `decode_of` gives reads a layer's keys and values out of those of all layers."""
    return platform == "tpu" and kernel != "xla"


def decode_of(kernel: str, platform: str, block: int) -> Decode:
    """What a strategy's kernel name means for decoding."""
    if takes_stack(kernel, platform):
        return partial(by_splash, block=block)
    return partial(by_kernel if platform == "gpu" and kernel != "xla" else by_blocks, block=block)
