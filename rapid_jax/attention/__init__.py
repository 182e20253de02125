# SPDX-License-Identifier: Apache-2.0
"""Positions, blocks and the cache: one attention algebra. Knows nothing of models."""
