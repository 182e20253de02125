# SPDX-License-Identifier: Apache-2.0
"""What a GGUF file's metadata says about the architecture, the vocabulary and the file itself."""

import json
import os
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models

from rapid_jax.model.config import LayerKind, Rope
from rapid_jax.model.gguf_config import gguf_config
from rapid_jax.model.gguf_io import GgufCheckpoint
from rapid_jax.model.load import open_checkpoint
from rapid_jax.model.tokenizer import Tokenizer, check_same_vocabulary
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.json_input import Fields
from tests.model import gguf_bytes as g
from tests.model.gguf_bytes import Value


def opened(tmp_path, changed=None, tensors=None) -> GgufCheckpoint:
    path = tmp_path / "model.gguf"
    path.write_bytes(g.gguf_bytes(g.metadata() | (changed or {}), tensors or g.tensors()))
    return GgufCheckpoint(path)


def rope(**values: float | str | int) -> dict[str, Value]:
    kinds = {str: g.STRING, float: g.F32, int: g.U32, bool: g.BOOL}
    return {f"llama.rope.{key.replace('__', '.')}": Value(kinds[type(value)], value) for key, value in values.items()}


LINEAR = Rope(10000.0, "linear", 4.0)
YARN = Rope(10000.0, "yarn", 4.0, original_max_positions=128, beta_fast=32.0, beta_slow=1.0)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (rope(scaling__factor=4.0), LINEAR),
        (rope(scale_linear=4.0), LINEAR),
        (rope(scaling__type="linear", scaling__factor=4.0, scaling__finetuned=True), LINEAR),
        (rope(scaling__type="linear", scale_linear=4.0), LINEAR),
        (rope(scaling__factor=4.0, scale_linear=8.0), LINEAR),
        (rope(scaling__factor=1.0), Rope(10000.0)),
        (rope(scaling__factor=0.0), Rope(10000.0)),
        (rope(scaling__factor=0.0, scale_linear=4.0), Rope(10000.0)),
        (rope(scaling__type="linear"), Rope(10000.0)),
        (rope(scaling__type="none", scaling__factor=4.0), Rope(10000.0)),
        (rope(scaling__type="yarn", scaling__factor=1.0), Rope(10000.0)),
        (rope(scaling__type="yarn", scaling__factor=4.0), YARN),
        (rope(scaling__type="yarn", scaling__factor=4.0, scaling__original_context_length=0), YARN),
        (
            rope(scaling__type="yarn", scaling__factor=2.0, scaling__original_context_length=64)
            | rope(scaling__yarn_beta_fast=16.0, scaling__yarn_ext_factor=1.0, scaling__attn_factor=1.0),
            Rope(10000.0, "yarn", 2.0, original_max_positions=64, beta_fast=16.0, beta_slow=1.0),
        ),
    ],
)
def test_rope_scaling_is_llama_cpps(values, expected, tmp_path):
    assert opened(tmp_path, values).config.rope == expected


@pytest.mark.parametrize(
    "values",
    [
        *(rope(scaling__type=kind, scaling__factor=4.0) for kind in ("longrope", "dynamic", "su", "", "Linear")),
        *(rope(scaling__factor=factor) for factor in (-4.0, float("nan"), float("inf"), "4")),
        *(rope(scaling__attn_factor=factor) for factor in (0.5, 0.0, "1")),
        *(rope(scaling__yarn_ext_factor=factor) for factor in (0.5, 1.0)),
        rope(scaling__type="yarn", scaling__factor=4.0, scaling__yarn_ext_factor=0.5),
        rope(scaling__type="yarn", scaling__factor=4.0, scaling__yarn_attn_factor=2.0),
        rope(scaling__type="yarn", scaling__factor=4.0, scaling__yarn_beta_slow=64.0),
        rope(scaling__type="yarn", scaling__factor=4.0, scaling__yarn_log_multiplier=0.5),
        rope(scaling__alpha=2.0),
        rope(freq_base_swa=10000.0),
        rope(freq_base=0.0),
        rope(dimension_count=2),
        {"llama.rope.dimension_sections": Value(g.ARRAY, [1, 1, 0, 0], g.I32)},
        {"llama.attention.scale": Value(g.F32, 0.5)},
        {"llama.final_logit_softcapping": Value(g.F32, 30.0)},
        {"llama.attention.causal": Value(g.BOOL, False)},
        {"llama.attention.sliding_window": Value(g.U32, 64)},
    ],
)
def test_what_would_change_a_number_and_is_not_read_is_refused(values, tmp_path):
    with pytest.raises(InputError, match=rf"model\.gguf: ({'|'.join(values)})"):
        opened(tmp_path, values)


