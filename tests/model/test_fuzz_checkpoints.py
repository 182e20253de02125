# SPDX-License-Identifier: Apache-2.0
"""Config, index and header of a checkpoint with every value replaced: the same model, transformers', or one line."""

import dataclasses
import json
import random
import shutil
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from rapid_jax.model.checkpoint_folder import INDEX, SINGLE
from rapid_jax.model.config import ModelConfig, from_hf, to_hf
from rapid_jax.model.hf_io import HfCheckpoint
from rapid_jax.model.hf_names import weights
from rapid_jax.model.rope import inverse_frequencies
from rapid_jax.runtime.json_input import parse_object
from tests.json_mutations import VALUES, amiss, mutations, places, replaced

# Keys that a config may have and transformers does not write for every family.
ADDED = (
    *("rope_theta", "rope_scaling", "rope_parameters", "original_max_position_embeddings", "partial_rotary_factor"),
    *("head_dim", "num_key_value_heads", "tie_word_embeddings", "sliding_window", "use_sliding_window", "use_mrope"),
    *("layer_types", "max_window_layers", "quantization_config", "per_layer_config", "hidden_act", "architectures"),
    *("eos_token_id", "bos_token_id", "pad_token_id", "attention_bias", "mlp_bias"),
)


# Keys that decide no logit, and of which transformers nevertheless refuses some values.
BESIDE = (
    *("dtype", "torch_dtype", "pretraining_tp", "initializer_range", "use_cache", "attention_dropout", "id2label"),
    *("label2id", "num_labels", "problem_type", "transformers_version", "bos_token_id", "pad_token_id", "eos_token_id"),
)


BESIDE_LOGITS = ("rope", "carried", "pattern", "joined")  # of a ModelConfig, or told otherwise


def older(given: dict[str, Any]) -> dict[str, Any]:
    """The same config in the spelling of transformers 4."""
    rope = dict(given["rope_parameters"])
    rest = {key: value for key, value in given.items() if key != "rope_parameters"}
    return rest | {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope | {"type": rope["rope_type"]}}


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def meaning_of(config: ModelConfig) -> dict[str, Any]:
    """What decides a logit."""
    inv_freq, factor = inverse_frequencies(config.rope, config.rotary_dim)
    sizes = {key: value for key, value in dataclasses.asdict(config).items() if key not in BESIDE_LOGITS}
    rotated = [config.kinds[kind].rotated for kind in config.kind_of]
    return sizes | {"rotated": rotated, "windows": list(config.window_of), "inv_freq": inv_freq, "factor": factor}


def windows_of(theirs: Any) -> list[int | None]:
    """Of each layer; None where it never closes."""
    window, layers, rope = getattr(theirs, "sliding_window", None), theirs.num_hidden_layers, theirs.rope_parameters
    context = theirs.max_position_embeddings
    if rope["rope_type"] == "yarn":
        context = max(context, int((rope["factor"] or 1) * rope["original_max_position_embeddings"]))
    if window is None or window >= context or theirs.model_type == "llama":
        return [None] * layers
    kinds = None if theirs.model_type == "mistral" else getattr(theirs, "layer_types", None)
    return [window if kind == "sliding_attention" else None for kind in kinds or ["sliding_attention"] * layers]


def meaning_to_transformers(given: dict[str, Any]) -> dict[str, Any] | None:
    """The same of transformers; None where it refuses the config, in one of its many ways."""
    given = {key: value for key, value in given.items() if key not in BESIDE}
    try:
        theirs: Any = transformers.CONFIG_MAPPING[given["model_type"]].from_dict(json.loads(json.dumps(given)))
        rotary = LlamaRotaryEmbedding(theirs)
    except Exception:
        return None
    layers = theirs.num_hidden_layers
    return {
        "family": theirs.model_type,
        "vocab_size": theirs.vocab_size,
        "hidden_size": theirs.hidden_size,
        "intermediate_size": theirs.intermediate_size,
        "num_layers": theirs.num_hidden_layers,
        "num_heads": theirs.num_attention_heads,
        "num_kv_heads": theirs.num_key_value_heads,
        "head_dim": getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads,
        "norm_eps": theirs.rms_norm_eps,
        "max_positions": theirs.max_position_embeddings,
        "tie_embeddings": theirs.tie_word_embeddings,
        "qkv_bias": theirs.model_type == "qwen2",
        "qk_norm": theirs.model_type == "qwen3",
        "activation": theirs.hidden_act,
        "post_norms": False,
        "norm_offset": 0.0,
        "embedding_scale": 1.0,
        "bidirectional": False,
        "query_pre_attn_scalar": None,
        "experts": None,
        "rotated": [bool(one) for one in getattr(theirs, "no_rope_layers", [1] * layers)[:layers]],
        "windows": windows_of(theirs),
        "inv_freq": rotary.inv_freq.numpy(),
        "factor": rotary.attention_scaling,
    }


