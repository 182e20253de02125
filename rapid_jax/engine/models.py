# SPDX-License-Identifier: Apache-2.0
"""The models of an engine: each is loaded when it is first needed, once, and never changes."""

import logging
import threading
from functools import cached_property
from pathlib import Path

from jax.sharding import Mesh

from rapid_jax.config import ATTENDED, RapidConfig
from rapid_jax.engine.encoded import EncodedTexts
from rapid_jax.identity import check_same_models
from rapid_jax.model.load import LoadedModel, load_model, open_checkpoint, own_settings
from rapid_jax.model.tokenizer import check_same_vocabulary
from rapid_jax.retrieval.config import RetrievalConfig
from rapid_jax.retrieval.embed import Embedder
from rapid_jax.retrieval.encoder_io import encoder_folder, read_config
from rapid_jax.retrieval.retriever import Retriever
from rapid_jax.runtime.files import cache_dir
from rapid_jax.runtime.mesh import make_meshes
from rapid_jax.runtime.mesh_config import MeshConfig
from rapid_jax.speculative.attended import check_attended
from rapid_jax.speculative.config import SpeculationConfig
from rapid_jax.speculative.own_sampling import resolve

_log = logging.getLogger(__name__)


class Models:
    """Target, drafter and encoder on their devices, as the settings `models`, `mesh` and `drafter_mesh` say.

    The encoder is not loaded before anything is retrieved, a second drafter not before anything is drafted.
    """

    def __init__(self, config: RapidConfig, *, quiet: bool = False):
        self.config, self._quiet = config, quiet
        self._cache = cache_dir(config.cache.folder)
        self._retrievers: dict[RetrievalConfig, Retriever] = {}
        self.encoded = EncodedTexts()  # of documents
        self._lock = threading.Lock()

    @property
    def name(self) -> str:
        """What the target is called: the last part of its path, or its own name."""
        return Path(self.config.models.target).name.removesuffix(".gguf")

    @cached_property
    def target(self) -> LoadedModel:
        """The long-context model."""
        target = self._load(self.config.models.target, self.meshes[0], self.config.mesh)
        ignored = resolve(self.config.sampling, target.generation).ignored
        if ignored:
            _log.warning("%s: not implemented and ignored: %s", target.generation.source, ", ".join(ignored))
        kind = self.config.models.target_weights
        return target if kind == "full" else target.with_weights(kind)

    @cached_property
    def drafter(self) -> LoadedModel:
        """The model that drafts: another where one is configured, maybe in quantised weights."""
        models, drafter, config = self.config.models, self.target, self.config
        if not models.has_one_checkpoint:
            drafter = self._load(models.drafter, self.meshes[1], config.drafter_mesh or config.mesh)
            check_same_vocabulary(self.target.tokenizer, drafter.tokenizer, models.drafter)
        is_copy = drafter is self.target and models.target_weights != "full"
        return drafter if is_copy or models.drafter_weights == "full" else drafter.with_weights(models.drafter_weights)

    @cached_property
    def embedder(self) -> Embedder:
        """The encoder of chunks and questions."""
        return Embedder(self.config.models.encoder, batch_size=self.config.retrieval.batch_size)

    @cached_property
    def meshes(self) -> tuple[Mesh | None, Mesh | None]:
        """The target's devices and the drafter's; None is the default device."""
        return make_meshes(self.config.mesh, self.config.drafter_mesh)

    @cached_property
    def token_spans(self):
        """Where the target's tokens begin and end in a text: what chunks are cut by."""
        return self.target.tokenizer.spans

    def retriever(self, config: RetrievalConfig) -> Retriever:
        """Chunks of a document by similarity with a question; the same one for the same settings."""
        with self._lock:
            if config not in self._retrievers:
                cache = self.config.cache
                self._retrievers[config] = Retriever(
                    self.embedder,
                    config,
                    self._cache if cache.embeddings else None,
                    disk_bytes=int(cache.disk_gib * 2**30),
                    quiet=self._quiet,
                )
            return self._retrievers[config]

    def load(self, speculation: SpeculationConfig) -> None:
        """Loads what answers of this kind need and is not loaded yet.

        Raises InputError for what can be found wrong with the models before any weights are read.
        """
        if "target" not in self.__dict__:
            self._check(speculation)
        retrieves = self.config.models.retrieves(speculation)
        _ = self.target, speculation.drafts and self.drafter, retrieves and self.embedder

    def _check(self, speculation: SpeculationConfig) -> None:
        models = self.config.models
        if models.retrieves(speculation):
            read_config(encoder_folder(models.encoder), None)
        checkpoint, target = open_checkpoint(models.target)
        if models.drafter == ATTENDED:
            check_attended(checkpoint.config)
        resolve(self.config.sampling, own_settings(target, models.target))
        if speculation.drafts and not models.has_one_checkpoint:
            check_same_vocabulary(target, open_checkpoint(models.drafter)[1], models.drafter)
        check_same_models(self.config)

    def _load(self, source: str, mesh: Mesh | None, config: MeshConfig) -> LoadedModel:
        how = {"layout": self.config.models.layout, "dtype": self.config.models.dtype, "quiet": self._quiet}
        return load_model(source, mesh=mesh, replicate_kv=config.replicate_kv, decodes=True, **how)
