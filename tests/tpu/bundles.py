# SPDX-License-Identifier: Apache-2.0
"""What decoding's kernel for TPUs does for a block of a prefix, in bundles of instructions and in cycles of memory.

    python -m tests.tpu.bundles v5p:2x2x1 --kv-heads 8 --tokens 11 --int8

A bundle is issued a cycle, so without stalls that many cycles; a block's keys, values, scales and positions take at the
least `memory` cycles of the same clock. Read from the compiler's final schedule, where the block is the longest run
without a branch.
"""

import argparse
import itertools
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

CLOCKS = {"v5e": (1.5e9, 1), "v5p": (1.75e9, 2), "v6e": (1.75e9, 1)}  # hertz, cores that share the memory: from peaks
GROUP, HEAD_DIM, SLOTS, TAIL = 4, 128, 131072, 1536


@dataclass(frozen=True)
class Block:
    """Of one kv head and core."""

    slots: int
    bundles: int
    memory: int  # cycles


def runs(text: str) -> list[int]:
    """Bundles between one place that branches lead to and the next."""
    places, last = [0], 0
    for line in text.splitlines():
        found = re.match(r"\s*(0x[0-9a-f]+|0)\s+(LB|LH|LE|PB|PF|CT)?\s*:", line)
        if found:
            last = int(found[1], 16)
            places += [last] if found[2] else []
    places.append(last)
    return [after - before for before, after in itertools.pairwise(places)]


def compiled(topology: str, kv_heads: int, tokens: int, int8: bool, folder: str) -> tuple[int, int]:
    """Compiles the kernel, a stack of 3 layers; (slots of a block, its bytes). libtpu reads once where its texts go."""
    os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
    import jax
    import jax.numpy as jnp
    from jax.sharding import SingleDeviceSharding

    from rapid_jax.attention.online_softmax import Rows, Slots
    from rapid_jax.attention.tpu_decode import Stack, cut_of, tpu_decoded
    from rapid_jax.plan.topologies import topology_of

    sharding = SingleDeviceSharding(topology_of(topology).devices[0])

    def of(*shape: int, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def pos(*shape: int):
        return of(*shape, dtype=jnp.int32)

    def kv(*shape: int):
        return of(*shape, HEAD_DIM), of(*shape, HEAD_DIM)

    K, R = kv_heads, tokens * GROUP
    rows, new = Rows(of(1, K, R, HEAD_DIM), pos(1, R), None, GROUP), Slots(*kv(1, K, tokens), pos(1, tokens))
    far, near = (Slots(*kv(3, 1, K, slots), pos(1, slots)) for slots in (SLOTS, TAIL))
    if int8:
        whole = of(3, 1, K, SLOTS, HEAD_DIM, dtype=jnp.int8), of(3, 1, K, HEAD_DIM, SLOTS, dtype=jnp.int8)
        far = Slots(*whole, pos(1, SLOTS), None, *[of(3, 1, K, SLOTS, dtype=jnp.float32)] * 2)

    def decoded(rows, far, near, new, layer, used):
        sides = Stack(far, layer), Stack(near, layer), new
        return tpu_decoded(rows, sides, (used,) * 3, scale=HEAD_DIM**-0.5)

    jax.jit(decoded).lower(rows, far, near, new, pos(), pos()).compile()
    cut = cut_of(rows, far, near)
    assert cut is not None
    beside = (8 * K * int8 + 4) / cut.heads  # of all heads, once for those of a program
    return cut.blocks[0], round(cut.blocks[0] * (2 * HEAD_DIM * (1 if int8 else 2) + beside))


def measured(topology: str, *, kv_heads: int, tokens: int, int8: bool) -> Block:
    """By another process: libtpu writes its texts for all programs of one, or for none."""
    words = [topology, "--kv-heads", str(kv_heads), "--tokens", str(tokens), *["--int8"] * int8]
    done = subprocess.run([sys.executable, "-m", __name__, *words], check=True, capture_output=True, text=True)
    found = re.search(r"(\d+) slots: (\d+) bundles, (\d+) cycles of memory", done.stdout)
    assert found, done.stdout + done.stderr
    return Block(*map(int, found.groups()))


def main() -> None:
    """One line."""
    from rapid_jax.plan.topologies import GENERATIONS

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("topology")
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=11)
    parser.add_argument("--int8", action="store_true")
    options = parser.parse_args()
    name = options.topology.split(":")[0]
    clock, cores = CLOCKS[name]
    with tempfile.TemporaryDirectory() as folder:
        slots, read = compiled(options.topology, options.kv_heads, options.tokens, options.int8, folder)
        (path,) = (path for path in Path(folder).glob("*tpu_decode*final_bundles*") if "schedule" not in path.name)
        bundles = max(runs(path.read_text(encoding="utf-8")))
    memory = round(read / (GENERATIONS[name].hbm_rate / cores) * clock)
    print(f"{slots} slots: {bundles} bundles, {memory} cycles of memory")


if __name__ == "__main__":
    main()
