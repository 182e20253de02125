# SPDX-License-Identifier: Apache-2.0
"""Programs compiled by the real TPU compiler, on any machine: nothing here runs them, and no TPU is looked for."""

import importlib.util

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache


def pytest_collection_modifyitems(items):
    if importlib.util.find_spec("libtpu") is None:
        for item in items:
            if "tests/tpu/" in item.nodeid:
                item.add_marker(pytest.mark.skip(reason="libtpu is not installed: pip install '.[tpu]'"))


@pytest.fixture(autouse=True)
def nothing_from_disk():
    """What was compiled for another machine's chips cannot be read back, by this worker or another: it is not kept."""
    before = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", before)
    compilation_cache.reset_cache()
