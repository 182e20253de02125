# SPDX-License-Identifier: Apache-2.0
"""Why a store did not answer, in one line, the same for stores of all kinds."""

from dataclasses import dataclass
from typing import Final

from rapid_jax.runtime.errors import InputError, Unavailable, legible

_BUSY: Final = (408, 429)


@dataclass(frozen=True)
class Terms:
    """What the words of a kind of store are."""

    credentials: str  # how they are given
    may_read: str
    may_write: str


@dataclass(frozen=True)
class Cause:
    """What a client library's error says, in this program's terms."""

    error: Exception  # whose text is shown
    status: int = 0  # of the store's answer; 0 without one
    unknown: bool = False  # it does not accept the credentials
    forbidden: bool = False  # it does, and does not allow this
    unreached: bool = False  # there was no answer


def failure(place: str, cause: Cause, terms: Terms, *, writes: bool) -> InputError:
    """The error that names the place: Unavailable where the same may go well later."""
    unsaid = "no answer in time" if isinstance(cause.error, TimeoutError) else type(cause.error).__name__
    words, kind = legible(str(cause.error)) or unsaid, InputError
    if cause.unknown:
        reason = f"the store does not accept the credentials: {terms.credentials} ({words})"
    elif cause.forbidden:
        what = f"write there: expected {terms.may_write}" if writes else f"read it: expected {terms.may_read}"
        reason = f"no permission to {what} for these credentials"
    elif cause.unreached:
        kind, reason = Unavailable, f"the store cannot be reached: {words}"
    elif cause.status in _BUSY or cause.status >= 500:
        kind, reason = Unavailable, f"the store failed, asked several times: {words}"
    elif cause.status:
        reason = f"the store refused it: {words}"
    else:
        reason = f"the store's answer makes no sense: {words}"
    return kind(f"{place}: {reason}")
