# SPDX-License-Identifier: Apache-2.0
"""The stage that writes the trained weights as a Hugging Face folder, which is also what the next round starts from."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp

from longpo_jax.checkpoints import newest, restore_weights
from longpo_jax.config import LongPOConfig
from longpo_jax.stages import identity_of, inputs_of, is_to_skip, mark_done
from rapid_jax.model.config import ModelConfig
from rapid_jax.model.decoder import Decoder
from rapid_jax.model.hf_io import save_hf
from rapid_jax.model.identity import identity_of as model_identity
from rapid_jax.model.load import open_checkpoint
from rapid_jax.model.placement import abstract
from rapid_jax.runtime.agreement import READING_S, check_agreed
from rapid_jax.runtime.axes import TRAINED, with_copied_kv
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.mesh import make_meshes


def run_export(config: LongPOConfig, folder: Path, *, leads: bool = True, quiet: bool = False) -> None:
    """Writes the newest checkpoint of `folder`/train to `folder`/export: bfloat16, sharded, whole or not at all.

    Tokenizer, chat template and generation defaults are those of the model that training started from; the rope theta
    is the one it was trained with, and the context size covers the longest row. All processes gather, one writes.
    """
    del quiet
    place = folder / "export"
    inputs = inputs_of(config, "export") | {"train": identity_of(folder / "train")}
    check_agreed(model_identity(config.model.source, config.model.dtype), patience=READING_S)
    if is_to_skip(place, inputs, leads=leads):
        return
    checkpoint, tokenizer = open_checkpoint(config.model.source)
    decoder = trained(config, checkpoint.config, folder / "train" / "checkpoints")
    save_hf(place, decoder, dtype="bfloat16", files=_reaching(tokenizer.files, decoder.config.context_size))
    if leads:
        mark_done(place, inputs, {"context_size": decoder.config.context_size, "theta": decoder.config.rope.theta})


def trained(config: LongPOConfig, model: ModelConfig, checkpoints: Path) -> Decoder:
    """The newest weights on the mesh of training; `model` is the architecture that training started from."""
    rope = model.rope
    if config.model.rope_theta is not None:
        rope = dataclasses.replace(rope, theta=config.model.rope_theta)
    longest = max(model.max_positions, config.train.lengths[-1])
    model = dataclasses.replace(model, rope=rope, max_positions=longest)
    mesh = make_meshes(config.mesh, None)[0]
    table = with_copied_kv(TRAINED, config.mesh.replicate_kv)
    found = newest(checkpoints)
    if found is None:
        raise InputError(f"{checkpoints}: expected a checkpoint, got none: run `longpo train` first")
    return restore_weights(found, abstract(model, layout="stacked", dtype=jnp.dtype("float32"), mesh=mesh, table=table))


def _reaching(files: Mapping[str, bytes], context: int) -> dict[str, bytes]:
    """The tokenizer's files, without a limit below `context`, at which transformers would warn or cut."""
    name, key = "tokenizer_config.json", "model_max_length"
    settings = json.loads(files.get(name, b"{}"))
    limit = settings.get(key)
    if not isinstance(limit, int | float) or limit >= context:
        return dict(files)
    return {**files, name: json.dumps(settings | {key: context}, indent=2, ensure_ascii=False).encode()}
