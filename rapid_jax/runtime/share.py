# SPDX-License-Identifier: Apache-2.0
"""A part of a work that several hosts split, I/N: which, of how many."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from rapid_jax.runtime.errors import InputError

_MOST: Final = 10_000


@dataclass(frozen=True)
class Share:
    """Part number `index`, from 0, of `count`."""

    index: int = 0
    count: int = 1

    @property
    def ending(self) -> str:
        """Of the names of its files."""
        return "" if self.count == 1 else f".{self.index}-of-{self.count}"


def share_of(text: str) -> Share:
    """What the option --share asks for. Raises InputError for anything but I/N."""
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count) <= _MOST):
        raise InputError(f"--share: expected I/N with 0 <= I < N, got {text!r}")
    return Share(int(index), int(count))


def shares_of(text: str) -> Sequence[Share]:
    """As `share_of`; any/N is all of them."""
    index, _, count = text.partition("/")
    if index != "any":
        return [share_of(text)]
    if not count.isdecimal() or not 0 < int(count) <= _MOST:
        raise InputError(f"--share: expected any/N with N from 1 to {_MOST}, got {text!r}")
    return [Share(number, int(count)) for number in range(int(count))]
