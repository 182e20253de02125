# SPDX-License-Identifier: Apache-2.0
"""What is kept in memory, on the devices and on the host: who goes when there is no room, and what stays."""

import itertools
import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass

from rapid_jax.attention.cache import Prefix
from rapid_jax.engine.aside import begun
from rapid_jax.engine.heads import Name
from rapid_jax.engine.host_prefixes import HostMoves, HostPrefix, device_bytes
from rapid_jax.runtime.errors import legible

_log = logging.getLogger(__name__)
_COUNT = itertools.count()


@dataclass(frozen=True)
class Handle:
    """One prefix that is kept, or was."""

    key: str
    tokens: int
    number: int  # no two prefixes have the same, of one key neither


class Kept:
    """A prefix on the devices or on the host, never on both."""

    def __init__(self, name: Name, prefix: Prefix, *, stored: bool):
        self.handle, self.marks = Handle(name.key, name.tokens, next(_COUNT)), name.marks
        self.device: Prefix | None = prefix
        self.host: HostPrefix | None = None
        self.bytes = device_bytes(prefix)  # on the devices
        self.holds = 0
        self.stored = stored  # on disk, or that was tried
        self.removed = False  # it is in no table any more

    @property
    def prefix(self) -> Prefix:
        """Its arrays, wherever they are."""
        found = self.device if self.host is None else self.host.prefix
        assert found is not None
        return found


@dataclass
class Move:
    """A prefix on its way to the host, or to disk and then away. Until it has arrived it counts where it was."""

    kept: Kept
    work: Callable[[], HostPrefix | None]  # in whichever thread: it changes nothing that is read here
    to_disk: bool
    host_bytes: int = 0  # that count on the host until it has ended
    asked: bool = False  # somebody wants it meanwhile: it stays
    future: "Future[HostPrefix | None] | None" = None


