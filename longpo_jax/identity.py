# SPDX-License-Identifier: Apache-2.0
"""What a model is known by, for which nothing of it is loaded: digests of its weights, tokenizer and chat template."""

import functools
from pathlib import Path

from rapid_jax.model.load import arithmetic, open_checkpoint
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


def _digest(path: Path) -> str:
    status = path.stat()
    return _digest_once(path, status.st_size, status.st_mtime_ns)


@functools.cache
def _digest_once(path: Path, size: int, changed: int) -> str:
    """A file is read once a process: weights of a large model take minutes."""
    del size, changed
    return digest_file(path)
