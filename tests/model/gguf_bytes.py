# SPDX-License-Identifier: Apache-2.0
"""A tiny GGUF file as bytes, any part of which may be wrong: the gguf package's writer would refuse to write it."""

import struct
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from tokenizers import pre_tokenizers

# Types of values, and how struct writes them.
U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
_CODES = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "?", U64: "Q", I64: "q", F64: "d"}
ALIGNMENT = 32


class Value(NamedTuple):
    """A value with its type; `inner` is the type of an array's values."""

    kind: int
    value: Any
    inner: int | None = None


class Tensor(NamedTuple):
    """A tensor: its shape innermost axis first, its type of numbers, and its bytes."""

    shape: tuple[int, ...]
    kind: int
    data: bytes


TOKENS = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "th", "the", "<s>", "</s>", "<|end|>", "[PAD261]", "[PAD262]"]
TYPES = [1] * 258 + [3, 3, 3, 5, 5]
MERGES = ["t h", "th e"]
HIDDEN, HEADS, KV_HEADS, FFN, LAYERS = 16, 4, 2, 24, 2


def text(value: str) -> Value:
    return Value(STRING, value)


def metadata() -> dict[str, Value]:
    return {
        "general.architecture": text("llama"),
        "general.name": text("tiny"),
        "general.alignment": Value(U32, ALIGNMENT),
        "llama.context_length": Value(U32, 128),
        "llama.embedding_length": Value(U32, HIDDEN),
        "llama.block_count": Value(U32, LAYERS),
        "llama.feed_forward_length": Value(U32, FFN),
        "llama.attention.head_count": Value(U32, HEADS),
        "llama.attention.head_count_kv": Value(U32, KV_HEADS),
        "llama.attention.layer_norm_rms_epsilon": Value(F32, 1e-5),
        "llama.rope.dimension_count": Value(U32, HIDDEN // HEADS),
        "llama.rope.freq_base": Value(F32, 10000.0),
        "tokenizer.ggml.model": text("gpt2"),
        "tokenizer.ggml.pre": text("llama-bpe"),
        "tokenizer.ggml.tokens": Value(ARRAY, TOKENS, STRING),
        "tokenizer.ggml.token_type": Value(ARRAY, TYPES, I32),
        "tokenizer.ggml.merges": Value(ARRAY, MERGES, STRING),
        "tokenizer.ggml.bos_token_id": Value(U32, 258),
        "tokenizer.ggml.eos_token_id": Value(U32, 259),
        "tokenizer.ggml.eot_token_id": Value(U32, 260),
        "tokenizer.ggml.unknown_token_id": Value(U32, 0),
        "tokenizer.ggml.padding_token_id": Value(U32, 259),
        "tokenizer.ggml.add_bos_token": Value(BOOL, True),
        "tokenizer.chat_template": text("{{ messages[0].content }}<|end|>"),
    }


def tensors(rows: int = len(TOKENS)) -> dict[str, Tensor]:
    """The weights of a Llama of two layers, random."""
    generator = np.random.default_rng(0)
    kv = KV_HEADS * HIDDEN // HEADS
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (HIDDEN, rows), "output_norm.weight": (HIDDEN,)}
    for layer in range(LAYERS):
        parts = {"attn_norm": (HIDDEN,), "ffn_norm": (HIDDEN,), "attn_q": (HIDDEN, HIDDEN), "attn_k": (HIDDEN, kv)}
        parts |= {"attn_v": (HIDDEN, kv), "attn_output": (HIDDEN, HIDDEN), "ffn_gate": (HIDDEN, FFN)}
        parts |= {"ffn_up": (HIDDEN, FFN), "ffn_down": (FFN, HIDDEN)}
        shapes |= {f"blk.{layer}.{name}.weight": shape for name, shape in parts.items()}
    shapes["output.weight"] = (HIDDEN, rows)
    return {
        name: Tensor(shape, 0, generator.standard_normal(int(np.prod(shape)), np.float32).tobytes())
        for name, shape in shapes.items()
    }


def gguf_bytes(
    pairs: Mapping[str, Value] | Sequence[tuple[str, Value]],
    weights: Mapping[str, Tensor] | Sequence[tuple[str, Tensor]],
    *,
    version: int = 3,
    counts: tuple[int, int] | None = None,
    offsets: Mapping[str, int] | None = None,
) -> bytes:
    """The file; `counts` of tensors and pairs, and `offsets` of tensors, instead of the right ones."""
    listed = list(pairs.items()) if isinstance(pairs, Mapping) else list(pairs)
    stored = list(weights.items()) if isinstance(weights, Mapping) else list(weights)
    head = b"GGUF" + struct.pack("<I", version) + struct.pack("<QQ", *(counts or (len(stored), len(listed))))
    head += b"".join(_text(key) + struct.pack("<I", value.kind) + _value(value) for key, value in listed)
    body = b""
    for name, tensor in stored:
        offset = (offsets or {}).get(name, len(body))
        head += _text(name) + struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *tensor.shape)
        head += struct.pack("<IQ", tensor.kind, offset)
        body += _padded(tensor.data)
    return _padded(head) + body


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % ALIGNMENT)


def _text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def _value(value: Value) -> bytes:
    if value.kind == STRING:
        return _text(value.value)
    if value.kind != ARRAY:
        return struct.pack(f"<{_CODES[value.kind]}", value.value)
    if value.inner is None:
        return value.value  # bytes as they are
    each = (_value(Value(value.inner, item)) for item in value.value)
    return struct.pack("<IQ", value.inner, len(value.value)) + b"".join(each)
