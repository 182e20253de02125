# SPDX-License-Identifier: Apache-2.0
"""The stage that scores answers with the frozen reference: what training needs of it, computed once and kept.

LongPO conditions the reference of both answers on the SHORT context (arXiv 2502.13922, Eq. 12): each turn by itself
behind its excerpt, with the reference's own rope theta. So no second model is in memory while training.

Which answers are scored, behind what, is in an objective's record (objectives.py): sums, or a teacher (teacher.py).

    RUN/reference/scores-00000.jsonl    {"id": ..., "chosen": [...], ...}, a line a record of pairs-00000.jsonl
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, TypeAlias

import numpy as np

from longpo_jax.config import LongPOConfig
from longpo_jax.objectives import objective_of
from longpo_jax.records import digest_of, read_records
from longpo_jax.scorer import Scorer
from longpo_jax.stages import (
    check_same_model,
    inputs_of,
    is_done,
    is_to_skip,
    made_with,
    mark_done,
    stage_in,
    summary_of,
)
from longpo_jax.teacher import Teachers
from rapid_jax.model.identity import identity_of
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.files import digest, replace_file, sha256_of
from rapid_jax.runtime.mesh import agreed
from rapid_jax.runtime.progress import progress
from rapid_jax.runtime.sealed import place_of, sealed, unsealed
from rapid_jax.runtime.storage import AnyPlace, bytes_of

References: TypeAlias = Mapping[str, Sequence[float]]  # by name, an item a turn (dpo: one item)
OfRecords: TypeAlias = Mapping[str, References] | Teachers  # by the record's id

_OWNER = "inputs.txt"  # beside the scores: a digest of the inputs that they are of
_TOGETHER = 32  # records between two writes


def run_reference(config: LongPOConfig, folder: AnyPlace, *, leads: bool = True, quiet: bool = False) -> None:
    """Scores the records of `folder`/pairs into `folder`/reference; goes on where it was interrupted.

    Every process computes, the one that `leads` writes.
    """
    place, pairs = stage_in(folder, "reference"), stage_in(folder, "pairs")
    inputs = reference_inputs(config, folder)
    if is_to_skip(place, inputs, leads=leads):
        return
    ids = [record.id for record in read_records(pairs)]  # a damaged one is told before the first is scored
    count = len(ids)
    objective = objective_of(config.objective.name)
    if objective.needs_reference:
        key = digest(json.dumps(inputs, sort_keys=True))
        done = _Scores(place, key, ids, objective.of_reference, leads=leads)
        first = int(agreed(done.count))
        scorer = Scorer(config, quiet=quiet) if first < count else None
        records = islice(read_records(pairs), first, None)
        with progress("reference", count - first, "documents", quiet=quiet or not leads) as report:
            while scorer is not None and (part := list(islice(records, _TOGETHER))):
                done.add(scorer.scores(part))
                report.advance(len(part))
    if leads:
        mark_done(place, inputs, {"records": count, "files": _digests(place)})


def reference_inputs(config: LongPOConfig, folder: AnyPlace) -> dict[str, Any]:
    """What the scores follow from: settings, weights, tokenizer, chat template, and the records.

    Raises InputError for records that another model has made: it teaches itself.
    """
    pairs = stage_in(folder, "pairs")
    inputs = inputs_of(config, "reference") | {"pairs": digest_of(pairs)}
    model = identity_of(config.model.source, config.model.dtype)
    check_same_model(pairs, made_with(pairs), model, config.model.source)
    return inputs | model if objective_of(config.objective.name).needs_reference else inputs


def read_references(place: AnyPlace, inputs: Mapping[str, Any]) -> OfRecords:
    """The scores of each record by its id. Raises InputError if there are none, or they are of other inputs."""
    if not is_done(place, inputs):
        raise InputError(f"{place}: expected the reference's log-probabilities, got none: run `longpo reference` first")
    if _digests(place) != summary_of(place).get("files"):
        raise InputError(
            f"{place}: expected the files that were written, got others: delete {place} to make them again"
        )
    objective = objective_of(inputs["objective.name"])
    if objective.teacher:
        return Teachers(_files(place), inputs["objective.top_k"])
    return {id: scores for path in _files(place) for id, scores in _scores_in(path, objective.of_reference)}


def check_references(references: OfRecords, turns: Mapping[str, int], objective: str) -> None:
    """Raises InputError if a record, given with how many turns it has, lacks a score."""
    if isinstance(references, Teachers):
        references.check(turns)
        return
    needed = objective_of(objective).sums
    for id, count in turns.items() if needed else ():
        if id not in references:
            raise InputError(f"reference: expected log-probabilities of every record, got none of {id!r}")
        for name, expected in ((name, 1 if sums.together else count) for sums in needed for name in sums.names):
            if len(references[id][name]) != expected:
                raise InputError(
                    f"reference: expected {expected} log-probabilities of the {name} answers of {id!r}, "
                    f"got {len(references[id][name])}"
                )


def sums_of(scores: References, objective: str, turn: int) -> dict[str, float]:
    """What the reference says of a row: of one turn, or of all together."""
    if objective_of(objective).row == "turn":
        return {name: values[turn] for name, values in scores.items()}
    return {name: float(np.sum(np.asarray(values, np.float64))) for name, values in scores.items()}


def _files(place: AnyPlace) -> list[AnyPlace]:
    return sorted(place.glob("scores-*.jsonl"), key=lambda path: path.name) if place.is_dir() else []


def _digests(place: AnyPlace) -> dict[str, str]:
    return {path.name: sha256_of(path) for path in _files(place)}


def _scores_in(path: AnyPlace, names: Sequence[str]) -> Iterator[tuple[str, References]]:
    """(id, scores) of each line. Raises InputError, naming the line, for one that is not what was written there."""
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        values = unsealed(line, place_of(path, number), f"{path}:{number}")
        yield values.text("id"), {name: values.numbers(name) for name in names}


class _Scores:
    """The scores on disk, in files that are written whole; each is of the same inputs.

    `ids` are those of all records, in their order. Raises InputError for files that are not of the first of them.
    """

    def __init__(self, place: AnyPlace, key: str, ids: Sequence[str], names: Sequence[str], *, leads: bool):
        self._place, self._key, self._leads = place, key, leads
        self.count = 0
        self._files = 0
        self._new = True
        if leads and bytes_of(place / _OWNER) == key.encode():
            self._new = False
            for path in _files(place):
                found = [id for id, _ in _scores_in(path, names)]
                if path != self._path(self._files) or found != ids[self.count : self.count + _TOGETHER]:
                    raise InputError(
                        f"{path}: expected the scores of {_TOGETHER} records from number {self.count + 1} on, got "
                        f"others: delete {place} to make them again"
                    )
                self.count += len(found)
                self._files += 1

    def _begin(self) -> None:
        """Nothing is there but what these inputs make."""
        for path in _files(self._place):
            path.unlink()
        with replace_file(self._place / _OWNER) as temporary:
            temporary.write_text(self._key)
        self._new = False

    def _path(self, index: int) -> AnyPlace:
        return self._place / f"scores-{index:05d}.jsonl"

    def add(self, scores: Sequence[Mapping[str, Any]]) -> None:
        """Of the next records."""
        if self._leads:
            if self._new:
                self._begin()
            path = self._path(self._files)
            with replace_file(path) as temporary:
                lines = (sealed(score, place_of(path, number)) for number, score in enumerate(scores, start=1))
                temporary.write_bytes(b"".join(lines))
        self._files += 1
