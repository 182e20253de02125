# SPDX-License-Identifier: Apache-2.0
"""RAPID: long-context answers by retrieval-augmented speculative decoding (arXiv 2502.20330), in JAX."""

__version__ = "0.1.0"
