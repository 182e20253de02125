# SPDX-License-Identifier: Apache-2.0
"""Prompts are read, a chunk at a time; what is read of documents is kept."""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import TypeAlias, TypeVar

from rapid_jax.attention.cache import Prefix
from rapid_jax.attention.quantized_kv import quantize_kv
from rapid_jax.config import RapidConfig
from rapid_jax.engine.drafter_room import DrafterRoom
from rapid_jax.engine.errors import TooLarge
from rapid_jax.engine.heads import Name
from rapid_jax.engine.job import Job
from rapid_jax.engine.models import Models
from rapid_jax.engine.prefixes import Found, PrefixCache, RoomLater
from rapid_jax.engine.request import Chat, Question, Request, Tokens
from rapid_jax.engine.rooms import room_of_retrieved, room_of_short
from rapid_jax.engine.tiers import Handle
from rapid_jax.model.decoder import Decoder
from rapid_jax.runtime.compiling import timed
from rapid_jax.runtime.progress import progress
from rapid_jax.speculative.chunk_layout import ChunkLayout
from rapid_jax.speculative.generate import Prompted
from rapid_jax.speculative.prefill import Prefill, PrefillSettings, serving

# Tokens that a prompt's prefix lacks when its rounds begin: the target feeds the last one, a drafter the last two.
TARGET_LACKS, DRAFTER_LACKS = 1, 2
PAUSE_S = 0.01  # between looks at what is being waited for, where nothing else is to be done
Result = TypeVar("Result")
# Work that yields between its pieces, and True once it needs the turn from there on: what takes room for a document, or
# waits for it, is done for one request at a time.
Steps: TypeAlias = Generator[bool, None, Result]


