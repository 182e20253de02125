# SPDX-License-Identifier: Apache-2.0
"""Models loaded once, requests that carry their own settings, and the engine that runs them side by side."""
