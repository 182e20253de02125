# SPDX-License-Identifier: Apache-2.0
"""What a run needs of a TPU, found by compiling it without one."""
