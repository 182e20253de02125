# SPDX-License-Identifier: Apache-2.0
"""How fast a document's keys and values go to the host and come back: python -m tests.benchmarks.tiers --tokens 131072

The shape is Llama-3.1-8B's. Beside what the engine does: the same arrays by memory that is pinned, where JAX has it.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rapid_jax.attention.cache import Prefix, empty_layers
from rapid_jax.engine.host_prefixes import HostMoves, device_bytes
from tests.engine.prefix_cases import MESHES, decoder_on


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    done = jax.block_until_ready(work())
    return time.perf_counter() - start, done


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    shape = {"num_layers": options.layers, "batch": 1, "kv_heads": 8, "slots": options.tokens, "head_dim": 128}
    layers = empty_layers(**shape, dtype=jnp.dtype("bfloat16"), stacked=False)
    pos_BS = jnp.arange(options.tokens, dtype=jnp.int32)[None]
    prefix = jax.block_until_ready(Prefix(layers, pos_BS, jnp.asarray(np.int32(options.tokens))))
    size, moves = device_bytes(prefix), HostMoves(decoder_on(MESHES["one device"]))
    print(f"{options.tokens} tokens, {size / 1e9:.2f} GB on {jax.devices()[0].device_kind}")
    for _ in range(options.repeats):
        # An array keeps what was once read of it: each turn takes new ones.
        fresh = jax.block_until_ready(jax.tree.map(jnp.copy, prefix))
        down, kept = timed(lambda fresh=fresh: moves.to_host(fresh))
        up, _ = timed(lambda kept=kept: moves.to_devices(kept))
        print(f"  to the host {size / down / 1e9:.1f} GB/s, to the device {size / up / 1e9:.1f} GB/s")
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    try:
        pinned = here.with_memory_kind("pinned_host")
        for _ in range(options.repeats):
            down, kept = timed(lambda: jax.device_put(prefix, pinned))
            up, _ = timed(lambda kept=kept: jax.device_put(kept, here))
            print(f"  pinned: to the host {size / down / 1e9:.1f} GB/s, to the device {size / up / 1e9:.1f} GB/s")
    except (ValueError, RuntimeError) as error:
        print(f"  no pinned memory here: {error}")


if __name__ == "__main__":
    main()
