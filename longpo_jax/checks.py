# SPDX-License-Identifier: Apache-2.0
"""What a later stage of a round would refuse, found before the first one starts its hours of work."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

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

# Setting -> the mesh, how layers lie in memory there, which axis is split over what.
MESHES: Mapping[str, Callable[[LongPOConfig], tuple[MeshConfig, Layout, Table]]] = MappingProxyType(
    {
        "generation.mesh": lambda config: (config.generation.mesh, config.generation.layout, PARAM),
        "mesh": lambda config: (config.mesh, "stacked", TRAINED),
    }
)


def check_round(config: LongPOConfig, source: str) -> None:
    """Raises InputError if a package is missing, a mesh does not fit the devices or the model, or no row can be made.

    `source` is a model of the shape of the one that is taught, which need not be there yet. Nothing of it is loaded.
    """
    check_installed(config.train)
    check_rows(config)
    model = open_checkpoint(source)[0].config
    for name in MESHES:
        check_mesh(name, config, model, make_meshes)


def check_rows(config: LongPOConfig) -> None:
    """Raises InputError if not even the shortest documents fit into a row."""
    # A document that is cut keeps about all that a prompt has room for.
    least = min(config.corpus.min_tokens, config.pairs.max_context - config.pairs.max_new_tokens)
    longest = config.train.lengths[-1]
    if least > longest:
        raise InputError(
            f"train.lengths: expected rows that hold documents of {least} tokens (corpus.min_tokens, "
            f"pairs.max_context), got at most {longest}"
        )


def check_mesh(name: str, config: LongPOConfig, model: ModelConfig, made: Callable[..., Any]) -> None:
    """Raises InputError if the mesh of that name does not divide the model, or as `made` does, which makes it."""
    mesh, layout, table = MESHES[name](config)
    try:
        table = with_copied_kv(table, mesh.replicate_kv)
        abstract(model, layout=layout, dtype=jnp.dtype("float32"), mesh=made(mesh, None)[0], table=table)
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
