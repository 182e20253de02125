# SPDX-License-Identifier: Apache-2.0
"""Hugging Face checkpoint folders: safetensors in and out, streamed, with errors that name the file and the tensor."""

import json
import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rapid_jax.model import safetensors_file
from rapid_jax.model.checkpoint_folder import (
    INDEX,
    SINGLE,
    encoder_tensors,
    folder_tensors,
    read_folder_config,
    text_tensors,
)
from rapid_jax.model.config import ModelConfig, from_hf, to_hf
from rapid_jax.model.decoder import Decoder, Layout
from rapid_jax.model.families import TEXT_PARTS
from rapid_jax.model.hf_names import EMBEDDING, HEAD, Weight, stored
from rapid_jax.model.placement import build, stored_arrays
from rapid_jax.runtime.axes import PARAM, Table
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.files import may_replace, new_folder
from rapid_jax.runtime.json_input import shown
from rapid_jax.runtime.storage import AnyPlace

ExportDtype = Literal["bfloat16", "float32"]
_CONFIG = "config.json"
_log = logging.getLogger(__name__)
_SHARD_BYTES = 5_000_000_000  # the hub's and transformers' usual limit


class HfCheckpoint:
    """A checkpoint folder whose tensors were found to be all there, of the right shapes and not cut short.

    Of a model that `encodes` it is the decoder without its head (`from_hf`).
    """

    def __init__(self, folder: AnyPlace, *, encodes: bool = False):
        self.folder = folder
        stated = read_folder_config(folder)
        self.config = from_hf(stated, encodes=encodes)
        self._tensors = folder_tensors(folder)
        if stated["model_type"] in TEXT_PARTS:
            self._tensors, others = text_tensors(self._tensors)
            _log.warning("%s: the vision tower (%d tensors) is left out: the model reads text alone", folder, others)
        if encodes:
            self._tensors = encoder_tensors(self._tensors)
        if self.config.tie_embeddings and EMBEDDING not in self._tensors and HEAD in self._tensors:
            self._tensors[EMBEDDING] = self._tensors[HEAD]  # of two names of one array a file need have one only
        _check_complete(folder, self.config, self._tensors)
        arrays = stored(self.config)
        parts = [part for array in arrays for part in array.split(self._tensors[array.key])]
        self._tensors |= {weight.key: part for weight, part in parts}

    @property
    def weight_files(self) -> list[AnyPlace]:
        """The safetensors files, in order of their names."""
        return sorted({tensor.file for tensor in self._tensors.values()}, key=str)

    @property
    def is_bfloat16(self) -> bool:
        """Whether every tensor is stored in bfloat16."""
        return all(tensor.dtype_name == "BF16" for tensor in self._tensors.values())

    def read(self, key: str, rows: range | None = None) -> np.ndarray:
        """One tensor, or these rows of its first axis, in its own dtype and the checkpoint's order of axes."""
        tensor = self._tensors[key]
        array = safetensors_file.read(tensor, rows)
        head = self._tensors.get(HEAD, tensor)
        tied = key == EMBEDDING and self.config.tie_embeddings
        if tied and head != tensor and safetensors_file.read(head, rows).tobytes() != array.tobytes():
            raise InputError(f"{head.file}: {HEAD} differs from {EMBEDDING}, but config.json ties them")
        return array


def load_hf(
    folder: AnyPlace,
    *,
    layout: Layout,
    dtype: jnp.dtype,
    mesh: Mesh | None = None,
    table: Table = PARAM,
    quiet: bool = False,
) -> Decoder:
    """The Decoder of a checkpoint folder, its weights streamed tensor by tensor to the default device or `mesh`."""
    checkpoint = HfCheckpoint(folder)
    return build(
        checkpoint.config,
        checkpoint.read,
        read_rows=checkpoint.read,
        layout=layout,
        dtype=dtype,
        mesh=mesh,
        table=table,
        quiet=quiet,
    )


