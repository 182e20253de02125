# SPDX-License-Identifier: Apache-2.0
"""Products that are summed in float32, whatever is multiplied."""

import jax
import jax.numpy as jnp


def einsum32(spec: str, x: jax.Array, weight: jax.Array) -> jax.Array:
    """einsum accumulated in float32, float32; float32 weights are multiplied in full float32 on every backend."""
    precision = jax.lax.Precision.HIGHEST if weight.dtype == jnp.float32 else None
    return jnp.einsum(spec, x, weight, precision=precision, preferred_element_type=jnp.float32)
