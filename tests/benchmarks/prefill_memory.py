# SPDX-License-Identifier: Apache-2.0
"""Peak memory of one long prefill with SmolLM2 in float32, as the operating system counts the process.

python -m tests.benchmarks.prefill_memory [--tokens 32768]
"""

import argparse
import os
import resource
import time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32768)
    arguments = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"

    import jax
    import jax.numpy as jnp

    from rapid_jax.model.load import load_model
    from rapid_jax.runtime.progress import progress
    from rapid_jax.speculative.prefill import prefill

    def peak_gb() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

    decoder = load_model("smollm2", layout="unrolled", dtype="float32", decodes=True, quiet=True).decoder
    loaded = peak_gb()
    prompt = [token % 40000 for token in range(7, 7 + arguments.tokens)]
    start = time.perf_counter()
    with progress("prefill", arguments.tokens, "tokens") as report:
        prefix = prefill(decoder, [prompt], chunk=512, dtype=jnp.dtype("float32"), progress=report)
    jax.block_until_ready(prefix)
    cache = sum(array.nbytes for array in jax.tree.leaves(prefix)) / 2**30
    print(
        f"{arguments.tokens} tokens in {time.perf_counter() - start:.0f} s: peak {peak_gb():.2f} GiB "
        f"(after loading {loaded:.2f}, of which weights 0.50; the cache itself {cache:.2f})"
    )


if __name__ == "__main__":
    main()
