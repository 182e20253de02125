# SPDX-License-Identifier: Apache-2.0
"""Machines and files: settings, checkpoints, meshes, progress. Knows nothing of transformers."""
