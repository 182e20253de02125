# SPDX-License-Identifier: Apache-2.0
"""cuDNN's attention at sizes of use, values and gradients, against XLA's in float32 on the same numbers.

tests/attention/test_kernels.py, which runs beside this, has the masks, at small sizes and against float64.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rapid_jax.attention.attend import attend_self
from rapid_jax.attention.order import zigzag
from rapid_jax.attention.strategy import Strategy


@dataclass(frozen=True)
class Size:
    batch: int
    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    runs: int = 1
    empty: int = 0  # places at the end of the last sequence
    window: int | None = None

    def positions(self) -> np.ndarray:
        pos = np.tile(np.arange(self.tokens, dtype=np.int32), (self.batch, 1))
        if self.empty:
            pos[-1, -self.empty :] = -1
        return pos


SIZES = (
    Size(1, 2048, 32, 8, 128),
    Size(2, 1500, 9, 3, 64, empty=333),
    Size(3, 777, 4, 4, 96),
    Size(1, 4096, 8, 1, 32),
    Size(1, 200, 4, 2, 256),  # heads that cuDNN is not given
    Size(2, 63, 4, 2, 64),  # fewer than it is worth
    Size(1, 4096, 32, 8, 128, window=1024),
    Size(2, 1500, 9, 3, 64, empty=333, window=100),
    Size(1, 1024, 4, 2, 64, window=1),
    Size(1, 1024, 4, 2, 128, window=1023),
)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_values_and_gradients(size):
    rng = np.random.default_rng(0)
    shapes = [(size.batch, size.tokens, heads, size.head_dim) for heads in (size.heads, size.kv_heads, size.kv_heads)]
    q, k, v = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in shapes)
    d_out = jnp.asarray(rng.normal(size=shapes[0]), jnp.bfloat16)
    pos_BT = jnp.asarray(size.positions())

    def both(kernel: str, dtype):
        attend = attend_self(pos_BT, Strategy(block=512, kernel=kernel), runs=size.runs)  # type: ignore[arg-type]

        @jax.jit
        def run(q, k, v, d_out):
            out, pull = jax.vjp(lambda *qkv: attend(*qkv, None, size.window)[0], q, k, v)
            return out, *pull(d_out)

        return [np.asarray(x.astype(jnp.float32)) for x in run(*(x.astype(dtype) for x in (q, k, v, d_out)))]

    found, right = both("cudnn", jnp.bfloat16), both("xla", jnp.float32)
    least = 1e-4 * np.sqrt(d_out.size)  # rows that see one slot have no gradient at q and k
    for name, got, want in zip(("out", "dq", "dk", "dv"), found, right, strict=True):
        assert np.all(np.isfinite(got)), name
        assert np.linalg.norm(got - want) <= 8e-3 * max(np.linalg.norm(want), least), name


def test_zigzag_order():
    """The order in which several devices share a sequence, on one: two runs of positions."""
    size = Size(1, 2048, 8, 2, 64)
    rng, order = np.random.default_rng(1), zigzag(size.tokens, 2)[:1024]  # the first device's half
    pos_BT = jnp.asarray(order[None].astype(np.int32))
    q, k, v = (jnp.asarray(rng.normal(size=(1, 1024, heads, 64)), jnp.bfloat16) for heads in (8, 2, 2))
    outs = []
    for kernel, dtype in (("cudnn", jnp.bfloat16), ("xla", jnp.float32)):
        attend = attend_self(pos_BT, Strategy(block=512, kernel=kernel), runs=2)  # type: ignore[arg-type]
        out = jax.jit(lambda *qkv, attend=attend: attend(*qkv, None)[0])(*(x.astype(dtype) for x in (q, k, v)))
        outs.append(np.asarray(out.astype(jnp.float32)))
    assert np.linalg.norm(outs[0] - outs[1]) <= 6e-3 * np.linalg.norm(outs[1])