def test_a_table_of_llama_3_beside_another_scaling_is_refused(tmp_path):
    table = {"rope_freqs.weight": g.Tensor((2,), 0, b"\0\0\x80\x3f" * 2)}
    assert opened(tmp_path, tensors=g.tensors() | table).config.rope.factor == 1.0
    with pytest.raises(InputError, match=r"llama\.rope\.scaling\.factor must be 1 beside the tensor rope_freqs"):
        opened(tmp_path, rope(scaling__factor=2.0), g.tensors() | table)
    for wrong in (((3,), b"\0\0\x80\x3f" * 3), ((2,), b"\0\0\xc0\x7f" * 2), ((2,), bytes(8))):
        with pytest.raises(InputError, match="does not follow Llama 3"):
            opened(tmp_path, tensors=g.tensors() | {"rope_freqs.weight": g.Tensor(wrong[0], 0, wrong[1])})


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"tokenizer.ggml.eos_token_id": Value(g.U32, 100_000)}, r"eos_token_id must be .* 0 to 262, got 100000"),
        ({"tokenizer.ggml.token_type": Value(g.ARRAY, [1, 3], g.I32)}, r"token_type must have 263 values, .*got 2"),
        ({"tokenizer.ggml.tokens": Value(g.ARRAY, ["a"], g.STRING)}, r"tokens must have 263 tokens, .*got 1"),
        ({"tokenizer.ggml.tokens": Value(g.ARRAY, ["a"] * 263, g.STRING)}, r"tokens has 'a' twice"),
        ({"tokenizer.ggml.merges": Value(g.ARRAY, ["t hex"], g.STRING)}, r"merges must have two tokens .*'t hex'"),
        ({"llama.attention.head_count": Value(g.ARRAY, [4, 4], g.I32)}, r"head_count must be .*got \[4, 4\]"),
        ({"llama.block_count": Value(g.U32, 2**32 - 1)}, r"block_count must be a whole number from 1 to 21"),
        ({"tokenizer.ggml.tokens": Value(g.ARRAY, [*g.TOKENS[:259], "", *g.TOKENS[260:]], g.STRING)}, "eos_token_id"),
        ({"general.alignment": Value(g.U32, 0)}, r"general\.alignment must be"),
        ({"general.alignment": Value(g.U32, 48)}, r"general\.alignment must be a power of two, got 48"),
    ],
)
def test_metadata_that_cannot_be_is_refused_by_file_and_key(values, words, tmp_path):
    with pytest.raises(InputError, match=r"model\.gguf: (tokenizer\.ggml\.|llama\.|attention\.)*" + words):
        opened(tmp_path, values).tokenizer_files()


@pytest.mark.parametrize("bos", ["<s>:1", "$A", "a b", "\u0120"])
def test_a_first_token_is_added_whatever_it_is_spelt_like(bos, tmp_path):
    tokens = [*g.TOKENS]
    if bos not in tokens:
        tokens[258] = bos
    at = tokens.index(bos)
    changed = {
        "tokenizer.ggml.tokens": Value(g.ARRAY, tokens, g.STRING),
        "tokenizer.ggml.bos_token_id": Value(g.U32, at),
    }
    tokenizer = Tokenizer(opened(tmp_path, changed).tokenizer_files())
    assert tokenizer.encode("the", add_special_tokens=True) == [at, tokens.index("the")]


def tokenizer_with(tmp_path, *unused: str) -> Tokenizer:
    """Of a GGUF file whose vocabulary is filled up with so many unused tokens."""
    tokens = [*g.TOKENS[:261], *unused]
    changed = {
        "tokenizer.ggml.tokens": Value(g.ARRAY, tokens, g.STRING),
        "tokenizer.ggml.token_type": Value(g.ARRAY, [*g.TYPES[:261], *[5] * len(unused)], g.I32),
    }
    return Tokenizer(opened(tmp_path, changed, g.tensors(len(tokens))).tokenizer_files())


