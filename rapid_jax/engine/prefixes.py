# SPDX-License-Identifier: Apache-2.0
"""Keys and values of documents in three tiers: on the devices, on the host, on disk."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import jax

from rapid_jax.attention.cache import Prefix
from rapid_jax.config import CacheConfig, ComputeConfig
from rapid_jax.engine.aside import done_by, seconds_until
from rapid_jax.engine.heads import Name, StoredHeads, made_by, store_for
from rapid_jax.engine.host_prefixes import HostMoves, bytes_left, device_bytes, head_bytes
from rapid_jax.engine.rooms import room_of_document
from rapid_jax.engine.saving import SavingRate
from rapid_jax.engine.tiers import Handle, Kept, Tiers
from rapid_jax.model.decoder import Decoder, Layout
from rapid_jax.runtime.agreement import all_told
from rapid_jax.runtime.files import digest
from rapid_jax.runtime.storage import AnyPlace
from rapid_jax.speculative.prefill import serving, windows_of
from rapid_jax.speculative.prefix_heads import Place, head_of

_GIB = 2**30


@dataclass(frozen=True)
class Found:
    """What there is of a head: on the devices are its first `tokens` tokens.

    All of them, then with a handle; or fewer, a multiple of the prefill chunk, as a copy in the slots that prefill has
    for the whole head: it is the caller's, who prefills the rest. None, then without a prefix.
    """

    prefix: Prefix | None = None
    tokens: int = 0
    handle: Handle | None = None
    tier: str | None = None  # where it was: device, host or disk


class RoomLater(Exception):
    """Room on the devices is being made: what was asked for is to be asked for again."""


class PrefixCache:
    """Prefixes of one row by the token ids of their heads, each tier with a bound in bytes.

    What has not been used for longest goes first: from the devices to the host, from there to disk. Owners share
    nothing but what is public. One thread calls it; `bytes`, `name` and `tier` any. With `aside` what goes is copied
    and saved by another thread, a prefix at a time: its room is free once that is done, and who needs it asks again.
    """

    def __init__(
        self,
        decoder: Decoder,
        compute: ComputeConfig,
        cache: CacheConfig,
        place: AnyPlace,
        *,
        weights_hash: Callable[[], str],
        reserve: int = 0,
        aside: bool = False,
        quiet: bool = False,
    ):
        """`reserve` bytes of the devices are for others, where the settings leave the bound to what there is.

        `weights_hash` is asked for only if something is stored, in the cache folder at `place`.
        """
        self._decoder, self._compute, self._weights_hash = decoder, compute, weights_hash
        self.moves = HostMoves(decoder)
        alone = jax.process_count() == 1  # several do all in the same order
        given = cache.device_gib
        left = bytes_left(decoder)
        device = min(all_told(left - min(reserve, left // 2) if given is None else int(given * _GIB)))
        most = {"device": device, "host": min(all_told(int(cache.host_gib * _GIB)))}
        self._tiers = Tiers(self.moves, most, self._save, self._saved, aside=aside and alone)
        self.sizes: set[int] = set()  # slots of documents that programs have been compiled for
        self.until: float | None = None  # of time.monotonic(): nothing is stored on disk from then on
        self._rate = SavingRate()
        self._store = store_for(decoder, cache, place, quiet=quiet)
        if self._store is not None:
            self._on_disk = StoredHeads(self._store)
        self._disk_bytes = 0 if self._store is None else self._store.bytes()

    def bytes(self) -> dict[str, int]:
        """What each tier holds, "device" (copies counted), "host" and "disk"."""
        return {**self._tiers.bytes, "disk": self._disk_bytes}

    def bytes_for(self, tokens: int) -> int:
        """Of the devices' memory that `prefill` takes for a head with room for so many tokens, in full precision."""
        return head_bytes(self._decoder, self._place(tokens, tokens), filling=True)

    def fits(self, tokens: int) -> bool:
        """Whether the devices have room for so many tokens with nothing else there."""
        return self.bytes_for(tokens) <= self._tiers.most["device"]

    def slots(self, handle: Handle) -> int:
        """Of the prefix, on the devices or on the host."""
        kept = self._tiers.get(handle.key)
        return 0 if kept is None else kept.prefix.slots

    def name(self, head: Sequence[int], owner: str = "", public: bool = False, *, spares: bool = False) -> Name:
        """What the cache knows a head by; `key` is that of its handle. Of any thread.

        It takes milliseconds for 100,000 tokens. `spares`: there is to be room for as many as one of the `sizes` has.
        """
        whose = "everybody's" if public else f"of {owner}"
        name = Name.of(head, self._compute.prefill_chunk, digest(self._made_by, whose))
        return replace(name, room=room_of_document(len(head), self.sizes)) if spares else name

    def on_devices(self, key: str) -> bool:
        """Whether the whole head of this key lies there. No store is asked."""
        kept = self._tiers.get(key)
        return kept is not None and kept.device is not None

    def tier(self, key: str) -> str | None:
        """Where the whole head of this key is: "device", "host", "disk" or nowhere. Of any thread."""
        kept = self._tiers.get(key)
        if kept is not None:
            return "host" if kept.device is None else "device"
        return "disk" if self._store is not None and self._store.sees(key) else None

    def find(self, name: Name) -> Found:
        """As much of the head as is kept somewhere and has room on the devices; it becomes the most recently used.

        Raises RoomLater.
        """
        kept = self._tiers.get(name.key)
        if kept is not None:
            tier = "device" if kept.host is None else "host"
            self._tiers.used(kept)
            there = self._now(self._tiers.to_devices(kept))
            return Found(kept.device, name.tokens, kept.handle, tier) if there else Found()
        if self._store is not None and self._store.has(name.key):
            prefix = self._from_disk(name.key, self._place(name.tokens, name.room))
            if prefix is not None:
                return Found(prefix, name.tokens, self._keep(name, prefix), "disk")
        return self._common(name)

    def put(self, name: Name, prefix: Prefix) -> Handle:
        """Keeps a finished prefix of the head of this name, as the most recently used.

        Where no room can be made for it it stays all the same: it is there. Where one of the same head is on the
        devices that one stays, and the handle is its.
        """
        if prefix.pos_BS.shape[0] != 1:
            raise ValueError(f"expected a prefix of one row, got {prefix.pos_BS.shape[0]}")
        kept = self._tiers.get(name.key)
        if kept is not None and kept.device is not None:
            self._tiers.used(kept)
            return kept.handle
        if kept is not None:
            self._tiers.forget(kept)
        self._tiers.make_room(device_bytes(prefix))
        return self._keep(name, prefix)

    def hold(self, handle: Handle) -> None:
        """Keeps the prefix on the devices until it is released as often as it was held."""
        self._tiers.hold(handle)

    def release(self, handle: Handle) -> None:
        """Takes one `hold` back."""
        self._tiers.release(handle)
        self._tiers.make_room(0)  # what was put where there was no room for it

    def pin(self, key: str, pinned: bool) -> None:
        """Whether the prefix of this key, there yet or not, stays in memory: on the devices, else on the host."""
        self._tiers.pin(key, pinned)

    def remove(self, key: str) -> None:
        """Forgets the prefix of this key in every tier, and its pin; those who hold it may still read it."""
        self._tiers.pin(key, pinned=False)
        kept = self._tiers.get(key)
        if kept is not None:
            self._tiers.forget(kept)
        if self._store is not None:
            self._store.remove(key)
            self._disk_bytes = self._store.bytes()

    def make_room(self, wanted: int) -> bool:
        """Moves prefixes that are not held off the devices until `wanted` more bytes fit; False if they cannot.

        While some are `moving` False may also mean: not yet.
        """
        return self._tiers.make_room(wanted)

    def reserve(self, wanted: int) -> bool:
        """As `make_room`; and so many bytes count as on the devices until they are given back: what is being read."""
        return self._tiers.reserve(wanted)

    def give_back(self, wanted: int) -> None:
        """Takes one `reserve` back."""
        self._tiers.give_back(wanted)

    @property
    def occupied(self) -> bool:
        """Whether anybody holds a prefix on the devices, or reads one."""
        return self._tiers.occupied

    @property
    def moving(self) -> bool:
        """Whether the other thread moves a prefix."""
        return self._tiers.moving

    def wait(self, seconds: float) -> None:
        """Until the move that is under way has ended, if one is, at most so long."""
        self._tiers.wait(seconds)

    def save(self, most: int | None = None) -> int:
        """Stores on disk what is not there yet, at most so many: each takes as long as its bytes need.

        How many there was no time for, of `until`. What is not stored in time is not stored later either.
        """
        self._tiers.wait(seconds_until(self.until))
        unsaved = [kept for kept in self._tiers.every() if not kept.stored][:most]
        while unsaved and done_by(self.until, partial(self._save, unsaved[0], unsaved[0].prefix)):
            kept = unsaved.pop(0)
            kept.stored = True
            self._saved(kept)
        return len(unsaved)

    @property
    def saving_seconds(self) -> float:
        """That `save` is reckoned to take now. Of any thread."""
        return self._rate.seconds([kept.bytes for kept in self._tiers.every() if not kept.stored])

    @cached_property
    def _made_by(self) -> str:
        return made_by(self._decoder, self._compute, "" if self._store is None else self._weights_hash())

    def _place(self, tokens: int, longest: int) -> Place:
        devices, windows = serving(self._decoder, block=1).context, windows_of(self._decoder.config)
        return Place.of(tokens, longest, self._compute.prefill_chunk, devices, *windows)

    def _keep(self, name: Name, prefix: Prefix) -> Handle:
        stored = self._store is None or self._store.has(name.key)
        kept = Kept(name, prefix, stored=stored)
        self._tiers.keep(kept)
        return kept.handle

    def _from_disk(self, key: str, place: Place) -> Prefix | None:
        assert self._store is not None
        if not self._now(self._tiers.make_room(head_bytes(self._decoder, place))):
            return None
        layout: Layout = "stacked" if self._decoder.layout == "stacked" else "unrolled"
        prefix = self._store.load(key, layout=layout, place=place)
        self._disk_bytes = self._store.bytes()
        return prefix

    def _common(self, name: Name) -> Found:
        """The longest head that another document has in common, copied; from disk only if that is longer."""
        # Nothing can be prefilled behind what was quantised, or where a window has left out what came before.
        if self._compute.kv != "full" or any(self._decoder.config.window_of):
            return Found()
        chunk, found, tier = self._compute.prefill_chunk, None, None
        count, kept = self._tiers.longest_common(name.marks)
        if self._store is not None:
            longer, key = self._on_disk.find(name.marks, least=count)
            if longer > count:
                found = self._from_disk(key, self._place(longer * chunk, name.room))
            if found is not None:
                count, tier = longer, "disk"
        if found is None and kept is not None and not kept.removed:  # to make room
            tier = "device" if kept.host is None else "host"
            found = self._copied(kept, self._place(count * chunk, name.room))
        if found is None:
            return Found()
        handle = self._keep(name, found) if count * chunk == name.tokens else None
        return Found(found, count * chunk, handle, tier)

    def _copied(self, kept: Kept, place: Place) -> Prefix | None:
        self._tiers.used(kept)
        if self.moves.is_parted and not self._now(self._tiers.to_devices(kept)):  # no host has all of it
            return None
        if not self._now(self._tiers.make_room(head_bytes(self._decoder, place), kept)):
            return None
        if kept.host is not None:
            return self.moves.head(kept.host, place)
        assert kept.device is not None
        return head_of(self._decoder, kept.device, place)

    def _now(self, there: bool) -> bool:
        if not there and self._tiers.moving:
            raise RoomLater
        return there

    def _save(self, kept: Kept, prefix: Prefix) -> None:
        """In whichever thread."""
        if self._store is not None:
            how = {"wanted": lambda: not kept.removed and seconds_until(self.until) != 0.0}
            self._rate.timed(kept.bytes, partial(self._store.save, kept.handle.key, prefix, kept.marks, **how))

    def _saved(self, kept: Kept) -> None:
        if self._store is None:
            return
        key = kept.handle.key
        if kept.removed and self._tiers.get(key) is None:  # in the very moment in which it was saved
            self._store.remove(key)
        self._disk_bytes = self._store.bytes()
