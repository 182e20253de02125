# SPDX-License-Identifier: Apache-2.0
"""Answer quality by length, task and mode: benchmarks, their scoring, a run that can be interrupted, reports."""
