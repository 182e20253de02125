# SPDX-License-Identifier: Apache-2.0
"""From a request to a row: its prompts are made and read, a piece at a time."""

from collections.abc import Sequence
from concurrent.futures import Executor, wait
from dataclasses import replace
from typing import TypeAlias

import jax

from rapid_jax.attention.cache import Prefix
from rapid_jax.config import ATTENDED
from rapid_jax.engine.heads import Name
from rapid_jax.engine.job import Job
from rapid_jax.engine.lane import LaneKey, Prepared
from rapid_jax.engine.prefilling import PAUSE_S, TARGET_LACKS, Prefilling, Steps
from rapid_jax.engine.reader import read
from rapid_jax.engine.request import Retrieved, Tokens
from rapid_jax.engine.rooms import QUESTION_TOKENS, room_of_retrieved
from rapid_jax.engine.tiers import Handle
from rapid_jax.identity import check_same_prompts
from rapid_jax.model.decoder import Decoder
from rapid_jax.prompts import Reading
from rapid_jax.runtime.compiling import timed
from rapid_jax.speculative.generate import Prompted, start
from rapid_jax.speculative.initial_state import Room

COPIED_BYTES = 2**30  # of keys and values that are copied, so that rows about several documents run in one program
Named: TypeAlias = tuple[Reading, Name | None]  # what the models read, and the name of what is kept of it