def folder_with(tokenizer: Tokenizer, tokens: dict[str, int]) -> Tokenizer:
    """The tokenizer with these further tokens in its vocabulary."""
    settings = json.loads(tokenizer.files["tokenizer.json"])
    settings["model"]["vocab"] |= tokens
    return Tokenizer({"tokenizer.json": json.dumps(settings).encode()})


def test_vocabularies_that_differ_in_unused_tokens_are_the_same(tmp_path):
    none, few = tokenizer_with(tmp_path), tokenizer_with(tmp_path, "[PAD261]")
    many = tokenizer_with(tmp_path, "[PAD261]", "<unused>", "[PAD263]", "[PAD264]")
    folder = folder_with(none, {"[PAD263]": 263})  # with a gap before it
    for target in (none, few, many, folder):
        for drafter in (none, few, many, folder):
            check_same_vocabulary(target, drafter, "drafter")
    assert many.vocab_size == 261 and many.encode("[PAD261]") == none.encode("[PAD261]")


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"used": 261}, "expected token 261 to be none, got 'used' in drafter"),
        ({"[PAD9]": 261}, r"expected token 261 to be none, got '\[PAD9\]'"),
        ({"[PAD261]": 261, "used": 270}, "expected token 270 to be none, got 'used'"),
    ],
)
def test_vocabularies_that_differ_in_a_used_token_are_not(more, expected, tmp_path):
    target = tokenizer_with(tmp_path, "[PAD261]")
    drafter = folder_with(target, more)
    with pytest.raises(InputError, match=expected):
        check_same_vocabulary(target, drafter, "drafter")
    with pytest.raises(InputError, match=r"to be '.*', got none in drafter"):
        check_same_vocabulary(drafter, target, "drafter")


def test_a_used_token_is_not_the_same_as_padding_in_its_place(tmp_path):
    padded = Tokenizer({"tokenizer.json": Backend(models.BPE({"a": 0, "[PAD1]": 1}, [])).to_str().encode()})
    used = Tokenizer({"tokenizer.json": Backend(models.BPE({"a": 0, "b": 1}, [])).to_str().encode()})
    with pytest.raises(InputError, match=r"expected token 1 to be '\[PAD1\]', got 'b'"):
        check_same_vocabulary(padded, used, "drafter")


@pytest.mark.parametrize("name", ["UPPER.GGUF", "model.gguf", "sha256-0a1b", "weights.bin"])
def test_files_are_known_by_their_ending_or_their_first_bytes(name, tmp_path):
    (tmp_path / name).write_bytes(g.gguf_bytes(g.metadata(), g.tensors()))
    checkpoint, tokenizer = open_checkpoint(tmp_path / name)
    assert checkpoint.config.num_layers == g.LAYERS and tokenizer.stop_ids == (259, 260)


def test_other_files_are_refused_without_being_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.gguf")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "text").write_text("GGU")
    for name, words in (
        ("pipe.gguf", r"pipe\.gguf: cannot be read: expected a regular file, got a pipe"),
        *((name, "expected a checkpoint folder, a .gguf file") for name in ("pipe", "text", "absent")),
        *((name, "model: expected a path, got") for name in ("a\0b", "~nobody-of-this-name")),
        ("x" * 5000, "cannot be read: File name too long"),
    ):
        with pytest.raises(InputError, match=words):
            open_checkpoint(name if "~" in name else tmp_path / name)


@pytest.mark.parametrize(("layers", "scalar"), [(7, 8), (62, 4)])
def test_gemma_3_s_largest_divides_its_scores_by_another_root(layers: int, scalar: int):
    """llama.cpp's files do not say so: it knows that model by its 62 layers."""
    named = {key.replace("llama.", "gemma3.", 1): value.value for key, value in g.metadata().items()}
    sizes = {"block_count": layers, "attention.key_length": 8, "attention.value_length": 8, "rope.dimension_count": 8}
    local = {"attention.sliding_window": 16, "rope.freq_base_swa": 3000.0}
    named |= {"general.architecture": "gemma3", **{f"gemma3.{key}": value for key, value in (sizes | local).items()}}
    tensors: Any = dict.fromkeys(map(str, range(100))) | {"token_embd.weight": SimpleNamespace(shape=(263, 16))}
    config = gguf_config(Fields(named, "file"), tensors)
    assert (config.query_pre_attn_scalar, config.norm_offset, config.family) == (scalar, 1.0, "gemma3_text")
    assert config.pattern == (*[LayerKind(window=16, rope=Rope(3000.0))] * 5, LayerKind())
