# SPDX-License-Identifier: Apache-2.0
"""The engine behind HTTP: OpenAI's schema, documents handed in once, metrics, and a page to ask on."""
