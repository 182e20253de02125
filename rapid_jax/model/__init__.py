# SPDX-License-Identifier: Apache-2.0
"""Decoders in Flax NNX, and their checkpoints in Hugging Face and GGUF format."""
