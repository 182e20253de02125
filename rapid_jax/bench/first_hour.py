# SPDX-License-Identifier: Apache-2.0
"""What `rapid plan` assumes of a chip and nobody has measured on a TPU: a row times a matrix, a small sum over the
chips, and a layer's operations beside its matrices (`plan/speed.py`).
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from rapid_jax.bench.models import random_decoder, random_prefix
from rapid_jax.bench.parts import seconds_of
from rapid_jax.model.config import ModelConfig
from rapid_jax.model.decoder import Decoder
from rapid_jax.model.fused import fuse, quantize
from rapid_jax.model.matrix import MODEL, Matrix, Place
from rapid_jax.runtime.mesh import make_mesh
from rapid_jax.runtime.mesh_config import MeshConfig
from rapid_jax.speculative.draft import read
from rapid_jax.speculative.prefill import new_tail
from rapid_jax.speculative.state import Plan, Side

ROWS = 8  # that sums are of: a tile of them
LAYERS = 8  # of the decoder that is timed
PROMPT = 256  # tokens that its attention reads: next to nothing
STEPS, SUMS = 8, 64  # that one call makes


@dataclass(frozen=True)
class Product:
    """A row times gate and up of a layer."""

    weights: str  # full, int8
    us: float
    bytes_per_second: float

    def __str__(self) -> str:
        return f"a row times a matrix, {self.weights}: {self.us:.1f} us, {self.bytes_per_second / 1e12:.3g} TB/s"


@dataclass(frozen=True)
class Sum:
    """Of ROWS rows of a layer's output over all chips."""

    chips: int
    kib: float
    us: float

    def __str__(self) -> str:
        return f"sum over {self.chips} chips of {self.kib:.0f} KiB: {self.us:.1f} us"


@dataclass(frozen=True)
class Layer:
    """One token through a layer, by itself and without what reading its weights takes at the product's rate."""

    weights: str
    us: float
    small_us: float

    def __str__(self) -> str:
        return f"a layer, {self.weights}: {self.us:.1f} us, {self.small_us:.1f} of them not its matrices"


def first_hour(config: ModelConfig, dtype: Any, repeats: int, add: Callable[[str, dict[str, Any]], None]) -> None:
    """Measures and prints each as soon as it is there; `add` is given (part, its numbers)."""
    config = replace(config, num_layers=min(config.num_layers, LAYERS))
    decoder: Decoder = fuse(random_decoder(config, dtype), spent=True)

    def tell(item: Product | Sum | Layer) -> None:
        add(type(item).__name__.lower(), asdict(item))
        print(item, flush=True)

    if len(jax.devices()) > 1:
        tell(_sum(config, dtype, repeats))
    for weights in ("full", "int8"):
        decoder = decoder if weights == "full" else quantize(decoder, 8)
        blocks: Any = decoder.blocks
        wide = [block.gate_up if block.experts is None else block.qkv for block in blocks]
        product = _product(wide, config, dtype, weights, repeats)
        tell(product)
        tell(_layer(decoder, weights, product.bytes_per_second, repeats))


def _product(matrices: list[Matrix], config: ModelConfig, dtype: Any, weights: str, repeats: int) -> Product:
    """Each layer's matrix in turn, so that none is in a cache when it comes again."""
    x_BTD = jax.random.normal(jax.random.key(0), (1, 1, config.hidden_size), jnp.float32).astype(dtype)

    @jax.jit
    def run(x_BTD: jax.Array, matrices: list[Matrix]) -> jax.Array:
        def all_of_them(_, x_BTD):
            for matrix in matrices:
                x_BTD = x_BTD + 1e-3 * matrix(x_BTD)[..., : config.hidden_size]
            return x_BTD

        return lax.fori_loop(0, STEPS, all_of_them, x_BTD)

    seconds = seconds_of(lambda: run(x_BTD, matrices), repeats).least / STEPS / len(matrices)
    size = sum(x.nbytes for x in jax.tree.leaves(matrices[0]))
    return Product(weights, 1e6 * seconds, size / seconds)


def _sum(config: ModelConfig, dtype: Any, repeats: int) -> Sum:
    chips = len(jax.devices())
    dtype = jnp.dtype(jnp.float32) if jax.default_backend() == "cpu" else dtype  # CPUs cannot add bfloat16
    place = Place(make_mesh(MeshConfig(model=chips)))
    x_CTD = jnp.zeros((chips, ROWS, config.hidden_size), dtype)
    lying = NamedSharding(place.mesh, PartitionSpec(MODEL))  # type: ignore[arg-type]

    def local(x_CTD: jax.Array) -> jax.Array:
        return lax.fori_loop(0, SUMS, lambda _, x: lax.psum(x, MODEL) * jnp.asarray(1 / chips, x.dtype), x_CTD)

    own = PartitionSpec(MODEL)
    run = jax.jit(place.per_device(local, (own,), own))
    given = jax.device_put(x_CTD, lying)
    seconds = seconds_of(lambda: run(given), repeats).least / SUMS
    return Sum(chips, given.nbytes / chips / 2**10, 1e6 * seconds)


def _layer(decoder: Decoder, weights: str, rate: float, repeats: int) -> Layer:
    config, dtype = decoder.config, decoder.embed_VD[...].dtype
    prefix = random_prefix(config, batch=1, tokens=PROMPT, dtype=dtype)
    none_B = jnp.zeros(1, jnp.int32)
    side, plan = Side(decoder, prefix, none_B[:, None], none_B), Plan(0, 0, 1, PROMPT, config.vocab_size)

    def steps(count: int, side: Side, tail: Any, token_BT: jax.Array) -> jax.Array:
        def step(_, item):
            tail, token_BT = item
            logits_BTV, tail = read(side, tail, token_BT, plan, rows=1)
            return tail, jnp.argmax(logits_BTV, axis=-1).astype(jnp.int32)

        return lax.fori_loop(0, count, step, (tail, token_BT))[1]

    tail = new_tail(decoder, [PROMPT], 2 * STEPS, dtype)
    run = jax.jit(partial(steps, STEPS))
    head = jax.jit(lambda decoder, x: lax.fori_loop(0, STEPS, partial(_headed, decoder), x))
    hidden_BTD = jnp.zeros((1, 1, config.hidden_size), dtype)
    whole = seconds_of(lambda: run(side, tail, none_B[:, None]), repeats).least
    ends = seconds_of(lambda: head(decoder, hidden_BTD), repeats).least
    each = max(whole - ends, 0.0) / STEPS / config.num_layers
    blocks: Any = decoder.blocks
    size = sum(x.nbytes for x in jax.tree.leaves(blocks[0]))
    if (experts := config.experts) is not None:  # the token reads its own
        every = sum(x.nbytes for x in jax.tree.leaves(blocks[0].matrices[2:]))
        size -= every * (1 - experts.per_token / experts.count)
    return Layer(weights, 1e6 * each, 1e6 * max(each - size / rate, 0.0))


def _headed(decoder: Decoder, _: Any, x_BTD: jax.Array) -> jax.Array:
    token_BT = jnp.argmax(decoder.logits(x_BTD), axis=-1)
    return decoder.embed(token_BT)
