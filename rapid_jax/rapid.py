# SPDX-License-Identifier: Apache-2.0
"""RAPID end to end: Rapid(config).answer(document, question).

A drafter reads the retrieved chunks, a target reads the whole document; the drafter drafts, the target verifies, and
the target's distribution is moved towards the drafter's (arXiv 2502.20330).
"""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path

import jax
from jax.sharding import Mesh

from rapid_jax.answer import Answer, OnText, Transcript
from rapid_jax.attention.cache import Prefix
from rapid_jax.attention.kernels import kernel_of, platform_of
from rapid_jax.config import RapidConfig
from rapid_jax.model.decoder import Decoder
from rapid_jax.model.load import LoadedModel, load_model, open_checkpoint
from rapid_jax.model.tokenizer import Tokenizer
from rapid_jax.prompts import Prompt, frame, visible_text
from rapid_jax.retrieval.embed import Embedder
from rapid_jax.retrieval.encoder_io import encoder_folder, read_config
from rapid_jax.retrieval.retriever import Retriever
from rapid_jax.retrieval.select import Selection
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.files import default_cache_dir, digest
from rapid_jax.runtime.mesh import check_agreed, make_meshes
from rapid_jax.runtime.mesh_config import MeshConfig
from rapid_jax.runtime.progress import progress
from rapid_jax.speculative.config import Mode
from rapid_jax.speculative.generate import Generation, Prompted, generate
from rapid_jax.speculative.prefill import prefill
from rapid_jax.speculative.prefix_store import PrefixStore

_DRAFTING: tuple[Mode, ...] = ("rapid", "lossless", "phat")


