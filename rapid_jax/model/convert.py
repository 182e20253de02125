# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of any format read here, written as a Hugging Face folder."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import jax.numpy as jnp
import numpy as np

from rapid_jax.model.gguf_io import GgufCheckpoint
from rapid_jax.model.hf_io import ExportDtype, HfCheckpoint, write_checkpoint
from rapid_jax.model.hf_names import Weight, weights
from rapid_jax.model.load import open_checkpoint
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.progress import progress


def convert(
    source: str | Path,
    target_folder: Path,
    dtype: Literal["auto"] | ExportDtype = "auto",
    *,
    quiet: bool = False,
) -> None:
    """Writes the checkpoint at `source` (folder, .gguf file or "smollm2") to `target_folder` for transformers to load.

    dtype "auto" loses nothing: bfloat16 when that is what the source stores, else float32 (a quantised weight is not
    a bfloat16 number). One tensor is in memory at a time, and no device is used. Raises InputError when the target
    holds anything, or the disk does not take it; nothing is left half-written.
    """
    if dtype not in ("auto", "float32", "bfloat16"):
        raise InputError(f"dtype must be auto, float32 or bfloat16, got {dtype!r}")
    if target_folder.exists() and (not target_folder.is_dir() or any(target_folder.iterdir())):
        raise InputError(f"{target_folder}: expected a new name or an empty folder, but it exists")
    checkpoint, tokenizer = open_checkpoint(source)
    chosen: ExportDtype = _lossless(checkpoint) if dtype == "auto" else dtype
    every = weights(checkpoint.config)
    with progress("converting", len(every), "arrays", quiet=quiet) as report:

        def arrays() -> Iterator[tuple[Weight, np.ndarray]]:
            for weight in every:
                yield weight, checkpoint.read(weight.key).astype(jnp.dtype(chosen), copy=False)
                report.advance(1)

        write_checkpoint(target_folder, checkpoint.config, arrays(), dtype=chosen, files=tokenizer.files)


def _lossless(checkpoint: HfCheckpoint | GgufCheckpoint) -> ExportDtype:
    return "bfloat16" if isinstance(checkpoint, HfCheckpoint) and checkpoint.is_bfloat16 else "float32"
