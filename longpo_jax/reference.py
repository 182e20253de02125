# SPDX-License-Identifier: Apache-2.0
"""The stage that scores answers with the frozen reference: what training needs of it, computed once and kept.

LongPO conditions the reference of both answers on the SHORT context (arXiv 2502.13922, Eq. 12): each turn by itself
behind its excerpt, with the reference's own rope theta. So no second model is in memory while training.

Which answers are scored, behind what, is in an objective's record (objectives.py): sums, or a teacher (teacher.py).

    RUN/reference/scores-00000.jsonl    {"id": ..., "chosen": [...], ...}, a line a record, of the first 32

One run scores all records, or several hosts a share each (shares.py), whose files are those of one run.
"""

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import islice
from typing import Any, TypeAlias

import numpy as np

from longpo_jax.config import LongPOConfig
from longpo_jax.objectives import objective_of
from longpo_jax.records import digest_of, read_records
from longpo_jax.score_files import TOGETHER, References, ScoreFiles, digests_in, files_in, is_begun, scores_in
from longpo_jax.scorer import Scorer
from longpo_jax.share_loop import make_shares
from longpo_jax.shares import Shares, documents_of
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
from rapid_jax.runtime.files import digest
from rapid_jax.runtime.mesh import agreed
from rapid_jax.runtime.progress import progress
from rapid_jax.runtime.share import Share
from rapid_jax.runtime.storage import AnyPlace

OfRecords: TypeAlias = Mapping[str, References] | Teachers  # by the record's id


def run_reference(config: LongPOConfig, folder: AnyPlace, *, leads: bool = True, quiet: bool = False) -> None:
    """Scores the records of `folder`/pairs into `folder`/reference; goes on where it was interrupted.

    Where that was begun in shares, those are joined. Every process computes, the one that `leads` writes. Raises
    InputError for pairs that cannot be used, and if not all shares are done.
    """
    job, shares = _Job(config, folder, leads=leads, quiet=quiet), Shares(folder, "reference", is_begun)
    if job.is_done():
        if leads:
            shares.remove()
    elif agreed(leads and shares.begun() is not None):
        if leads:
            with shares.to_join(job.folder, job.inputs) as (places, _):
                job.join(places)
                job.finish()
            shares.remove()
    else:
        if job.scores:
            job.make(job.folder, range(len(job.ids)))
        if leads:
            job.finish()


def run_share(
    config: LongPOConfig, folder: AnyPlace, asked: Sequence[Share], *, leads: bool = True, quiet: bool = False
) -> bool:
    """Scores the shares that are asked for, as `make_shares`. Whether all are now done, to be joined by
    `run_reference`; also where the objective has no reference, and there is nothing to do.

    Raises InputError for pairs that cannot be used, and if another run makes the one that is asked for.
    """
    job, shares = _Job(config, folder, leads=leads, quiet=quiet), Shares(folder, "reference", is_begun)
    if job.is_done() or not job.scores:
        return True
    inputs = {**job.inputs, "shares": asked[0].count}
    if leads:
        shares.check(inputs, job.folder)
        shares.begin(inputs, {})

    def make(share: Share) -> None:
        part, place = documents_of(share, len(job.ids), TOGETHER), shares.place(share)
        job.make(place, part)
        if leads:
            mark_done(place, shares.inputs_of(share, inputs), {"records": len(part), "files": digests_in(place)})

    return make_shares(shares, asked, inputs, job.folder, make, leads=leads, quiet=quiet)


class _Job:
    """The scores of a run: what decides them, the records, and how these become files."""

    def __init__(self, config: LongPOConfig, folder: AnyPlace, *, leads: bool, quiet: bool):
        self.folder, self._pairs = stage_in(folder, "reference"), stage_in(folder, "pairs")
        self.inputs = reference_inputs(config, folder)
        self.scores = objective_of(config.objective.name).needs_reference  # whether there are any
        self._config, self._leads, self._quiet = config, leads, quiet
        self._key = digest(json.dumps(self.inputs, sort_keys=True))

    def is_done(self) -> bool:
        """Whether they are all there."""
        return is_to_skip(self.folder, self.inputs, leads=self._leads)

    @cached_property
    def ids(self) -> list[str]:
        """Of all records: a damaged one is told before the first is scored."""
        return [record.id for record in read_records(self._pairs)]

    @cached_property
    def _scorer(self) -> Scorer:
        return Scorer(self._config, quiet=self._quiet)

    def make(self, place: AnyPlace, part: range) -> None:
        """Scores these records, whole files of them, into `place`; goes on where that was interrupted."""
        done = ScoreFiles(place, self._key, self.ids, self._names, part, leads=self._leads)
        first = int(agreed(done.next))
        scorer = self._scorer if first < part.stop else None
        records = islice(read_records(self._pairs), first, part.stop)
        with progress("reference", part.stop - first, "documents", quiet=self._quiet or not self._leads) as report:
            while scorer is not None and (batch := list(islice(records, TOGETHER))):
                done.add(scorer.scores(batch))
                report.advance(len(batch))

    def join(self, places: Sequence[AnyPlace]) -> None:
        """Takes in the files of all shares, which follow one another."""
        every = ScoreFiles(self.folder, self._key, self.ids, self._names, range(len(self.ids)), leads=True)
        for path in (path for place in places for path in files_in(place)):
            every.take(path)
        if every.next != len(self.ids):
            raise InputError(f"{self.folder}: expected scores of {len(self.ids)} records, got {every.next}")

    @property
    def _names(self) -> Sequence[str]:
        return objective_of(self._config.objective.name).of_reference

    def finish(self) -> None:
        """Marks the stage done."""
        mark_done(self.folder, self.inputs, {"records": len(self.ids), "files": digests_in(self.folder)})


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
    if digests_in(place) != summary_of(place).get("files"):
        raise InputError(
            f"{place}: expected the files that were written, got others: delete {place} to make them again"
        )
    objective = objective_of(inputs["objective.name"])
    if objective.teacher:
        return Teachers(files_in(place), inputs["objective.top_k"])
    return {id: scores for path in files_in(place) for id, scores in scores_in(path, objective.of_reference)}


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
