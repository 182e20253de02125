# SPDX-License-Identifier: Apache-2.0
"""The files of sentence-transformers in an encoder's folder: pooling, linear layers, prompts, length of an input."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, get_args

import jax
import jax.numpy as jnp

from rapid_jax.model import safetensors_file
from rapid_jax.model.backend import check_unicode
from rapid_jax.model.checkpoint_folder import folder_tensors
from rapid_jax.retrieval.pooling import Dense, DenseActivation, Linear, Pooling, Prompts
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.json_input import Fields, read_json, read_object, shown
from rapid_jax.runtime.storage import AnyPlace

# Both spellings of sentence-transformers: a mode by name (since 5.2), or a switch for each.
_POOLINGS: Final[Mapping[str, Pooling]] = {
    **{"mean": "mean", "cls": "cls", "lasttoken": "last"},
    **{"mean_tokens": "mean", "cls_token": "cls"},
}
_MODEL_FILES: Final = (
    "sentence_bert_config.json",
    "sentence_roberta_config.json",
    "sentence_xlm-roberta_config.json",
)
_MODULES: Final = "modules.json"
_PROMPTS: Final = "config_sentence_transformers.json"
_DOCUMENT_NAMES: Final = ("document", "passage", "corpus")  # the order in which sentence-transformers looks for one
# The last parts of the names of torch's classes.
_ACTIVATIONS: Final[Mapping[str, DenseActivation]] = {"Identity": "identity", "Tanh": "tanh"}
_MOST_FEATURES: Final = 2**18  # several times those of the largest encoder there is


@dataclass(frozen=True)
class SentenceSettings:
    """What the files say; None where they say nothing."""

    pooling: Pooling | None
    dense: tuple[Dense, ...]
    prompts: Prompts
    max_tokens: int | None
    lower_case: bool


def read_sentence_settings(folder: AnyPlace, embed_dim: int, pooling: Pooling | None = None) -> SentenceSettings:
    """What the folder's files say about texts, of a model with hidden states of `embed_dim`; `pooling` overrides them.

    Raises InputError naming the file and the key of a value that is none, or that is not implemented.
    """
    if pooling is not None and pooling not in get_args(Pooling):
        raise InputError(f"encoder: expected pooling by {', '.join(get_args(Pooling))}, got {pooling!r}")
    modules = _read_modules(folder / _MODULES) if (folder / _MODULES).is_file() else []
    pooling_file = folder / (_folder_of(modules[1]) if modules else "1_Pooling") / "config.json"
    prompts = _read_prompts(folder)
    if pooling is None and (modules or pooling_file.is_file()):
        pooling = _read_pooling(pooling_file, prompts)
    dense = []
    for module in modules[2:]:
        if _kind(module) == "Dense":
            dense.append(_read_dense(folder, _folder_of(module), dense[-1].outputs if dense else embed_dim))
    return SentenceSettings(pooling, tuple(dense), prompts, *_read_model_file(folder))


def dense_files(folder: AnyPlace) -> list[AnyPlace]:
    """The safetensors files of the linear layers behind the pooling."""
    modules = _read_modules(folder / _MODULES) if (folder / _MODULES).is_file() else []
    inner = [folder / _folder_of(module) for module in modules if _kind(module) == "Dense"]
    return sorted({tensor.file for place in inner for tensor in folder_tensors(place).values()}, key=str)


def load_dense(folder: AnyPlace, dense: Dense) -> dict[str, jax.Array]:
    """The arrays of a `Linear` by their names. InputError names a tensor that is missing or of another shape."""
    tensors, place = folder_tensors(folder / dense.folder), folder / dense.folder
    expected = {"linear.weight": (dense.outputs, dense.inputs)}
    expected |= {"linear.bias": (dense.outputs,)} if dense.bias else {}
    if set(tensors) != set(expected):
        raise InputError(f"{place}: expected the tensors {', '.join(expected)}, got {shown(sorted(tensors))}")
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise InputError(f"{place}: {name} has shape {shown(list(tensors[name].shape))}, expected {list(shape)}")
        safetensors_file.check_dtype(tensors[name])
    arrays = {name: jnp.asarray(safetensors_file.read(tensors[name]), jnp.float32) for name in expected}
    bias = {"bias_E": arrays["linear.bias"]} if dense.bias else {}
    return {"matrix_EE": arrays["linear.weight"].T, **bias}


def fill_dense(layers: Any, folder: AnyPlace, every: tuple[Dense, ...]) -> None:
    """Puts the folder's weights into the linear layers."""
    for layer, dense in zip(layers, every, strict=True):
        assert isinstance(layer, Linear)
        for name, array in load_dense(folder, dense).items():
            getattr(layer, name)[...] = array


