# SPDX-License-Identifier: Apache-2.0
"""Attention of a few new tokens over a prefix and a tail, on one device's parts of them: by platform.

gpu    `flash_decode.py`: a kernel that reads every key once
tpu    `tpu_decode.py`: the same
else   plain XLA, a block of the prefix at a time; the reference

Each takes a prefix of one sequence under the rows of many, and reads it once for all of them.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from rapid_jax.attention.flash_decode import fits, flash_decoded
from rapid_jax.attention.online_softmax import (
    Rows,
    Slots,
    SoftmaxState,
    attend_block,
    attend_blockwise,
    attend_what_is_seen,
    finish,
    merge,
    nothing_seen,
)
from rapid_jax.attention.ring import merge_over
from rapid_jax.attention.shared_prefix import is_shared, over_shared
from rapid_jax.attention.tpu_decode import Stack, tpu_decode, tpu_decoded
from rapid_jax.attention.tpu_decode import fits as tpu_fits

# This device's part of the prefix; the tail, whole on every device, and for TPUs perhaps the new tokens, not yet in it.
Sides: TypeAlias = tuple[Slots, ...]
StackSides: TypeAlias = tuple[Slots | Stack, ...]
Used: TypeAlias = tuple[jax.Array, ...]  # slots from there on are empty
# (rows, `Sides`, or `StackSides` for `by_tpu_kernel`, used, scale, mesh axis that the prefix is split over) -> softmax
# over the keys of all times the values, [B, K, R, H] in the queries' dtype
Decode: TypeAlias = Callable[[Rows, Any, Used, float, str | None], jax.Array]


def by_blocks(rows: Rows, sides: StackSides, used: Used, scale: float, axis: str | None, *, block: int) -> jax.Array:
    """In plain XLA."""
    del used  # every block is looked at, empty ones too: the loops' length is known to XLA
    far, *others = sides
    skip = rows.first_BR is not None
    if isinstance(far, Stack):
        slots, attend = far.every, partial(attend_stack, stack=far, scale=scale, block=block)
    else:
        slots, attend = far, partial(attend_blockwise, slots=far, scale=scale, block=block, skip=skip)
    seen = over_shared(rows, slots, attend, most=rows.pos_BR.size) if is_shared(rows, slots) else attend(rows)
    if axis is not None:
        seen = merge_over(seen, axis)
    for side in others:
        near = side.one() if isinstance(side, Stack) else side
        seen = merge(seen, attend_blockwise(rows, near, scale=scale, block=block))
    return finish(seen, rows.q_BKRH.dtype)


def attend_stack(rows: Rows, stack: Stack, *, scale: float, block: int) -> SoftmaxState:
    """`attend_blockwise` over a layer in the stack of all: each block is read where it lies, quantised ones as int8.

    The layer taken out first would be a copy of it, written and read again. Blocks before all first positions of the
    rows are left out.
    """
    size = stack.every.pos_BS.shape[1]
    whole, rest = divmod(size, min(block, size))

    def add(seen: SoftmaxState, start: jax.Array | int, count: int) -> SoftmaxState:
        part = stack.block(start, count)
        if rows.first_BR is None:
            return merge(seen, attend_block(rows, part, scale=scale))
        return attend_what_is_seen(seen, rows, part, scale=scale)

    def step(index: jax.Array, seen: SoftmaxState) -> SoftmaxState:
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
    over = None if axis is None or lax.axis_size(axis) == 1 else axis
    return flash_decoded(rows, sides, used, scale=scale, axis=over, interpret=interpret)


def by_tpu_kernel(
    rows: Rows, sides: StackSides, used: Used, scale: float, axis: str | None, *, block: int, interpret: Any = False
) -> jax.Array:
    """By the kernel for TPUs where it takes the shapes."""
    far, *others = sides
    if not all(tpu_fits(rows, far, side) for side in others):
        return by_blocks(rows, sides, used, scale, axis, block=block)
    if axis is None or lax.axis_size(axis) == 1:
        return tpu_decoded(rows, sides, used, scale=scale, interpret=interpret)
    # What every device has whole the first adds.
    first = lax.axis_index(axis) == 0
    used = used[0], *(jnp.where(first, count, 0) for count in used[1:])
    seen = tpu_decode(rows, sides, used, scale=scale, interpret=interpret)
    return finish(merge_over(seen, axis), rows.q_BKRH.dtype)


def takes_stack(kernel: str, platform: str) -> bool:
    """Whether what `decode_of` gives reads a layer's keys and values out of those of all layers, and new ones apart."""
    return platform == "tpu" and kernel != "xla"


def decode_of(kernel: str, platform: str, block: int) -> Decode:
    """What a strategy's kernel name means for decoding."""
    if takes_stack(kernel, platform):
        return partial(by_tpu_kernel, block=block)
    return partial(by_kernel if platform == "gpu" and kernel != "xla" else by_blocks, block=block)
