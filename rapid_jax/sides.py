# SPDX-License-Identifier: Apache-2.0
"""What a question is to the two models: each with its prompt, and the text that may be copied."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax

from rapid_jax.speculative.generate import Prompted


@dataclass(frozen=True)
class Sides:
    """Both models with their prompts, and what level 0 may copy from."""

    target: Prompted
    drafter: Prompted | None
    texts: Sequence[list[int]]
    reused: bool = False  # the document was not prefilled anew

    def wait(self) -> None:
        """Until the prefixes are computed."""
        jax.block_until_ready((self.target.prefix, None if self.drafter is None else self.drafter.prefix))
