# SPDX-License-Identifier: Apache-2.0
"""The stage that writes the trained weights as a Hugging Face folder, which is also what the next round starts from."""

import dataclasses
import json
from collections.abc import Mapping

import jax.numpy as jnp

from longpo_jax.card import CARD, card_of, renew
from longpo_jax.checkpoint_files import of_step
from longpo_jax.checkpoints import restore_weights
from longpo_jax.config import LongPOConfig
from longpo_jax.stages import check_same_model, identity_of, inputs_of, is_to_skip, made_with, mark_done, summary_of
from rapid_jax.model.config import ModelConfig
from rapid_jax.model.decoder import Decoder
from rapid_jax.model.hf_io import save_hf
from rapid_jax.model.identity import identity_of as model_identity
from rapid_jax.model.load import open_checkpoint
from rapid_jax.model.placement import abstract
from rapid_jax.runtime.agreement import READING_S, check_agreed
from rapid_jax.runtime.axes import TRAINED, with_copied_kv
from rapid_jax.runtime.command_line import say
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.json_input import Fields
from rapid_jax.runtime.mesh import make_meshes
from rapid_jax.runtime.storage import AnyPlace


def run_export(config: LongPOConfig, folder: AnyPlace, *, leads: bool = True, quiet: bool = False) -> None:
    """Writes the checkpoint that training ended with to `folder`/export: bfloat16, sharded, whole or not at all.

    `export.step` asks for another; done.json says which it was. None is taken in the place of one that is damaged.

    Tokenizer, chat template and generation defaults are those of the model that training started from; the rope theta
    is the one it was trained with, and the context size covers the longest row. All processes gather, one writes. The
    model card beside them is written anew where an evaluation has come since, unless somebody has edited it.
    """
    place = folder / "export"
    inputs = inputs_of(config, "export") | {"train": identity_of(folder / "train"), "step": step_of(config, folder)}
    model = model_identity(config.model.source, config.model.dtype)
    check_agreed(model, patience=READING_S)
    checkpoint, tokenizer = open_checkpoint(config.model.source)
    card = card_of(config, folder, checkpoint, inputs["step"])
    if is_to_skip(place, inputs, leads=leads):
        if leads and not renew(place, card) and not quiet:
            say(f"export: {place / CARD} was edited, and stays as it is")
        return
    check_same_model(folder / "train", made_with(folder / "train"), model, config.model.source)
    decoder = trained(config, checkpoint.config, folder / "train" / "checkpoints", inputs["step"])
    files = _reaching(tokenizer.files, decoder.config.context_size) | {CARD: card.encode()}
    save_hf(place, decoder, dtype="bfloat16", files=files)
    if leads:
        made = {"context_size": decoder.config.context_size, "theta": decoder.config.rope.theta, "step": inputs["step"]}
        mark_done(place, inputs, made)


def step_of(config: LongPOConfig, folder: AnyPlace) -> int:
    """The update after which the weights are exported. Raises InputError if training is not done."""
    if config.export.step is not None:
        return config.export.step
    return Fields(summary_of(folder / "train"), str(folder / "train" / "done.json"), "summary.").whole("steps")


def trained(config: LongPOConfig, model: ModelConfig, checkpoints: AnyPlace, step: int) -> Decoder:
    """The weights after `step` updates on the mesh of training; `model` is the architecture that training started from.

    Raises InputError if there is no such checkpoint, or it is damaged.
    """
    rope = model.rope
    if config.model.rope_theta is not None:
        rope = dataclasses.replace(rope, theta=config.model.rope_theta)
    longest = max(model.max_positions, config.train.lengths[-1])
    model = dataclasses.replace(model, rope=rope, max_positions=longest)
    mesh = make_meshes(config.mesh, None)[0]
    table = with_copied_kv(TRAINED, config.mesh.replicate_kv)
    try:
        found = of_step(checkpoints, step)
        target = abstract(model, layout="stacked", dtype=jnp.dtype("float32"), mesh=mesh, table=table)
        return restore_weights(found, target)
    except InputError as error:
        again = checkpoints.parent / "done.json"
        raise InputError(
            f"{error}: nothing was exported; export.step takes another checkpoint, and without {again} `longpo train` "
            "goes on from the newest that is whole"
        ) from error


def _reaching(files: Mapping[str, bytes], context: int) -> dict[str, bytes]:
    """The tokenizer's files, without a limit below `context`, at which transformers would warn or cut."""
    name, key = "tokenizer_config.json", "model_max_length"
    settings = json.loads(files.get(name, b"{}"))
    limit = settings.get(key)
    if not isinstance(limit, int | float) or limit >= context:
        return dict(files)
    return {**files, name: json.dumps(settings | {key: context}, indent=2, ensure_ascii=False).encode()}
