# SPDX-License-Identifier: Apache-2.0
"""Attention of a sequence that is spread over a mesh axis: each device keeps its queries and sees all keys in turn.

Ring attention (arXiv 2310.01889). Keys and values go round the ring; every device adds what its own queries see of the
visitors. In the backward pass they go round once more and their gradients travel with them, one hop behind, so that
nothing is kept per hop. What sees what is told by the positions that travel along: any order of tokens is right, and
the zigzag order (`order.py`) makes the work equal.

Everything here runs inside `shard_map`, or with axis None on a sequence that is whole.

    hop      device 0   device 1   device 2   device 3        the visitor's gradients, one hop behind
    0        0          1          2          3
    1        3          0          1          2               3          0          1          2
    2        2          3          0          1               ...
    3        1          2          3          0

Where rows see no more than a window, in zigzag order, that fits into half of a device's slots, nothing goes round: each
device sends the end of its two runs to the neighbours that go on there (`before`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from rapid_jax.attention.config import Over
from rapid_jax.attention.kernels import Cotangent, Kernel
from rapid_jax.attention.online_softmax import Rows, Slots, SoftmaxState, block_of, finish, log_sum, merge, rows_of

ATTENDED = "attended"  # by this name `jax.checkpoint` policies know what attention gives


@dataclass(frozen=True)
class Hops:
    """How keys and values reach a device's queries. Static.

    over ring        from neighbour to neighbour, n - 1 times; memory for one visitor
    over all_gather  all at once, before anything is computed; memory for all of them
    """

    axis: str | None  # mesh axis; None: they are all here
    over: Over = "ring"


def fits_neighbours(size: int, window: int | None, runs: int, hops: Hops) -> bool:
    """Whether rows see nothing but their device's slots, `size` of them in 2 promised runs, and those `before` them."""
    several = hops.axis is not None and lax.axis_size(hops.axis) > 1
    return several and window is not None and runs == 2 and size % 2 == 0 and window - 1 <= size // 2


def before(slots: Slots, window: int, axis: str) -> tuple[Slots, Slots]:
    """The slots in the window's reach before each of this device's two runs, in zigzag order. Differentiable.

    Empty where a run is the first, or where what comes before it is here.

        device    0          1          2          3
        runs      0    7     1    6     2    5     3    4
        before         6'    0'   5'    1'   4'    2'
    """
    count, half, width = lax.axis_size(axis), slots.pos_BS.shape[1] // 2, max(window - 1, 1)
    marked = replace(slots, pos_BS=slots.pos_BS + 1)  # who is sent nothing has 0

    def sent(start: int, pairs: list[tuple[int, int]]) -> Slots:
        got = jax.tree.map(lambda x: lax.ppermute(x, axis, pairs), block_of(marked, start, width))
        return replace(got, pos_BS=got.pos_BS - 1)

    onward = [(device, device + 1) for device in range(count - 1)]
    return sent(half - width, onward), sent(2 * half - width, [(there, here) for here, there in onward])