class Rapid:
    """Loaded models and caches; answers any number of questions.

    Models are loaded when first needed: retrieval's encoder not at all in mode target, a second drafter only where one
    is configured. The last document's prefill stays in memory.
    """

    def __init__(self, config: RapidConfig, *, quiet: bool = False):
        self.config = config
        self._quiet = quiet
        self._cache = Path(config.cache.folder).expanduser() if config.cache.folder else default_cache_dir()
        self._last_prefix: tuple[str, Prefix] | None = None
        self._unsaved: tuple[str, Prefix] | None = None  # to be stored once the answer is out

    @cached_property
    def target(self) -> LoadedModel:
        """The long-context model."""
        self._check_models()
        return self._load(self.config.models.target, self._meshes[0], self.config.mesh)

    @cached_property
    def drafter(self) -> LoadedModel:
        """The model that reads the retrieved text; the target itself unless another is configured."""
        if self.config.models.drafter == "same":
            return self.target
        drafter = self._load(self.config.models.drafter, self._meshes[1], self.config.drafter_mesh or self.config.mesh)
        _check_vocabularies(self.target.tokenizer, drafter.tokenizer, self.config.models.drafter)
        return drafter

    @cached_property
    def retriever(self) -> Retriever:
        """Chunks of a document by similarity with a question."""
        embedder = Embedder(self.config.models.encoder, batch_size=self.config.retrieval.batch_size)
        folder = self._cache if self.config.cache.embeddings else None
        return Retriever(embedder, self.config.retrieval, folder, quiet=self._quiet)

    @cached_property
    def _prefixes(self) -> PrefixStore | None:
        limit = int(self.config.cache.prefix_gib * 2**30)
        if jax.process_count() > 1:
            limit = 0  # every process would have to find the same entry
        heads, place = self.target.config.num_kv_heads, self._cache / "prefixes"
        return PrefixStore(place, limit, mesh=self._meshes[0], kv_heads=heads, quiet=self._quiet) if limit else None

    @cached_property
    def _token_spans(self):
        return self.target.tokenizer.spans

    def _check_models(self) -> None:
        """Raises InputError for what can be found wrong with the models before any weights are read."""
        models, mode = self.config.models, self.config.speculation.mode
        if mode != "target":
            read_config(encoder_folder(models.encoder), None)
        if mode in _DRAFTING and models.drafter != "same":
            target, drafter = (open_checkpoint(source)[1] for source in (models.target, models.drafter))
            _check_vocabularies(target, drafter, models.drafter)

    @cached_property
    def _meshes(self) -> tuple[Mesh | None, Mesh | None]:
        """The target's devices and the drafter's; None is the default device."""
        return make_meshes(self.config.mesh, self.config.drafter_mesh)

    def _load(self, source: str, mesh: Mesh | None, config: MeshConfig) -> LoadedModel:
        models, copied = self.config.models, config.replicate_kv
        how = {"layout": models.layout, "dtype": models.dtype, "quiet": self._quiet, "replicate_kv": copied}
        return load_model(source, mesh=mesh, **how)

    def answer(
        self,
        document: str,
        question: str,
        *,
        on_text: OnText | None = None,
        on_retrieved: Callable[[Selection], None] | None = None,
    ) -> Answer:
        """The answer to one question; `on_text` gets it piece by piece, `on_retrieved` the chunks before that."""
        start = time.perf_counter()
        config, mode = self.config, self.config.speculation.mode
        target, drafter = self.target, self.drafter if mode in _DRAFTING else self.target
        retriever = self.retriever if mode != "target" else None
        loaded = time.perf_counter()

        long_frame = frame(target.tokenizer, config.prompts.target, question, config.prompts.system)
        text, document_tokens = self._visible(document, long_frame.size)
        long_prompt = long_frame.around(text)
        selection, short_prompt = None, None
        if retriever is not None:
            selection = retriever.retrieve(text, question, self._token_spans, len(long_prompt.tokens))
            if on_retrieved is not None:
                on_retrieved(selection)
            short_frame = frame(drafter.tokenizer, config.prompts.drafter, question, config.prompts.system)
            short_prompt = short_frame.around(selection.text)
            self._check_fits(drafter, len(short_prompt.tokens))
        retrieved = time.perf_counter()
        check_agreed("prompts and settings", long_prompt, short_prompt, config.speculation, config.sampling)
        transcript = Transcript(target.tokenizer, config.stop, on_text)
        try:
            generation, reused, prefill_seconds = self._generate(transcript, long_prompt, short_prompt)
            transcript.finish()
        finally:  # whoever interrupts the answer keeps the prefill
            self._save_prefix()
        reason = generation.finish_reasons[0]
        first_token_at = transcript.first_token_at or time.perf_counter()
        return Answer(
            text=transcript.text,
            token_ids=transcript.token_ids,
            origins=transcript.origins,
            finish_reason="stop" if reason == "interrupted" else reason,
            mode=mode,
            eta=config.speculation.effective_eta,
            gamma=config.speculation.gamma if short_prompt and mode != "retrieval" else 0,
            generation=generation,
            selection=selection,
            target_tokens=len((short_prompt if short_prompt and mode == "retrieval" else long_prompt).tokens),
            draft_tokens=len(short_prompt.tokens) if short_prompt and mode != "retrieval" else 0,
            document_tokens=document_tokens,
            prefix_reused=reused,
            seconds={
                "load": loaded - start,
                "retrieval": retrieved - loaded,
                "prefill": prefill_seconds + generation.prepare_seconds,
                "compile": generation.compile_seconds,
                "first_token": first_token_at - loaded,
                "decode": generation.decode_seconds,
            },
        )

    def with_config(self, config: RapidConfig) -> "Rapid":
        """The same loaded models under other settings of retrieval, speculation, sampling, prompts or stop texts."""
        if replace(config.models, max_context=None) != replace(self.config.models, max_context=None):
            raise ValueError("with_config keeps the models: models.* must be the same")
        if (config.mesh, config.drafter_mesh) != (self.config.mesh, self.config.drafter_mesh):
            raise ValueError("with_config keeps the models where they are: mesh and drafter_mesh must be the same")
        other = Rapid(config, quiet=self._quiet)
        for name in ("target", "drafter", "_token_spans", "_meshes"):
            if name in self.__dict__:
                other.__dict__[name] = self.__dict__[name]
        if "retriever" in self.__dict__ and config.retrieval == self.config.retrieval:
            other.__dict__["retriever"] = self.__dict__["retriever"]
        other._last_prefix = self._last_prefix
        return other

    def _visible(self, document: str, around: int) -> tuple[str, int]:
        """(what the target reads of the document, the tokens of the whole document); `around` are the prompt's others.

        What is cut depends on the question only where it takes more than 1/32 of the context: one prefill serves the
        questions that are shorter.
        """
        config, target = self.config, self.target
        most = config.models.max_context or target.config.context_size
        if most > target.config.context_size:
            raise InputError(
                f"models.max_context: expected at most the {target.config.context_size} positions that {target.source} "
                f"was made for, got {most}; a longer context needs rope scaling in the checkpoint's config.json"
            )
        left = most - config.sampling.max_new_tokens
        usual = frame(target.tokenizer, config.prompts.target, "?", config.prompts.system).size + most // 32
        keep = left - max(around, usual) if left > usual else left - around
        return visible_text(document, left - around, target.tokenizer, config.models.too_long, keep)

    def _check_fits(self, drafter: LoadedModel, prompt_tokens: int) -> None:
        needed = prompt_tokens + self.config.sampling.max_new_tokens
        if needed > drafter.config.context_size:
            raise InputError(
                f"the drafter's prompt is too long: expected at most {drafter.config.context_size} positions, got "
                f"{needed} with the answer; lower retrieval.min_tokens or retrieval.max_chunks"
            )

    def _generate(self, transcript: Transcript, long: Prompt, short: Prompt | None) -> tuple[Generation, bool, float]:
        """(what was generated, whether the document's prefill was reused, seconds of prefilling)."""
        config, start = self.config, time.perf_counter()
        mode, reused = config.speculation.mode, False
        drafted, texts = None, [long.head]
        if mode == "retrieval" and short is not None:
            prefix = self._prefilled(self.target.decoder, short.tokens[:-1], "prefill")
            prompted = Prompted(self.target.decoder, [short.tokens], prefix, [len(short.tokens) - 1])
            texts = [short.tokens]
        else:
            drafts = short if mode != "target" else None
            apart = drafts is not None and self._meshes[0] != self._meshes[1]
            # On devices of its own the drafter reads while the target reads the document: nothing waits for it here.
            short_prefix = self._drafter_prefix(drafts, wait=False) if drafts is not None and apart else None
            prefix, reused = self._document_prefix(long.head)
            prompted = Prompted(self.target.decoder, [long.tokens], prefix, [len(long.head)])
            if drafts is not None:
                short_prefix = short_prefix or self._drafter_prefix(drafts, wait=True)
                drafted = Prompted(self.drafter.decoder, [drafts.tokens], short_prefix, [len(drafts.tokens) - 2])
                texts = [long.head + drafts.tokens]
        jax.block_until_ready((prompted.prefix, None if drafted is None else drafted.prefix))
        prefill_seconds = time.perf_counter() - start
        generation = generate(
            prompted,
            drafted,
            speculation=config.speculation,
            sampling=config.sampling,
            stops=self.target.tokenizer.stop_ids,
            texts=texts,
            block=config.compute.attention_block,
            on_tokens=transcript.on_tokens,
        )
        return generation, reused, prefill_seconds

    def _drafter_prefix(self, prompt: Prompt, *, wait: bool) -> Prefix:
        return self._prefilled(self.drafter.decoder, prompt.tokens[:-2], "prefill (drafter)" if wait else None)

    def _prefilled(self, decoder: Decoder, tokens: list[int], label: str | None) -> Prefix:
        """The prefix of one prompt; without a label it is only under way."""
        compute = self.config.compute
        run = partial(prefill, decoder, [tokens], chunk=compute.prefill_chunk, dtype=decoder.embed_VD[...].dtype)
        run = partial(run, kernel=compute.kernel, over=compute.context)
        if label is None:
            return run()
        with progress(label, len(tokens), "tokens", quiet=self._quiet) as report:
            return run(progress=report)

    def _document_prefix(self, head: list[int]) -> tuple[Prefix, bool]:
        """(the target's prefix for these tokens, whether it was there already): from memory, from disk, or new."""
        decoder, chunk = self.target.decoder, self.config.compute.prefill_chunk
        dtype = decoder.embed_VD[...].dtype
        kernel = kernel_of(self.config.compute.kernel, platform_of(decoder.mesh), 1)
        known = digest(",".join(map(str, head)), str(chunk), type(kernel).__name__)
        if self._last_prefix is not None and self._last_prefix[0] == known:
            return self._last_prefix[1], True
        self._last_prefix = prefix = None  # frees the last document's before the new one is made
        store, key = self._prefixes, ""
        if store is not None:
            arithmetic = f"{self.target.config!r} on {jax.default_backend()} by {type(kernel).__name__}"
            key = store.key(self.target.weights_hash, [head], arithmetic=arithmetic, dtype=dtype, chunk=chunk)
            prefix = store.load(key, layout=self.config.models.layout)
        reused = prefix is not None
        if prefix is None:
            prefix = self._prefilled(decoder, head, "prefill")
            self._unsaved = (key, prefix)
        self._last_prefix = (known, prefix)
        return prefix, reused

    def _save_prefix(self) -> None:
        """Stores what was prefilled anew: many gigabytes of a long document, and the answer need not wait for them."""
        unsaved, self._unsaved = self._unsaved, None
        if unsaved is not None and self._prefixes is not None:
            self._prefixes.save(*unsaved)


def _check_vocabularies(target: Tokenizer, drafter: Tokenizer, source: str) -> None:
    """Raises InputError unless both tokenizers give every id the same meaning; `source` names the drafter."""
    if target.fingerprint == drafter.fingerprint:
        return
    for token_id in range(min(target.vocab_size, drafter.vocab_size)):
        ours, theirs = target.token_of(token_id), drafter.token_of(token_id)
        if ours != theirs:
            raise InputError(
                f"the drafter must have the target's vocabulary: expected token {token_id} to be {ours!r}, "
                f"got {theirs!r} in {source}"
            )
    if target.vocab_size != drafter.vocab_size:
        raise InputError(
            f"the drafter must have the target's vocabulary: expected {target.vocab_size} tokens, "
            f"got {drafter.vocab_size} in {source}"
        )
