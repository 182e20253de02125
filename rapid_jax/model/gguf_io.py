# SPDX-License-Identifier: Apache-2.0
"""GGUF checkpoints: the architecture, weights and tokenizer that llama.cpp's files hold, under Hugging Face's names."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rapid_jax.model import gguf_file
from rapid_jax.model.decoder import Decoder, Layout
from rapid_jax.model.gguf_config import ARCHITECTURES, gguf_config
from rapid_jax.model.gguf_names import LONG_FACTORS, ROPE_FACTORS, SHORT_FACTORS, gguf_name
from rapid_jax.model.gguf_tokenizer import tokenizer_files
from rapid_jax.model.hf_names import Stored, stored
from rapid_jax.model.placement import build
from rapid_jax.runtime.axes import PARAM, Table
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.storage import AnyPlace


class GgufCheckpoint:
    """A GGUF file whose tensors were found to be all there, of the right shapes and not cut short."""

    def __init__(self, path: AnyPlace):
        self.path = path
        self._metadata, self._tensors = gguf_file.open_gguf(path)
        self.config = gguf_config(self._metadata, self._tensors)
        self._check_complete()

    @property
    def weight_files(self) -> list[AnyPlace]:
        """The file."""
        return [self.path]

    @property
    def licence(self) -> str | None:
        """As the file names it."""
        found = self._metadata.get("general.license")
        return found if isinstance(found, str) and found.isprintable() else None

    def tokenizer_files(self) -> dict[str, bytes]:
        """The tokenizer as Hugging Face files, by name."""
        return tokenizer_files(self._metadata, str(self.path))

    def read(self, key: str) -> np.ndarray:
        """One weight by its Hugging Face key, dense float32 in the Hugging Face order of rows."""
        array = gguf_file.read(self._parts[key])
        if key.endswith("norm.weight"):
            return array - np.float32(self.config.norm_offset)  # llama.cpp's files have the factors themselves
        turned = ("self_attn.q_proj", "self_attn.k_proj")
        if ARCHITECTURES[self._metadata["general.architecture"]] and any(part in key for part in turned):
            return _half_split(array, self.config.head_dim)
        return array

    def _check_complete(self) -> None:
        groups: dict[str, list[Stored]] = {}  # all experts of a layer are one tensor
        for array in stored(self.config):
            groups.setdefault(gguf_name(array.key, post_norms=self.config.post_norms), []).append(array)
        expected = {
            name: group[0].shape if group[0].weights[0].expert is None else (len(group), *group[0].shape)
            for name, group in groups.items()
        }
        for name, shape in expected.items():
            if name not in self._tensors:
                raise InputError(f"{self.path}: tensor {name} is missing")
            found = self._tensors[name].shape
            if found != shape:
                raise InputError(f"{self.path}: {name} has shape {list(found)}, expected {list(shape)}")
            gguf_file.check_readable(self._tensors[name])
        for name in self._tensors:
            if name not in expected and name not in (ROPE_FACTORS, LONG_FACTORS, SHORT_FACTORS):
                raise InputError(f"{self.path}: tensor {name} is not part of a {self.config.family} decoder")
        self._parts: dict[str, gguf_file.Tensor] = {}
        for name, group in groups.items():
            whole = self._tensors[name]
            size = whole.size // len(group)
            for at, array in enumerate(group):
                own = replace(whole, shape=array.shape, start=whole.start + at * size, size=size)
                self._parts |= {weight.key: part for weight, part in array.split(own)}


def load_gguf(
    path: AnyPlace,
    *,
    layout: Layout,
    dtype: jnp.dtype,
    mesh: Mesh | None = None,
    table: Table = PARAM,
    quiet: bool = False,
) -> Decoder:
    """The Decoder of a GGUF file of a supported architecture, its weights made dense in `dtype` one at a time."""
    checkpoint = GgufCheckpoint(path)
    return build(checkpoint.config, checkpoint.read, layout=layout, dtype=dtype, mesh=mesh, table=table, quiet=quiet)


def _half_split(array: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows of q or k with rotary pairs (2i, 2i + 1), llama.cpp's order, as pairs (i, i + head_dim / 2)."""
    rows = array.reshape(-1, head_dim // 2, 2, *array.shape[1:])
    return rows.swapaxes(1, 2).reshape(array.shape)
