# SPDX-License-Identifier: Apache-2.0
"""Shapes are contracts: what a kernel is given is checked while it is traced, at no cost to the program."""

import contextlib
import re
from collections.abc import Iterator


@contextlib.contextmanager
def contract(kernel: str) -> Iterator[None]:
    """Inside it a failed assertion (chex's above all) is a ValueError that begins with the kernel's name.

    Unlike an assertion it stands under `python -O`, and unlike an `InputError` it is a fault of the caller's code.
    """
    try:
        yield
    except AssertionError as error:
        text = re.sub(r"^\[Chex\] Assertion \w+ failed: ", "", " ".join(str(error).split()))
        raise ValueError(f"{kernel}: {text}") from error
