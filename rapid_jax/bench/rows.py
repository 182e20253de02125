# SPDX-License-Identifier: Apache-2.0
"""The rows of `rapid bench`."""

import json
from pathlib import Path
from typing import Any

from rapid_jax.runtime.errors import InputError


class Rows:
    """What was measured, also in a file: written row by row, for a run that is cut short."""

    def __init__(self, path: Path | None):
        self.kept: list[dict[str, Any]] = []
        self._path = path
        if path is not None:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text("", encoding="utf-8")
            except OSError as error:
                raise InputError(f"--json: {path}: {error.strerror}") from error

    def add(self, part: str, row: dict[str, Any]) -> None:
        """A row of this part."""
        row = {"part": part, **row}
        self.kept.append(row)
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
