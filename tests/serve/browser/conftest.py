# SPDX-License-Identifier: Apache-2.0
"""Leaves these tests out where there is no Chromium, and says so."""

from pathlib import Path

from tests.serve.browser import CHROMIUM


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Without Chromium nothing here is collected."""
    return True if CHROMIUM is None and collection_path.name.startswith("test_") else None


def pytest_terminal_summary(terminalreporter) -> None:
    """Says what a run left out as a whole."""
    if CHROMIUM is None:
        terminalreporter.write_line("tests/serve/browser: not collected, they need Chromium: apt-get install chromium")
