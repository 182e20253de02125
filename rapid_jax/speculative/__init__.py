# SPDX-License-Identifier: Apache-2.0
"""Prefill, draft, verify: token ids and caches in, token ids out."""
