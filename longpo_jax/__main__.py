# SPDX-License-Identifier: Apache-2.0
"""`python -m longpo_jax` is the command `longpo`."""

import sys

from longpo_jax.cli import main

sys.exit(main())
