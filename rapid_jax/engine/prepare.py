# SPDX-License-Identifier: Apache-2.0
"""From a request to a row: its prompts are made and read, a piece at a time."""

from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Executor, wait
from dataclasses import replace
from typing import TypeAlias, TypeVar

import jax

from rapid_jax.attention.cache import Prefix
from rapid_jax.attention.rounded import rounded
from rapid_jax.config import RapidConfig
from rapid_jax.engine.errors import TooLarge
from rapid_jax.engine.job import Job
from rapid_jax.engine.lane import LaneKey, Prepared
from rapid_jax.engine.models import Models
from rapid_jax.engine.prefixes import Found, PrefixCache, RoomLater
from rapid_jax.engine.reader import read
from rapid_jax.engine.request import Question, Request, Retrieved, Tokens
from rapid_jax.engine.rooms import QUESTION_TOKENS, room_of_retrieved, room_of_short
from rapid_jax.engine.tiers import Handle
from rapid_jax.identity import check_same_prompts
from rapid_jax.model.decoder import Decoder
from rapid_jax.prompts import Reading
from rapid_jax.runtime.compiling import timed
from rapid_jax.runtime.progress import progress
from rapid_jax.speculative.generate import Prompted, start
from rapid_jax.speculative.prefill import Prefill, PrefillSettings
from rapid_jax.speculative.start import Room

# Tokens that a prompt's prefix lacks when its rounds begin: the target feeds the last one, a drafter the last two.
TARGET_LACKS, DRAFTER_LACKS = 1, 2
Result = TypeVar("Result")
_PAUSE_S = 0.01  # between looks at whether prompts are made, where nothing else is to be done
COPIED_BYTES = 2**30  # of keys and values that are copied, so that rows about several documents run in one program


# Work that yields between its pieces, and True once it needs the turn from there on: what makes keys and values, or
# room for them, is done for one request at a time.
Steps: TypeAlias = Generator[bool, None, Result]


