# SPDX-License-Identifier: Apache-2.0
"""Matrices of 8 and 4 bits: how far a weight may be off, what a decoder made of them says, and its fast path."""

from collections import Counter
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, cast

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rapid_jax.attention.attend import attend_self
from rapid_jax.attention.strategy import Strategy
from rapid_jax.bench.models import random_decoder
from rapid_jax.model import fused_decoder
from rapid_jax.model import quantized as quantized_module
from rapid_jax.model.config import ModelConfig, Rope
from rapid_jax.model.decoder import Decoder
from rapid_jax.model.fused import quantize
from rapid_jax.model.fused_decoder import FusedBlock, Pending
from rapid_jax.model.matrix import Matrix
from rapid_jax.model.placement import build, stored_arrays
from rapid_jax.model.quantized import dequantize, kernels_fit, product, quantize_weights
from rapid_jax.model.skinny import GROUP, fixed_point, skinny_matmul


def weights(depth: int, width: int, dtype=jnp.float32, seed: int = 0) -> jax.Array:
    """[D, N] with columns of different sizes, one of zeros, and groups whose largest element has either sign."""
    rng = np.random.default_rng(seed)
    w_DN = rng.normal(size=(depth, width)) * rng.uniform(0.01, 10, width)
    w_DN[:, 1] = 0
    w_DN[5, 2], w_DN[5, 3] = 1000, -1000
    w_DN[:, 4] = np.where(np.arange(depth) % 2, 3.0, -3.0)  # of the two, 4 bits have one exactly
    return jnp.asarray(w_DN.astype(dtype))


@pytest.mark.parametrize("depth, dtype", [(256, jnp.float32), (200, jnp.bfloat16)])
def test_8_bits_are_off_by_half_a_step_at_most(depth, dtype):
    w_DN = weights(depth, 24, dtype)
    values, scale_N = quantize_weights(w_DN, 8)
    assert values.shape == (24, 256) and values.dtype == jnp.int8 and scale_N.dtype == jnp.float32
    w_ND, got_ND = np.asarray(w_DN, np.float64).T, np.asarray(dequantize(values, scale_N, 8), np.float64)
    largest_N = np.max(np.abs(w_ND), axis=1)
    np.testing.assert_allclose(scale_N, largest_N / 127, rtol=1e-6)
    assert np.all(np.abs(got_ND[:, :depth] - w_ND) <= 0.5001 * largest_N[:, None] / 127)
    assert np.all(got_ND[:, depth:] == 0) and np.all(got_ND[:, :depth][w_ND == 0] == 0)


@pytest.mark.parametrize("depth, dtype", [(256, jnp.float32), (200, jnp.bfloat16)])
def test_4_bits_are_off_by_half_a_step_and_by_one_where_clipped(depth, dtype):
    w_DN = weights(depth, 24, dtype)
    values, scale_GN = quantize_weights(w_DN, 4)
    assert values.shape == (24, 128) and values.dtype == jnp.int8
    assert scale_GN.shape == (2, 24) and scale_GN.dtype == jnp.float32
    got_ND = np.asarray(dequantize(values, scale_GN, 4), np.float64)
    assert got_ND.shape == (24, 256)
    w_ND = np.pad(np.asarray(w_DN, np.float64).T, ((0, 0), (0, 256 - depth)))
    w_NGD, got_NGD = w_ND.reshape(24, 2, GROUP), got_ND.reshape(24, 2, GROUP)
    largest_NG = np.max(np.abs(w_NGD), axis=2, keepdims=True)
    step_NG, off = largest_NG / 8, np.abs(got_NGD - w_NGD)
    scale_NG = np.asarray(scale_GN, np.float64).T[..., None]
    np.testing.assert_allclose(np.abs(scale_NG), step_NG, rtol=1e-6)
    clipped = w_NGD * np.sign(scale_NG) > 7.5 * step_NG  # they would be step 8
    assert np.all(off <= np.where(clipped, 1.0001, 0.5001) * step_NG)
    assert np.any(off > 0.6 * step_NG) and 100 < np.sum(clipped) < 300  # a half of column 4, and some
    largest = np.abs(w_NGD) == largest_NG
    assert np.all(np.any(largest & (off <= 1e-6 * largest_NG), axis=2)), "expected -8 steps for the largest"
    assert np.all(got_NGD[w_NGD == 0] == 0)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", [(2, 3, 200), (256,)])
