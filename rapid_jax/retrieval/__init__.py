# SPDX-License-Identifier: Apache-2.0
"""Chunks, embeddings, index, selection: text in, text out."""