class Preparing:
    """Makes prompts and reads them; what is read of documents is kept."""

    def __init__(self, prefilling: Prefilling, aside: Executor | None):
        """`prefilling` reads the prompts; `aside` is where they are made, None: here."""
        self._prefilling, self._aside = prefilling, aside
        self._config, self._models, self._prefixes = prefilling.config, prefilling.models, prefilling.prefixes
        self._few_programs = prefilling.few_programs

    @property
    def waits_for_room(self) -> bool:
        """Whether the request in turn can go on only when others have given back memory."""
        return self._prefilling.waits_for_room

    def steps(self, job: Job) -> Steps[Prepared]:
        """The request's row.

        Raises InputError where the models cannot read what is asked, and TooLarge where it never fits.
        """
        config = job.config
        with timed() as retrieval:
            job.reading, name = yield from self._prompts(job)
        reading = job.reading
        if config.prompts.enable_thinking and not isinstance(job.request.prompt, Tokens):
            job.thinks_after(reading.long.tokens, self._models.target.tokenizer)
        job.took("retrieval", retrieval)
        if job.streams and reading.selection is not None:
            job.tell(Retrieved(reading.selection))
        if reading.short is None and config.models.retrieves(
            config.speculation
        ):  # nothing to retrieve from: the target alone
            config = job.config = replace(config, speculation=replace(config.speculation, mode="target"))
        check_same_prompts(config, [reading], [job.sampling.config.seed], streamed=job.streams)
        if (rest := self._passes(job, reading, name)) is None:
            yield True
            rest = self._reads(job, reading, name)
        with self._prefilling.reading():
            return (yield from rest)

    def _passes(self, job: Job, reading: Reading, name: Name | None) -> Steps[Prepared] | None:
        """The rest of the work of a request that needs no turn: it waits for nobody, and no new room for a document is
        taken. Where no rounds run beside (`Engine`, `prefill_first`) nothing is gained by that but for one that has
        nothing to be read.
        """
        retrieved = job.config.speculation.reads == "retrieved"
        if not self._few_programs and (retrieved or name is None or job.config.speculation.drafts):
            return None
        if retrieved or (name is None and len(reading.long.head) < self._config.compute.prefill_chunk):
            return self._reads(job, reading, name)
        if job.config.speculation.drafts and self._prefilling.is_apart:
            assert reading.short is not None  # who passes waits for no room of the drafter's either
            room = self._prefilling.room_of_drafter(reading.long.head, name)
            if not self._prefilling.takes_drafter(job, reading.short.tokens, room):
                return None
        at_hand = self._prefilling.at_hand(job, name)
        if at_hand is None:
            job.give_back()  # who has the turn may be waiting for it
            return None
        return self._behind(job, reading, *at_hand, None)

    def _reads(self, job: Job, reading: Reading, name: Name | None) -> Steps[Prepared]:
        """The row of a request whose prompts have been made."""
        speculation, model = job.config.speculation, self._models.target
        if speculation.reads == "retrieved":
            assert reading.short is not None
            tokens = reading.short.tokens
            prefix = yield from self._prefilling.read(job, model.decoder, tokens[:-TARGET_LACKS], "prefill")
            target = Prompted(model.decoder, [tokens], prefix, [len(tokens) - TARGET_LACKS])
            return self._prepare(job, target, None, tokens, None)
        drafter = None
        if speculation.drafts and self._prefilling.is_apart:
            assert reading.short is not None  # on devices of its own the drafter reads while the target does
            room = self._prefilling.room_of_drafter(reading.long.head, name)
            drafter = yield from self._prefilling.drafter_apart(job, reading.short.tokens, room=room)
        prefix, handle = yield from self._prefilling.document(job, reading.long.head, name)
        return (yield from self._behind(job, reading, prefix, handle, drafter))

    def _read(self, job: Job) -> Named:
        reading = read(self._models, job.config, job.request)
        is_read = reading.short is None or job.config.speculation.reads == "document"
        return reading, self._prefilling.name(job.request, reading.long.head) if is_read else None

    def _prompts(self, job: Job) -> Steps[Named]:
        """The request's prompts; where others are answered meanwhile, by a thread of its own."""
        if self._aside is None:
            return self._read(job)
        work = self._aside.submit(self._read, job)
        try:
            while not work.done():
                if self._prefilling.is_alone() and not self._prefilling.under_way:
                    wait([work], PAUSE_S)
                yield False
        finally:
            work.cancel()  # of a request that was taken back
        return work.result()

    def _behind(
        self, job: Job, reading: Reading, prefix: Prefix, handle: Handle | None, drafter: Prompted | None
    ) -> Steps[Prepared]:
        """What is left to be read once the target has the document, which is held: the question, and the drafter's
        prompt.
        """
        config, head = job.config, reading.long.head
        try:
            target = Prompted(self._models.target.decoder, [reading.long.tokens], prefix, [len(head)])
            if not config.speculation.drafts:
                return self._prepare(job, target, None, head, handle)
            if config.models.drafter == ATTENDED:
                return self._prepare(job, target, self._models.drafter.decoder, head, handle)
            assert reading.short is not None
            short, slots = reading.short.tokens, prefix.slots
            room = room_of_retrieved(slots, config.retrieval) if self._few_programs else 0
            if drafter is None:
                reads = self._prefilling.drafter_apart if self._prefilling.is_apart else self._prefilling.drafter
                drafter = yield from reads(job, short, room=room)
            return self._prepare(job, target, drafter, head + short, handle, room)
        except BaseException:  # closed too, where the request is taken back
            if handle is not None:
                self._prefixes.release(handle)
            raise

    def document(self, job: Job) -> Steps[Reading]:
        """As `steps`, of the request's document alone: no row comes of it. Returns the request's prompts."""
        config = job.config
        reading, name = self._read(job)
        check_same_prompts(config, [reading])
        if config.speculation.reads == "document":
            with self._prefilling.reading():
                _, handle = yield from self._prefilling.document(job, reading.long.head, name)
            if handle is not None:
                self._prefixes.release(handle)
        return reading

    def _prepare(
        self,
        job: Job,
        target: Prompted,
        drafter: Prompted | Decoder | None,
        text: Sequence[int],
        handle: Handle | None,
        retrieved: int = 0,
    ) -> Prepared:
        config, room = job.config, Room(logprobs=job.request.logprobs is not None)
        if self._few_programs:
            slots = target.prefix.slots
            new = self._config.sampling.max_new_tokens
            room = replace(room, new=new, suffix=QUESTION_TOKENS, text=slots + retrieved)
        document = object() if handle is None else handle
        size = sum(x.nbytes for x in jax.tree.leaves(target.prefix))
        with timed() as work:
            rounds = start(
                target,
                drafter,
                speculation=config.speculation,
                sampling=job.sampling.config,
                stops=self._models.target.tokenizer.stop_ids,
                texts=[text],
                block=config.compute.attention_block,
                token_ids=self._models.target.token_ids,
                room=room,
            )
            if self._few_programs:
                # Greedy rows have the engine's own rule: that is what a warm-up compiles.
                rounds.widen(transfers=drafter is not None and self._config.speculation.transfers_greedily)
        job.took("prefill", work)
        slots = rounds.slots if self._few_programs else None
        key = LaneKey.of(config.speculation, None if size <= COPIED_BYTES else document, slots)
        return Prepared(key, rounds, document, handle)
