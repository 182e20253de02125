# SPDX-License-Identifier: Apache-2.0
"""Ring attention over several devices against one: prefill, gradients, decoding. Random weights of a real shape.

    python -m tests.benchmarks.ring --lengths 131072 262144 --devices 2

Prefill is timed from the second run on, so that compiling is left out; the figures are the best of `--repeats`.
"""

import argparse
import json
import time
from dataclasses import replace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from rapid_jax.attention.attend import attend_self
from rapid_jax.attention.order import inverse, zigzag
from rapid_jax.attention.strategy import Strategy
from rapid_jax.model.config import ModelConfig
from rapid_jax.model.decoder import Decoder
from rapid_jax.model.hf_names import weights
from rapid_jax.model.placement import build
from rapid_jax.plan.architectures import architecture_of
from rapid_jax.runtime.mesh import make_mesh
from rapid_jax.runtime.mesh_config import MeshConfig
from rapid_jax.speculative.config import SamplingConfig, SpeculationConfig
from rapid_jax.speculative.generate import Prompted, generate
from rapid_jax.speculative.prefill import prefill


def config_of(layers: int) -> ModelConfig:
    llama = architecture_of("", "llama-3.1-8b").config
    return replace(llama, num_layers=layers, max_positions=1 << 20)


def decoder_on(config: ModelConfig, mesh) -> Decoder:
    """Weights that repeat one random block: their values do not matter to the time."""
    shapes = {weight.key: weight.stored_shape for weight in weights(config)}
    block = np.random.default_rng(0).normal(size=1 << 20).astype(ml_dtypes.bfloat16)

    def read(key: str) -> np.ndarray:
        shape = shapes[key]
        return np.resize(block, shape) * ml_dtypes.bfloat16(shape[-1] ** -0.5)

    return build(config, read, layout="unrolled", dtype=jnp.dtype("bfloat16"), mesh=mesh, quiet=True)


def prefill_seconds(decoder: Decoder, length: int, chunk: int, over: str, repeats: int):
    """(best seconds of `repeats` runs after a first one, the prompt, its prefix)."""
    tokens = np.random.default_rng(1).integers(0, 32000, length).tolist()
    seconds, prefix = [], None
    for _ in range(repeats + 1):
        prefix = None  # frees the last one first
        start = time.perf_counter()
        prefix = prefill(decoder, [tokens], chunk=chunk, dtype=jnp.dtype("bfloat16"), over=over)  # type: ignore[arg-type]
        jax.block_until_ready(prefix)
        seconds.append(time.perf_counter() - start)
    print(f"    first run {seconds[0]:.1f} s, with compiling", flush=True)
    return min(seconds[1:]), tokens, prefix


def decode_ms(decoder: Decoder, tokens: list[int], prefix, new_tokens: int = 128) -> tuple[float, list[int]]:
    """(ms a token of greedy decoding, the tokens)."""
    side = Prompted(decoder, [[*tokens, 1]], prefix, [len(tokens)])
    plain = SpeculationConfig(mode="target", gamma=0, lookup="off", rounds_per_read=16)
    best, said = float("inf"), []
    for _ in range(2):
        sampling = SamplingConfig(temperature=0.0, max_new_tokens=new_tokens)
        done = generate(side, None, speculation=plain, sampling=sampling, stops=(), block=131072)
        best, said = min(best, 1e3 * done.decode_seconds / len(done.tokens[0])), done.tokens[0]
    return best, said


def gradients(mesh, dtype, length: int, over: str = "ring"):
    """(output, gradients of q, k and v, seconds) of causal attention in zigzag order on the mesh; whole arrays."""
    rng = np.random.default_rng(2)
    shapes = [(1, length, heads, 128) for heads in (32, 8, 8, 32)]
    q, k, v, cotangent = (jnp.asarray(rng.normal(size=shape).astype(np.float32), dtype) for shape in shapes)
    devices = 1 if mesh is None else mesh.shape["context"]
    order = zigzag(length, devices)
    strategy = Strategy(block=1024, mesh=mesh, over=over)  # type: ignore[arg-type]
    q, k, v, cotangent = (
        x[:, order] if mesh is None else jax.device_put(x[:, order], _lies(strategy)) for x in (q, k, v, cotangent)
    )
    pos_BT = jnp.asarray(order[None])

    @jax.jit
    def run(q, k, v, cotangent):
        def attention(q, k, v):
            return attend_self(pos_BT, strategy, runs=min(devices, 2))(q, k, v, None)[0]

        out, back = jax.vjp(attention, q, k, v)
        return out, *back(cotangent)

    results = jax.block_until_ready(run(q, k, v, cotangent))
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        jax.block_until_ready(run(q, k, v, cotangent))
        best = min(best, time.perf_counter() - start)
    back = inverse(order)
    return [np.asarray(x, np.float32)[:, back] for x in results], best


def _lies(strategy: Strategy):
    return jax.sharding.NamedSharding(strategy.mesh, strategy.spec("x_BTKH"))  # type: ignore[arg-type]


def compare_gradients(mesh) -> None:
    for dtype, length in (("float32", 4096), ("bfloat16", 32768)):
        (one, seconds), (many, spread) = gradients(None, dtype, length), gradients(mesh, dtype, length)
        errors = [float(np.linalg.norm(a - b) / np.linalg.norm(a)) for a, b in zip(one, many, strict=True)]
        named = dict(zip(("out", "dq", "dk", "dv"), (f"{error:.1e}" for error in errors), strict=True))
        print(
            f"gradients, {dtype}, {length} tokens: relative difference of one device and the mesh {named}; "
            f"{1e3 * seconds:.1f} ms against {1e3 * spread:.1f} ms",
            flush=True,
        )


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--lengths", type=int, nargs="+", default=[131072])
    options.add_argument("--devices", type=int, default=2)
    options.add_argument("--chunk", type=int, default=16384)
    options.add_argument("--layers", type=int, default=32)
    options.add_argument("--repeats", type=int, default=2)
    options.add_argument("--skip", nargs="*", default=[], choices=["one", "ring", "all_gather", "gradients"])
    given = options.parse_args()
    mesh = make_mesh(MeshConfig(context=given.devices), jax.devices()[: given.devices])
    print(f"{jax.devices()[0].device_kind} x {given.devices}, jax {jax.__version__}, chunk {given.chunk}", flush=True)
    if "gradients" not in given.skip:
        compare_gradients(mesh)
    config, rows = config_of(given.layers), []
    for where, over in (("one", "ring"), ("ring", "ring"), ("all_gather", "all_gather")):
        if where in given.skip:
            continue
        decoder = decoder_on(config, None if where == "one" else mesh)
        for length in given.lengths:
            seconds, tokens, prefix = prefill_seconds(decoder, length, given.chunk, over, given.repeats)
            ms, said = decode_ms(decoder, tokens, prefix) if where != "all_gather" else (None, None)
            rows.append({"where": where, "length": length, "prefill_s": seconds, "decode_ms": ms, "tokens": said})
            print(json.dumps(rows[-1] | {"tokens": (said or [])[:8]}), flush=True)
            prefix = None
        decoder = None
    for length in given.lengths:
        by = {row["where"]: row for row in rows if row["length"] == length}
        if "one" not in by:
            continue
        for where in by.keys() - {"one"}:
            gain = by["one"]["prefill_s"] / by[where]["prefill_s"]
            print(f"{length} tokens, {where}: {gain:.2f}x of one device, efficiency {gain / given.devices:.0%}")


if __name__ == "__main__":
    main()
