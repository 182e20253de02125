# SPDX-License-Identifier: Apache-2.0
"""The teacher of on-policy self-distillation on disk: at each token of an answer its k most probable tokens.

A line of RUN/reference/scores-*.jsonl, sealed as the others are:

    {"id": ..., "tokens": [a number a turn], "ids": BASE64, "log_probs": BASE64, "rest": BASE64}

ids are int32 [tokens, k], log_probs float32 [tokens, k], rest float32 [tokens], little-endian; all turns in a row. In
bfloat16 log_probs would save a quarter, and be off by up to 0.03 at -8: a student equal to its teacher would be taught
that. Records are read where they are used, one at a time: those of a large corpus fit in no memory.
"""

import base64
import binascii
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from longpo_jax.records import Line
from longpo_jax.rows import Row
from rapid_jax.attention.order import zigzag
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.json_input import Fields
from rapid_jax.runtime.sealed import place_of, stated_seal, unsealed
from rapid_jax.runtime.storage import AnyPlace

TEACHER = ("ids_BTJ", "log_probs_BTJ", "rest_BT")  # the arrays of a batch, at the places of its tails


@dataclass(frozen=True)
class Teacher:
    """Distributions at the tokens of some answers, one after the other; J the k most probable tokens."""

    ids_TJ: np.ndarray  # int32
    log_probs_TJ: np.ndarray  # float32
    rest_T: np.ndarray  # float32: log of the probability of all other tokens together
    tokens: tuple[int, ...]  # of each turn

    def to_json(self) -> dict[str, Any]:
        """Plain values, which `from_json` reads back bit for bit."""
        arrays = {"ids": (self.ids_TJ, "<i4"), "log_probs": (self.log_probs_TJ, "<f4"), "rest": (self.rest_T, "<f4")}
        texts = {name: base64.b64encode(x.astype(kind).tobytes()).decode() for name, (x, kind) in arrays.items()}
        return {"tokens": list(self.tokens)} | texts

    @classmethod
    def from_json(cls, value: Fields, k: int) -> "Teacher":
        """Raises InputError, naming its place, for what is not the record of a teacher with k tokens."""
        tokens = tuple(value.wholes("tokens"))
        shape = sum(tokens), k
        ids, log_probs = (_array(value, name, kind, shape) for name, kind in (("ids", "<i4"), ("log_probs", "<f4")))
        return cls(ids, log_probs, _array(value, "rest", "<f4", shape[:1]), tokens)


def joined(turns: Sequence[Teacher]) -> Teacher:
    """The teacher of all turns of a record."""
    arrays = (np.concatenate([getattr(x, name) for x in turns]) for name in ("ids_TJ", "log_probs_TJ", "rest_T"))
    return Teacher(*arrays, tokens=tuple(count for turn in turns for count in turn.tokens))


def bytes_per_token(k: int) -> float:
    """On disk, of one token of an answer: k ids, k log-probabilities and the rest, 4 bytes each, in base 64."""
    return 4 * (2 * k + 1) * 4 / 3


def check_top_k(k: int, vocabulary: int) -> None:
    """Raises InputError unless a vocabulary of this size has a rest beside the k tokens."""
    if k >= vocabulary:
        raise InputError(f"objective.top_k: expected less than the model's vocabulary of {vocabulary}, got {k}")


class Teachers(Mapping[str, Teacher]):
    """The teacher of each record by its id, read from the files when it is asked for.

    Raises InputError, naming the line, for one that is not what was written there.
    """

    def __init__(self, files: Iterable[AnyPlace], k: int):
        self._k, self._lines = k, dict[str, Line]()
        self._tokens: dict[str, tuple[int, ...]] = {}
        for path in files:
            offset = 0
            for number, data in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
                values = unsealed(data, place_of(path, number), f"{path}:{number}")
                id = values.text("id")
                self._lines[id] = Line(str(path), number, offset, len(data), stated_seal(data))
                self._tokens[id] = Teacher.from_json(values, k).tokens
                offset += len(data)

    def __getitem__(self, id: str) -> Teacher:
        return Teacher.from_json(self._lines[id].fields(), self._k)

    def __iter__(self) -> Iterator[str]:
        return iter(self._lines)

    def __len__(self) -> int:
        return len(self._lines)

    def check(self, turns: Mapping[str, int]) -> None:
        """Raises InputError if a record, given with how many turns it has, lacks a teacher for one."""
        for id, count in turns.items():
            if len(self._tokens.get(id, ())) != count:
                raise InputError(
                    f"reference: expected a teacher of {count} answers of {id!r}, got {len(self._tokens.get(id, ()))}"
                )


def batch_teachers(teachers: Sequence[Teacher], rows: Sequence[Row], *, devices: int) -> Mapping[str, np.ndarray]:
    """The arrays of TEACHER [B, tail, ...] at the places of the rows' tails, in the order of `rows.batch_rows`.

    Raises InputError for a teacher of other answers than the row's.
    """
    tail = rows[0].tail
    ids = np.zeros((len(rows), tail, teachers[0].ids_TJ.shape[1]), np.int32)
    log_probs, rest = np.zeros(ids.shape, np.float32), np.zeros(ids.shape[:2], np.float32)
    for b, (teacher, row) in enumerate(zip(teachers, rows, strict=True)):
        turn = np.where(row.pos_T >= 0, row.turn_T, 0)[row.trunk :]
        counts = tuple(int(np.sum(turn == number)) for number in range(1, len(teacher.tokens) + 1))
        if counts != teacher.tokens or turn.max(initial=0) > len(counts):
            raise InputError(f"reference: expected a teacher of answers of {counts} tokens, got {teacher.tokens}")
        at = np.flatnonzero(turn > 0)
        ids[b, at], log_probs[b, at], rest[b, at] = teacher.ids_TJ, teacher.log_probs_TJ, teacher.rest_T
    order = zigzag(tail, devices)
    return dict(zip(TEACHER, (ids[:, order], log_probs[:, order], rest[:, order]), strict=True))


def _array(value: Fields, name: str, kind: str, shape: tuple[int, ...]) -> np.ndarray:
    size = 4 * int(np.prod(shape))
    try:
        data = base64.b64decode(value.text(name), validate=True)
    except (binascii.Error, ValueError):
        data = b""
    if len(data) != size:
        raise value.error(name, f"{size} bytes in base 64")
    return np.frombuffer(data, kind).reshape(shape).astype(kind[1:], copy=False)