def _read_modules(file: AnyPlace) -> list[Fields]:
    """Model (in the folder itself), pooling, linear layers in their order, and the norm if it is named."""
    modules = list(Fields({"modules": read_json(file)}, str(file)).each("modules"))
    kinds = [_kind(module) for module in modules]
    behind = kinds[2:-1] if kinds[-1:] == ["Normalize"] else kinds[2:]
    if kinds[:2] != ["Transformer", "Pooling"] or set(behind) - {"Dense"}:
        raise InputError(
            f"{file}: expected the modules Transformer, Pooling, any number of Dense, and Normalize, got {shown(kinds)}"
        )
    if modules[0].text("path") != "":
        raise modules[0].error("path", "'': a model in a folder of its own is not supported")
    for module in modules[1 : 2 + len(behind)]:
        _folder_of(module)
    return modules


def _kind(module: Fields) -> str:
    return module.text("type").rsplit(".", 1)[-1]


def _folder_of(module: Fields) -> str:
    path = module.text("path")
    if not path.isprintable() or Path(path).name != path or not path:
        raise module.error("path", "the name of a folder in this one")
    return path


def _read_pooling(file: AnyPlace, prompts: Prompts) -> Pooling:
    stated = read_object(file)
    if "pooling_mode" in stated:  # over any switches, as there
        listed = isinstance(stated["pooling_mode"], list)
        modes = stated.texts("pooling_mode") if listed else [stated.text("pooling_mode")]
    else:
        switches = [key for key in stated if key.startswith("pooling_mode_")]
        modes = [key.removeprefix("pooling_mode_") for key in switches if stated.truth(key)]
    if len(modes) != 1 or modes[0] not in _POOLINGS:
        raise InputError(f"{file}: expected pooling by mean, by cls or by the last token, got {shown(modes)}")
    if prompts != Prompts() and not stated.truth("include_prompt", True):
        raise stated.error("include_prompt", "true, since there are prompts: pooling without them is not supported")
    return _POOLINGS[modes[0]]


def _read_dense(folder: AnyPlace, name: str, inputs: int) -> Dense:
    stated = read_object(folder / name / "config.json")
    if stated.whole("in_features", least=1, most=_MOST_FEATURES) != inputs:
        raise stated.error("in_features", f"{inputs}, the length of what comes before")
    for key in ("module_input_name", "module_output_name"):
        if stated.text(key, "sentence_embedding") not in ("", "sentence_embedding"):
            raise stated.error(key, "'sentence_embedding': layers of other values are not supported")
    activation = stated.text("activation_function", "torch.nn.modules.activation.Tanh").rsplit(".", 1)[-1]
    if activation not in _ACTIVATIONS:
        raise stated.error("activation_function", "torch's Identity or Tanh: others are not supported")
    outputs = stated.whole("out_features", least=1, most=_MOST_FEATURES)
    return Dense(name, inputs, outputs, stated.truth("bias", True), _ACTIVATIONS[activation])


def _read_prompts(folder: AnyPlace) -> Prompts:
    """The prompts by the names that sentence-transformers looks for, else the default one, else none."""
    if not (folder / _PROMPTS).is_file():
        return Prompts()
    stated = read_object(folder / _PROMPTS)
    prompts: Fields = stated.fields("prompts", Fields({}, stated.source))
    default, usual = stated.text("default_prompt_name", None), ""
    if default is not None:
        if default not in prompts:
            raise stated.error("default_prompt_name", f"null or one of the prompts, {shown(sorted(prompts))}")
        usual = prompts.text(default)
    document = next((prompts.text(name) for name in _DOCUMENT_NAMES if name in prompts), usual)
    for prompt in (query := prompts.text("query", usual), document):
        check_unicode(prompt, f"{stated.source}: prompts")
    return Prompts(query, document)


def _read_model_file(folder: AnyPlace) -> tuple[int | None, bool]:
    """(most tokens of an input, whether text is lower-cased)."""
    for name in _MODEL_FILES:
        if (folder / name).is_file():
            stated = read_object(folder / name)
            return stated.whole("max_seq_length", None, least=1), stated.truth("do_lower_case", False)
    return None, False
