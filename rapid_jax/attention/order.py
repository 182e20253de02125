# SPDX-License-Identifier: Apache-2.0
"""The zigzag order: which tokens of a sequence each device of the context axis holds.

A causal query sees what comes before it, so devices with consecutive parts of a sequence have unequal work. Cut into
2n pieces of which device i holds pieces i and 2n - 1 - i, all have the same.

    4 devices        0 7 | 1 6 | 2 5 | 3 4
"""

import numpy as np

from rapid_jax.runtime.errors import InputError


def zigzag(size: int, devices: int) -> np.ndarray:
    """int32 [size]: the token at each place, so that `tokens[zigzag(...)]` split over the devices is in zigzag order.

    Raises InputError unless the size is a multiple of twice the devices. One device keeps the order.
    """
    if devices == 1:
        return np.arange(size, dtype=np.int32)
    if size % (2 * devices):
        raise InputError(f"zigzag order over {devices} devices needs a multiple of {2 * devices} tokens, got {size}")
    pieces = np.arange(size, dtype=np.int32).reshape(2 * devices, -1)
    return np.concatenate([pieces[[i, 2 * devices - 1 - i]].ravel() for i in range(devices)])


def inverse(order: np.ndarray) -> np.ndarray:
    """int32 [size]: the place of each token."""
    places = np.empty_like(order)
    places[order] = np.arange(order.size, dtype=order.dtype)
    return places
