# SPDX-License-Identifier: Apache-2.0
"""Two continuations of one beginning in one sequence: which part sees which, without tags.

    trunk   beginning, first continuation      sees itself, causally
    tail    second continuation                sees the beginning, which is the trunk up to position `reach`, and itself

A tail row of position p sees of the trunk what a row of position min(p, reach) sees, and of the tail what any row of
position p sees; where the row has a first position, it is the same in both. So three calls of a kernel that knows
positions alone do it, and no block is visited for nothing.
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from rapid_jax.attention.kernels import Cotangent, Gradients, Kernel
from rapid_jax.attention.online_softmax import Rows, Slots, SoftmaxState, merge, rows_of


@dataclass(frozen=True)
class Forked:
    """`Kernel` of a forked sequence; `tail` positions at the end of rows and slots are the second continuation.

    Rows need `reach_BR`. `runs` is promised of trunk and tail, each by itself.
    """

    kernel: Kernel
    tail: int

    def forward(
        self, rows: Rows, slots: Slots, *, scale: float, runs: int = 0, used: jax.Array | None = None
    ) -> SoftmaxState:
        """Attention of the rows over the slots; `used` is not for sequences that end in a tail."""
        if used is not None:
            raise ValueError("a forked sequence has no unused slots at its end")
        trunk, tail, beginning = self._rows(rows)
        far, near = self._slots(slots)
        upper = self.kernel.forward(trunk, far, scale=scale, runs=runs)
        lower = merge(
            self.kernel.forward(beginning, far, scale=scale, runs=runs),
            self.kernel.forward(tail, near, scale=scale, runs=runs),
        )
        return jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=2), upper, lower)

    def backward(self, rows: Rows, slots: Slots, cotangent: Cotangent, *, scale: float, runs: int = 0) -> Gradients:
        """What these slots contribute to the gradients of q, and the gradients of their k and v."""
        trunk, tail, beginning = self._rows(rows)
        far, near = self._slots(slots)
        at = trunk.pos_BR.shape[1]
        first = jax.tree.map(lambda x: x[:, :, :at], cotangent)
        second = jax.tree.map(lambda x: x[:, :, at:], cotangent)
        dq, dk, dv = self.kernel.backward(trunk, far, first, scale=scale, runs=runs)
        far_q, far_k, far_v = self.kernel.backward(beginning, far, second, scale=scale, runs=runs)
        near_q, near_k, near_v = self.kernel.backward(tail, near, second, scale=scale, runs=runs)
        return (
            jnp.concatenate([dq, far_q + near_q], axis=2),
            jnp.concatenate([dk + far_k, near_k], axis=2),
            jnp.concatenate([dv + far_v, near_v], axis=2),
        )

    def _rows(self, rows: Rows) -> tuple[Rows, Rows, Rows]:
        """(the trunk's, the tail's, the tail's as they look at the trunk)."""
        at = rows.pos_BR.shape[1] - self.tail * rows.group
        assert rows.reach_BR is not None
        plain = replace(rows, branch_BR=None, reach_BR=None)
        trunk = rows_of(plain, 0, at)
        tail = rows_of(plain, at, rows.pos_BR.shape[1] - at)
        return trunk, tail, replace(tail, pos_BR=jnp.minimum(tail.pos_BR, rows.reach_BR[:, at:]))

    def _slots(self, slots: Slots) -> tuple[Slots, Slots]:
        """(the trunk's, the tail's)."""
        at = slots.pos_BS.shape[1] - self.tail
        far = Slots(slots.k_BKSH[:, :, :at], slots.v_BKSH[:, :, :at], slots.pos_BS[:, :at])
        return far, Slots(slots.k_BKSH[:, :, at:], slots.v_BKSH[:, :, at:], slots.pos_BS[:, at:])