def test_a_packed_matrix_times_rows(shape, bits):
    x = jnp.asarray(np.float32(np.random.default_rng(1).normal(size=shape)))
    values, scale = quantize_weights(weights(shape[-1], 96), bits)
    weight_ND = np.asarray(dequantize(values, scale, bits), np.float64)[:, : shape[-1]]
    got, want = product(x, values, scale, bits), np.asarray(x, np.float64) @ weight_ND.T
    assert got.dtype == jnp.float32 and got.shape == (*shape[:-1], 96)
    np.testing.assert_allclose(got, want, atol=1e-6 * np.max(np.abs(want)))
    depth = shape[-1]
    assert kernels_fit(8, depth, values) == (depth == 256) and not kernels_fit(9, depth, values)


QWEN = ModelConfig(
    family="qwen2",
    vocab_size=96,
    hidden_size=128,
    intermediate_size=256,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    norm_eps=1e-5,
    rope=Rope(10000.0),
    max_positions=512,
    tie_embeddings=False,
    qkv_bias=True,
)
LLAMA = replace(QWEN, family="llama", hidden_size=96, head_dim=24, num_layers=1, tie_embeddings=True, qkv_bias=False)


@lru_cache
def decoder_of(config: ModelConfig) -> Decoder:
    """Random, with norms and biases that show where they are left out."""
    graph, state = nnx.split(random_decoder(config, jnp.dtype(jnp.float32)))
    rng = np.random.default_rng(0)

    def fill(path: tuple, leaf: jax.Array) -> jax.Array:
        name = jax.tree_util.keystr(path)
        if "norm" not in name and "bias" not in name:
            return leaf
        return jnp.asarray(np.float32(rng.normal(size=leaf.shape) * 0.5 + ("norm" in name)))

    return nnx.merge(graph, jax.tree_util.tree_map_with_path(fill, state))


@partial(jax.jit, static_argnums=0)
def _logits(graph: Any, state: Any, tokens_BT: jax.Array, pos_BT: jax.Array) -> jax.Array:
    decoder = nnx.merge(graph, state)
    hidden_BTD, _ = decoder.hidden(tokens_BT, pos_BT, attend_self(pos_BT, Strategy(block=256)))
    return decoder.logits(hidden_BTD)


def logits(decoder: Decoder) -> np.ndarray:
    tokens_BT = np.random.default_rng(0).integers(0, 96, (1, 8))
    return np.asarray(_logits(*nnx.split(decoder), tokens_BT, np.arange(8)[None]))


def relative(got, want) -> float:
    got, want = (np.asarray(x, np.float64) for x in (got, want))
    return float(np.sqrt(np.mean(np.square(got - want)) / np.mean(np.square(want))))


@pytest.mark.parametrize("config", [QWEN, LLAMA], ids=["biases, untied", "tied"])
def test_8_bits_say_nearly_the_same(config):
    decoder = decoder_of(config)
    before = jax.tree.map(np.asarray, nnx.state(decoder))
    want = logits(decoder)
    copy = quantize(decoder, 8)
    got = logits(copy)
    assert got.dtype == np.float32
    assert 1e-4 < relative(got, want) < 0.03
    assert isinstance(copy, Decoder) and copy.config is decoder.config
    chex.assert_trees_all_equal(nnx.state(decoder), before)
    assert copy.embed_VD is decoder.embed_VD and copy.norm_D is decoder.norm_D


