# SPDX-License-Identifier: Apache-2.0
"""The folder of an evaluation: what it is of, and its answers, each on disk as soon as it is there.

DIR/suite.json            the suite and its options, the settings that decide answers, whose templates
DIR/settings.yaml         the settings
DIR/answers-LABEL.jsonl   a line a finished sample; of a share I/N answers-LABEL.I-of-N.jsonl
"""

import fcntl
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rapid_jax.config import RapidConfig
from rapid_jax.evaluate import results
from rapid_jax.runtime import settings
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.files import remove_leftovers, replace_file


@dataclass(frozen=True)
class Share:
    """Which samples are this run's: number % count == index."""

    index: int = 0
    count: int = 1

    @property
    def ending(self) -> str:
        """Of the names of its files."""
        return "" if self.count == 1 else f".{self.index}-of-{self.count}"


class Answers:
    """The lines of one mode on disk. Raises InputError if another run writes to its file."""

    def __init__(self, folder: Path, label: str, share: Share, *, leads: bool):
        self._path = folder / f"answers-{label}{share.ending}.jsonl"
        self._file = open(self._path, "ab") if leads else None  # noqa: SIM115 - it lives as long as this
        if self._file is not None:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                self._file.close()
                raise InputError(f"{self._path}: expected no other run there, got one that is at work") from error
            os.truncate(self._path, results.torn_at(self._path))  # a line that was torn when the run was killed

    def close(self) -> None:
        """Others may write."""
        if self._file is not None:
            self._file.close()

    def add(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Appends them. Raises InputError if the disk is full: what was there stays."""
        if self._file is None:
            return
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()
        size = self._path.stat().st_size
        try:
            self._file.write(text)
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            os.truncate(self._path, size)
            raise InputError(f"{self._path}: an answer could not be written: {error.strerror}") from error


def check_folder(folder: Path, *, resume: bool) -> None:
    """Raises InputError if there is an evaluation that is not to be resumed, or a file in the way."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: expected a folder or nothing there, got a file")
    if (folder / results.SUITE).is_file() and not resume:
        raise InputError(f"{folder}: expected a folder without an evaluation, got one: --resume goes on with it")


def check_same(folder: Path, described: Mapping[str, Any]) -> None:
    """Raises InputError for a folder of another run, or with a line that is no sample's; none at all is right."""
    if not (folder / results.SUITE).is_file():
        return
    there = results.read_suite(folder / results.SUITE)
    described = json.loads(json.dumps(dict(described), default=str))
    for key in (*described, *there):
        if described.get(key) != there.get(key):
            raise InputError(
                f"{folder} was begun with {key} = {json.dumps(there.get(key)):.80}, expected "
                f"{json.dumps(described.get(key)):.80}: choose another --out"
            )
    results.finished(folder, described["suite"])


def begin(folder: Path, described: Mapping[str, Any], config: RapidConfig) -> None:
    """Makes the folder of a run, or checks that what is there is this run. Raises InputError if it is another."""
    remove_leftovers(folder)
    path = folder / results.SUITE
    if path.is_file():
        check_same(folder, described)
        return
    described = json.loads(json.dumps(dict(described), default=str))
    folder.mkdir(parents=True, exist_ok=True)
    settings.save(config, folder / results.SETTINGS)
    with replace_file(path) as temporary:
        temporary.write_text(json.dumps(described, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
