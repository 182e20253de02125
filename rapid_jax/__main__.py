# SPDX-License-Identifier: Apache-2.0
"""`python -m rapid_jax` is the command `rapid`."""

import sys

from rapid_jax.cli import main

sys.exit(main())
