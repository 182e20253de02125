# SPDX-License-Identifier: Apache-2.0
"""Tests of the page in a browser: they need Chromium, which is a package of the system's."""

import shutil

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
