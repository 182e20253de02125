# SPDX-License-Identifier: Apache-2.0
"""The one error that is the user's to mend, and how words of others are shown in it."""


class InputError(ValueError):
    """Input that cannot be used: the message is one line, says what was expected and what was got.

    The command line prints the message without a traceback and exits with status 2.
    """


def legible(text: str) -> str:
    """The text on one line, what is no printable character written as its escape: a terminal obeys none of it."""
    line = " ".join(text.split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in line)