class Preparing:
    """Makes prompts and reads them; what is read of documents is kept."""

    def __init__(
        self,
        config: RapidConfig,
        models: Models,
        prefixes: PrefixCache,
        *,
        is_alone: Callable[[], bool],
        few_programs: bool,
        aside: Executor | None,
        on_read: Callable[[Request, str], None],
        quiet: bool,
    ):
        """`is_alone`: whether no other request has memory that it will give back. `few_programs`: requests that ask
        for different things share theirs. `aside`: where prompts are made, None: here. `on_read` is told the key of a
        document's keys and values.
        """
        self._config, self._models, self._prefixes, self._quiet = config, models, prefixes, quiet
        self._is_alone, self._few_programs, self._on_read = is_alone, few_programs, on_read
        self._aside = aside
        self._has_turn = False  # whether a request has got what it yielded True for
        self.waits_for_room = False  # whether that one can go on only when others have given back memory

    def steps(self, job: Job) -> Steps[Prepared]:
        """The request's row.

        Raises InputError where the models cannot read what is asked, and TooLarge where it never fits.
        """
        config = job.config
        with timed() as retrieval:
            job.reading = reading = yield from self._prompts(job)
        job.took("retrieval", retrieval)
        if job.streams and reading.selection is not None:
            job.tell(Retrieved(reading.selection))
        if reading.short is None and config.speculation.retrieves:  # nothing to retrieve from: the target alone
            config = job.config = replace(config, speculation=replace(config.speculation, mode="target"))
        check_same_prompts(config, [reading], [job.sampling.config.seed], streamed=job.streams)
        if (at_hand := self._at_hand(job, reading.long.head)) is not None:
            return (yield from self._behind(job, reading, *at_hand, None))
        yield True
        self._has_turn = True
        try:
            return (yield from self._in_turn(job, reading))
        finally:
            self._has_turn = False

    def _in_turn(self, job: Job, reading: Reading) -> Steps[Prepared]:
        """The row of a request whose prompts have been made."""
        speculation, model = job.config.speculation, self._models.target
        if speculation.reads == "retrieved":
            assert reading.short is not None
            tokens = reading.short.tokens
            prefix = yield from self._read(job, model.decoder, tokens[:-TARGET_LACKS], "prefill")
            target = Prompted(model.decoder, [tokens], prefix, [len(tokens) - TARGET_LACKS])
            return self._prepared(job, target, None, tokens, None)
        drafter = None
        if speculation.drafts and self._models.meshes[0] != self._models.meshes[1]:
            assert reading.short is not None  # on devices of its own the drafter reads while the target does
            drafter = yield from self._drafter(job, reading.short.tokens, waits=False)
        prefix, handle = yield from self._document(job, reading.long.head)
        return (yield from self._behind(job, reading, prefix, handle, drafter))

    def _at_hand(self, job: Job, head: list[int]) -> tuple[Prefix, Handle] | None:
        """The document, held, where all that the request needs of keys and values lies on the devices."""
        request, speculation = job.request, job.config.speculation
        reads_alone = speculation.reads == "document" and not speculation.drafts
        if not reads_alone or self.waits_for_room or not self._is_kept(request, head):
            return None
        if self._prefixes.tier(head, request.owner, request.public) != "device":
            return None
        try:
            found = self._prefixes.find(head, request.owner, request.public)
        except RoomLater:
            return None
        if found.handle is None or found.prefix is None:
            return None
        self._on_read(request, found.handle.key)
        job.reused = True
        self._prefixes.hold(found.handle)
        return found.prefix, found.handle

    def _is_kept(self, request: Request, head: list[int]) -> bool:
        """Whether a prompt's keys and values are kept for others."""
        prompt, is_short = request.prompt, len(head) < self._config.compute.prefill_chunk
        return isinstance(prompt, Question) or not (is_short or (isinstance(prompt, Tokens) and not prompt.kept))

    def _prompts(self, job: Job) -> Steps[Reading]:
        """The request's prompts; where others are answered meanwhile, by a thread of its own."""
        if self._aside is None:
            return read(self._models, job.config, job.request)
        work = self._aside.submit(read, self._models, job.config, job.request)
        try:
            while not work.done():
                if self._is_alone() and not self._has_turn:
                    wait([work], _PAUSE_S)
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
        target = Prompted(self._models.target.decoder, [reading.long.tokens], prefix, [len(head)])
        try:
            if not config.speculation.drafts:
                return self._prepared(job, target, None, head, handle)
            assert reading.short is not None
            short, slots = reading.short.tokens, prefix.pos_BS.shape[1]
            room = room_of_retrieved(slots, config.retrieval) if self._few_programs else 0
            drafter = drafter or (yield from self._drafter(job, short, room=room))
            return self._prepared(job, target, drafter, head + short, handle, room)
        except BaseException:  # closed too, where the request is taken back
            if handle is not None:
                self._prefixes.release(handle)
            raise

    def _drafter(self, job: Job, tokens: list[int], *, room: int = 0, waits: bool = True) -> Steps[Prompted]:
        """The drafter with its prompt; without waiting it is only under way."""
        decoder = self._models.drafter.decoder
        label = "prefill (drafter)" if waits else None
        prefix = yield from self._read(job, decoder, tokens[:-DRAFTER_LACKS], label, room=room)
        is_copy = decoder.bits is not None and decoder is not self._models.target.decoder
        if is_copy:
            prefix = rounded(prefix)
        return Prompted(decoder, [tokens], prefix, [len(tokens) - DRAFTER_LACKS])

    def _room_of_short(self, tokens: list[int]) -> int:
        """Tokens that there is room for with a prompt that is not kept; 0: as it is."""
        return room_of_short(len(tokens), self._config.compute.prefill_chunk) if self._few_programs else 0

    def document(self, job: Job) -> Steps[Reading]:
        """As `steps`, of the request's document alone: no row comes of it. Returns the request's prompts."""
        config = job.config
        reading = read(self._models, config, job.request)
        check_same_prompts(config, [reading])
        if config.speculation.reads == "document":
            _, handle = yield from self._document(job, reading.long.head)
            if handle is not None:
                self._prefixes.release(handle)
        return reading

    def _document(self, job: Job, head: list[int]) -> Steps[tuple[Prefix, Handle | None]]:
        """The target's prefix of the prompt up to the end of the document, kept for others; held where it is kept."""
        request, decoder = job.request, self._models.target.decoder
        owner = request.owner, request.public
        if not self._is_kept(request, head):
            return (yield from self._read(job, decoder, head, "prefill", room=self._room_of_short(head))), None
        self._on_read(request, self._prefixes.name(head, *owner).key)
        found = yield from self._find(job, head)
        if found.handle is not None and found.prefix is not None:
            job.reused = True
            self._prefixes.hold(found.handle)
            return found.prefix, found.handle
        while not self._prefixes.make_room(self._prefixes.bytes_for(len(head))):
            if not self._prefixes.fits(len(head)) or (self._is_alone() and not self._prefixes.moving):
                raise TooLarge(f"the document is too large for the memory: {len(head)} tokens of keys and values")
            yield from self._until_there_may_be_room()
        prefix = yield from self._read(job, decoder, head, "prefill", found)
        if self._config.compute.kv != "full":
            prefix = rounded(prefix)
        handle = self._prefixes.put(head, prefix, *owner)
        self._prefixes.hold(handle)
        return prefix, handle

    def _find(self, job: Job, head: list[int]) -> Steps[Found]:
        """What is kept of the document."""
        while True:
            try:
                with timed() as work:
                    found = self._prefixes.find(head, job.request.owner, job.request.public)
            except RoomLater:
                yield from self._until_there_may_be_room()
                continue
            job.took("prefill", work)
            return found

    def _until_there_may_be_room(self) -> Steps[None]:
        if self._is_alone():
            self._prefixes.wait(_PAUSE_S)
        self.waits_for_room = True
        try:
            yield False
        finally:
            self.waits_for_room = False

    def _read(
        self,
        job: Job,
        decoder: Decoder,
        tokens: list[int],
        label: str | None,
        begun: Found | None = None,
        room: int = 0,
    ) -> Steps[Prefix]:
        """The prefix of a prompt, a chunk at a time; of one that is kept, from what there is of it. Without a label it
        is only under way, at once.
        """
        compute, dtype = self._config.compute, decoder.embed_VD[...].dtype
        settings = PrefillSettings(compute.prefill_chunk, compute.kernel, compute.context, begun is None, room)
        known = {} if begun is None else {"begun": begun.prefix, "known": begun.tokens}
        work = Prefill(decoder, [tokens], settings, dtype=dtype, **known)
        while label is None and work.left:
            work.step()
        with progress(label or "", work.left, "tokens", quiet=self._quiet or label is None) as report:
            while work.left:
                before = work.left
                with timed() as chunk:
                    work.step()
                    work.wait()
                job.took("prefill", chunk)
                report.advance(before - work.left)
                yield False
        return work.prefix

    def _prepared(
        self,
        job: Job,
        target: Prompted,
        drafter: Prompted | None,
        text: Sequence[int],
        handle: Handle | None,
        retrieved: int = 0,
    ) -> Prepared:
        config, room = job.config, Room(logprobs=job.request.logprobs is not None)
        if self._few_programs:
            slots = target.prefix.pos_BS.shape[1]
            new = self._config.sampling.max_new_tokens
            room = replace(room, new=new, suffix=QUESTION_TOKENS, text=slots + retrieved)
        document = object() if handle is None else handle
        size = sum(x.nbytes for x in jax.tree.leaves(target.prefix.layers))
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
                rounds.widen()
        job.took("prefill", work)
        slots = rounds.slots if self._few_programs else None
        key = LaneKey.of(config.speculation, None if size <= COPIED_BYTES else document, slots)
        return Prepared(key, rounds, document, handle)
