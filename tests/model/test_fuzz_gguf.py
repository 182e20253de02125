# SPDX-License-Identifier: Apache-2.0
"""GGUF files that are wrong in a place: each loads as it says or is refused in one line, soon and in little memory."""

import hashlib
import math
import random
import resource
import struct
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from rapid_jax.model.config import ModelConfig
from rapid_jax.model.gguf_io import GgufCheckpoint
from rapid_jax.model.hf_names import weights
from rapid_jax.model.tokenizer import Tokenizer
from rapid_jax.runtime.errors import InputError
from tests.model import gguf_bytes as g
from tests.model.gguf_bytes import Value

SECONDS, MIB = 10.0, 400  # of one case; of all of them


@dataclass(frozen=True)
class Loaded:
    """What a file gives: equal for equal files."""

    config: ModelConfig
    ids: tuple[int, ...]
    stop_ids: tuple[int, ...]
    files: dict[str, bytes]
    weights: str


def load(path: Path) -> Loaded:
    checkpoint = GgufCheckpoint(path)
    files = checkpoint.tokenizer_files()
    tokenizer = Tokenizer(files, checkpoint.config.carried_keys().get("eos_token_id"))
    arrays = hashlib.sha256()
    for weight in weights(checkpoint.config):
        arrays.update(checkpoint.read(weight.key).tobytes())
    ids = tokenizer.encode("the\u00e9 <|end|>", add_special_tokens=True)
    return Loaded(checkpoint.config, tuple(ids), tokenizer.stop_ids, files, arrays.hexdigest())


class Fuzz:
    """Tries files and holds each to the limits; `refused` counts those that were refused."""

    def __init__(self, path: Path):
        self.path = path
        path.write_bytes(g.gguf_bytes(g.metadata(), g.tensors()))
        self.right = load(path)
        self.tried = self.refused = 0

    def loaded(self, data: bytes) -> Loaded | None:
        """What the file gives, or None if it was refused."""
        self.path.write_bytes(data)
        self.tried += 1
        begin = time.perf_counter()
        try:
            return load(self.path)
        except InputError as error:
            words = str(error)
            assert words.startswith(f"{self.path}: ") and words.isprintable() and len(words) < 1000
            self.refused += 1
            return None
        finally:
            assert time.perf_counter() - begin < SECONDS


@pytest.fixture
def fuzz(tmp_path):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield Fuzz(tmp_path / "model.gguf")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MIB * 1024


def whole(value: int) -> Value:
    return Value(g.U32, value)


VALUES = [
    *(whole(0), whole(1), whole(2), whole(3), whole(1000), whole(2**32 - 1), Value(g.U64, 2**63), Value(g.U64, 2**60)),
    *(Value(g.I32, -1), Value(g.I64, -(2**63)), Value(g.U8, 4), Value(g.I8, -4), Value(g.U16, 16), Value(g.I16, 4)),
    *(Value(g.F32, value) for value in (0.0, 0.5, 2.0, -1.0, 1e30, -1e-40, math.inf, -math.inf, math.nan)),
    *(Value(g.F64, value) for value in (1e-300, 1e300, 8.0)),
    *(Value(g.BOOL, False), Value(g.BOOL, True)),
    *(g.text(""), g.text("4"), g.text("llama"), g.text("\n\x1b[31m\0"), g.text("x" * 100_000)),
    *(Value(g.ARRAY, [], g.I32), Value(g.ARRAY, [4, 4], g.I32), Value(g.ARRAY, [1.0] * 300, g.F32)),
    *(Value(g.ARRAY, [], g.STRING), Value(g.ARRAY, ["a", "a"], g.STRING), Value(g.ARRAY, ["a b c"], g.STRING)),
    Value(g.ARRAY, [True], g.BOOL),
]
MORE_KEYS = {
    **{f"llama.rope.{key}": Value(g.F32, 1.0) for key in ("scale_linear", "scaling.factor", "scaling.attn_factor")},
    "llama.rope.scaling.type": g.text("none"),
    "llama.attention.key_length": whole(4),
    "llama.attention.value_length": whole(4),
    "llama.attention.sliding_window": whole(128),
    "llama.expert_count": whole(0),
    "llama.vocab_size": whole(263),
    "split.count": whole(1),
}


