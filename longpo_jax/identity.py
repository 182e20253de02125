# SPDX-License-Identifier: Apache-2.0
"""What a model is known by, for which nothing of it is loaded: digests of its weights, tokenizer and chat template."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rapid_jax.model.load import arithmetic, open_checkpoint
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.files import digest, digest_file


def identity_of(source: str, dtype: str) -> dict[str, str]:
    """model.weights, model.tokenizer, model.template, and of a `dtype` that is "auto" what it comes to, model.dtype."""
    checkpoint, tokenizer = open_checkpoint(source)
    # The files that the template is in, not what it renders: some templates write the day's date.
    rest = [item for item in sorted(tokenizer.files.items()) if item[0] != "tokenizer.json"]
    return {
        "model.dtype": arithmetic(dtype).name,
        "model.weights": digest(*map(_digest, checkpoint.weight_files), repr(checkpoint.config)),
        "model.tokenizer": tokenizer.fingerprint,
        "model.template": digest(*(part for item in rest for part in item), repr(tokenizer.stop_ids)),
    }


def check_same_model(place: Path, made: Mapping[str, Any], model: Mapping[str, str], source: str) -> None:
    """Raises InputError if the stage of `place` was made with another model than `source`, known by `model`."""
    for key in ("model.weights", "model.tokenizer", "model.template"):
        if made.get(key, model[key]) != model[key]:
            raise InputError(
                f"{place} was made with another model, with {key} = {str(made[key])[:60]}, expected {model[key]} as "
                f"{source} has: choose another run folder or model.source"
            )


def _digest(path: Path) -> str:
    status = path.stat()
    return _digest_once(path, status.st_size, status.st_mtime_ns)


@functools.cache
def _digest_once(path: Path, size: int, changed: int) -> str:
    """A file is read once a process: weights of a large model take minutes."""
    del size, changed
    return digest_file(path)
