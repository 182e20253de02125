# SPDX-License-Identifier: Apache-2.0
"""Packed rows: a pair of dialogues about one document, the document and first instruction once.

    trunk   document, first instruction | chosen turns        positions 0 .. n - 2
    tail                                  rejected turns      positions P - 1 .. : they restart behind the shared part

P tokens are shared. A place holds the token that is read and, as its target, the one that it predicts: targets are
shifted before anything is split over devices. The last shared token is read twice, by the trunk and by the tail, so
that each branch's first token has a place that predicts it. The tail sees of the trunk what lies up to `reach`,
position P - 2, and itself. The row equals two separate sequences (specification oracle O16; measured in the tests).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from longpo_jax.dialogue import Branch
from rapid_jax.attention.order import zigzag
from rapid_jax.runtime.errors import InputError

SHARED, CHOSEN, REJECTED = 0, 1, 2  # branch tags
# Of each place of a row; int32.
PLACES = ("tokens_BT", "targets_BT", "pos_BT", "branch_BT", "turn_BT")


@dataclass(frozen=True)
class Row:
    """One row of `trunk` + `tail` places, in the order of the text; a place without a token has position -1."""

    tokens_T: np.ndarray
    targets_T: np.ndarray
    pos_T: np.ndarray
    branch_T: np.ndarray
    turn_T: np.ndarray  # turn whose answer the target belongs to, 0: none, -1: none, and not to be learnt at all
    reach: int  # the last position of the trunk that the tail sees
    tail: int  # places of the tail

    @property
    def trunk(self) -> int:
        """Places of the trunk."""
        return self.tokens_T.size - self.tail


def needed(shared: Sequence[int], chosen: Branch, rejected: Branch | None) -> tuple[int, int]:
    """(places of the trunk, places of the tail) that hold these tokens."""
    return len(shared) + len(chosen.tokens) - 1, 0 if rejected is None else len(rejected.tokens)


def packed(shared: Sequence[int], chosen: Branch, rejected: Branch | None, *, trunk: int, tail: int) -> Row:
    """The row of two branches behind a shared part; None: of one branch, and the tail stays empty.

    Raises InputError if they do not fit.
    """
    least = needed(shared, chosen, rejected)
    if least[0] > trunk or least[1] > tail:
        raise InputError(f"a row of {trunk} + {tail} places does not hold a pair of {least[0]} + {least[1]} tokens")
    row = {name: np.zeros(trunk + tail, np.int32) for name in ("tokens", "targets", "branch", "turn")}
    pos = np.full(trunk + tail, -1, np.int32)

    def put(at: int, read: Sequence[int], targets: Sequence[int], turns: Sequence[int], first: int) -> None:
        place = slice(at, at + len(targets))
        row["tokens"][place], row["targets"][place], row["turn"][place] = read, targets, turns
        pos[place] = np.arange(first, first + len(targets))

    sequence = [*shared, *chosen.tokens]
    put(0, sequence[:-1], sequence[1:], [0] * (len(shared) - 1) + chosen.turns, 0)
    row["branch"][len(shared) - 1 : trunk] = CHOSEN
    row["branch"][trunk:] = REJECTED
    if rejected is not None:
        put(trunk, [shared[-1], *rejected.tokens[:-1]], rejected.tokens, rejected.turns, len(shared) - 1)
    return Row(row["tokens"], row["targets"], pos, row["branch"], row["turn"], len(shared) - 2, tail)


def batch_rows(rows: Sequence[Row], *, trunk: int, devices: int) -> Mapping[str, np.ndarray]:
    """The arrays of PLACES, [B, T], and `reach_B`, for `devices` along the context axis.

    Trunks are padded to `trunk` places. Split into `devices` equal parts, each part holds its share of the trunk in
    zigzag order and behind it its share of the tail.
    """
    order = arrangement(trunk, rows[0].tail, devices)
    found = {}
    for name in PLACES:
        field, empty = name.replace("_BT", "_T"), -1 if name == "pos_BT" else 0
        padded = [np.insert(getattr(row, field), row.trunk, [empty] * (trunk - row.trunk)) for row in rows]
        found[name] = np.stack(padded)[:, order].astype(np.int32)
    return found | {"reach_B": np.asarray([row.reach for row in rows], np.int32)}


def arrangement(trunk: int, tail: int, devices: int) -> np.ndarray:
    """int32 [trunk + tail]: which place of the text's order lies at each place of the devices' order."""
    parts = [zigzag(trunk, devices).reshape(devices, -1)]
    if tail:
        parts.append(trunk + zigzag(tail, devices).reshape(devices, -1))
    return np.concatenate(parts, axis=1).ravel()
