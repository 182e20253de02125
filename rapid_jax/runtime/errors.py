# SPDX-License-Identifier: Apache-2.0
"""The one error that is the user's to mend."""


class InputError(ValueError):
    """Input that cannot be used: the message is one line, says what was expected and what was got.

    The command line prints the message without a traceback and exits with status 2.
    """


def extra(name: str) -> str:
    """What installs an extra of setup.py: the packages here are on no index."""
    return f"run in the folder of rapid-jax's setup.py: pip install '.[{name}]'"
