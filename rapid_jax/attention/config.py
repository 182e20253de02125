# SPDX-License-Identifier: Apache-2.0
"""The names by which settings choose how attention is computed. Imports no jax."""

from typing import Literal, TypeAlias

KernelName: TypeAlias = Literal["auto", "xla", "splash", "cudnn"]  # kernels.py
Over: TypeAlias = Literal["ring", "all_gather"]  # ring.py
