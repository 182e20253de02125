# SPDX-License-Identifier: Apache-2.0
"""The one error that is the user's to mend, and how words of others are shown in it."""

from typing import Final

AGAIN: Final = 75  # exit status, EX_TEMPFAIL of sysexits.h: started again, it may go well


class InputError(ValueError):
    """Input that cannot be used: the message is one line, says what was expected and what was got.

    The command line prints the message without a traceback and exits with status 2.
    """


class Unavailable(InputError):
    """A store does not answer now: the same may go well later."""


class Busy(InputError):
    """Another run is at work there."""


class Again(SystemExit):
    """This process alone cannot go on now, and nothing is lost: the run is to be started again, status 75."""

    def __init__(self, reason: str):
        super().__init__(AGAIN)
        self.reason = reason


class TooLarge(InputError):
    """What is asked for never fits: the context, or the memory."""


def printable(text: str) -> str:
    """The text with each character that is not printable, line ends too, as its escape: a terminal obeys none of it."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def legible(text: str) -> str:
    """`printable`, on one line and with one space between words."""
    return printable(" ".join(text.split()))


def extra(name: str) -> str:
    """What installs an extra of setup.py: the packages here are on no index."""
    return f"run in the folder of rapid-jax's setup.py: pip install '.[{name}]'"
