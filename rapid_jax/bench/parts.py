# SPDX-License-Identifier: Apache-2.0
"""The parts of decoding by themselves: the device's memory, attention of a few rows, prefill."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from rapid_jax.attention.decoding import by_blocks, decode_of
from rapid_jax.attention.kernels import platform_of
from rapid_jax.attention.online_softmax import Rows, Slots
from rapid_jax.bench.cases import Timing
from rapid_jax.model.config import ModelConfig
from rapid_jax.model.decoder import Decoder
from rapid_jax.speculative.prefill import prefill

TAIL = 256  # slots of it in the attention that is timed


def seconds_of(call: Callable[[], Any], repeats: int = 3) -> Timing:
    """The seconds of some calls, after one that compiles."""
    jax.block_until_ready(call())
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - start)
    return Timing.of(seconds)


def memory_rate(size: int) -> float:
    """Bytes a second that the device's memory gives at best: of a copy of `size` bytes, read and written, or a sum."""
    rows = jnp.arange(size // 4, dtype=jnp.int32)
    copied, summed = jax.jit(jnp.copy), jax.jit(jnp.sum)
    return max(2 * size / seconds_of(lambda: copied(rows)).least, size / seconds_of(lambda: summed(rows)).least)


@dataclass(frozen=True)
class Attention:
    """Of one layer, `tokens` new ones over a prompt; microseconds, medians of several timings."""

    context: int
    tokens: int
    kernel_us: float
    kernel_us_least: float  # of the timings
    kernel_us_most: float
    xla_us: float  # plain XLA in one block, the reference
    rate: float  # bytes of keys and values a second, by the kernel
    share: float  # of what the memory gives
    error: float  # of the kernel, relative to the reference

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def attention(
    config: ModelConfig, dtype: jnp.dtype, context: int, tokens: int, memory: float, repeats: int = 3
) -> Attention:
    """Times what a decoder of this shape does in every layer, as this platform does it, beside plain XLA."""
    K, H, group = config.num_kv_heads, config.head_dim, config.num_heads // config.num_kv_heads
    size = 2 * K * context * H * dtype.itemsize
    sets = max(2, min(8, -(-(1 << 28) // size))) if jax.default_backend() != "cpu" else 1  # more than a cache holds
    keys = jax.random.split(jax.random.key(0), 2 * sets + 1)

    @partial(jax.jit, static_argnums=1)
    def normal(key, slots):
        return jax.random.normal(key, (1, K, slots, H), jnp.float32).astype(dtype)

    pos = jnp.arange(context + TAIL, dtype=jnp.int32)[None]
    layers = [
        Slots(normal(a, context), normal(b, context), pos[:, :context])
        for a, b in zip(keys[::2], keys[1::2], strict=False)
    ]
    near = Slots(normal(keys[-1], TAIL), normal(keys[-1], TAIL), pos[:, context:])
    R = tokens * group
    pos_BR = jnp.full((1, R), context + TAIL - 1, jnp.int32)
    q_BKRH = jax.random.normal(keys[-1], (1, K, R, H), jnp.float32).astype(dtype)
    used, rounds = (jnp.int32(context), jnp.int32(TAIL)), 8 if context <= 131072 else 4

    def repeated(decode):
        def step(_, q, layers):
            for far in layers:
                q = decode(Rows(q, pos_BR, None, group), (far, near), used, H**-0.5, None)
            return q

        return jax.jit(lambda q, layers: lax.fori_loop(0, rounds, partial(step, layers=layers), q))

    ours, plain = decode_of("auto", platform_of(None), context), partial(by_blocks, block=context)
    calls = [repeated(decode) for decode in (ours, plain)]
    kernel, xla = (seconds_of(lambda call=call: call(q_BKRH, layers), repeats) for call in calls)
    us, each = 1e6 / rounds / sets, kernel.median / rounds / sets
    rows, sides = Rows(q_BKRH, pos_BR, None, group), (layers[0], near)
    got, wanted = (
        np.asarray(jax.jit(lambda rows, sides, f=f: f(rows, sides, used, H**-0.5, None))(rows, sides), np.float64)
        for f in (ours, plain)
    )
    error = float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))
    times = us * kernel.median, us * kernel.least, us * kernel.most, us * xla.median
    return Attention(context, tokens, *times, size / each, size / each / memory, error)


def prefill_seconds(decoder: Decoder, tokens: int, chunk: int, repeats: int = 3, *, seed: int = 0) -> Timing:
    """Seconds to read a prompt of so many random tokens, after a first time that compiles."""
    prompt = np.random.default_rng(seed).integers(0, decoder.config.vocab_size, tokens).tolist()
    dtype = decoder.embed_VD[...].dtype
    return seconds_of(lambda: prefill(decoder, [prompt], chunk=chunk, dtype=dtype), repeats)
