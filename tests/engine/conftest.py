# SPDX-License-Identifier: Apache-2.0
"""A small decoder, and how large what it keeps is."""

from pathlib import Path

import pytest

from tests.engine.prefix_cases import LENGTH, MESHES, cache_of, decoder_on


@pytest.fixture(scope="module")
def decoder():
    return decoder_on(MESHES["one device"])


@pytest.fixture(scope="module")
def size(decoder) -> int:
    """Bytes of a prefix of LENGTH tokens."""
    return cache_of(decoder, Path()).bytes_for(LENGTH)
