# SPDX-License-Identifier: Apache-2.0
"""The frozen reference on its devices: what it says of answers behind their excerpts, or behind the document."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import jax
import numpy as np

from longpo_jax.config import LongPOConfig
from longpo_jax.objectives import objective_of
from longpo_jax.records import Record
from longpo_jax.remat import wrapping
from longpo_jax.rows import Row, batch_rows
from longpo_jax.samples import Parts, all_turns, one_turn, taught_turn
from longpo_jax.scores import row_log_probs, row_top
from longpo_jax.teacher import Teacher, check_top_k, joined
from rapid_jax.attention.order import inverse, zigzag
from rapid_jax.attention.strategy import Strategy
from rapid_jax.model.load import LoadedModel, load_model
from rapid_jax.model.tokenizer import Tokenizer
from rapid_jax.runtime.axes import TRAINED
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.mesh import make_meshes, put_on_mesh, whole
from rapid_jax.speculative.chunk_layout import bucket

_Found = TypeVar("_Found")
_LEAST = 64  # places that a device's half of a zigzag part is padded to multiples of


class Scorer:
    """The reference, loaded. Raises InputError for a teacher whose `objective.top_k` the vocabulary does not have."""

    def __init__(self, config: LongPOConfig, *, quiet: bool = False):
        model = self._model = self._load(config, quiet)
        mesh = model.decoder.mesh
        train, compute = config.train, config.compute
        self._objective, self._tokenizer = objective_of(config.objective.name), model.tokenizer
        self._strategy = Strategy(train.attention_block, mesh, compute.kernel, compute.context)
        self._rows = config.mesh.data * config.mesh.fsdp
        how: dict[str, Any] = {"strategy": self._strategy, "logits_chunk": train.logits_chunk}
        how["wrap"] = wrapping("none", offload=False, mesh=mesh)
        call = partial(row_log_probs, **how)
        if self._objective.teacher:
            check_top_k(config.objective.top_k, model.decoder.config.vocab_size)
            call = partial(row_top, k=config.objective.top_k, **how)
        # What is found comes whole to every device: each process reads all of it.
        self._call = jax.jit(lambda *given, **how: whole(mesh, call(*given, **how)), static_argnames="tail")

    @staticmethod
    def _load(config: LongPOConfig, quiet: bool) -> LoadedModel:
        return load_model(
            config.model.source,
            layout="stacked",
            dtype=config.model.dtype,
            mesh=make_meshes(config.mesh, None)[0],
            table=TRAINED,
            replicate_kv=config.mesh.replicate_kv,
            rope_theta=config.model.reference_rope_theta,
            quiet=quiet,
        )

    def scores(self, records: Sequence[Record]) -> list[dict[str, Any]]:
        """Of each record its id, and its sums by name or its teacher.

        Raises InputError for a log-probability that is not finite.
        """
        if self._objective.teacher:
            return self._taught(records)
        asked = [(index, *item) for index, record in enumerate(records) for item in self._asked(record)]
        sums = self.sums([parts for *_, parts in asked])
        found: list[dict[str, Any]] = [{"id": record.id} for record in records]
        for (index, names, _), values in zip(asked, sums, strict=True):
            for name, value in zip(names, values, strict=False):
                if not math.isfinite(value):
                    raise InputError(
                        f"reference: expected a finite log-probability of the {name} answer of document "
                        f"{records[index].id}, got {value}"
                    )
                found[index].setdefault(name, []).append(value)
        return found

    def sums(self, parts: Sequence[Parts]) -> list[tuple[float, float]]:
        """(chosen, rejected) of each."""
        return self._together(parts, self._summed)

    def teachers(self, parts: Sequence[Parts]) -> list[Teacher]:
        """Of each, made by `samples.taught_turn`, the distributions at its answer's tokens."""
        return self._together(parts, self._teachers_of)

    def _asked(self, record: Record) -> Iterator[tuple[tuple[str, ...], Parts]]:
        """(names of the sums of the chosen and the rejected branch, tokens)."""
        tokenizer: Tokenizer = self._tokenizer
        for sums in self._objective.sums:
            both = len(sums.names) > 1
            if sums.together:
                yield sums.names, all_turns(tokenizer, record, record.context, rejected=both)
                continue
            for turn in record.turns:
                context = record.excerpt_of(turn) if sums.behind == "excerpt" else record.context
                yield sums.names, one_turn(tokenizer, turn, context, rejected=both)

    def _taught(self, records: Sequence[Record]) -> list[dict[str, Any]]:
        asked = [(record, turn) for record in records for turn in record.turns]
        parts = [taught_turn(self._tokenizer, turn, record.excerpt_of(turn)) for record, turn in asked]
        teachers, found = iter(self.teachers(parts)), []
        for record in records:
            teacher = joined([next(teachers) for _ in record.turns])
            if not (np.all(np.isfinite(teacher.log_probs_TJ)) and np.all(np.isfinite(teacher.rest_T))):
                raise InputError(
                    "reference: expected finite log-probabilities at the tokens of the rejected answers of document "
                    f"{record.id}, got others"
                )
            found.append({"id": record.id} | teacher.to_json())
        return found

    def _together(self, parts: Sequence[Parts], of_rows: Callable[[list[Parts]], list[_Found]]) -> list[_Found]:
        """What `of_rows` finds of each, rows of about equal length together."""
        by_size = sorted(range(len(parts)), key=lambda index: parts[index].size)
        found: dict[int, _Found] = {}
        for start in range(0, len(by_size), self._rows):
            group = by_size[start : start + self._rows]
            rows = [*group, *[group[-1]] * (self._rows - len(group))]
            found |= dict(zip(group, of_rows([parts[index] for index in rows]), strict=False))
        return [found[index] for index in range(len(parts))]

    def _summed(self, parts: list[Parts]) -> list[tuple[float, float]]:
        _, out = self._read(parts)
        return [(float(c), float(r)) for c, r in zip(out["chosen_B"], out["rejected_B"], strict=True)]

    def _teachers_of(self, parts: list[Parts]) -> list[Teacher]:
        rows, out = self._read(parts)
        places = inverse(zigzag(rows[0].tail, self._strategy.context))
        arrays = [np.asarray(x)[:, places] for x in (out.ids_BTJ, out.log_probs_BTJ, out.rest_BT)]
        found = []
        for b, row in enumerate(rows):
            at = np.flatnonzero((row.turn_T > 0)[row.trunk :])
            ids, log_probs, rest = (array[b, at] for array in arrays)
            found.append(Teacher(ids, log_probs, rest, (at.size,)))
        return found

    def _read(self, parts: list[Parts]) -> tuple[list[Row], Any]:
        """(the rows that the parts are packed into, what the model says of them)."""
        devices = self._strategy.context
        least = _LEAST * (2 * devices if devices > 1 else 1)
        trunk, tail = (max(part.size[axis] for part in parts) for axis in (0, 1))
        trunk, tail = bucket(trunk, least), bucket(tail, least) if tail else 0
        rows = [part.packed(trunk, tail) for part in parts]
        arrays = batch_rows(rows, trunk=trunk, devices=devices)
        spec, mesh = self._strategy.spec, self._strategy.mesh
        batch = {name: put_on_mesh(mesh, spec(name), array) for name, array in arrays.items()}
        return rows, jax.device_get(self._call(self._model.decoder, batch, tail=tail))
