# SPDX-License-Identifier: Apache-2.0
"""A layer's products for a few rows on an NVIDIA GPU: the kernel by its tiles against XLA, in microseconds and TB/s.

    python -m tests.benchmarks.few_rows [--rows 1] [--all]

Every product is of weights that are not in the chip's cache: some matrices in turn.
"""

import argparse
import itertools
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp

from rapid_jax.model.decoder import rms_norm
from rapid_jax.model.few_rows import Tile, few_rows_matmul
from rapid_jax.model.matrix import times

D, F, QKV, EPS = 4096, 14336, 6144, 1e-5
SHAPES = {"qkv": (D, QKV), "out": (D, D), "gate_up": (D, 2 * F), "down": (F, D)}
COPIES = 6  # of a matrix: more than the cache


def by_xla(name, x, weight, norm, added):
    """As `FusedBlock` has it without the kernel."""
    x = rms_norm(x, norm, EPS) if name in ("qkv", "gate_up") else x
    out = times(x[None], weight, "DJ")[0].astype(x.dtype)
    if name == "gate_up":
        gate, up = jnp.split(out, 2, axis=-1)
        return jax.nn.silu(gate) * up
    return out if name == "qkv" else added + out


def by_kernel(name, x, weight, norm, added, tile):
    """The same by the kernel."""
    if name in ("qkv", "gate_up"):
        return few_rows_matmul(x, weight, norm_D=norm, eps=EPS, gated=name == "gate_up", tile=tile)
    return few_rows_matmul(x, weight, added_TJ=added, tile=tile)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--all", action="store_true", help="tiles of all kinds")
    options = parser.parse_args()
    tiles = [Tile()]
    if options.all:
        cut = itertools.product((128, 256, 512), (32, 64), (4, 8), (3, 5))
        tiles += [Tile(*one) for one in cut if one[0] * one[1] <= 16384 and Tile(*one) != Tile()]
    for name, (depth, width) in SHAPES.items():
        keys = jax.random.split(jax.random.key(0), COPIES + 3)
        weights = [(jax.random.normal(key, (depth, width)) * depth**-0.5).astype(jnp.bfloat16) for key in keys[3:]]
        x = jax.random.normal(keys[0], (options.rows, depth)).astype(jnp.bfloat16)
        norm = jax.random.normal(keys[1], (depth,)).astype(jnp.bfloat16)
        added = jax.random.normal(keys[2], (options.rows, width)).astype(jnp.bfloat16)

        def program(tile, name=name):
            def run(x, weights, norm, added):
                for weight in weights:  # each takes up what the one before made: they come one after the other
                    one = (
                        by_xla(name, x, weight, norm, added)
                        if tile is None
                        else by_kernel(name, x, weight, norm, added, tile)
                    )
                    x = x + 1e-9 * one[:, :1]
                return x, one

            try:
                return jax.jit(run).lower(x, weights, norm, added).compile()
            except Exception as error:
                return f"{type(error).__name__}: {str(error)[:100]}"

        with ThreadPoolExecutor(12) as pool:
            programs = list(pool.map(program, [None, *tiles]))
        want = None
        lines = []
        for tile, run in zip([None, *tiles], programs, strict=True):
            if isinstance(run, str):
                lines.append((1e9, f"{name:8} {tile}: {run}"))
                continue
            got = jax.block_until_ready(run(x, weights, norm, added))[1].astype(jnp.float32)
            want = got if want is None else want
            off = float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))
            best = []
            for _ in range(5):
                start = time.perf_counter()
                for _ in range(20):
                    made = run(x, weights, norm, added)
                jax.block_until_ready(made)
                best.append((time.perf_counter() - start) / 20 / COPIES)
            seconds = sorted(best)[2]
            rate = depth * width * 2 / seconds / 1e12
            lines.append(
                (
                    seconds if tile else 0,
                    f"{name:8} {tile or 'XLA'}: {1e6 * seconds:.1f} us, {rate:.2f} TB/s, off {off:.1e}",
                )
            )
        for _, line in sorted(lines)[:6]:
            print(line, flush=True)


if __name__ == "__main__":
    main()
