# SPDX-License-Identifier: Apache-2.0
"""RAPID end to end: Rapid(config).answer(document, question).

A drafter reads the retrieved chunks, a target reads the whole document; the drafter drafts, the target verifies, and
the target's distribution is moved towards the drafter's (arXiv 2502.20330).
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property, partial

from jax.sharding import Mesh

from rapid_jax.answer import Answer, OnText, Transcript, answer_of
from rapid_jax.attention.cache import Prefix
from rapid_jax.attention.rounded import rounded
from rapid_jax.config import RapidConfig
from rapid_jax.document_prefixes import DocumentPrefixes
from rapid_jax.identity import check_same_models, check_same_prompts
from rapid_jax.model.decoder import Decoder
from rapid_jax.model.load import LoadedModel, load_model, open_checkpoint, own_settings
from rapid_jax.model.tokenizer import check_same_vocabulary
from rapid_jax.prompts import Reading, check_fits, frame, visible
from rapid_jax.retrieval.embed import Embedder
from rapid_jax.retrieval.encoder_io import encoder_folder, read_config
from rapid_jax.retrieval.retriever import Retriever
from rapid_jax.retrieval.select import Selection
from rapid_jax.runtime.compiling import timed
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.files import cache_dir
from rapid_jax.runtime.mesh import make_meshes
from rapid_jax.runtime.mesh_config import MeshConfig
from rapid_jax.runtime.progress import progress
from rapid_jax.sides import Sides
from rapid_jax.speculative.config import Mode
from rapid_jax.speculative.generate import Generation, Prompted, generate
from rapid_jax.speculative.own_sampling import ResolvedSampling, resolve
from rapid_jax.speculative.prefill import prefill
from rapid_jax.speculative.prefill_once import distinct, prefilled_once, spread

_log = logging.getLogger(__name__)
_DRAFTING: tuple[Mode, ...] = ("rapid", "lossless", "phat")


class Rapid:
    """Loaded models and caches; answers any number of questions.

    Models are loaded when first needed: retrieval's encoder not at all in mode target, a second drafter only where one
    is configured. The last document's prefill stays in memory.
    """

    def __init__(self, config: RapidConfig, *, quiet: bool = False):
        self.config = config
        self._quiet = quiet
        self._cache = cache_dir(config.cache.folder)

    @cached_property
    def target(self) -> LoadedModel:
        """The long-context model."""
        self._check_models()
        target = self._load(self.config.models.target, self._meshes[0], self.config.mesh)
        ignored = resolve(self.config.sampling, target.generation).ignored
        if ignored:
            _log.warning("%s: not implemented and ignored: %s", target.generation.source, ", ".join(ignored))
        return target

    @cached_property
    def drafter(self) -> LoadedModel:
        """The model that reads the retrieved text: another where one is configured, maybe in rounded weights."""
        models, drafter, config = self.config.models, self.target, self.config
        if models.drafter != "same":
            drafter = self._load(models.drafter, self._meshes[1], config.drafter_mesh or config.mesh)
            check_same_vocabulary(self.target.tokenizer, drafter.tokenizer, models.drafter)
        return drafter if models.drafter_weights == "full" else drafter.with_weights(models.drafter_weights)

    @property
    def sampling(self) -> ResolvedSampling:
        """How answers are drawn: as the settings say, else as the target's checkpoint does."""
        return resolve(self.config.sampling, self.target.generation)

    @cached_property
    def _embedder(self) -> Embedder:
        return Embedder(self.config.models.encoder, batch_size=self.config.retrieval.batch_size)

    @cached_property
    def retriever(self) -> Retriever:
        """Chunks of a document by similarity with a question."""
        folder = self._cache if self.config.cache.embeddings else None
        disk = int(self.config.cache.disk_gib * 2**30)
        return Retriever(self._embedder, self.config.retrieval, folder, disk_bytes=disk, quiet=self._quiet)

    @cached_property
    def _prefixes(self) -> DocumentPrefixes:
        return DocumentPrefixes(self.config, self.target, self._meshes[0], self._cache, quiet=self._quiet)

    @cached_property
    def _token_spans(self):
        return self.target.tokenizer.spans

    def _check_models(self) -> None:
        """Raises InputError for what can be found wrong with the models before any weights are read."""
        models, mode = self.config.models, self.config.speculation.mode
        if mode != "target":
            read_config(encoder_folder(models.encoder), None)
        target = open_checkpoint(models.target)[1]
        resolve(self.config.sampling, own_settings(target, models.target))
        if mode in _DRAFTING and models.drafter != "same":
            check_same_vocabulary(target, open_checkpoint(models.drafter)[1], models.drafter)
        check_same_models(self.config)

    @cached_property
    def _meshes(self) -> tuple[Mesh | None, Mesh | None]:
        """The target's devices and the drafter's; None is the default device."""
        return make_meshes(self.config.mesh, self.config.drafter_mesh)

    def _load(self, source: str, mesh: Mesh | None, config: MeshConfig) -> LoadedModel:
        how = {"layout": self.config.models.layout, "dtype": self.config.models.dtype, "quiet": self._quiet}
        return load_model(source, mesh=mesh, replicate_kv=config.replicate_kv, **how)

    def answer(
        self,
        document: str,
        question: str,
        *,
        on_text: OnText | None = None,
        on_retrieved: Callable[[Selection], None] | None = None,
    ) -> Answer:
        """The answer to one question; `on_text` gets it piece by piece, `on_retrieved` the chunks before that."""
        start, config = time.perf_counter(), self.config
        self.load()
        loaded = time.perf_counter()
        with timed() as retrieval:
            read = self.read(document, question, on_retrieved=on_retrieved)
        streamed = on_text is not None
        check_same_prompts(config, [read], streamed=streamed)
        transcript = Transcript(self.target.tokenizer, config.stop, on_text)
        try:
            with timed() as prefilling:
                sides = self._prompted([read])
                sides.wait()
            generation = self._generated(sides, [transcript], None, streamed=streamed)
            transcript.finish()
        finally:  # whoever interrupts the answer keeps the prefill
            self._prefixes.save()
        first_token_at = transcript.first_token_at or time.perf_counter()
        seconds = {
            "load": loaded - start,
            "retrieval": retrieval.working,
            "prefill": prefilling.working + generation.prepare_seconds,
            "compile": retrieval.compiling + prefilling.compiling + generation.compile_seconds,
            "first_token": first_token_at - loaded,
            "decode": generation.decode_seconds,
        }
        how = config.speculation, self.sampling
        return answer_of(read, transcript, generation, *how, seconds, reused=sides.reused)

    def load(self) -> None:
        """Loads what answers need and is not loaded yet."""
        mode = self.config.speculation.mode
        _ = self.target, mode in _DRAFTING and self.drafter, mode != "target" and self.retriever

    def read(
        self,
        document: str,
        question: str,
        *,
        template: str | None = None,
        begins: str = "",
        retrieve_from: str | None = None,
        on_retrieved: Callable[[Selection], None] | None = None,
    ) -> Reading:
        """The prompts about one question.

        `template` stands for both of the settings'. The answer is made to begin with `begins`. What is retrieved comes
        from `retrieve_from` instead, for a look at unrelated retrieval (Table 3).
        """
        config, target, mode = self.config, self.target, self.config.speculation.mode
        prompts = config.prompts
        long_frame = frame(target.tokenizer, template or prompts.target, question, prompts.system, begins)
        text, document_tokens = visible(config, target, document, long_frame.size)
        long, short, selection = long_frame.around(text), None, None
        if mode != "target":
            selection = self.retriever.retrieve(retrieve_from or text, question, self._token_spans, len(long.tokens))
            if on_retrieved is not None:
                on_retrieved(selection)
            drafter = self.drafter if mode in _DRAFTING else target
            short_frame = frame(drafter.tokenizer, template or prompts.drafter, question, prompts.system, begins)
            short = short_frame.around(selection.text)
            check_fits(config, drafter, len(short.tokens))
        return Reading(long, short, selection, document_tokens, truncated=len(text) < len(document))

    def answers(
        self, readings: Sequence[Reading], seeds: Sequence[int] | None = None, *, kept: bool = True
    ) -> list[Answer]:
        """Of each reading what `answer` would say; all are worked on at once, and share the seconds evenly.

        `seeds`: one a reading, else the settings' for each. What was prefilled is `kept` for the next call.
        """
        check_same_prompts(self.config, readings, seeds)
        transcripts = [Transcript(self.target.tokenizer, self.config.stop, None) for _ in readings]
        with timed() as prefilling:
            sides = self._prompted(readings, kept=kept)
            sides.wait()
        generation = self._generated(sides, transcripts, seeds)
        share = {
            "prefill": prefilling.working + generation.prepare_seconds,
            "compile": prefilling.compiling + generation.compile_seconds,
            "decode": generation.decode_seconds,
        }
        seconds = {name: value / len(readings) for name, value in share.items()}
        found = []
        for row, (read, transcript) in enumerate(zip(readings, transcripts, strict=True)):
            transcript.finish()
            own = replace(generation.row(row), decode_seconds=seconds["decode"])
            how = self.config.speculation, self.sampling
            found.append(answer_of(read, transcript, own, *how, seconds, reused=sides.reused))
        self._prefixes.save()
        return found

    def with_config(self, config: RapidConfig) -> "Rapid":
        """The same loaded models under other settings, and other models.max_context and models.too_long."""
        if not config.models.loads_as(self.config.models):
            raise ValueError("with_config keeps the models: models.* must be the same, but max_context and too_long")
        if (config.mesh, config.drafter_mesh) != (self.config.mesh, self.config.drafter_mesh):
            raise ValueError("with_config keeps the models where they are: mesh and drafter_mesh must be the same")
        other = Rapid(config, quiet=self._quiet)
        for name in ("target", "drafter", "_token_spans", "_meshes", "_embedder"):
            if name in self.__dict__:
                other.__dict__[name] = self.__dict__[name]
        if "retriever" in self.__dict__ and config.retrieval == self.config.retrieval:
            other.__dict__["retriever"] = self.__dict__["retriever"]
        if "target" in self.__dict__:
            other.__dict__["_prefixes"] = self._prefixes.under(config)
        return other

    def _prompted(self, readings: Sequence[Reading], *, kept: bool = True) -> Sides:
        """Prefilled prompts, one a row."""
        decoder, mode = self.target.decoder, self.config.speculation.mode
        shorts = [read.short.tokens for read in readings if read.short is not None]
        if mode == "retrieval":
            make = partial(self._prefilled, decoder, label="prefill")
            prefix = prefilled_once([tokens[:-1] for tokens in shorts], make)
            return Sides(Prompted(decoder, shorts, prefix, [len(tokens) - 1 for tokens in shorts]), None, shorts)
        # On devices of its own the drafter reads while the target reads the document: nothing waits for it here.
        apart = bool(shorts) and self._meshes[0] != self._meshes[1]
        short_prefix = self._drafter_prefix(shorts, None) if apart else None
        heads = [read.long.head for read in readings]
        different, rows = distinct(heads)
        make = partial(self._prefilled, decoder, different, "prefill")
        prefix, reused = self._prefixes.of(different, make) if kept else (self._prefixes.as_asked(make()), False)
        prefix = spread(prefix, rows)
        target = Prompted(decoder, [read.long.tokens for read in readings], prefix, [len(head) for head in heads])
        if not shorts:
            return Sides(target, None, heads, reused)
        short_prefix = short_prefix or self._drafter_prefix(shorts, "prefill (drafter)")
        drafter = Prompted(self.drafter.decoder, shorts, short_prefix, [len(tokens) - 2 for tokens in shorts])
        return Sides(target, drafter, [head + short for head, short in zip(heads, shorts, strict=True)], reused)

    def _generated(
        self,
        sides: Sides,
        transcripts: Sequence[Transcript],
        seeds: Sequence[int] | None,
        *,
        streamed: bool = False,
    ) -> Generation:
        speculation = self.config.speculation
        try:
            return generate(
                sides.target,
                sides.drafter,
                speculation=replace(speculation, rounds_per_read=1) if streamed else speculation,
                sampling=self.sampling.config,
                stops=self.target.tokenizer.stop_ids,
                texts=sides.texts,
                seeds=seeds,
                block=self.config.compute.attention_block,
                token_ids=self.target.token_ids,
                on_tokens=lambda row, tokens, origins: transcripts[row].on_tokens(0, tokens, origins),
            )
        except InputError:  # the models give no answer: what they made of the document is of no use
            self._prefixes.forget()
            raise

    def _drafter_prefix(self, prompts: Sequence[list[int]], label: str | None) -> Prefix:
        make = partial(self._prefilled, self.drafter.decoder, label=label)
        prefix = prefilled_once([tokens[:-2] for tokens in prompts], make)
        return prefix if self.config.models.drafter_weights == "full" else rounded(prefix)

    def _prefilled(self, decoder: Decoder, prompts: Sequence[list[int]], label: str | None) -> Prefix:
        """The prefix of prompts, one a row; without a label it is only under way."""
        compute, dtype = self.config.compute, decoder.embed_VD[...].dtype
        how = {"chunk": compute.prefill_chunk, "kernel": compute.kernel, "over": compute.context}
        run = partial(prefill, decoder, prompts, dtype=dtype, **how)
        if label is None:
            return run()
        with progress(label, max(map(len, prompts)), "tokens", quiet=self._quiet) as report:
            return run(progress=report)