def in_full(copy: Any, decoder: Decoder) -> Decoder:
    """A decoder of the weights that the copy stands for."""
    graph, state = nnx.split(decoder)
    plain: Any = nnx.merge(graph, state)

    def weight(matrix: Matrix) -> jax.Array:
        assert matrix.scale is not None and matrix.bits is not None
        return dequantize(matrix.values[...], matrix.scale[...], matrix.bits).T

    for mine, theirs in zip(plain.blocks, copy.blocks, strict=True):
        q, k, v = jnp.split(weight(theirs.qkv), [4 * 32, 6 * 32], axis=1)
        gate, up = jnp.split(weight(theirs.gate_up), 2, axis=1)
        given = {"q_DNH": q, "k_DKH": k, "v_DKH": v, "o_NHD": weight(theirs.out), "gate_DF": gate, "up_DF": up}
        for name, value in (given | {"down_FD": weight(theirs.down)}).items():
            parameter = getattr(mine, name)
            parameter[...] = value.reshape(parameter.shape)
    plain.head_DV[...] = weight(copy.lm_head)
    return plain


def test_4_bits_say_what_their_weights_say():
    decoder = decoder_of(QWEN)
    copy = quantize(decoder, 4)
    got, full = logits(copy), logits(decoder)
    np.testing.assert_allclose(got, logits(in_full(copy, decoder)), atol=1e-4 * np.max(np.abs(got)))
    assert 0.02 < relative(got, full) < 0.4


class Gpu:
    """jax, but for the name of its backend."""

    def __getattr__(self, name: str) -> Any:
        return getattr(jax, name)

    def default_backend(self) -> str:
        return "gpu"


@pytest.fixture
def calls(monkeypatch) -> Counter:
    """As on a GPU, with kernels interpreted: how often each is called, or traced."""
    counts: Counter = Counter()

    def counted(function):
        def call(*args, **kwargs):
            counts[function.__name__] += 1
            return function(*args, interpret=True, **kwargs)

        return call

    for module in (fused_decoder, quantized_module):
        monkeypatch.setattr(module, "jax", Gpu())
        for function in (fixed_point, skinny_matmul):
            monkeypatch.setattr(module, function.__name__, counted(function))
    return counts


def run(decoder: Decoder, block: FusedBlock, x: jax.Array | Pending, rows: tuple[int, int] = (2, 3)) -> Any:
    """(x after the block, the keys and values that it attends and what else it was given)."""
    pos_BT = jnp.asarray(np.tile(np.arange(7, 7 + rows[1], dtype=np.int32), (rows[0], 1)))
    inner = attend_self(pos_BT, Strategy(block=64))
    graph, state = nnx.split(block)
    ((cos, sin),) = decoder.rotations(pos_BT)

    def attend(q_BTNH, k_BTKH, v_BTKH, layer):
        return inner(q_BTNH, k_BTKH, v_BTKH, None)[0], (k_BTKH, v_BTKH, layer)

    @jax.jit
    def through(state, x):
        x_BTD, kept = nnx.merge(graph, state)(x, cos, sin, attend, jnp.int32(5))
        return x_BTD.summed() if isinstance(x_BTD, Pending) else x_BTD, kept

    return through(state, x)


def in_bfloat16(block: FusedBlock) -> FusedBlock:
    """With the norms and biases of a bfloat16 model."""
    graph, state = nnx.split(block)

    def one(path: tuple, leaf: jax.Array) -> jax.Array:
        name = jax.tree_util.keystr(path)
        return leaf.astype(jnp.bfloat16) if "norm" in name or "bias" in name else leaf

    return nnx.merge(graph, jax.tree_util.tree_map_with_path(one, state))


