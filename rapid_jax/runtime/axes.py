# SPDX-License-Identifier: Apache-2.0
"""The letters that array names end in, and the mesh axis that each is split over.

    B batch          T query time     S key time        G the few tokens of a decode step, or of a tail
    L layer          D embed          N query heads     K kv heads         H head dim
    F ffn            V vocab          E encoder embedding              J a teacher's most probable tokens    X experts

`q_BTNH` is [batch, query time, query heads, head dim]; `gate_DF` is [embed, ffn]. These letters are the only sharding
rule: PARAM for parameters (TRAINED while they are trained), ACT for everything that flows between them.
"""

from collections.abc import Mapping
from typing import TypeAlias

from jax.sharding import PartitionSpec

MeshAxes: TypeAlias = str | tuple[str, ...] | None
Table: TypeAlias = Mapping[str, MeshAxes]

PARAM: Table = {
    "V": "model",
    "D": "fsdp",
    "N": "model",
    "K": "model",
    "F": "model",
    "H": None,
    "L": None,
    "E": None,  # encoders are small: whole on every device
    "X": None,  # each device has a part of every expert
}
# While training, weights and what the optimizer keeps of them are also split over the devices that share a sequence.
TRAINED: Table = {**PARAM, "D": ("fsdp", "context")}
ACT: Table = {
    "B": ("data", "fsdp"),
    "T": "context",
    "S": "context",
    "G": None,
    "N": "model",
    "K": "model",
    "F": "model",
    "V": "model",
    "D": None,
    "H": None,
    "L": None,
    "E": None,
    "J": None,
}


def with_copied_kv(table: Table, copied: bool) -> Table:
    """The table; if `copied`, with kv heads whole on every device of `model`, for more of those than kv heads."""
    return {**table, "K": None} if copied else table


def letters_of(name: str) -> str:
    """The axis letters that a name ends in: "q_bias_NH" -> "NH"."""
    _, underscore, letters = name.rpartition("_")
    if not underscore or not letters.isalpha() or not letters.isupper():
        raise ValueError(f"{name!r} does not end in axis letters, as in 'gate_DF'")
    return letters


def spec_of(name: str, table: Table) -> PartitionSpec:
    """How an array of this name lies on the mesh: "gate_DF" with PARAM -> PartitionSpec("fsdp", "model").

    Raises ValueError for a letter that the table lacks, and for two letters of the name on one mesh axis.
    """
    used: dict[str, str] = {}
    entries: list[MeshAxes] = []
    for letter in letters_of(name):
        if letter not in table:
            raise ValueError(f"{name!r}: no mesh axis is given for letter {letter!r}")
        entry = table[letter]
        for axis in (entry,) if isinstance(entry, str) else entry or ():
            if axis in used:
                raise ValueError(f"{name!r}: letters {used[axis]!r} and {letter!r} are both split over {axis!r}")
            used[axis] = letter
        entries.append(entry)
    return PartitionSpec(*entries)
