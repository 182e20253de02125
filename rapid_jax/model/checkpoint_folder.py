# SPDX-License-Identifier: Apache-2.0
"""What is in a folder that should hold a Hugging Face checkpoint: its config, where its tensors lie, or what it is."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from rapid_jax.model import safetensors_file
from rapid_jax.model.safetensors_file import Tensor
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.json_input import Fields, read_object, shown
from rapid_jax.runtime.storage import AnyPlace

INDEX: Final = "model.safetensors.index.json"
SINGLE: Final = "model.safetensors"
_CONFIG: Final = "config.json"
_ADAPTER: Final = "adapter_config.json"
_NO_TEXT: Final = ("vision_tower.", "multi_modal_projector.")
_MOST_CONFIG_BYTES: Final = 2**24  # of the JSON files; an index of the largest models has 2 MB


def read_folder_config(folder: AnyPlace) -> Fields:
    """The config.json of a checkpoint folder. Raises InputError that says what the folder is, if it is something else.

    A folder that holds an adapter, too, is refused: transformers would put it on top of the weights.
    """
    if (folder / _ADAPTER).is_file():
        raise InputError(
            f"{folder}: holds a PEFT adapter ({_ADAPTER}); merge it into its base model (merge_and_unload), save that"
        )
    if not (folder / _CONFIG).is_file():
        raise InputError(f"{folder / _CONFIG}: no such file; {_describe(folder)}")
    return read_object(folder / _CONFIG, _MOST_CONFIG_BYTES)


def folder_tensors(folder: AnyPlace) -> dict[str, Tensor]:
    """The tensors of a checkpoint folder by name: those of model.safetensors, else of the files that the index names.

    Raises InputError when there are none, or one is not where the index says.
    """
    if (folder / SINGLE).is_file():
        return safetensors_file.tensors_in(folder / SINGLE)
    if (folder / INDEX).is_file():
        return _read_index(folder)
    shards = _names(folder.glob("*.safetensors"))
    if shards:
        raise InputError(f"{folder}: expected {SINGLE}, or {INDEX} beside the files that it names; found {shards}")
    pickled = _names(path for end in ("*.bin", "*.pt", "*.pth") for path in folder.glob(end))
    if pickled:
        raise InputError(
            f"{folder}: pickled weights ({pickled}) are not read: they can run code; save the model as safetensors"
        )
    raise InputError(f"{folder}: expected {SINGLE} or {INDEX}; {_describe(folder)}")


def text_tensors(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], int]:
    """(tensors of the decoder of text in a model of text and images, by such a decoder's names, how many are others').

    Older files have them under language_model.model, newer ones under model.language_model.
    """
    kept = {}
    for key, tensor in tensors.items():
        if not key.removeprefix("model.").startswith(_NO_TEXT):
            inner = key.removeprefix("model.").removeprefix("language_model.")
            at_top = inner.startswith(("model.", "lm_head."))
            kept[key if key == inner else inner if at_top else f"model.{inner}"] = tensor
    return kept, len(tensors) - len(kept)


def encoder_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a decoder without its head, by their names in a model that has one.

    transformers leaves `model.` out of the names where it saves a model without a head.
    """
    inner = {key: tensor for key, tensor in tensors.items() if not key.startswith("lm_head.")}
    return {key if key.startswith("model.") else f"model.{key}": tensor for key, tensor in inner.items()}


def _read_index(folder: AnyPlace) -> dict[str, Tensor]:
    path = folder / INDEX
    weight_map: Fields = read_object(path, _MOST_CONFIG_BYTES).fields("weight_map")
    places = {key: weight_map.text(key) for key in weight_map}
    files: dict[str, dict[str, Tensor]] = {}
    for name in sorted(set(places.values())):
        if not name or Path(name).name != name:
            raise InputError(f"{path}: {shown(name)} is not the name of a file in this folder")
        if not (folder / name).is_file():
            raise InputError(f"{path}: names {shown(name)}, and there is no such file")
        files[name] = safetensors_file.tensors_in(folder / name)
    for key, name in places.items():
        if key not in files[name]:
            raise InputError(f"{folder / name}: has no tensor {shown(key)}, but {INDEX} says so")
    return {key: files[name][key] for key, name in places.items()}


def _describe(folder: AnyPlace) -> str:
    """What is there instead, and what to do about it, for the end of an error's line."""
    if gguf := [path for path in folder.iterdir() if path.suffix.lower() == ".gguf"]:
        return f"name the GGUF file itself: {folder}/{_names(gguf)}"
    if inner := [path.parent for path in folder.glob(f"*/{_CONFIG}")]:
        return f"name the checkpoint inside: {folder}/{_names(inner)}"
    return f"the folder holds {_names(folder.iterdir()) or 'nothing'}"


def _names(paths: Iterable[AnyPlace]) -> str:
    """The names of the files, or the first few of them."""
    names = sorted(path.name for path in paths)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(name if name.isprintable() else shown(name) for name in names[:3]) + more