def field_of(key: str, loaded: Loaded) -> Any:
    """What the file gave for a key whose value may be another one."""
    config, carried = loaded.config, loaded.config.carried_keys()
    eos = carried["eos_token_id"]
    return {
        "llama.context_length": config.max_positions,
        "llama.attention.layer_norm_rms_epsilon": config.norm_eps,
        "llama.rope.freq_base": config.rope.theta,
        "llama.rope.scaling.factor": config.rope.factor,
        "llama.rope.scale_linear": config.rope.factor,
        "tokenizer.ggml.bos_token_id": carried.get("bos_token_id"),
        "tokenizer.ggml.eos_token_id": eos[0] if isinstance(eos, list) else eos,
        "tokenizer.ggml.eot_token_id": eos[-1] if isinstance(eos, list) else eos,
        "tokenizer.ggml.padding_token_id": carried.get("pad_token_id"),
    }.get(key)


# Keys whose other values say something else about the tokenizer, not about the numbers.
OF_TOKENIZER = ("tokenizer.ggml.add_bos_token", "tokenizer.ggml.unknown_token_id", "tokenizer.chat_template")
OF_TOKENIZER += ("tokenizer.ggml.pre", "tokenizer.ggml.merges")


def test_every_value_of_the_metadata_replaced(fuzz):
    pairs, weights_ = g.metadata(), g.tensors()
    for key in (*pairs, *MORE_KEYS):
        for value in VALUES:
            found = fuzz.loaded(g.gguf_bytes(pairs | {key: value}, weights_))
            if found is None:
                continue
            given = field_of(key, found)
            if given is not None and given != field_of(key, fuzz.right):
                assert math.isclose(given, value.value, rel_tol=1e-6), (key, value)
            elif key in OF_TOKENIZER:
                assert (found.config, found.weights) == (fuzz.right.config, fuzz.right.weights), (key, value)
            else:
                assert found == fuzz.right, (key, value)
    assert fuzz.tried > 1000 and fuzz.refused > 0.6 * fuzz.tried


def test_every_key_removed(fuzz):
    pairs, missing = g.metadata(), set()
    for key in pairs:
        if fuzz.loaded(g.gguf_bytes({name: pairs[name] for name in pairs if name != key}, g.tensors())) is None:
            missing.add(key)
    optional = {"general.name", "general.alignment", "llama.rope.dimension_count", "llama.rope.freq_base"}
    optional |= {f"tokenizer.ggml.{name}_token_id" for name in ("bos", "eos", "eot", "unknown", "padding")}
    optional |= {"tokenizer.ggml.add_bos_token", "tokenizer.chat_template"}
    # Without it as many heads of keys as of queries are expected, and the tensors have other shapes.
    assert missing == set(pairs) - optional