def save_hf(
    folder: AnyPlace,
    decoder: Decoder,
    *,
    dtype: ExportDtype,
    files: Mapping[str, bytes],
    shard_bytes: int = _SHARD_BYTES,
) -> None:
    """Writes the decoder as a folder that transformers loads; `files` (tokenizer, chat template) go in as they are.

    Written whole or not at all; a checkpoint already at `folder` is replaced. On several hosts every one must call it:
    arrays are gathered, and the first host writes.
    """
    arrays = stored_arrays(decoder, jnp.dtype(dtype))
    if jax.process_index() == 0:
        write_checkpoint(folder, decoder.config, arrays, dtype=dtype, files=files, shard_bytes=shard_bytes)
    else:
        for _ in arrays:
            pass


def write_checkpoint(
    folder: AnyPlace,
    config: ModelConfig,
    arrays: Iterable[tuple[Weight, np.ndarray]],
    *,
    dtype: ExportDtype,
    files: Mapping[str, bytes],
    shard_bytes: int = _SHARD_BYTES,
) -> None:
    """Writes `arrays`, which come in the order of `weights(config)` and are taken one at a time, as a folder.

    Raises InputError when `folder` holds something other than a checkpoint, or when the disk does not take it; nothing
    is left half-written.
    """
    if not may_replace(folder, known_by=_CONFIG):
        raise InputError(f"{folder}: expected a new name, an empty folder or a checkpoint to replace")
    kind = jnp.dtype(dtype)
    shards = _shards(config, kind, shard_bytes)
    stream = _joined(config, (array for _, array in arrays))
    try:
        with new_folder(folder, known_by=_CONFIG) as file:
            for name, content in files.items():
                with file(name) as path:
                    path.write_bytes(content)
            for name, shapes in shards.items():
                with file(name) as path:
                    safetensors_file.write(path, shapes, kind, islice(stream, len(shapes)))
            if len(shards) > 1:
                with file(INDEX) as path:
                    _write_json(path, _index(config, kind, shards))
            with file(_CONFIG) as path:
                _write_json(path, to_hf(config) | {"torch_dtype": dtype})
    except OSError as error:
        raise InputError(f"{folder}: could not be written: {error.strerror}; nothing was left there") from error


def _joined(config: ModelConfig, arrays: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """The checkpoint's arrays, of those of all weights."""
    for array in stored(config):
        parts = list(islice(arrays, len(array.weights)))
        yield parts[0] if len(parts) == 1 else np.concatenate(parts)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _check_complete(folder: AnyPlace, config: ModelConfig, tensors: Mapping[str, safetensors_file.Tensor]) -> None:
    expected = {array.key: array.shape for array in stored(config)}
    if config.tie_embeddings and HEAD in tensors:
        expected[HEAD] = expected[EMBEDDING]
    missing = [key for key in expected if key not in tensors]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(f"{folder}: tensor {missing[0]} is missing{more}")
    for key, tensor in tensors.items():
        if key not in expected:
            # Old Llama checkpoints store the rotary frequencies, which follow from config.json.
            if not key.endswith("rotary_emb.inv_freq"):
                raise InputError(f"{tensor.file}: tensor {shown(key)} is not part of a {config.family} decoder")
            continue
        if tensor.shape != expected[key]:
            found = shown(list(tensor.shape))
            raise InputError(f"{tensor.file}: {key} has shape {found}, expected {list(expected[key])}")
        safetensors_file.check_dtype(tensor)


def _shards(config: ModelConfig, dtype: np.dtype, limit: int) -> dict[str, dict[str, tuple[int, ...]]]:
    """File name -> tensors in it; as many in a file as fit below the limit, at least one."""
    groups: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for array in stored(config):
        size = math.prod(array.shape) * dtype.itemsize
        if groups[-1] and filled + size > limit:
            groups.append({})
            filled = 0
        groups[-1][array.key] = array.shape
        filled += size
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {f"model-{n:05d}-of-{len(groups):05d}.safetensors": group for n, group in enumerate(groups, start=1)}


def _index(config: ModelConfig, dtype: np.dtype, shards: Mapping[str, Iterable[str]]) -> dict[str, Any]:
    total = sum(math.prod(array.shape) * dtype.itemsize for array in stored(config))
    return {
        "metadata": {"total_size": total},
        "weight_map": {key: name for name, keys in shards.items() for key in keys},
    }
