# SPDX-License-Identifier: Apache-2.0
"""The model's own answers, many prompts at a time: to independent prompts, and to several questions on one document."""

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

from longpo_jax.config import LongPOConfig
from longpo_jax.records import Answer
from rapid_jax.attention.cache import Prefix
from rapid_jax.model.config import to_hf
from rapid_jax.model.hf_io import HfCheckpoint
from rapid_jax.model.load import LoadedModel, load_model, open_checkpoint
from rapid_jax.runtime.files import digest, digest_file
from rapid_jax.runtime.mesh import make_meshes
from rapid_jax.speculative.config import SamplingConfig, SpeculationConfig
from rapid_jax.speculative.generate import Prompted, generate
from rapid_jax.speculative.prefill import prefill

_TEMPLATES = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")


class Generator:
    """A model, loaded when it is first asked.

    Row by row an answer follows from its own prompt, the sampling and its own seed, not from what is beside it (up to
    rounding, which can turn a near tie). The same calls give the same answers.
    """

    def __init__(self, config: LongPOConfig, source: str | None = None, *, quiet: bool = False):
        self.config = config
        self.source = source or config.model.source
        self._quiet = quiet
        self._checkpoint, self.tokenizer = open_checkpoint(self.source)
        self._theta = config.model.generation_rope_theta or config.model.rope_theta

    @cached_property
    def model(self) -> LoadedModel:
        """The model on its devices, with the rope theta of generation."""
        mesh_config = self.config.generation.mesh
        return load_model(
            self.source,
            layout=self.config.generation.layout,
            dtype=self.config.model.dtype,
            mesh=make_meshes(mesh_config, None)[0],
            replicate_kv=mesh_config.replicate_kv,
            rope_theta=self._theta,
            quiet=self._quiet,
        )

    @cached_property
    def weights_hash(self) -> str:
        """`LoadedModel.weights_hash`, for which nothing is loaded."""
        checkpoint = self._checkpoint
        config = checkpoint.config
        if self._theta is not None:
            config = replace(config, rope=replace(config.rope, theta=self._theta))
        paths = checkpoint.weight_files if isinstance(checkpoint, HfCheckpoint) else [checkpoint.path]
        return digest(json.dumps(to_hf(config), sort_keys=True), *(digest_file(path) for path in paths))

    @property
    def identity(self) -> dict[str, str]:
        """What besides settings decides an answer: digests of the model, the tokenizer, and the template and stops."""
        files, stops = self.tokenizer.files, self.tokenizer.stop_ids
        return {
            "model.weights": self.weights_hash,
            "model.tokenizer": self.tokenizer.fingerprint,
            "model.template": digest(*(files.get(name, b"") for name in _TEMPLATES), repr(stops)),
        }

    def answers(self, prompts: Sequence[list[int]], sampling: SamplingConfig, seeds: Sequence[int]) -> list[Answer]:
        """An answer to each prompt of two tokens or more; `pairs.batch` of about equal length are worked on at once."""
        by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        found: dict[int, Answer] = {}
        most = self.config.pairs.batch
        for start in range(0, len(by_length), most):
            batch = by_length[start : start + most]
            rows = self._filled(batch, most)
            prefix = self._prefilled([prompts[row][:-1] for row in rows])
            cached = [len(prompts[row]) - 1 for row in rows]
            prompted = Prompted(self.model.decoder, [prompts[row] for row in rows], prefix, cached)
            said = self._generated(prompted, None, sampling, [seeds[row] for row in rows])
            found |= dict(zip(batch, said, strict=False))
        return [found[index] for index in range(len(prompts))]

    def answers_about(
        self,
        head: list[int],
        tails: Sequence[list[int]],
        sampling: SamplingConfig,
        seeds: Sequence[int],
        *,
        drafts: Sequence[list[int]] | None = None,
    ) -> list[Answer]:
        """An answer to each prompt head + tail. The head is computed and kept once, and every row reads that one copy.

        With `drafts`, shorter prompts for the same answers, RAPID's drafter reads those, and `pairs.gamma` drafts are
        verified a round. That is lossless: the law is exactly the target's, and greedy answers are the same.
        """
        if not tails:
            return []
        rows = self._filled(range(len(tails)))
        decoder = self.model.decoder
        # Attention broadcasts a prefix of one row over all rows; on a mesh each part of `data` has one.
        prefix = self._prefilled([head] * self.config.generation.mesh.data)
        prompts = [head + tails[row] for row in rows]
        target, drafter = Prompted(decoder, prompts, prefix, [len(head)] * len(rows)), None
        if drafts is not None:
            short = [drafts[row] for row in rows]
            cached = [len(prompt) - 2 for prompt in short]
            drafter = Prompted(decoder, short, self._prefilled([prompt[:-2] for prompt in short]), cached)
        return self._generated(target, drafter, sampling, [seeds[row] for row in rows])[: len(tails)]

    def _filled(self, rows: Sequence[int], most: int | None = None) -> list[int]:
        """The rows, the last one repeated up to a power of two or `most`: programs are compiled for few sizes only.

        On a mesh up to what `data` divides.
        """
        data, size = self.config.generation.mesh.data, 1 << (len(rows) - 1).bit_length()
        size = size if most is None else min(size, most)
        return [*rows, *[rows[-1]] * (-(-size // data) * data - len(rows))]

    def _prefilled(self, prompts: Sequence[list[int]]) -> Prefix:
        decoder, compute = self.model.decoder, self.config.compute
        chunk, dtype = self.config.generation.prefill_chunk, decoder.embed_VD[...].dtype
        return prefill(decoder, prompts, chunk=chunk, dtype=dtype, kernel=compute.kernel, over=compute.context)

    def _generated(
        self, target: Prompted, drafter: Prompted | None, sampling: SamplingConfig, seeds: Sequence[int]
    ) -> list[Answer]:
        # Level 0 is off: a second program for every shape would have to be compiled.
        mode = "target" if drafter is None else "lossless"
        speculation = SpeculationConfig(mode=mode, gamma=self.config.pairs.gamma, lookup="off")
        generation = generate(
            target,
            drafter,
            speculation=speculation,
            sampling=sampling,
            stops=self.tokenizer.stop_ids,
            seeds=seeds,
            block=self.config.generation.attention_block,
        )
        ended = [reason == "stop" for reason in generation.finish_reasons]
        said = [tokens[:-1] if stop else tokens for tokens, stop in zip(generation.tokens, ended, strict=True)]
        texts = [self.tokenizer.decode(tokens) for tokens in said]
        return [Answer(text, len(tokens), stop) for text, tokens, stop in zip(texts, said, ended, strict=True)]
