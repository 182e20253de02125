# SPDX-License-Identifier: Apache-2.0
"""The folder of an evaluation: what it is of, and its answers, each kept as soon as it is there.

DIR/suite.json            the suite and its options, the settings that decide answers, whose templates
DIR/settings.yaml         the settings
DIR/answers-LABEL.jsonl   a line a finished sample; of a share I/N answers-LABEL.I-of-N.jsonl
DIR/lease.json            in a bucket, of the run at work there; of a share lease.I-of-N.json
"""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rapid_jax.config import RapidConfig
from rapid_jax.evaluate import results
from rapid_jax.runtime import settings
from rapid_jax.runtime.append_log import Log
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.files import remove_leftovers, replace_file
from rapid_jax.runtime.run_folder import alone_in_logs
from rapid_jax.runtime.share import Share
from rapid_jax.runtime.storage import AnyPlace


class Answers:
    """The lines of one mode, where they are kept; of a process that does not lead, nowhere."""

    def __init__(self, log: Log | None):
        self._log = log
        if log is not None:
            log.truncate(results.torn_at(log.read()))  # a line that was torn when the run was killed

    def add(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Appends them. Raises InputError if they cannot be written: what was there stays."""
        if self._log is not None:
            self._log.append("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())

    def finish(self) -> None:
        """There are no more: they are one file."""
        if self._log is not None:
            self._log.join()


@contextlib.contextmanager
def open_answers(folder: AnyPlace, labels: Sequence[str], share: Share, *, leads: bool) -> Iterator[dict[str, Answers]]:
    """The lines of each mode that are this run's, to be added to. Raises InputError if another run writes to them."""
    names = [f"answers-{label}{share.ending}.jsonl" for label in labels]
    held = alone_in_logs(folder, names, f"lease{share.ending}.json")
    with held if leads else contextlib.nullcontext([None] * len(names)) as logs:
        yield dict(zip(labels, map(Answers, logs), strict=True))


def check_folder(folder: AnyPlace, *, resume: bool) -> None:
    """Raises InputError if there is an evaluation that is not to be resumed, or a file in the way."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: expected a folder or nothing there, got a file")
    if (folder / results.SUITE).is_file() and not resume:
        raise InputError(f"{folder}: expected a folder without an evaluation, got one: --resume goes on with it")


def check_same(folder: AnyPlace, described: Mapping[str, Any]) -> None:
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


def begin(folder: AnyPlace, described: Mapping[str, Any], config: RapidConfig) -> None:
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