class Tiers:
    """Prefixes by key, in the order of their use; `most` bounds the bytes on "device" and on "host".

    Those that are held stay on the devices, pinned ones in memory. What is about to leave memory is saved. One thread
    calls this; with `aside` another one copies and saves meanwhile, one prefix at a time.
    """

    def __init__(
        self,
        moves: HostMoves,
        most: Mapping[str, int],
        save: Callable[[Kept, Prefix], None],
        saved: Callable[[Kept], None],
        *,
        aside: bool = False,
    ):
        """`save` may be called in the other thread, with the arrays to be saved; `saved` once it has ended, in this."""
        self._moves, self.most, self._save, self._saved, self._aside = moves, most, save, saved, aside
        self._kept: OrderedDict[str, Kept] = OrderedDict()  # the least recently used first
        self._held: dict[Handle, Kept] = {}  # some of which may have been removed
        self._by_mark: dict[str, dict[str, None]] = {}  # mark -> keys
        self._pinned: set[str] = set()
        self._move: Move | None = None  # under way
        self._reserved = 0  # of the bytes on the devices: for what is being made
        self.bytes = {"device": 0, "host": 0}

    def get(self, key: str) -> Kept | None:
        """What is kept under the key; counts as no use."""
        return self._kept.get(key)

    def every(self) -> list[Kept]:
        """All, the least recently used first."""
        return list(self._kept.values())

    def used(self, kept: Kept) -> None:
        """Makes it the most recently used; if it is about to leave it stays."""
        self._kept.move_to_end(kept.handle.key)
        if self._move is not None and self._move.kept is kept:
            self._move.asked = True

    def keep(self, kept: Kept) -> None:
        """Adds what is on the devices, under a key that is free."""
        self._kept[kept.handle.key] = kept
        for mark in kept.marks:
            self._by_mark.setdefault(mark, {})[kept.handle.key] = None
        self.bytes["device"] += kept.bytes

    def forget(self, kept: Kept) -> None:
        """Takes it away at once; what is held, or on its way, takes its room until that ends."""
        del self._kept[kept.handle.key]
        for mark in kept.marks:
            keys = self._by_mark[mark]
            del keys[kept.handle.key]
            if not keys:
                del self._by_mark[mark]
        kept.removed = True
        self._free(kept)

    def _free(self, kept: Kept) -> None:
        """The room of what has been taken away, unless its arrays are still read."""
        if not kept.removed or kept.holds or (self._move is not None and self._move.kept is kept):
            return
        if kept.host is not None:
            self.bytes["host"] -= kept.host.bytes
        else:
            self.bytes["device"] -= kept.bytes

    def hold(self, handle: Handle) -> None:
        """Keeps it on the devices until it is released as often as it was held."""
        kept = self._held.get(handle) or self._kept.get(handle.key)
        if kept is None or kept.handle != handle or kept.device is None:
            raise ValueError("expected the handle of a prefix on the devices, got one of another place or gone")
        kept.holds += 1
        self._held[handle] = kept

    def release(self, handle: Handle) -> None:
        """Takes one `hold` back."""
        kept = self._held.get(handle)
        if kept is None:
            raise ValueError("expected the handle of a prefix that is held, got another")
        kept.holds -= 1
        if kept.holds:
            return
        del self._held[handle]
        self._free(kept)

    def pin(self, key: str, pinned: bool) -> None:
        """Whether what is or will be kept under the key stays in memory."""
        (self._pinned.add if pinned else self._pinned.discard)(key)

    def longest_common(self, marks: Sequence[str]) -> tuple[int, Kept | None]:
        """(how many of the marks something has, in their order; what that is, rather on the devices)."""
        for count in range(len(marks), 0, -1):
            keys = self._by_mark.get(marks[count - 1])
            if keys:
                return count, max((self._kept[key] for key in keys), key=lambda kept: kept.device is not None)
        return 0, None

    @property
    def moving(self) -> bool:
        """Whether a move is under way: room that there is not yet may be there later."""
        return self._move is not None

    def wait(self, seconds: float | None = None) -> None:
        """Until the move that is under way, if one is, has ended, or so long."""
        if self._move is not None and self._move.future is not None:
            wait([self._move.future], seconds)
            self._settle()

    @property
    def occupied(self) -> bool:
        """Whether any room on the devices is held or reserved."""
        return bool(self._held or self._reserved)

    def reserve(self, wanted: int) -> bool:
        """Makes room for so many bytes on the devices, and counts them; False if it cannot, or not yet."""
        there = self.make_room(wanted)
        self._reserve(wanted * there)
        return there

    def give_back(self, wanted: int) -> None:
        """Takes one `reserve` back."""
        self._reserve(-wanted)

    def _reserve(self, more: int) -> None:
        self._reserved += more
        self.bytes["device"] += more

    def make_room(self, wanted: int, but: Kept | None = None) -> bool:
        """Moves what is not held off the devices until `wanted` more bytes fit; False if they cannot, or not yet.

        `but` stays where it is.
        """
        self._settle()
        most, staying = self.most["device"], {*self._held.values(), *([but] if but and but.device else [])}
        if sum(kept.bytes for kept in staying) + self._reserved + wanted > most:
            return False
        for kept in self.every():
            if self._move is not None or self.bytes["device"] + wanted <= most:
                break
            if kept.device is not None and kept not in staying:
                self._off_devices(kept, but)
        return self.bytes["device"] + wanted <= most

    def to_devices(self, kept: Kept) -> bool:
        """Brings it to the devices if it is on the host; False where they have no room, or not yet."""
        if kept.host is None:
            return True
        if not self.make_room(kept.bytes, kept):
            return False
        kept.device, host, kept.host = self._moves.to_devices(kept.host), kept.host, None
        self.bytes["device"] += kept.bytes
        if self._move is not None and self._move.kept is kept:  # which is being saved from there
            self._move.host_bytes += host.bytes
        else:
            self.bytes["host"] -= host.bytes
        return True

    def _off_devices(self, kept: Kept, but: Kept | None) -> None:
        """To the host, or away where that has no room; what is pinned then stays where it is."""
        prefix = kept.device
        assert prefix is not None
        size = self._moves.host_bytes(prefix)
        if self._moves.is_parted and not kept.stored:  # from the devices all processes write it, from hosts none could
            self._save(kept, prefix)
            kept.stored = True
            self._saved(kept)
        if not self._room_on_host(size, but):
            if kept.handle.key not in self._pinned:
                self._drop(kept)
        elif self._move is None:  # else something leaves the host first
            self._begin(Move(kept, lambda: self._moves.to_host(prefix), to_disk=False, host_bytes=size))

    def _room_on_host(self, wanted: int, but: Kept | None) -> bool:
        """Whether there is room, or will be once the move that is under way then has ended."""
        sizes = {kept: kept.host.bytes for kept in self._kept.values() if kept.host is not None}
        free = [kept for kept in sizes if kept is not but and kept.handle.key not in self._pinned]
        if self.bytes["host"] - sum(sizes[kept] for kept in free) + wanted > self.most["host"]:
            return False
        for kept in free:
            if self._move is not None or self.bytes["host"] + wanted <= self.most["host"]:
                break
            self._drop(kept)
        return True

    def _drop(self, kept: Kept) -> None:
        if kept.stored:
            self.forget(kept)
            return
        prefix = kept.prefix
        self._begin(Move(kept, lambda: self._save(kept, prefix), to_disk=True))

    def _begin(self, move: Move) -> None:
        # Saving from several devices runs programs on them all, which must be in one order: that of one thread.
        if not self._aside or (move.to_disk and move.kept.host is None and not self._moves.on_one_device):
            self._end(move, move.work())
            return
        self.bytes["host"] += move.host_bytes
        self._move, move.future = move, begun(move.work)

    def _settle(self) -> None:
        """Takes in the move that was under way, if it has ended."""
        move = self._move
        if move is None or move.future is None or not move.future.done():
            return
        self._move = None
        self.bytes["host"] -= move.host_bytes
        error = move.future.exception()
        if error is not None:
            why = legible(f"{type(error).__name__}: {error}")
            _log.warning("keys and values of a document could not be moved off the devices: %s", why)
        self._end(move, None if error is not None else move.future.result())

    def _end(self, move: Move, arrived: HostPrefix | None) -> None:
        kept = move.kept
        if move.to_disk:
            kept.stored = True
            self._saved(kept)
        self._free(kept)
        if kept.removed or kept.holds or move.asked or (move.to_disk and kept.handle.key in self._pinned):
            return
        if arrived is None:
            self.forget(kept)
            return
        kept.host, kept.device = arrived, None
        self.bytes["device"] -= kept.bytes
        self.bytes["host"] += arrived.bytes