def _beginning(rows: Rows, one: Slots, run: int) -> tuple[int, int]:
    """(start, size) of the rows at the beginning of a run that may see the slots before it."""
    return run * (rows.pos_BR.shape[1] // 2), one.pos_BS.shape[1] * rows.group


def attend_before(
    total: SoftmaxState, rows: Rows, two: Sequence[Slots], attend: Callable[[Rows, Slots], SoftmaxState]
) -> SoftmaxState:
    """`total` with what the rows see of the slots `before` their runs: by the first rows of each alone."""
    for run, one in enumerate(two):
        start, size = _beginning(rows, one, run)
        some = jax.tree.map(lambda x, at=start, size=size: x[:, :, at : at + size], total)
        some = merge(some, attend(rows_of(rows, start, size), one))
        total = jax.tree.map(lambda x, new, at=start, size=size: x.at[:, :, at : at + size].set(new), total, some)
    return total


def attend_visitors(rows: Rows, home: Any, attend: Callable[[Rows, Any], SoftmaxState], hops: Hops) -> SoftmaxState:
    """The sum of `attend(rows, visitor)` over every device's `home`, a pytree of arrays."""
    count = 1 if hops.axis is None else lax.axis_size(hops.axis)
    if count == 1:
        return attend(rows, home)
    if hops.over == "all_gather":
        others = jax.tree.map(lambda x: lax.all_gather(x, hops.axis), home)

        def visit(total: SoftmaxState | None, index) -> SoftmaxState:
            partial = attend(rows, jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, index, keepdims=False), others))
            return partial if total is None else merge(total, partial)

        return lax.fori_loop(1, count, lambda index, total: visit(total, index), visit(None, 0))

    def hop(carry, _):
        visitor, total = carry
        coming, partial = _while_shifting(visitor, lambda: attend(rows, visitor), hops.axis)
        return (coming, merge(total, partial)), None

    carry = _while_shifting(home, lambda: attend(rows, home), hops.axis)
    (last, total), _ = lax.scan(hop, carry, length=count - 2)
    return merge(total, attend(rows, last))


@dataclass(frozen=True)
class _Static:
    kernel: Kernel
    scale: float
    runs: int
    hops: Hops


def ring_attention(rows: Rows, slots: Slots, *, kernel: Kernel, scale: float, runs: int = 0, hops: Hops) -> jax.Array:
    """softmax(scale q.k) v of every row over the slots of all devices, [B, K, R, H] in the queries' dtype.

    Differentiable in q, k and v. `runs` as in `Kernel`; 2 over devices is the zigzag order of sequences without gaps. A
    row that sees nothing is 0, and so are its gradients.
    """
    more: tuple[Slots, ...] = ()
    if fits_neighbours(slots.pos_BS.shape[1], rows.window, runs, hops):
        assert rows.window is not None and hops.axis is not None
        more, hops = before(slots, rows.window, hops.axis), Hops(None)
    return _attention(rows, (slots, *more), _Static(kernel, scale, runs, hops))


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _attention(rows: Rows, sets: tuple[Slots, ...], static: _Static) -> jax.Array:
    return _forward(rows, sets, static)[0]


def _forward(rows: Rows, sets: tuple[Slots, ...], static: _Static):
    """Over the first set's slots of all devices, and over the others, which are here."""

    def attend(rows: Rows, visitor: Slots) -> SoftmaxState:
        return static.kernel.forward(rows, visitor, scale=static.scale, runs=static.runs)

    slots, *more = sets
    total = attend_before(attend_visitors(rows, slots, attend, static.hops), rows, more, attend)
    # Named: a remat policy that keeps both spares the backward pass a second forward pass of the kernels.
    out_BKRH = checkpoint_name(finish(total, rows.q_BKRH.dtype), ATTENDED)
    return out_BKRH, (rows, sets, out_BKRH, checkpoint_name(log_sum(total), ATTENDED))


def _backward(static: _Static, residuals, d_out_BKRH: jax.Array):
    rows, (slots, *more), out_BKRH, log_sum_BKR = residuals
    delta_BKR = jnp.sum(out_BKRH.astype(jnp.float32) * d_out_BKRH.astype(jnp.float32), axis=-1)
    cotangent = Cotangent(out_BKRH, d_out_BKRH.astype(rows.q_BKRH.dtype), delta_BKR, log_sum_BKR)

    def gradients(visitor: Slots):
        return static.kernel.backward(rows, visitor, cotangent, scale=static.scale, runs=static.runs)

    dq, *home = _gradients_of_visitors(slots, gradients, static.hops)
    found = [(slots, *home)]
    for run, one in enumerate(more):
        start, size = _beginning(rows, one, run)
        some = jax.tree.map(lambda x, at=start, size=size: x[:, :, at : at + size], cotangent)
        more_q, *kv = static.kernel.backward(rows_of(rows, start, size), one, some, scale=static.scale, runs=1)
        dq, found = dq.at[:, :, start : start + size].add(more_q), [*found, (one, *kv)]
    none: Any = None
    return (
        Rows(dq.astype(rows.q_BKRH.dtype), none, none, rows.group, window=rows.window),
        tuple(Slots(dk.astype(x.k_BKSH.dtype), dv.astype(x.v_BKSH.dtype), none, none) for x, dk, dv in found),
    )