def damaged() -> dict[str, bytes]:
    """Files that are wrong beyond the value of a key, by what is wrong."""
    pairs, stored = g.metadata(), g.tensors()
    listed, tensors = list(pairs.items()), list(stored.items())
    q = "blk.0.attn_q.weight"
    first, head = stored[q], stored["output.weight"]

    def changed(**values: Any) -> bytes:
        return g.gguf_bytes(pairs, stored | {q: first._replace(**values)})

    def array(data: bytes) -> bytes:
        return g.gguf_bytes(pairs | {"tokenizer.ggml.merges": Value(g.ARRAY, data)}, stored)

    huge = 2**60
    right = g.gguf_bytes(pairs, stored)
    found = {
        **{f"version {version}": g.gguf_bytes(pairs, stored, version=version) for version in (0, 1, 4, 3 << 24)},
        **{f"counts {counts}": g.gguf_bytes(pairs, stored, counts=counts) for counts in (
            *((len(stored), huge), (huge, len(pairs)), (2**63, 2**63), (0, len(pairs)), (len(stored), 0), (0, 0)),
            *((len(stored) + 1, len(pairs)), (len(stored) - 1, len(pairs)), (len(stored), len(pairs) - 1)),
        )},
        **{f"axes {shape}": changed(shape=shape) for shape in (
            *((), (0,), (16, 0), (16, 16, 1), (1, 16, 16), (2**62, 2**62), (2**63, 2), (15, 16), (16, 17), (256,)),
            *((4, 4, 4, 4), (1, 1, 1, 16, 16)),
        )},
        **{f"numbers of kind {kind}": changed(kind=kind) for kind in (1, 2, 4, 5, 8, 9, 15, 24, 27, 28, 30, 99, 2**31)},
        **{f"offset {offset}": g.gguf_bytes(pairs, stored, offsets={q: offset}) for offset in (0, 1, 32, huge, 2**63)},
        "offset of the last": g.gguf_bytes(pairs, stored, offsets={"output.weight": 0}),
        "smaller numbers in the last": g.gguf_bytes(pairs, stored | {"output.weight": head._replace(kind=1)}),
        "bytes behind": right + bytes(64),
        "key twice": g.gguf_bytes([*listed, listed[3]], tensors),
        "key twice, another value": g.gguf_bytes([*listed, ("llama.context_length", whole(9))], tensors),
        "tensor twice": g.gguf_bytes(listed, [*tensors, tensors[2]]),
        "tensor too many": g.gguf_bytes(listed, [*tensors, ("blk.2.attn_q.weight", first)]),
        "array of arrays": array(struct.pack("<IQ", g.ARRAY, 1) + struct.pack("<IQ", g.U8, 1) + b"\0"),
        "array of arrays, deep": array(struct.pack("<IQ", g.ARRAY, 1) * 5000),
        "array of an unknown type": array(struct.pack("<IQ", 77, 1) + b"\0"),
        **{f"array of 2^60 of type {kind}": array(struct.pack("<IQ", kind, huge)) for kind in range(13)},
        **{f"text of {size} bytes": array(struct.pack("<IQQ", g.STRING, 1, size)) for size in (huge, 2**63, 2**64 - 1)},
        "text that is not UTF-8": array(struct.pack("<IQQ", g.STRING, 1, 3) + b"\xff\xfea"),
        "value of an unknown type": g.gguf_bytes(listed, tensors).replace(
            b"general.name" + struct.pack("<I", g.STRING), b"general.name" + struct.pack("<I", 13)
        ),
        "zeros behind the header's counts": right[:24] + bytes(200_000),
        "letters": b"GGUF" * 20_000,
        "ones": b"GGUF\3\0\0\0" + b"\xff" * 100_000,
    }  # fmt: skip
    for name in stored:
        found[f"without {name}"] = g.gguf_bytes(pairs, {key: stored[key] for key in stored if key != name})
    return found


def test_headers_damaged_by_hand(fuzz):
    cases = damaged()
    wrong = [name for name, data in cases.items() if fuzz.loaded(data) is not None]
    assert wrong == ["without output.weight"] and len(cases) > 80  # the head is tied then
    found = fuzz.loaded(cases["without output.weight"])
    assert found is not None and found.config == replace(fuzz.right.config, tie_embeddings=True)


def test_truncated_anywhere(fuzz, request):
    data, cases = g.gguf_bytes(g.metadata(), g.tensors()), random.Random(1)
    for size in [*range(60), *(cases.randrange(len(data)) for _ in range(100 * request.config.getoption("--fuzz")))]:
        assert fuzz.loaded(data[:size]) is None


def test_bits_of_the_header_flipped(fuzz, request):
    data, cases = g.gguf_bytes(g.metadata(), g.tensors()), random.Random(2)
    end = len(data) - sum(len(tensor.data) for tensor in g.tensors().values())
    different = 0
    for case in range(400 * request.config.getoption("--fuzz")):
        changed = bytearray(data)
        # Half of them outside the vocabulary, which is most of the header and where a flip is another spelling.
        for _ in range(1 + case % 3):
            changed[cases.randrange(1200 if case % 2 else end)] ^= 1 << cases.randrange(8)
        found = fuzz.loaded(bytes(changed))
        if found is not None and found.config == fuzz.right.config:
            assert found.weights == fuzz.right.weights
        different += found is not None and found != fuzz.right
    assert fuzz.refused > 100 and different < fuzz.tried / 2