def same(ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
    """Equal, but for the last bits of a frequency."""
    if ours.keys() != theirs.keys() or any(ours[key] != theirs[key] for key in ours.keys() - {"inv_freq", "factor"}):
        return False
    near = np.allclose(ours["factor"], theirs["factor"], rtol=1e-6, atol=0)
    return near and np.allclose(ours["inv_freq"], theirs["inv_freq"], rtol=1e-5, atol=0)


def check_config(folder: Path, base: dict[str, Any], given: dict[str, Any]) -> None:
    """Refused, or the folder opens as what it was or as what transformers takes it for."""
    text = json.dumps(given)
    ours = from_hf(parse_object(text, "config.json"))
    meaning = meaning_of(ours)
    assert np.isfinite(meaning["inv_freq"]).all() and meaning["inv_freq"].all() and np.isfinite(meaning["factor"])
    assert from_hf(to_hf(ours)) == ours
    (folder / "config.json").write_text(text)
    opened = HfCheckpoint(folder)
    assert opened.config == ours
    for weight in weights(ours):
        assert opened.read(weight.key).shape == weight.stored_shape
    theirs = meaning_to_transformers(given)
    assert same(meaning, base if theirs is None else theirs), f"{ours}; transformers: {theirs}"


@pytest.mark.parametrize(
    ("name", "spelling"),
    [
        *(("llama3", "newer"), ("llama-yarn", "older"), ("llama-linear", "newer"), ("mistral", "older")),
        *(("qwen2", "newer"), ("qwen3", "newer"), ("smollm3", "older")),
    ],
)
def test_config_with_each_value_replaced(name, spelling, checkpoint, tmp_path, request):
    folder = shutil.copytree(checkpoint(name)[1], tmp_path / "model")
    given = config_of(folder) if spelling == "newer" else older(config_of(folder))
    base = meaning_of(from_hf(given))
    cases = list(mutations(given))
    cases += [(f"{key} = {value!r}", given | {key: value}) for key in ADDED if key not in given for value in VALUES]
    rng, every = random.Random(0), list(places(given))
    for _ in range(50 * request.config.getoption("--fuzz")):  # two at once
        (first, second), values = rng.sample(every, 2), rng.choices(VALUES, k=2)
        if first[: len(second)] != second:
            twice = replaced(given, first, values[0])
            if len(second) == 1 or second[0] != first[0]:
                cases.append((f"{first}, {second} = {values!r}", replaced(twice, second, values[1])))
    assert len(cases) > 500
    wrong = [said for what, case in cases if (said := amiss(what, partial(check_config, folder, base, case)))]
    assert not wrong, "\n".join(wrong[:20])


def arrays_of(folder: Path) -> dict[str, np.ndarray]:
    opened = HfCheckpoint(folder)
    return {weight.key: opened.read(weight.key) for weight in weights(opened.config)}


def check_arrays(folder: Path, base: dict[str, np.ndarray]) -> None:
    """Refused, or the arrays are what they were."""
    arrays = arrays_of(folder)
    assert arrays.keys() == base.keys()
    for key, array in base.items():
        np.testing.assert_array_equal(arrays[key], array)


def test_index_with_each_value_replaced(checkpoint, tmp_path):
    folder = tmp_path / "model"
    checkpoint("llama")[0].save_pretrained(folder, max_shard_size="20KB")
    base, index = arrays_of(folder), json.loads((folder / INDEX).read_text())
    whole = [(f"all of it = {value!r}", value) for value in VALUES]
    added = [(f"added {value!r}", replaced(index, ("weight_map", "more"), value)) for value in VALUES]
    files = sorted(set(index["weight_map"].values()))
    moved = [(f"{key} in {files[0]}", replaced(index, ("weight_map", key), files[0])) for key in index["weight_map"]]
    wrong = []
    for what, case in [*mutations(index), *whole, *added, *moved]:
        (folder / INDEX).write_text(json.dumps(case))
        wrong.append(amiss(what, partial(check_arrays, folder, base)))
    assert len(wrong) > 500
    assert not any(wrong), "\n".join(list(filter(None, wrong))[:20])


def header_of(data: bytes) -> tuple[dict[str, Any], bytes]:
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def with_header(header: Any, rest: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + rest


def damaged_files(data: bytes, rng: random.Random, flips: int) -> Iterator[tuple[str, bytes]]:
    """The file with its header's values replaced, its ranges moved, bits flipped, its length a lie, or cut short."""
    header, rest = header_of(data)
    end = len(data) - len(rest)
    few = {name: entry for index, (name, entry) in enumerate(header.items()) if index in (0, 1, 5)}
    for what, case in mutations(few):
        untouched = {name: entry for name, entry in header.items() if name not in few}
        yield what, with_header(case | untouched, rest)
    for value in VALUES:
        yield f"header {value!r}", with_header(value, rest)
        yield f"added {value!r}", with_header(header | {"more": value}, rest)
    yield "deep", with_header(b'{"a":' * 100_000 + b"1" + b"}" * 100_000, rest)
    tensors = [name for name in header if name != "__metadata__"]
    for first, second in pairwise(tensors):
        moved = header[first] | {"data_offsets": header[second]["data_offsets"]}
        yield f"{first} over {second}", with_header(header | {first: moved}, rest)
    for length in (0, 1, 2, end - 9, end - 7, len(data), 2**31, 2**32, 2**62, 2**63, 2**64 - 1):
        yield f"length {length}", length.to_bytes(8, "little") + data[8:]
    for size in (0, 1, 7, 8, 9, 10, 100, end - 1, end, end + 1, len(data) - 1):
        yield f"cut at {size}", data[:size]
    yield "longer", data + b"\0"
    for _ in range(flips):
        at, bit = rng.randrange(end), rng.randrange(8)
        yield f"bit {bit} of {at}", data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]


def test_header_with_each_value_replaced(checkpoint, tmp_path, request):
    folder = shutil.copytree(checkpoint("llama")[1], tmp_path / "model")
    base, data = arrays_of(folder), (folder / SINGLE).read_bytes()
    wrong = []
    for what, case in damaged_files(data, random.Random(0), 300 * request.config.getoption("--fuzz")):
        (folder / SINGLE).write_bytes(case)
        wrong.append(amiss(what, partial(check_arrays, folder, base)))
    assert len(wrong) > 700
    assert not any(wrong), "\n".join(list(filter(None, wrong))[:20])