def test_a_block_s_fast_path_is_its_plain_one(request):
    """In bfloat16, after a block that left its last product in parts."""
    decoder = decoder_of(QWEN)
    block = in_bfloat16(cast(Any, quantize(decoder, 4).blocks)[1])
    x, parts = (np.random.default_rng(2).normal(size=shape) * 2 for shape in ((2, 3, 128), (3, 6, 128)))
    given = Pending(jnp.asarray(x.astype(jnp.bfloat16)), jnp.asarray(np.float32(parts)))
    np.testing.assert_allclose(np.float32(given.summed()), x + parts.sum(axis=0).reshape(x.shape), atol=0.1)
    plain = run(decoder, block, given.summed())
    calls = request.getfixturevalue("calls")
    fast = run(decoder, block, given)
    assert calls == {"fixed_point": 4, "skinny_matmul": 4}
    for got, want in zip(*map(jax.tree.leaves, (fast, plain)), strict=True):
        assert got.dtype == want.dtype and got.shape == want.shape
        assert relative(got, want) < 0.005


@pytest.mark.parametrize("layout", ["unrolled", "stacked"])
def test_a_decoder_s_fast_path_is_its_plain_one(request, layout):
    """In one array of all layers too, where what a layer gives the next is summed."""
    decoder = decoder_of(QWEN)
    copy = quantize(decoder if layout == "unrolled" else stacked(decoder), 8)
    want = logits(copy)
    calls = request.getfixturevalue("calls")
    _logits.clear_cache()
    got = logits(copy)
    layers = QWEN.num_layers if layout == "unrolled" else 1
    assert calls == {"fixed_point": 4 * layers + 1, "skinny_matmul": 4 * layers + 1}
    assert relative(got, want) < 5e-4


def stacked(decoder: Decoder) -> Decoder:
    arrays = {weight.key: array for weight, array in stored_arrays(decoder, np.dtype("float32"))}
    how = {"layout": "stacked", "dtype": jnp.dtype(jnp.float32), "quiet": True}
    return build(decoder.config, arrays.__getitem__, **how)


def test_a_packed_matrix_s_fast_path(calls):
    """The head, say: rows of any axes, at most 8 at a time."""
    values, scale = quantize_weights(weights(256, 96), 8)
    x = np.float32(np.random.default_rng(1).normal(size=(2, 5, 256)))
    got = product(jnp.asarray(x), values, scale, 8)
    assert calls == {"fixed_point": 2, "skinny_matmul": 2}
    weight_ND = np.asarray(dequantize(values, scale, 8), np.float64)
    assert got.shape == (2, 5, 96) and relative(got, np.asarray(x, np.float64) @ weight_ND.T) < 1e-4


@pytest.mark.parametrize("config, time, fast", [(QWEN, 4, 4), (QWEN, 5, 8), (QWEN, 17, 0), (LLAMA, 1, 1)])
def test_what_the_fast_path_is_for(config, time, fast, calls):
    """All of a block for 8 rows, its matrices for some more; of a hidden size of 96, the last matrix alone."""
    decoder = decoder_of(config)
    block = cast(Any, quantize(decoder, 8).blocks)[0]
    x_BTD = jax.ShapeDtypeStruct((2, time, config.hidden_size), jnp.float32)
    out_BTD, _ = jax.eval_shape(partial(run, decoder, block, rows=(2, time)), x_BTD)
    assert out_BTD.shape == x_BTD.shape and out_BTD.dtype == x_BTD.dtype
    assert calls["fixed_point"] == calls["skinny_matmul"] == fast


@pytest.mark.parametrize("bits", [8, 4])
def test_the_copys_head_is_what_its_logits_are_made_by(bits):
    copy = quantize(decoder_of(LLAMA), bits)
    hidden_BTD = jax.random.normal(jax.random.key(3), (1, 2, LLAMA.hidden_size))
    weight, axes = copy.head
    wanted = np.einsum(f"BTD,{axes}->BTV", np.asarray(hidden_BTD, np.float64), np.asarray(weight, np.float64))
    np.testing.assert_allclose(copy.logits(hidden_BTD), wanted, rtol=1e-5, atol=1e-5)
