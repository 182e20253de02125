# SPDX-License-Identifier: Apache-2.0
"""Matrices as decoding reads them say what the checkpoint's say, on every mesh and in both layouts, in few bits too."""

from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rapid_jax.attention.attend import attend_self
from rapid_jax.attention.strategy import Strategy
from rapid_jax.model import fused_decoder
from rapid_jax.model.config import LayerKind, ModelConfig, Rope
from rapid_jax.model.decoder import Decoder, Layout
from rapid_jax.model.experts_config import Experts
from rapid_jax.model.finite import why_not_finite
from rapid_jax.model.fused import FusedDecoder, fuse, quantize
from rapid_jax.model.fused_decoder import FusedBlock
from rapid_jax.model.hf_names import weights
from rapid_jax.model.placement import abstract, stored_arrays
from rapid_jax.model.quantized import dequantize, in_digits, quantize_weights
from rapid_jax.runtime.axes import PARAM, with_copied_kv
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.mesh import make_mesh
from rapid_jax.runtime.mesh_config import MeshConfig
from tests.speculative.models import Weights

QWEN = ModelConfig(
    family="qwen2",
    vocab_size=104,
    hidden_size=64,
    intermediate_size=192,
    num_layers=2,
    num_heads=8,
    num_kv_heads=4,
    head_dim=16,
    norm_eps=1e-5,
    rope=Rope(10000.0),
    max_positions=512,
    tie_embeddings=False,
    qkv_bias=True,
)
LLAMA = replace(QWEN, family="llama", num_kv_heads=2, tie_embeddings=True, qkv_bias=False)
# Norms of q and k, a layer without rope between others, half of a head that is not rotated.
OTHER = replace(
    replace(QWEN, family="qwen3", qkv_bias=False, qk_norm=True, num_layers=3),
    pattern=(LayerKind(), LayerKind(rotated=False)),
    rope=Rope(10000.0, fraction=0.5),
)
# Norms around attention and MLP, gelu, a scaled embedding, queries that make up for another scale of scores, two ropes.
GEMMA = replace(
    replace(QWEN, family="gemma3_text", qkv_bias=False, qk_norm=True, num_layers=3, tie_embeddings=True),
    pattern=(LayerKind(window=5, rope=Rope(100.0)), LayerKind()),
    activation="gelu_pytorch_tanh",
    post_norms=True,
    norm_offset=1.0,
    embedding_scale=8.0,
    query_pre_attn_scalar=24,
)
EXPERTS = replace(
    replace(QWEN, family="qwen3_moe", qkv_bias=False, qk_norm=True, intermediate_size=0),
    experts=Experts(count=5, per_token=2, ffn=192, normalized=True),
    pattern=(LayerKind(experts=True),),
)
MESHES = {
    "model 2": MeshConfig(model=2),
    "model 4": MeshConfig(model=4),
    "model 8, copied": MeshConfig(model=8, replicate_kv=True),
    "fsdp 2, model 2": MeshConfig(fsdp=2, model=2),
    "context 2, model 2, copied": MeshConfig(context=2, model=2, replicate_kv=True),
}


@lru_cache
def arrays_of(config: ModelConfig) -> dict[str, np.ndarray]:
    rng, found = np.random.default_rng(0), {}
    for weight in weights(config):
        noise = rng.normal(size=weight.stored_shape)
        found[weight.key] = np.float32(noise * weight.stored_shape[-1] ** -0.5 if noise.ndim > 1 else 1 + 0.2 * noise)
    return found


def decoder_of(
    config: ModelConfig, layout: Layout, mesh: MeshConfig | None = None, dtype: Any = jnp.float32
) -> Decoder:
    on = None if mesh is None else make_mesh(mesh, jax.devices()[: mesh.devices])
    table = with_copied_kv(PARAM, mesh is not None and mesh.replicate_kv)
    return Weights(config, arrays_of(config)).decoder(layout, jnp.dtype(dtype), on, table)


def logits(decoder: Decoder) -> np.ndarray:
    """float64 [T, vocabulary]."""
    tokens_BT, pos_BT = np.random.default_rng(1).integers(0, 104, (1, 8)), np.arange(8)[None]
    graph, state = nnx.split(decoder)

    @jax.jit
    def run(state: Any):
        decoder = nnx.merge(graph, state)
        hidden_BTD, _ = decoder.hidden(tokens_BT, pos_BT, attend_self(pos_BT, Strategy(block=256)))
        return decoder.logits(hidden_BTD)[0]

    return np.asarray(run(state), np.float64)


@lru_cache
def wanted(config: ModelConfig, bits: Any) -> np.ndarray:
    """On one device; in full by the checkpoint's own matrices."""
    decoder = decoder_of(config, "unrolled")
    return logits(decoder if bits is None else quantize(decoder, bits))


