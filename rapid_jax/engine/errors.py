# SPDX-License-Identifier: Apache-2.0
"""Why the engine does not take a request."""

from rapid_jax.runtime.errors import InputError


class QueueFull(Exception):
    """As many requests wait as may; `retry_after` is in how many seconds a place is expected to be free."""

    def __init__(self, retry_after: float):
        super().__init__(f"the queue is full: try again in {retry_after:g} s")
        self.retry_after = retry_after


class TooLarge(InputError):
    """A request that never fits: beyond the model's context, or beyond the memory even when nothing else runs."""


class Draining(Exception):
    """The engine ends what it has begun and takes nothing new."""


class UnknownDocument(InputError):
    """There is no such document, or it is somebody else's: the two are not told apart."""
