# SPDX-License-Identifier: Apache-2.0
"""Whether arrays are numbers at all: on their devices, in one pass, whatever mesh they lie on."""

from typing import Any

import jax
import jax.numpy as jnp


def all_finite(tree: Any) -> jax.Array:
    """Whether no number of any array is NaN or infinite; to be traced."""
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)]))


@jax.jit
def finite_each(tree: Any) -> Any:
    """A tree like the given one that says of each array whether all of it is finite."""
    return jax.tree.map(lambda x: jnp.all(jnp.isfinite(x)), tree)