def same(got: np.ndarray, want: np.ndarray) -> None:
    """Logits, of which there may be more behind the vocabulary: -inf."""
    assert got.shape[1] in (104, 256, 512, 1024)
    np.testing.assert_allclose(got[:, :104], want, atol=2e-5)
    assert np.all(got[:, 104:] == -np.inf)


@pytest.mark.parametrize(
    "config",
    [QWEN, LLAMA, OTHER, GEMMA, EXPERTS],
    ids=["biases, untied", "tied", "norms, not all rotated", "norms around", "experts"],
)
@pytest.mark.parametrize("layout", ["stacked", "unrolled"])
def test_on_one_device(config: ModelConfig, layout: Layout):
    decoder = decoder_of(config, layout)
    same(logits(fuse(decoder)), wanted(config, None))
    for bits in (8, 4):
        same(logits(quantize(decoder, bits)), wanted(config, bits))
    same(logits(decoder), wanted(config, None))  # it was left as it is


@pytest.mark.parametrize("name", MESHES)
@pytest.mark.parametrize(("config", "layout"), [(QWEN, "stacked"), (QWEN, "unrolled"), (LLAMA, "stacked")])
def test_on_a_mesh(name: str, config: ModelConfig, layout: Layout):
    lies_as_on_one_device(name, config, layout)


@pytest.mark.parametrize(("name", "config"), [("model 4", OTHER), ("model 8, copied", OTHER), ("model 4", GEMMA)])
def test_norms_and_kinds_of_layers_on_a_mesh(name: str, config: ModelConfig):
    """Each head is normalised where it lies."""
    lies_as_on_one_device(name, config, "stacked")


def test_experts_on_a_mesh():
    """Each device has a part of every expert, filled up to whole tiles."""
    lies_as_on_one_device("fsdp 2, model 2", EXPERTS, "unrolled")


@pytest.mark.parametrize("layout", ["stacked", "unrolled"])
def test_an_expert_that_is_not_finite_is_named(layout: Layout):
    decoder: Any = decoder_of(EXPERTS, layout)
    block, place = (decoder.blocks, (1, 3)) if layout == "stacked" else (decoder.blocks[1], (3,))
    block.up_XDF[...] = block.up_XDF[...].at[place].set(jnp.inf)
    for one in (decoder, fuse(decoder)):
        assert why_not_finite(one).startswith("model.layers.1.mlp.experts.3.up_proj.weight holds")


@pytest.mark.parametrize("config", [OTHER, GEMMA], ids=["of q and k", "around"])
def test_norms_where_a_few_rows_run_in_kernels(config: ModelConfig, monkeypatch):
    """As on a GPU, by kernels that are interpreted here."""
    copy = quantize(decoder_of(replace(config, hidden_size=128, intermediate_size=256, num_layers=2), "unrolled"), 8)
    want = logits(copy)
    for name in ("fixed_point", "skinny_matmul"):
        monkeypatch.setattr(fused_decoder, name, partial(getattr(fused_decoder, name), interpret=True))
    monkeypatch.setattr(FusedBlock, "_runs_in_kernels", lambda self, rows, depth: True)
    got = logits(copy)
    assert 0 < np.linalg.norm(got - want) < 2e-3 * np.linalg.norm(want)


def lies_as_on_one_device(name: str, config: ModelConfig, layout: Layout) -> None:
    mesh = MESHES[name]
    if config.num_kv_heads % mesh.model and not mesh.replicate_kv:
        mesh = replace(mesh, replicate_kv=True)
    decoder = decoder_of(config, layout, mesh)
    whole = fuse(decoder, spent=True)
    same(logits(whole), wanted(config, None))
    copy = quantize(whole, 8)
    same(logits(copy), wanted(config, 8))
    same(logits(whole), wanted(config, None))
    for one in (whole, copy):
        outline = abstract_of(config, layout, mesh, one.bits)
        for made, shape in zip(jax.tree.leaves(nnx.state(one)), jax.tree.leaves(nnx.state(outline)), strict=True):
            assert (made.shape, made.dtype) == (shape.shape, shape.dtype)
            assert made.sharding.is_equivalent_to(shape.sharding, made.ndim)


def abstract_of(config: ModelConfig, layout: Layout, mesh: MeshConfig, bits: Any) -> FusedDecoder:
    on, table = make_mesh(mesh, jax.devices()[: mesh.devices]), with_copied_kv(PARAM, mesh.replicate_kv)
    decoder = abstract(config, layout=layout, dtype=jnp.dtype(jnp.float32), mesh=on, table=table)
    return fuse(decoder) if bits is None else quantize(decoder, bits)


