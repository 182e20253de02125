# SPDX-License-Identifier: Apache-2.0
"""The model's own answers, many prompts at a time: to independent prompts, and to several questions on one document."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from flax import nnx

from longpo_jax.config import LongPOConfig
from longpo_jax.records import Answer
from rapid_jax.attention.cache import Prefix
from rapid_jax.model.decoder import Decoder
from rapid_jax.model.identity import identity_of
from rapid_jax.model.load import LoadedModel, load_model, open_checkpoint
from rapid_jax.runtime.mesh import make_meshes
from rapid_jax.speculative.config import SamplingConfig, SpeculationConfig
from rapid_jax.speculative.generate import Prompted, generate
from rapid_jax.speculative.initial_state import Room
from rapid_jax.speculative.prefill import Prefill, PrefillSettings

ROUNDS = 32  # that the device runs before the host looks whether all answers have ended
AROUND = 256  # tokens around an excerpt, or behind a document, that there is room for: programs are then of one size


@dataclass(frozen=True)
class About:
    """A document's prompt up to its end, and what of each question's prompt comes behind it."""

    head: list[int]
    tails: Sequence[list[int]]
    drafts: Sequence[list[int]] | None = None  # shorter prompts for the same answers; all documents have them, or none


class Generator:
    """A model, loaded when it is first asked.

    Row by row an answer follows from its own prompt, the sampling and its own seed, not from what is beside it (up to
    rounding, which can turn a near tie). The same calls give the same answers.
    """

    def __init__(self, config: LongPOConfig, *, quiet: bool = False):
        self.config = config
        self._quiet = quiet
        self._checkpoint, self.tokenizer = open_checkpoint(self.config.model.source)

    @cached_property
    def model(self) -> LoadedModel:
        """The model on its devices, with the rope theta for whole documents."""
        mesh_config = self.config.generation.mesh
        return load_model(
            self.config.model.source,
            layout=self.config.generation.layout,
            dtype=self.config.model.dtype,
            mesh=make_meshes(mesh_config, None)[0],
            replicate_kv=mesh_config.replicate_kv,
            rope_theta=self.config.model.generation_rope_theta or self.config.model.rope_theta,
            decodes=True,
            quiet=self._quiet,
        )

    @cached_property
    def short(self) -> Decoder:
        """The same arrays with the checkpoint's own rope theta, for short contexts."""
        decoder = nnx.merge(*nnx.split(self.model.decoder))
        decoder.config = replace(decoder.config, rope=self._checkpoint.config.rope)
        return decoder

    @property
    def identity(self) -> dict[str, str]:
        """What besides settings decides an answer."""
        return identity_of(self.config.model.source, self.config.model.dtype)

    def compile_short(self, sampling: SamplingConfig, prompts: int) -> None:
        """Compiles what `answers` runs for so many prompts: prompts of two tokens are answered by one."""
        one, new = replace(sampling, max_new_tokens=1), sampling.max_new_tokens
        self.answers([[0, 0]] * prompts, one, [0] * prompts, new=new)

    def compile_long(self, sampling: SamplingConfig, documents: int, tokens: int, *, drafted: bool) -> None:
        """Compiles what `answers_about` runs for so many documents, the longest of about so many tokens."""
        one, new = replace(sampling, max_new_tokens=1), sampling.max_new_tokens
        about = About([0, 0], [[0, 0]], [[0, 0, 0]] if drafted else None)
        self.answers_about([about] * documents, one, [[0]] * documents, head=tokens, new=new)

    def answers(
        self, prompts: Sequence[list[int]], sampling: SamplingConfig, seeds: Sequence[int], *, new: int = 0
    ) -> list[Answer]:
        """An answer to each short prompt of two tokens or more, `pairs.batch` of about equal length at once.

        There is room for `new` tokens of an answer at least.
        """
        by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        found: dict[int, Answer] = {}
        most = self.config.pairs.batch
        for start in range(0, len(by_length), most):
            batch = by_length[start : start + most]
            rows = self._fill(batch, most)
            prefix = self._prefill(self.short, [prompts[row][:-1] for row in rows], self._room)
            cached = [len(prompts[row]) - 1 for row in rows]
            prompted = Prompted(self.short, [prompts[row] for row in rows], prefix, cached)
            said = self._generated(prompted, None, sampling, [seeds[row] for row in rows], Room(new=new))
            found |= dict(zip(batch, said, strict=False))
        return [found[index] for index in range(len(prompts))]

    def answers_about(
        self,
        asked: Sequence["About"],
        sampling: SamplingConfig,
        seeds: Sequence[Sequence[int]],
        *,
        head: int = 0,
        new: int = 0,
    ) -> list[list[Answer]]:
        """The answers to the questions about each document, all at once. A document is computed and kept once, and the
        rows of all its questions read that one copy.

        With drafts, RAPID's drafter reads those, and `pairs.gamma` drafts are verified a round. That is lossless: the
        distribution is exactly the target's, and greedy answers are the same. There is room for `head` tokens of a
        document and `new` of an answer at least.
        """
        if not any(about.tails for about in asked):
            return [[] for _ in asked]
        places = [at for at, about in enumerate(asked) if about.tails]
        documents = self._fill(places)
        most = max(self.config.excerpts.per_document, *(len(about.tails) for about in asked))
        each = 1 << (most - 1).bit_length()  # rows of a document, whatever it has: they are nearly free
        rows = [(at, min(row, len(asked[at].tails) - 1)) for at in documents for row in range(each)]
        decoder, heads = self.model.decoder, [asked[at].head for at in documents]
        prefix = self._prefill(decoder, heads, head)
        prompts = [asked[at].head + asked[at].tails[row] for at, row in rows]
        target, drafter = Prompted(decoder, prompts, prefix, [len(asked[at].head) for at, _ in rows]), None
        if asked[places[0]].drafts is not None:
            short = [(asked[at].drafts or [])[row] for at, row in rows]
            lacking = [prompt[:-2] for prompt in short]
            prefix = self._prefill(self.short, lacking, self._room)
            drafter = Prompted(self.short, short, prefix, list(map(len, lacking)))
        room, own = Room(new=new, suffix=AROUND), [seeds[at][row] for at, row in rows]
        said = self._generated(target, drafter, sampling, own, room)
        found = dict(zip(places, (said[start : start + each] for start in range(0, len(said), each)), strict=False))
        return [found[at][: len(about.tails)] if at in found else [] for at, about in enumerate(asked)]

    @property
    def _room(self) -> int:
        """Tokens of a short prompt that there is room for."""
        return self.config.excerpts.max_tokens + AROUND

    def _fill(self, rows: Sequence[int], most: int | None = None) -> list[int]:
        """The rows, the last one repeated up to a power of two, or to `most` or a fourth, a sixteenth ... of that.

        Programs are so compiled for few sizes only. On a mesh up to what `data` divides.
        """
        data, size = self.config.generation.mesh.data, 1 << (len(rows) - 1).bit_length()
        if most is not None:
            size = most
            while size // 4 >= len(rows):
                size //= 4
        return [*rows, *[rows[-1]] * (-(-size // data) * data - len(rows))]

    def _prefill(self, decoder: Decoder, prompts: Sequence[list[int]], room: int = 0) -> Prefix:
        """The keys and values of prompts, in few sizes: every size compiles programs of its own. There is `room` for as
        many tokens at least.
        """
        compute, generation = self.config.compute, self.config.generation
        settings = PrefillSettings(generation.prefill_chunk, compute.kernel, compute.context, coarse=True, room=room)
        work = Prefill(decoder, prompts, settings, dtype=decoder.embed_VD[...].dtype)
        while work.left:
            work.step()
        return work.prefix

    def _generated(
        self,
        target: Prompted,
        drafter: Prompted | None,
        sampling: SamplingConfig,
        seeds: Sequence[int],
        room: Room,
    ) -> list[Answer]:
        # No prompt lookup: a second program for every shape would have to be compiled. Nobody waits for first tokens.
        mode = "target" if drafter is None else "lossless"
        gamma = self.config.pairs.gamma
        speculation = SpeculationConfig(mode=mode, gamma=gamma, lookup="off", rounds_per_read=ROUNDS)
        generation = generate(
            target,
            drafter,
            speculation=speculation,
            sampling=sampling,
            stops=self.tokenizer.stop_ids,
            seeds=seeds,
            block=self.config.generation.attention_block,
            token_ids=self.model.token_ids,
            room=room,
        )
        ended = [reason == "stop" for reason in generation.finish_reasons]
        said = [tokens[:-1] if stop else tokens for tokens, stop in zip(generation.tokens, ended, strict=True)]
        # One that was cut off may end inside a character.
        texts = [
            self.tokenizer.decode(tokens).rstrip("" if stop else "\N{REPLACEMENT CHARACTER}")
            for tokens, stop in zip(said, ended, strict=True)
        ]
        return [Answer(text, len(tokens), stop) for text, tokens, stop in zip(texts, said, ended, strict=True)]
