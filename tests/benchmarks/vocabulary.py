# SPDX-License-Identifier: Apache-2.0
"""What top-k and a nucleus cost over a vocabulary, by bits found a pass, against sorting it.

python -m tests.benchmarks.vocabulary

Microseconds of a call among fifty in one program, medians of five; "nothing" is a maximum, and in all of them.
"""

import argparse
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from rapid_jax.speculative import vocabulary

CALLS = 50


def timed(cut: Callable[[jax.Array], jax.Array], z_RV: jax.Array) -> float:
    """Microseconds of a cut, each of what the one before left."""

    @jax.jit
    def many(z_RV):
        return lax.fori_loop(0, CALLS, lambda _, z_RV: z_RV + 1e-6 * cut(z_RV), z_RV)

    jax.block_until_ready(many(z_RV))
    times = []
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready(many(z_RV))
        times.append((time.perf_counter() - start) / CALLS)
    return 1e6 * float(np.median(times))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 6, 64])
    parser.add_argument("--bits", type=int, nargs="*", default=[1, 2, 4, 8])
    options = parser.parse_args()
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}")
    for rows in options.rows:
        z_RV = 3 * jax.random.normal(jax.random.key(0), (rows, options.vocabulary))
        k, outside = jnp.full((rows, 1), 50), jnp.full((rows, 1), 0.1)
        known = {
            "nothing": lambda z_RV: jnp.max(z_RV, axis=-1, keepdims=True),
            "lax.top_k": lambda z_RV: lax.top_k(z_RV, 50)[0][..., -1:],
            "sort": lambda z_RV: jnp.sort(z_RV, axis=-1)[..., :1],
        }
        said = [f"{name} {timed(cut, z_RV):.0f}" for name, cut in known.items()]
        for bits in options.bits:
            vocabulary._edge = lambda *given, bits=bits: vocabulary._edge_by(bits, *given)
            top_k = timed(lambda z_RV: vocabulary.kth_largest(z_RV, k), z_RV)  # noqa: B023
            nucleus = timed(lambda z_RV: vocabulary.nucleus(z_RV, outside)[..., :1], z_RV)  # noqa: B023
            said.append(f"{bits} bits: top-k {top_k:.0f}, nucleus {nucleus:.0f}")
        print(f"{rows} rows: {'; '.join(said)}", flush=True)


if __name__ == "__main__":
    main()