@pytest.mark.parametrize("bits", [None, 8])
def test_in_bfloat16_on_a_mesh(bits: Any):
    decoder = decoder_of(QWEN, "stacked", MeshConfig(fsdp=2, model=2), dtype=jnp.bfloat16)
    got = logits(fuse(decoder) if bits is None else quantize(decoder, bits))[:, :104]
    assert np.linalg.norm(got - wanted(QWEN, bits)) < 0.03 * np.linalg.norm(wanted(QWEN, bits))


def test_4_bits_are_not_split_over_devices():
    with pytest.raises(InputError, match="4 bits are for one device that is no TPU"):
        quantize(abstract_of(QWEN, "stacked", MeshConfig(model=2), None), 4)
    alone = decoder_of(QWEN, "stacked", MeshConfig())  # a mesh of one
    same(logits(quantize(alone, 4)), wanted(QWEN, 4))


def test_the_head_of_a_mesh_is_whole_tiles():
    """Of every device: the compiler copies another one at each call."""
    decoder = fuse(decoder_of(QWEN, "stacked", MeshConfig(model=4)))
    assert decoder.vocabulary == 512 and decoder.lm_head is not None
    assert decoder.lm_head.values[...].addressable_shards[0].data.shape == (64, 128)
    assert decoder.config.vocab_size == 104 and decoder.head[0].shape == (64, 512)


def test_the_ffn_of_a_mesh_is_whole_tiles():
    """Of every device, filled up with zeros: 96 columns of gate and of up come to 128."""
    decoder: Any = fuse(decoder_of(QWEN, "stacked", MeshConfig(model=2)))
    gate_up, down = (matrix.values[...] for matrix in (decoder.blocks.gate_up, decoder.blocks.down))
    assert gate_up.addressable_shards[0].data.shape == (2, 64, 256)
    assert down.addressable_shards[0].data.shape == (2, 128, 64)
    assert np.all(np.asarray(gate_up)[..., 96:128] == 0) and np.all(np.asarray(down)[:, 96:128] == 0)


def test_of_a_spent_decoder_no_matrix_is_left():
    for layout, mesh in (("stacked", None), ("unrolled", MeshConfig(model=2))):
        decoder = decoder_of(QWEN, layout, mesh)
        block: Any = decoder.blocks if layout == "stacked" else decoder.blocks[1]
        whole = fuse(decoder, spent=True)
        for name in ("q_DNH", "k_DKH", "v_DKH", "o_NHD", "gate_DF", "up_DF"):
            assert getattr(block, name)[...].is_deleted(), name
        assert mesh is None or (block.down_FD[...].is_deleted() and decoder.head_DV[...].is_deleted())  # filled up
        same(logits(whole), wanted(QWEN, None))
        assert fuse(whole) is whole


def test_it_is_no_checkpoint():
    with pytest.raises(ValueError, match=r"expected a Decoder, whose arrays .* got a FusedDecoder"):
        next(stored_arrays(quantize(decoder_of(LLAMA, "unrolled"), 8), np.dtype("float32")))


def test_a_copy_of_a_copy_is_refused():
    with pytest.raises(InputError, match="got one that is quantised already"):
        quantize(quantize(decoder_of(LLAMA, "unrolled"), 8), 4)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", [(1, 128, 40), (11, 200, 96), (48, 384, 7)])
def test_rows_in_two_digits(shape: tuple[int, int, int], dtype: Any):
    """As far off as a row's 16,256 steps are: half of one for each addend, so far less of their sum."""
    rows, depth, width = shape
    rng = np.random.default_rng(2)
    w_DN = jnp.asarray(np.float32(rng.normal(size=(depth, width)) * rng.uniform(0.1, 3, width)))
    x_TD = np.float32(rng.normal(size=(rows, depth)) * rng.uniform(0.01, 100, (rows, 1)))
    x_TD[rows // 2] = 0
    values_ND, scale_N = quantize_weights(w_DN, 8)
    x_TD = jnp.asarray(x_TD, dtype)
    got_TN = np.asarray(in_digits(x_TD, values_ND, scale_N), np.float64)
    weight_ND = np.asarray(dequantize(values_ND, scale_N, 8), np.float64)[:, :depth]
    exact = np.asarray(x_TD, np.float64)
    steps_T = np.abs(exact).max(axis=1) / (127 * 128)
    worst_TN = 0.5 * steps_T[:, None] * np.abs(weight_ND).sum(axis=1)
    want_TN = exact @ weight_ND.T
    assert np.all(np.abs(got_TN - want_TN) <= worst_TN * 1.001 + 1e-6 * np.abs(want_TN).max())
    assert np.all(got_TN[rows // 2] == 0)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_no_number_stays_none(bad: float):
    x_TD = np.ones((2, 128), np.float32)
    x_TD[1, 5] = bad
    out_TN = np.asarray(in_digits(jnp.asarray(x_TD), *quantize_weights(jnp.ones((128, 8)), 8)))
    assert np.all(np.isfinite(out_TN[0])) and not np.any(np.isfinite(out_TN[1]))
