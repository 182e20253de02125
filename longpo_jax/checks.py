# SPDX-License-Identifier: Apache-2.0
"""What a later stage of a round would refuse, found before the first one starts its hours of work."""

import jax.numpy as jnp

from longpo_jax.config import LongPOConfig
from longpo_jax.metrics import check_installed
from rapid_jax.model.config import ModelConfig
from rapid_jax.model.decoder import Layout
from rapid_jax.model.load import open_checkpoint
from rapid_jax.model.placement import abstract
from rapid_jax.runtime.axes import PARAM, TRAINED, Table, with_copied_kv
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.mesh import make_meshes
from rapid_jax.runtime.mesh_config import MeshConfig


def check_round(config: LongPOConfig, source: str) -> None:
    """Raises InputError if a package is missing, a mesh does not fit the devices or the model, or no row can be made.

    `source` is a model of the shape of the one that is taught, which need not be there yet. Nothing of it is loaded.
    """
    check_installed(config.train)
    # A document that is cut keeps about all that a prompt has room for.
    least = min(config.corpus.min_tokens, config.pairs.max_context - config.pairs.max_new_tokens)
    longest = config.train.lengths[-1]
    if least > longest:
        raise InputError(
            f"train.lengths: expected rows that hold documents of {least} tokens (corpus.min_tokens, "
            f"pairs.max_context), got at most {longest}"
        )
    model = open_checkpoint(source)[0].config
    _check_mesh("generation.mesh", config.generation.mesh, model, config.generation.layout, PARAM)
    _check_mesh("mesh", config.mesh, model, "stacked", TRAINED)


def _check_mesh(name: str, config: MeshConfig, model: ModelConfig, layout: Layout, table: Table) -> None:
    table = with_copied_kv(table, config.replicate_kv)
    try:
        mesh = make_meshes(config, None)[0]
        abstract(model, layout=layout, dtype=jnp.dtype("float32"), mesh=mesh, table=table)
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
