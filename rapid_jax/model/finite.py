# SPDX-License-Identifier: Apache-2.0
"""Why a model's logits are not numbers: looked for once they are not."""

import re
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import nnx

from rapid_jax.model.decoder import Decoder
from rapid_jax.model.fused_decoder import FusedDecoder
from rapid_jax.model.hf_names import weights
from rapid_jax.runtime.mesh import whole


def why_not_finite(decoder: Decoder) -> str:
    """The first weight that holds NaN or infinity, by the checkpoint's name for it; else what else it can be."""
    named = {
        (weight.name, weight.layer, weight.expert): weight.part_of or weight.key for weight in weights(decoder.config)
    }
    for name, layer, array in _arrays(decoder):
        if not bool(_all_finite(array, decoder)):
            if isinstance(decoder, FusedDecoder):
                name = decoder.part_at(name.split(".")[0], int(_first_column(array, decoder)))
            expert = int(_first_row(array, decoder)) if (name, layer, 0) in named else None
            return f"{named.get((name, layer, expert), _spelt(name, layer))} holds NaN or infinite values"
    angles = [x for pair in decoder.rotations(jnp.arange(2)[None]) for x in pair]
    if not bool(jnp.all(jnp.isfinite(jnp.stack(angles)))):
        return f"the angles of {decoder.config.rope} are not finite"
    return f"every weight is finite, so activations overflow in {decoder.embed_VD[...].dtype}"


def _arrays(decoder: Decoder) -> Iterator[tuple[str, int | None, jax.Array]]:
    """(name, layer, values) of every floating array, in the order of the forward pass as far as layers go."""
    found = []
    for path, value in nnx.to_flat_state(nnx.state(decoder)):
        array, keys = value[...], [key for key in path if isinstance(key, str)]
        layer = next((key for key in path if isinstance(key, int)), None)
        if not jnp.issubdtype(array.dtype, jnp.floating):
            continue
        name = ".".join(keys[1:] if keys[0] == "blocks" else keys)
        if keys[0] == "blocks" and layer is None:  # stacked
            found += [(name, row, array[row]) for row in range(array.shape[0])]
        else:
            found.append((name, layer, array))
    order = {"embed_VD": -1}
    yield from sorted(
        found, key=lambda item: order.get(item[0], decoder.config.num_layers) if item[1] is None else item[1]
    )


def _all_finite(array: jax.Array, decoder: Decoder) -> jax.Array:
    return jax.jit(lambda x: whole(decoder.mesh, jnp.all(jnp.isfinite(x))))(array)


def _first_column(array: jax.Array, decoder: Decoder) -> jax.Array:
    """Of the last axis, the first place with something that is not finite."""

    return _first(array, decoder, -1)


def _first_row(array: jax.Array, decoder: Decoder) -> jax.Array:
    """Of the first axis, the first place with something that is not finite."""
    return _first(array, decoder, 0)


def _first(array: jax.Array, decoder: Decoder, axis: int) -> jax.Array:
    def first(x: jax.Array) -> jax.Array:
        return jnp.argmax(jnp.any(~jnp.isfinite(jnp.moveaxis(x, axis, -1)), axis=tuple(range(x.ndim - 1))))

    return jax.jit(lambda x: whole(decoder.mesh, first(x)))(array)


def _spelt(name: str, layer: int | None) -> str:
    place = "" if layer is None else f"layer {layer}'s "
    return place + re.sub(r"\.(value|raw_value)$", "", name)