_attention.defvjp(_forward, _backward)


def _gradients_of_visitors(home: Slots, gradients: Callable[[Slots], Any], hops: Hops):
    """(dq over all visitors, dk and dv of `home` over all devices' queries), float32."""
    count = 1 if hops.axis is None else lax.axis_size(hops.axis)
    if count == 1:
        return gradients(home)
    if hops.over == "all_gather":
        return _gradients_of_gathered(home, gradients, hops.axis, count)

    def hop(carry, _):
        visitor, dq, dkv = carry
        (coming, dkv), (more_q, more_kv) = _while_shifting((visitor, dkv), lambda: packed(visitor), hops.axis)
        return (coming, dq + more_q, dkv + more_kv), None

    # dk and dv travel as one array: of the five that would be under way, XLA's scheduler starts only four in time.
    def packed(visitor: Slots):
        dq, dk, dv = gradients(visitor)
        return dq, jnp.stack([dk, dv])

    first, (dq, dkv) = _while_shifting(home, lambda: packed(home), hops.axis)
    (last, dq, dkv), _ = lax.scan(hop, (first, dq, dkv), length=count - 2)
    dkv, (more_q, more_kv) = _while_shifting(dkv, lambda: packed(last), hops.axis)
    dk, dv = _shift(dkv + more_kv, hops.axis)  # home
    return dq + more_q, dk, dv


def _gradients_of_gathered(home: Slots, gradients: Callable[[Slots], Any], axis: str | None, count: int):
    others = jax.tree.map(lambda x: lax.all_gather(x, axis), home)

    def visit(dq, index):
        visitor = jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, index, keepdims=False), others)
        more_q, dk, dv = gradients(visitor)
        return dq + more_q, (dk, dv)

    shape = jax.eval_shape(lambda: gradients(home)[0])
    dq, (dk, dv) = lax.scan(visit, jnp.zeros(shape.shape, shape.dtype), jnp.arange(count))
    return dq, *(lax.psum_scatter(x, axis, scatter_dimension=0) for x in (dk, dv))


def _while_shifting(tree: Any, compute: Callable[[], Any], axis: str | None) -> tuple[Any, Any]:
    """(What the device before this one has of the tree, the result of `compute`), the first under way during the other.

    The barrier holds back what uses either. Without it XLA's scheduler hides the transfer behind the cheap sums that
    follow the kernels, and no part of it behind the kernels.
    """
    return lax.optimization_barrier((_shift(tree, axis), compute()))


def _shift(tree: Any, axis: str | None) -> Any:
    """What the device before this one has."""
    count = lax.axis_size(axis)
    return jax.tree.map(lambda x: lax.ppermute(x, axis, [(i, (i + 1) % count) for i in range(count)]), tree)


def merge_over(partial: SoftmaxState, axis: str) -> SoftmaxState:
    """The sum of every device's partial of the same rows: three small tensors are reduced, no key or value moves."""
    peak = lax.pmax(partial.max_BKR, axis)
    weight = jnp.exp(partial.max_BKR - jnp.where(peak == -jnp.inf, 0.0, peak))
    out_BKRH, sum_BKR = lax.psum((partial.out_BKRH * weight[..., None], partial.sum_BKR * weight), axis)
    return replace(partial, out_BKRH=out_BKRH, max_BKR=peak, sum_BKR=sum_BKR)
