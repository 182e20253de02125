# SPDX-License-Identifier: Apache-2.0
"""Experts by the names that checkpoints give them, of the arrays that transformers joins them to in memory."""

from collections.abc import Mapping
from typing import Any


def apart(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """The arrays; of `experts.gate_up_proj` [X, 2 F, D] and `experts.down_proj` [X, D, F] each expert's own."""
    found = {}
    for key, array in arrays.items():
        place, experts, name = key.partition(".experts.")
        if not experts:
            found[key] = array
            continue
        half = array.shape[1] // 2
        parts = {"down": array} if name == "down_proj" else {"gate": array[:, :half], "up": array[:, half:]}
        for part, of in parts.items():
            found |= {f"{place}.experts.{at}.{part}_proj.weight": of[at] for at in range(len(of))}
    return found