class Prefilling:
    """Reads prompts for requests whose steps are taken in turns."""

    def __init__(
        self,
        config: RapidConfig,
        models: Models,
        prefixes: PrefixCache,
        *,
        is_alone: Callable[[], bool],
        few_programs: bool,
        on_read: Callable[[Request, str], None],
        quiet: bool,
    ):
        """`is_alone`: whether no request has been read and not ended. `few_programs`: requests that ask for different
        things share theirs. `on_read` is told the key of a document's keys and values.
        """
        self.config, self.models, self.prefixes, self._quiet = config, models, prefixes, quiet
        self.is_alone, self.few_programs, self._on_read = is_alone, few_programs, on_read
        self.under_way = 0  # requests whose prompts are being read
        self._waits = 0  # requests that can go on only when others have given back memory

    @property
    def waits_for_room(self) -> bool:
        """Whether a request can go on only when others have given back memory."""
        return self._waits > 0

    def name(self, request: Request, head: Sequence[int]) -> Name | None:
        """Of a prompt's head whose keys and values are kept for others; None: they are not. Of any thread.

        It is made once a request: that takes milliseconds for a long document.
        """
        prompt, is_short = request.prompt, len(head) < self.config.compute.prefill_chunk
        about_document = isinstance(prompt, Question) or (isinstance(prompt, Chat) and prompt.document is not None)
        if not about_document and (is_short or (isinstance(prompt, Tokens) and not prompt.kept)):
            return None
        return self.prefixes.name(head, request.owner, request.public, spares=about_document)

    def at_hand(self, job: Job, name: Name | None) -> tuple[Prefix, Handle] | None:
        """The document, held, where it lies on the devices and nobody waits for what it takes there."""
        if name is None or self.waits_for_room or not self.prefixes.on_devices(name.key):
            return None
        try:
            found = self.prefixes.find(name)
        except RoomLater:
            return None
        if found.handle is None or found.prefix is None:
            return None
        self._on_read(job.request, name.key)
        job.reused = True
        self.prefixes.hold(found.handle)
        return found.prefix, found.handle

    def document(self, job: Job, head: list[int], name: Name | None) -> Steps[tuple[Prefix, Handle | None]]:
        """The target's prefix of the prompt up to the end of the document, kept for others under the name; held where
        it is kept.
        """
        decoder = self.models.target.decoder
        if name is None:
            room = room_of_short(len(head), self.config.compute.prefill_chunk) if self.few_programs else 0
            return (yield from self.read(job, decoder, head, "prefill", room=room)), None
        self._on_read(job.request, name.key)
        found, name = yield from self._begun(job, name)
        if found.handle is not None and found.prefix is not None:
            job.reused = True
            self.prefixes.hold(found.handle)
            return found.prefix, found.handle
        size = self.prefixes.bytes_for(name.room)
        try:
            prefix = yield from self.read(job, decoder, head, "prefill", found, name.room)
            if self.config.compute.kv != "full":
                prefix = quantize_kv(prefix)
        finally:
            self.prefixes.give_back(size)
        handle = self.prefixes.put(name, prefix)
        self.prefixes.hold(handle)
        return prefix, handle

    @contextmanager
    def reading(self) -> Iterator[None]:
        """While a request's prompts are read."""
        self.under_way += 1
        try:
            yield
        finally:
            self.under_way -= 1

    def _begun(self, job: Job, name: Name) -> Steps[tuple[Found, Name]]:
        """What there is of a document, and the name with the room that it has; unless all is there that is reserved."""
        while True:
            found = yield from self._find(job, name)
            if found.handle is not None or self.prefixes.reserve(self.prefixes.bytes_for(name.room)):
                return found, name
            del found  # by the time that there is room there may be more
            name = yield from self._roomy(name)

    def _roomy(self, name: Name) -> Steps[Name]:
        """Waits until there is room; the name with the document's own where there will be no more."""
        while not self.prefixes.reserve(size := self.prefixes.bytes_for(name.room)):
            if self.prefixes.fits(name.room) and self._may_be_room_later():
                yield from self._until_there_may_be_room()
            elif name.room > name.tokens:
                name = replace(name, room=name.tokens)
            else:
                raise TooLarge(f"the document is too large for the memory: {name.tokens} tokens of keys and values")
        self.prefixes.give_back(size)
        return name

    def _find(self, job: Job, name: Name) -> Steps[Found]:
        """What is kept of the document."""
        while True:
            try:
                with timed() as work:
                    found = self.prefixes.find(name)
            except RoomLater:
                yield from self._until_there_may_be_room()
                continue
            job.took("prefill", work)
            return found

    def _may_be_room_later(self) -> bool:
        """Whether some will be given back: by another request, or at the end of a move."""
        others = self.under_way > 1 or not self.is_alone()
        return self.prefixes.moving or (others and self.prefixes.occupied)

    def _until_there_may_be_room(self) -> Steps[None]:
        if self.is_alone():
            self.prefixes.wait(PAUSE_S)
        self._waits += 1
        try:
            yield False
        finally:
            self._waits -= 1

    @property
    def is_apart(self) -> bool:
        """Whether the drafter has devices of its own."""
        return self.models.meshes[0] != self.models.meshes[1]

    @cached_property
    def drafter_room(self) -> DrafterRoom:
        """The memory of a drafter's own devices."""
        return DrafterRoom(self.models.drafter.decoder)

    def room_of_drafter(self, head: Sequence[int], name: Name | None) -> int:
        """Tokens that there is to be room for with a drafter's prompt about that document, before it is read."""
        if not self.few_programs:
            return 0
        chunk, target = self.config.compute.prefill_chunk, self.models.target.decoder
        longest = room_of_short(len(head), chunk) if name is None else name.room
        coarse, devices = name is None, serving(target, block=1).context
        layout = ChunkLayout.of(max(longest, len(head)), chunk, devices, coarse=coarse)
        return room_of_retrieved(layout.slots, self.config.retrieval)

    def takes_drafter(self, job: Job, tokens: Sequence[int], room: int) -> bool:
        """Whether the request has room on a drafter's own devices, from now on until it ends."""
        return self.drafter_room.take(job, self._drafter_bytes(tokens, room))

    def _drafter_bytes(self, tokens: Sequence[int], room: int) -> int:
        return self.drafter_room.bytes_for(len(tokens), self._settings(coarse=True, room=room))

    def drafter_apart(self, job: Job, tokens: list[int], *, room: int) -> Steps[Prompted]:
        """The drafter with its prompt, which is only under way, on devices of its own once they have room for it."""
        while not self.takes_drafter(job, tokens, room):
            if not self.drafter_room.taken:
                raise TooLarge(f"the retrieved text is too large for the drafter's devices: {len(tokens)} tokens")
            yield from self._until_there_may_be_room()
        return (yield from self.drafter(job, tokens, room=room, waits=False))

    def drafter(self, job: Job, tokens: list[int], *, room: int, waits: bool = True) -> Steps[Prompted]:
        """The drafter with its prompt; without waiting it is only under way."""
        decoder = self.models.drafter.decoder
        label = "prefill (drafter)" if waits else None
        prefix = yield from self.read(job, decoder, tokens[:-DRAFTER_LACKS], label, room=room)
        is_copy = decoder.bits is not None and decoder is not self.models.target.decoder
        if is_copy:
            prefix = quantize_kv(prefix)
        return Prompted(decoder, [tokens], prefix, [len(tokens) - DRAFTER_LACKS])

    def _settings(self, *, coarse: bool, room: int) -> PrefillSettings:
        compute = self.config.compute
        return PrefillSettings(compute.prefill_chunk, compute.kernel, compute.context, coarse, room)

    def read(
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
        dtype, settings = decoder.embed_VD[...].dtype, self._settings(coarse=begun is None, room=room)
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
