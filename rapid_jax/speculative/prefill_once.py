# SPDX-License-Identifier: Apache-2.0
"""Rows that begin alike: what they have in common is prefilled once and kept once."""

from collections.abc import Callable, Sequence

import jax
import numpy as np

from rapid_jax.attention.cache import Prefix


def distinct(prompts: Sequence[list[int]]) -> tuple[list[list[int]], list[int]]:
    """(the different ones, in the order of their first rows; which of them each row is)."""
    index: dict[tuple[int, ...], int] = {}
    rows = [index.setdefault(tuple(prompt), len(index)) for prompt in prompts]
    return [list(prompt) for prompt in index], rows


def spread(prefix: Prefix, rows: Sequence[int]) -> Prefix:
    """The prefix of rows of which each is one of those given; a single one stays one row: attention broadcasts it."""
    count = prefix.pos_BS.shape[0]
    if count == 1 or list(rows) == list(range(count)):
        return prefix
    taken = np.asarray(rows, np.int32)
    stacked = not isinstance(prefix.layers, tuple)  # a leading axis of layers
    layers = jax.tree.map(lambda array: array[:, taken] if stacked else array[taken], prefix.layers)
    return Prefix(layers, prefix.pos_BS[taken], prefix.used)


def prefilled_once(
    prompts: Sequence[list[int]], make: Callable[[list[list[int]]], Prefix], *, parts: int = 1
) -> Prefix:
    """The prefix that `make` gives for each different prompt, for all rows; of a single one, a row for each part of
    `data`.
    """
    different, rows = distinct(prompts)
    return make(different * parts) if len(different) == 1 else spread(make(different), rows)
