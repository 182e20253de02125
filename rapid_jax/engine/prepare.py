# SPDX-License-Identifier: Apache-2.0
"""From a request to a row: its prompts are made and read, a piece at a time."""

from collections.abc import Callable, Generator, Hashable, Sequence
from concurrent.futures import Executor, wait
from dataclasses import dataclass, replace
from typing import TypeAlias, TypeVar

import jax

from rapid_jax.attention.cache import Prefix
from rapid_jax.attention.rounded import rounded
from rapid_jax.config import RapidConfig
from rapid_jax.engine.errors import TooLarge
from rapid_jax.engine.job import Job
from rapid_jax.engine.lane import LaneKey
from rapid_jax.engine.models import Models
from rapid_jax.engine.prefixes import Found, PrefixCache, RoomLater
from rapid_jax.engine.reader import read
from rapid_jax.engine.request import Question, Request, Retrieved, Tokens
from rapid_jax.engine.tiers import Handle
from rapid_jax.identity import check_same_prompts
from rapid_jax.model.decoder import Decoder
from rapid_jax.prompts import Reading
from rapid_jax.retrieval.config import chunk_count
from rapid_jax.runtime.compiling import timed
from rapid_jax.runtime.progress import progress
from rapid_jax.speculative.generate import Prompted, start
from rapid_jax.speculative.prefill import Prefill, PrefillSettings
from rapid_jax.speculative.rounds import Rounds
from rapid_jax.speculative.start import Room

# Tokens that a prompt's prefix lacks when its rounds begin: the target feeds the last one, a drafter the last two.
TARGET_LACKS, DRAFTER_LACKS = 1, 2
Result = TypeVar("Result")
_PAUSE_S = 0.01  # between looks at whether prompts are made, where nothing else is to be done
# Where requests are to share programs, there is room for at least so many tokens: of a question about a document and
# what the chat template puts behind it, around a drafter's text, and between two chunks of it.
QUESTION_TOKENS, FRAME_TOKENS, JOIN_TOKENS = 128, 256, 2
COPIED_BYTES = 2**30  # of keys and values that are copied, so that rows about several documents run in one program


@dataclass(frozen=True)
class Prepared:
    """A request whose prompts have been read."""

    key: LaneKey
    rounds: Rounds
    document: Hashable  # equal for requests about the same one
    handle: Handle | None  # of the document's keys and values, held


# Between pieces of the work. What is yielded: whether the next piece keeps the device busy for long (a chunk of a
# prompt); else it is short, or there is nothing to do yet.
Steps: TypeAlias = Generator[bool, None, Result]


def room_of_short(tokens: int, chunk: int) -> int:
    """Tokens that there is room for with a prompt of so many that others are not to begin with: of two sizes."""
    return chunk // 4 if tokens <= chunk // 4 else chunk


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
        self._holding = 0  # requests that hold keys and values while the rest of them is read

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
        speculation, model = config.speculation, self._models.target
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
        self._holding += 1
        try:
            return (yield from self._behind(job, reading, prefix, handle, drafter))
        except BaseException:  # closed too, where the request is taken back
            if handle is not None:
                self._prefixes.release(handle)
            raise
        finally:
            self._holding -= 1

    def _prompts(self, job: Job) -> Steps[Reading]:
        """The request's prompts; where others are answered meanwhile, by a thread of its own."""
        if self._aside is None:
            return read(self._models, job.config, job.request)
        work = self._aside.submit(read, self._models, job.config, job.request)
        while not work.done():
            if self._is_alone():
                wait([work], _PAUSE_S)
            yield False
        return work.result()

    def _behind(
        self, job: Job, reading: Reading, prefix: Prefix, handle: Handle | None, drafter: Prompted | None
    ) -> Steps[Prepared]:
        """What is left to be read once the target has the document: the question, and the drafter's prompt."""
        config, head = job.config, reading.long.head
        target = Prompted(self._models.target.decoder, [reading.long.tokens], prefix, [len(head)])
        if not config.speculation.drafts:
            return self._prepared(job, target, None, head, handle)
        assert reading.short is not None
        short, room = reading.short.tokens, self._room_of_retrieved(job, prefix)
        drafter = drafter or (yield from self._drafter(job, short, room=room))
        return self._prepared(job, target, drafter, head + short, handle, room)

    def _drafter(self, job: Job, tokens: list[int], *, room: int = 0, waits: bool = True) -> Steps[Prompted]:
        """The drafter with its prompt; without waiting it is only under way."""
        decoder = self._models.drafter.decoder
        label = "prefill (drafter)" if waits else None
        prefix = yield from self._read(job, decoder, tokens[:-DRAFTER_LACKS], label, room=room)
        is_copy = decoder.bits is not None and decoder is not self._models.target.decoder
        if is_copy:
            prefix = rounded(prefix)
        return Prompted(decoder, [tokens], prefix, [len(tokens) - DRAFTER_LACKS])

    def _room_of_retrieved(self, job: Job, prefix: Prefix) -> int:
        """Tokens that a drafter's prompt has at most for any document of the size, whatever is found; 0: as it is."""
        if not self._few_programs:
            return 0
        retrieval, slots = job.config.retrieval, prefix.pos_BS.shape[1]
        each = retrieval.chunk_tokens + JOIN_TOKENS
        return chunk_count(slots, retrieval) * each + FRAME_TOKENS

    def _room_of_short(self, tokens: int) -> int:
        """Tokens that there is room for with a prompt of so many that is not kept; 0: as it is."""
        return room_of_short(tokens, self._config.compute.prefill_chunk) if self._few_programs else 0

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
        prompt, is_short = request.prompt, len(head) < self._config.compute.prefill_chunk
        if not isinstance(prompt, Question) and (is_short or (isinstance(prompt, Tokens) and not prompt.kept)):
            return (yield from self._read(job, decoder, head, "prefill", room=self._room_of_short(len(head)))), None
        self._on_read(request, self._prefixes.name(head, *owner).key)
        is_turn = False
        while True:
            found = yield from self._find(job, head)
            if found.handle is not None and found.prefix is not None:
                job.reused = True
                self._prefixes.hold(found.handle)
                return found.prefix, found.handle
            if not is_turn:
                is_turn = True
                yield True  # whoever reads before may read this very document
            elif self._prefixes.make_room(self._prefixes.bytes_for(len(head))):
                break
            elif self._is_alone() and not self._holding and not self._prefixes.moving:
                raise TooLarge(f"the document is too large for the memory: {len(head)} tokens of keys and values")
            else:
                is_turn = False
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
        yield False

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
                yield True
                before = work.left
                with timed() as chunk:
                    work.step()
                    work.wait()
                job.took("prefill", chunk)
                report.advance(before - work.left)
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
