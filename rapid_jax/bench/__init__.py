# SPDX-License-Identifier: Apache-2.0
"""How fast: plain decoding, RAPID and their parts, measured side by side on this machine."""
