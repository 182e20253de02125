# SPDX-License-Identifier: Apache-2.0
"""Programs compiled by the real TPU compiler, on any machine: nothing here runs them, and no TPU is looked for."""

import importlib.util

import pytest


def pytest_collection_modifyitems(items):
    if importlib.util.find_spec("libtpu") is None:
        for item in items:
            if "tests/tpu/" in item.nodeid:
                item.add_marker(pytest.mark.skip(reason="libtpu is not installed: pip install '.[tpu]'"))
