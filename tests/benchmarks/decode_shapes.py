# SPDX-License-Identifier: Apache-2.0
"""How the decoding kernel is best cut, by the number of rows of a kv head: python -m tests.benchmarks.decode_shapes

Llama-3.1-8B's attention in one layer. GB/s are of keys and values read once, whatever the cut reads: what a document
costs in a round. Errors are against the first cut. A cut that asks for more than a multiprocessor has is told.
"""

import argparse
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from rapid_jax.attention.flash_decode import Shape, flash_decode, shape_of
from rapid_jax.attention.online_softmax import Rows, Slots, finish
from tests.attention.decode_cases import error

CUTS = {  # by rows of a kv head
    64: [(64, 64, 4, 3, 264), (64, 128, 4, 2, 264), (32, 64, 4, 3, 264)],
    128: [
        *[
            (128, 64, 8, 2, 132),
            (128, 64, 8, 3, 132),
            (128, 128, 8, 2, 132),
            (128, 32, 8, 3, 132),
            (128, 64, 4, 2, 132),
        ],
        *[(64, 64, 4, 3, 264), (64, 128, 4, 2, 264), (64, 32, 4, 3, 264), (64, 64, 4, 3, 396), (64, 128, 8, 2, 132)],
    ],
    256: [(64, 64, 4, 3, 264), (64, 128, 4, 2, 264), (128, 64, 8, 2, 132), (128, 64, 8, 3, 132)],
}
CALLS = 32


def slots_of(tokens: int, kv_heads: int, head_dim: int, int8: bool) -> Slots:
    """Of random keys and values."""
    rng = np.random.default_rng(0)
    pos_BS = jnp.arange(tokens, dtype=jnp.int32)[None]
    shape = (1, kv_heads, tokens, head_dim)
    keys = jax.random.split(jax.random.key(0))
    if not int8:
        k, v = (jax.random.normal(key, shape, jnp.bfloat16) for key in keys)
        return Slots(k, v, pos_BS)
    k, v = (
        jax.random.randint(key, size, -127, 128, jnp.int8)
        for key, size in zip(keys, (shape, transposed(shape)), strict=True)
    )
    scales = (jnp.asarray(rng.uniform(0.005, 0.015, shape[:3]), jnp.float32) for _ in range(2))
    return Slots(k, v, pos_BS, None, *scales)


def transposed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Rounded values lie slots last."""
    return (*shape[:2], shape[3], shape[2])


@partial(jax.jit, static_argnames=("calls", "shape"))
def attended(q_BKRH: jax.Array, slots: Slots, *, calls: int, shape: Shape) -> jax.Array:
    """Attention so many times, each of what came before."""
    tokens = slots.pos_BS.shape[1]
    pos_BR = jnp.full((1, q_BKRH.shape[2]), tokens, jnp.int32)

    def step(_, q_BKRH):
        seen = flash_decode(Rows(q_BKRH, pos_BR), (slots,), (jnp.int32(tokens),), scale=128**-0.5, shape=shape)
        return finish(seen, jnp.bfloat16) + q_BKRH

    return lax.fori_loop(0, calls, step, q_BKRH)


def measure(count: int, slots: Slots, name: str) -> None:
    """A line for each cut of so many rows."""
    q_BKRH = jax.random.normal(jax.random.key(1), (1, 8, count, 128), jnp.bfloat16)
    size, first = slots.k_BKSH.nbytes + slots.v_BKSH.nbytes, None
    for shape in (Shape(*cut) for cut in CUTS[count]):
        try:
            out = np.asarray(attended(q_BKRH, slots, calls=1, shape=shape).astype(jnp.float32), np.float64)
        except Exception as refusal:
            print(f"{name}, {count} rows, {shape}: {str(refusal).splitlines()[0][:150]}", flush=True)
            continue
        first = out if first is None else first
        jax.block_until_ready(attended(q_BKRH, slots, calls=CALLS, shape=shape))
        times = []
        for _ in range(5):
            start = time.perf_counter()
            jax.block_until_ready(attended(q_BKRH, slots, calls=CALLS, shape=shape))
            times.append((time.perf_counter() - start) / CALLS)
        took, gap = float(np.median(times)), error(jnp.asarray(out), first)
        mark = " (in use)" if shape == shape_of(count, slots.k_scale_BKS is not None) else ""
        speed = f"{1e6 * took:.0f} us, {size / took / 1e9:.0f} GB/s"
        print(f"{name}, {count} rows, {shape}: {speed}, error {gap:.1e}{mark}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--rows", type=int, nargs="*", choices=list(CUTS), default=list(CUTS))
    options = parser.parse_args()
    for int8 in (False, True):
        slots = slots_of(options.tokens, 8, 128, int8)
        for count in options.rows:
            measure(count, slots, "int8" if int8 else "full")


if __name__ == "__main__":
    main()
