# SPDX-License-Identifier: Apache-2.0
"""Why an engine does not take a request."""

from rapid_jax.runtime.errors import InputError, TooLarge

__all__ = ("Draining", "QueueFull", "TooLarge", "UnknownDocument")


class QueueFull(Exception):
    """As many requests wait as may; `retry_after` seconds from now there may be room."""

    def __init__(self, retry_after: float):
        super().__init__(f"the queue is full; try again in {retry_after:.0f} s")
        self.retry_after = retry_after


class Draining(Exception):
    """The engine ends, and takes nothing more."""


class UnknownDocument(InputError):
    """No document of this owner has that id."""
