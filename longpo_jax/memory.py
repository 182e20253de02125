# SPDX-License-Identifier: Apache-2.0
"""Memory of a device by what lies there, counted from shapes: nothing is compiled, and no device need be there.

What a program needs on its way (gathered weights, a layer's own arrays) is not part of it: `longpo plan` has the exact
number of a TPU slice, by its compiler.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType

from longpo_jax.checks import MESHES
from longpo_jax.config import LongPOConfig
from longpo_jax.optimizer import transform_of
from longpo_jax.step import Step
from rapid_jax.model.config import ModelConfig
from rapid_jax.model.placement import abstract
from rapid_jax.plan.models import own_bytes
from rapid_jax.runtime.axes import with_copied_kv
from rapid_jax.runtime.mesh_config import AXES, MeshConfig
from rapid_jax.speculative.chunk_layout import ChunkLayout
from rapid_jax.speculative.window_layout import WindowLayout


def abstract_mesh(first: MeshConfig, second: MeshConfig | None = None) -> tuple[AbstractMesh, None]:
    """The mesh without devices, in the place of `make_meshes`."""
    del second
    return AbstractMesh(first.sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES)), None


def of_training(config: LongPOConfig, model: ModelConfig) -> Mapping[str, int]:
    """Bytes of a device by kind: weights, optimizer and gradients, what is kept of each layer, logits of a chunk."""
    mesh = config.mesh
    decoder = _decoder(config, model, "mesh", "float32")
    step = Step(config, decoder, transform_of(config.optimizer, 1000))
    held = own_bytes((step.moments(decoder), step.zero_total(decoder)[0]))
    item = jnp.dtype(config.model.dtype).itemsize
    tokens = -(-(config.train.lengths[-1] + config.train.tail) // mesh.context)
    width = model.hidden_size  # of a layer's input, and of attention's output where that is kept, too
    if config.train.remat != "layer":
        width += model.num_heads * model.head_dim
    if config.train.offload:
        width -= model.hidden_size
    if config.train.remat == "none":
        mlp = 3 * model.intermediate_size
        if (experts := model.experts) is not None:
            mlp = experts.per_token * (3 * experts.ffn + 2 * model.hidden_size)
        width += mlp + (model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    logits = 2 * 4 * min(config.train.logits_chunk, tokens) * model.vocab_size // mesh.model
    return {
        "weights": own_bytes(decoder),
        "optimizer and gradients": held,
        "layers": model.num_layers * tokens * item * width,
        "logits": logits,
    }


def of_generation(config: LongPOConfig, model: ModelConfig) -> Mapping[str, int]:
    """Bytes of a device by kind: weights, and keys and values of the longest prompts that are read at once."""
    mesh = config.generation.mesh
    item = jnp.dtype(config.model.dtype).itemsize
    heads = -(-model.num_kv_heads // mesh.model)
    slots = -(-min(config.corpus.max_tokens + config.pairs.max_new_tokens, config.pairs.max_context) // mesh.context)
    kept = sum(min(slots, _slots_of(window, slots, mesh.context)) for window in model.window_of)
    cache = 2 * heads * model.head_dim * item * kept * config.pairs.documents
    return {"weights": own_bytes(_decoder(config, model, "generation.mesh", config.model.dtype)), "cache": cache}


def _slots_of(window: int | None, slots: int, context: int) -> int:
    """Of so many slots that a device has of a prompt, those that a layer with this window keeps."""
    if window is None:
        return slots
    everything = slots * context
    return WindowLayout(window, ChunkLayout(everything, 1, everything, context)).kept.slots // context


def _decoder(config: LongPOConfig, model: ModelConfig, name: str, dtype: str) -> Any:
    """The model as shapes that lie on the mesh of that name."""
    mesh, layout, table = MESHES[name](config)
    table = with_copied_kv(table, mesh.replicate_kv)
    return abstract(model, layout=layout, dtype=jnp.dtype(dtype), mesh=abstract_mesh(mesh)[0], table=table)  # type: ignore[arg-type]
