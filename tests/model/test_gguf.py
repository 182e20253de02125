# SPDX-License-Identifier: Apache-2.0
"""GGUF files written by the gguf package from a tiny transformers model, and the real SmolLM2 file."""

import re

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
from gguf.quants import dequantize, quantize

from rapid_jax.model import gguf_file
from rapid_jax.model.gguf_io import GgufCheckpoint, gguf_name, load_gguf
from rapid_jax.model.hf_io import HfCheckpoint
from rapid_jax.model.hf_names import stored, weights
from rapid_jax.model.load import load_model
from rapid_jax.runtime.errors import InputError
from tests.model.conftest import our_logits, tokens_at, torch_logits

BYTES = [chr(code) for code in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324))]


def interleaved(array: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to the rows of q and k."""
    return array.reshape(heads, 2, array.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(array.shape)


def each_weight(model):
    """(key, values) as files have them: all experts of a layer are one, gate and up apart."""
    for key, value in model.state_dict().items():
        key = key.replace("block_sparse_moe", "mlp")
        place, experts, name = key.partition(".experts.")
        if not experts:
            yield key, value
            continue
        parts = value.chunk(2, dim=1) if name == "gate_up_proj" else [value]
        for part, of in zip(parts, ["gate", "up"] if len(parts) == 2 else ["down"], strict=True):
            yield f"{place}.experts.0.{of}_proj.weight", part


def add_experts(writer, config):
    if getattr(config, "num_local_experts", None):
        writer.add_expert_count(config.num_local_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    if getattr(config, "moe_intermediate_size", None):
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)


def write_gguf(
    path,
    model,
    *,
    architecture="llama",
    quantised=None,
    extra=(),
    omit=(),
    pre="llama-bpe",
    rope_factors=None,
):
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if head_dim * config.num_attention_heads != config.hidden_size:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    rope = config.rope_parameters
    if architecture == "gemma3":
        rope, local = rope["full_attention"], rope["sliding_attention"]
        writer.add_sliding_window(config.sliding_window)
        writer.add_float32("gemma3.rope.freq_base_swa", local["rope_theta"])
        writer.add_uint32("gemma3.attention.sliding_window_pattern", 3)
        writer.add_rope_scaling_factor(rope["factor"])
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    tokens = (BYTES + ["<bos>", "<eos>"] + [f"<{n}>" for n in range(config.vocab_size)])[: config.vocab_size]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<") and len(token) > 1 else 1 for token in tokens])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(5)
    if architecture == "phi3":
        writer.add_rope_dimension_count(int(head_dim * rope["partial_rotary_factor"]))
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        writer.add_rope_scaling_attn_factors(float(model.model.rotary_emb.attention_scaling))
        for kind in ("long", "short"):
            writer.add_tensor(f"rope_factors_{kind}.weight", np.asarray(rope[f"{kind}_factor"], np.float32))
    for key, value in extra:
        add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}[type(value)]
        add(key, value)
    add_experts(writer, config)
    if rope_factors is not None:
        writer.add_tensor("rope_freqs.weight", rope_factors)
    for key, value in each_weight(model):
        if key in omit or (key == "lm_head.weight" and config.tie_word_embeddings):
            continue
        array = value.numpy()
        if architecture in ("llama", "smollm3") and ("q_proj" in key or "k_proj" in key):
            array = interleaved(array, config.num_attention_heads if "q_proj" in key else config.num_key_value_heads)
        if quantised is not None and array.ndim == 2 and array.shape[1] % gguf.GGML_QUANT_SIZES[quantised][0] == 0:
            writer.add_tensor(gguf_name(key), quantize(array, quantised), raw_dtype=quantised)
        elif architecture == "gemma3":  # of norms the factors
            writer.add_tensor(gguf_name(key, post_norms=True), array + 1 if "norm" in key else array)
        else:
            writer.add_tensor(gguf_name(key), array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("name", "architecture"),
    [
        ("llama", "llama"),
        ("qwen2-tied", "qwen2"),
        ("qwen3", "qwen3"),
        ("smollm3", "smollm3"),
        ("phi3", "phi3"),
        ("gemma3", "gemma3"),
        ("qwen3_moe", "qwen3moe"),
        ("mixtral", "llama"),
    ],
)
def test_logits_of_a_gguf_file_equal_the_model_it_was_made_from(name, architecture, checkpoint, tmp_path):
    model, _ = checkpoint(name)
    path = write_gguf(tmp_path / "model.gguf", model, architecture=architecture)
    windows = name == "gemma3"
    tokens_BT, pos_BT = tokens_at(8100, 150 if windows else 60, windows=windows)
    expected = torch_logits(model, tokens_BT, pos_BT)
    for layout in ("stacked", "unrolled"):
        decoder = load_gguf(path, layout=layout, dtype=jnp.float32, quiet=True)
        assert (decoder.head_DV is None) == model.config.tie_word_embeddings
        assert decoder.config.norm_eps == 1e-5
        np.testing.assert_allclose(our_logits(decoder, tokens_BT, pos_BT), expected, atol=1e-4 * np.abs(expected).max())


def test_quantised_rows_of_joined_matrices_are_those_of_the_whole(checkpoint, tmp_path):
    model, _ = checkpoint("phi3")
    kind = gguf.GGMLQuantizationType.Q8_0
    file = GgufCheckpoint(write_gguf(tmp_path / "model.gguf", model, architecture="phi3", quantised=kind))
    for joined, parts in (
        ("self_attn.qkv", ("self_attn.q", "self_attn.k", "self_attn.v")),
        ("mlp.gate_up", ("mlp.gate", "mlp.up")),
    ):
        array = model.state_dict()[f"model.layers.1.{joined}_proj.weight"].numpy()
        found = np.concatenate([file.read(f"model.layers.1.{part}_proj.weight") for part in parts])
        np.testing.assert_array_equal(found, dequantize(quantize(array, kind), kind))


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "smollm3", "phi3", "gemma3", "qwen3_moe", "mixtral"])
def test_weights_are_named_as_the_package_names_them(name, checkpoint):
    config = HfCheckpoint(checkpoint(name)[1]).config
    architecture = {"qwen3_moe": "QWEN3MOE", "mixtral": "LLAMA"}.get(name, name.upper())
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, architecture), config.num_layers)
    for array in stored(config):
        stem, _, kind = re.sub(r"experts\.\d+", "experts", array.key).rpartition(".")
        assert f"{names.get_name(stem)}.{kind}" == gguf_name(array.key, post_norms=config.post_norms)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q5_1"])
def test_dense_weights_equal_the_packages_own_dequantisation(kind, checkpoint, tmp_path):
    model, _ = checkpoint("llama")
    quantised = gguf.GGMLQuantizationType[kind]
    path = write_gguf(tmp_path / "model.gguf", model, quantised=quantised)
    ours = GgufCheckpoint(path).read("model.layers.1.mlp.up_proj.weight")
    array = model.state_dict()["model.layers.1.mlp.up_proj.weight"].numpy()
    np.testing.assert_array_equal(ours, dequantize(quantize(array, quantised), quantised))
    assert np.abs(ours - array).max() < 0.2


def test_llama3_rope_scaling_comes_back_from_the_table_of_divisors(checkpoint, tmp_path):
    model, _ = checkpoint("llama3")
    inv_freq = model.model.rotary_emb.inv_freq.numpy()
    divisors = (500000.0 ** (-np.arange(0, 8, 2, dtype=np.float32) / 8) / inv_freq).astype(np.float32)
    decoder = load_gguf(
        write_gguf(tmp_path / "a.gguf", model, rope_factors=divisors), layout="stacked", dtype=jnp.float32, quiet=True
    )
    assert (decoder.config.rope.scaling, decoder.config.rope.factor) == ("llama3", 8.0)
    tokens_BT, pos_BT = tokens_at(8100, 60)
    expected = torch_logits(model, tokens_BT, pos_BT)
    np.testing.assert_allclose(our_logits(decoder, tokens_BT, pos_BT), expected, atol=1e-4 * np.abs(expected).max())
    with pytest.raises(InputError, match="does not follow Llama 3"):
        GgufCheckpoint(write_gguf(tmp_path / "b.gguf", model, rope_factors=divisors[::-1].copy()))


def test_yarn_metadata_is_read(checkpoint, tmp_path):
    extra = [("qwen2.rope.scaling.type", "yarn"), ("qwen2.rope.scaling.factor", 4.0)]
    model, _ = checkpoint("qwen2-tied")
    rope = GgufCheckpoint(write_gguf(tmp_path / "a.gguf", model, architecture="qwen2", extra=extra)).config.rope
    assert (rope.scaling, rope.factor, rope.beta_fast, rope.original_max_positions) == ("yarn", 4.0, 32.0, 32768)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"architecture": "qwen2moe"}, "architecture 'qwen2moe'"),
        ({"architecture": "qwen3moe"}, "qwen3moe.expert_count must be"),
        ({"extra": [("llama.expert_count", 4)]}, "llama.expert_used_count must be"),
        ({"extra": [("llama.expert_shared_count", 1)]}, "llama.expert_shared_count"),
        ({"architecture": "qwen2", "extra": [("qwen2.expert_count", 4)]}, "experts of qwen2 are not supported"),
        ({"extra": [("llama.rope.scaling.type", "longrope")]}, "longrope"),
        ({"extra": [("llama.rope.scaling.attn_factor", 2.0)]}, "attn_factor"),
        ({"omit": ["model.layers.0.mlp.up_proj.weight"]}, "blk.0.ffn_up.weight is missing"),
        ({"omit": ["model.embed_tokens.weight"]}, "token_embd.weight is missing"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(options, words, checkpoint, tmp_path):
    model, _ = checkpoint("llama")
    with pytest.raises(InputError, match=words):
        GgufCheckpoint(write_gguf(tmp_path / "model.gguf", model, **options))


def test_a_truncated_or_foreign_file_is_refused_in_one_line(checkpoint, tmp_path):
    whole = write_gguf(tmp_path / "whole.gguf", checkpoint("llama")[0]).read_bytes()
    bad = tmp_path / "bad.gguf"
    for size, words in (
        (len(whole) - 40, "cut short"),
        (2000, "inside its header"),
        (10, "cut short"),
        (0, "cut short"),
    ):
        bad.write_bytes(whole[:size])
        with pytest.raises(InputError, match=words) as caught:
            GgufCheckpoint(bad)
        assert "\n" not in str(caught.value)
    for data, words in ((b"PK" * 20, "not a GGUF"), (b"GGUF\1\0\0\0" + bytes(40), "version 1")):
        bad.write_bytes(data)
        with pytest.raises(InputError, match=words):
            GgufCheckpoint(bad)
    with pytest.raises(InputError, match="no such file"):
        GgufCheckpoint(tmp_path / "absent.gguf")
    # A length that would not fit in memory is a damaged file, not an allocation.
    bad.write_bytes(whole[:24] + (2**60).to_bytes(8, "little") + whole[32:])
    with pytest.raises(InputError, match="cut short"):
        GgufCheckpoint(bad)


def test_smollm2_header_and_weights_equal_the_gguf_package(smollm2_path):
    reader = gguf.GGUFReader(smollm2_path)
    metadata, tensors = gguf_file.open_gguf(smollm2_path)
    assert metadata == {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    theirs = {tensor.name: tensor for tensor in reader.tensors}
    assert tensors.keys() == theirs.keys()
    checkpoint = GgufCheckpoint(smollm2_path)
    assert sum(np.prod(weight.stored_shape) for weight in weights(checkpoint.config)) == 134_515_008
    for key in ("model.layers.0.self_attn.k_proj.weight", "model.layers.29.mlp.down_proj.weight", "model.norm.weight"):
        tensor = theirs[gguf_name(key)]
        expected = dequantize(tensor.data, tensor.tensor_type)
        ours = checkpoint.read(key)
        np.testing.assert_array_equal(interleaved(ours, 3) if "k_proj" in key else ours, expected)


def test_smollm2_says_paris(smollm2_path):
    loaded = load_model(smollm2_path, layout="stacked", dtype="float32", quiet=True)
    prompt = loaded.tokenizer.encode("The capital of France is")
    logits = our_logits(loaded.decoder, np.array([prompt]), np.arange(len(prompt))[None])
    assert loaded.tokenizer.decode([int(logits[0, -1].argmax())]) == " Paris"
