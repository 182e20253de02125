# SPDX-License-Identifier: Apache-2.0
"""What decides RAPID's programs and answers, by name, and that it is the same for all processes of a run."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from rapid_jax.config import RapidConfig
from rapid_jax.model.identity import identity_of
from rapid_jax.prompts import Reading
from rapid_jax.retrieval.encoder_io import encoder_folder, read_config, weight_files
from rapid_jax.runtime import settings
from rapid_jax.runtime.agreement import (
    READING_S,
    are_several,
    backend_fields,
    check_agreed,
    code_fields,
    left_out,
)
from rapid_jax.runtime.files import cache_dir, digest, digests_of
from rapid_jax.runtime.storage import AnyPlace

# Where files lie, on each machine: what is in them is compared.
_OWN = ("cache.*", "models.target", "models.drafter", "models.encoder")
# Options that say where to read or write, or what is told ...
_OWN_OPTIONS = ("run", "document", "data", "text", "out", "json", "trace", "save_config", "quiet", "resume")
# ... and those that are compared by what comes of them, settings and samples.
_OWN_OPTIONS += ("config", "set", "model", "drafter", "mode", "temperature", "eta", "gamma", "max_new_tokens", "seed")


def deciding(config: RapidConfig) -> dict[str, object]:
    """The settings that must be the same for all processes of a run, "section.key" -> value."""
    return left_out(settings.flat(config), _OWN)


def check_same_command(command: str, options: Mapping[str, object], config: RapidConfig) -> None:
    """Raises InputError, on every process of a run, unless all run the same code with the same options and settings.

    Needs no jax: programs that differ here may not even join each other.
    """
    if are_several():
        fields = {"command": command, **code_fields("rapid_jax"), **deciding(config)}
        fields |= {f"--{name}".replace("_", "-"): item for name, item in left_out(options, _OWN_OPTIONS).items()}
        check_agreed(fields)


def check_same_models(config: RapidConfig) -> None:
    """Raises InputError, on every process of a run, unless all have the same devices, settings and models.

    Reads all weights where that has not been done yet. JAX has joined the processes.
    """
    if not are_several():
        return
    models, mode, cache = config.models, config.speculation.mode, cache_dir(config.cache.folder)
    fields = backend_fields() | deciding(config) | identity_of(models.target, models.dtype, name="target", cache=cache)
    if mode not in ("target", "retrieval") and not models.has_one_checkpoint:
        fields |= identity_of(models.drafter, models.dtype, name="drafter", cache=cache)
    if mode != "target":
        fields |= _of_encoder(encoder_folder(models.encoder), cache)
    check_agreed(fields, patience=READING_S)


def check_same_prompts(
    config: RapidConfig, readings: Sequence[Reading], seeds: Sequence[int] | None = None, *, streamed: bool = False
) -> None:
    """Raises InputError, on every process of a run, unless all ask the models the same, and all `streamed` or none."""
    prompts = {"prompts": [reading.long for reading in readings], "drafter's prompts": [r.short for r in readings]}
    if are_several():
        check_agreed(prompts | {"seeds": seeds, "streamed": streamed, "settings": deciding(config)})


def _of_encoder(folder: AnyPlace, cache: Path) -> dict[str, str]:
    tokenizer = folder / "tokenizer.json"
    weights = digests_of(weight_files(folder), cache / "digests")
    return {
        "encoder.weights": digest(*weights, repr(read_config(folder, None))),
        "encoder.tokenizer": digest(tokenizer.read_bytes()) if tokenizer.is_file() else "none",
    }
