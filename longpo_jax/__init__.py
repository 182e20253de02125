# SPDX-License-Identifier: Apache-2.0
"""LongPO: a short-context chat model teaches itself long context (arXiv 2502.13922), in JAX."""
