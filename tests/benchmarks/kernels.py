# SPDX-License-Identifier: Apache-2.0
"""Where a decoding step's time goes, kernel by kernel, on NVIDIA GPUs: `rapid bench`'s models under JAX's profiler.

    python -m tests.benchmarks.kernels --case plain --context 131072 [--mesh context=2] [--layers 8]

For every GPU: how long it was busy for a step, and the kernels that took the most. Steps are a drafter's where one
drafts, else the target's.
"""

import argparse
import collections
import tempfile
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp

from rapid_jax.bench.decoding import Decoding
from rapid_jax.bench.options import case_of, shape_of
from rapid_jax.runtime.command_line import prepare_jax
from rapid_jax.runtime.mesh_config import MeshConfig


def main() -> None:
    """Decodes under the profiler and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", default="plain")
    parser.add_argument("--context", type=int, default=131072)
    parser.add_argument("--mesh", type=str)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--dial", type=float, default=16.0)
    parser.add_argument("--kernels", type=int, default=20)
    options = parser.parse_args()
    prepare_jax(programs=True, cache=None)
    over = None if options.mesh is None else MeshConfig.named(options.mesh)
    config = shape_of("llama-3.1-8b", options.layers)
    bench = Decoding(config, jnp.dtype("bfloat16"), 8192, options.tokens, 1, dial=options.dial, over=over)
    case = replace(case_of(options.case), context=options.context)
    bench._decode(case)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            made = bench._decode(case)
        (trace,) = Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(trace))
    steps = made.draft_steps or made.target_steps
    wall = 1e3 * made.decode_seconds / steps
    print(f"{case}, context {case.context}, {over or 'one device'}: {wall:.2f} ms a step, {steps} steps")
    for plane in data.planes:
        events = [event for line in plane.lines if "Stream" in line.name for event in line.events]
        if "GPU" not in plane.name or not events:
            continue
        total, count = collections.Counter(), collections.Counter()
        for event in events:
            total[event.name] += event.duration_ns
            count[event.name] += 1
        print(f"{plane.name}: busy {sum(total.values()) / 1e6 / steps:.2f} ms a step, all streams added")
        for name, nanoseconds in total.most_common(options.kernels):
            each, times = nanoseconds / 1e3 / count[name], count[name] / steps
            print(f"  {nanoseconds / 1e3 / steps:9.1f} us a step {times:8.2f} times {each:8.2f} us  {name[:90]}")


if __name__ == "__main__":
    main()
