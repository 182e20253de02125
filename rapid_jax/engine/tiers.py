# SPDX-License-Identifier: Apache-2.0
"""What is kept in memory, on the devices and on the host: who goes when there is no room, and what stays."""

import itertools
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import jax

from rapid_jax.attention.cache import Prefix
from rapid_jax.engine.heads import Name
from rapid_jax.engine.host_prefixes import HostMoves, HostPrefix, device_bytes

_COUNT = itertools.count()


@dataclass(frozen=True)
class Handle:
    """One prefix that is kept, or was."""

    key: str
    tokens: int
    number: int  # no two prefixes have the same, of one key neither


class Kept:
    """A prefix on the devices or on the host, never on both."""

    def __init__(self, name: Name, tokens: int, prefix: Prefix, *, stored: bool):
        self.handle, self.marks = Handle(name.key, tokens, next(_COUNT)), name.marks
        self.device: Prefix | None = prefix
        self.host: HostPrefix | None = None
        self.bytes = device_bytes(prefix)  # on the devices
        self.holds = 0
        self.stored = stored  # on disk, or that was tried

    @property
    def prefix(self) -> Prefix:
        """Its arrays, wherever they are."""
        found = self.device if self.host is None else self.host.prefix
        assert found is not None
        return found


class Tiers:
    """Prefixes by key, in the order of their use; `most` bounds the bytes on "device" and on "host".

    Those that are held stay on the devices, pinned ones in memory. `dropped` is called with what is about to leave.
    """

    def __init__(self, moves: HostMoves, most: Mapping[str, int], dropped: Callable[[Kept], None]):
        self._moves, self._most, self._dropped = moves, most, dropped
        self._kept: OrderedDict[str, Kept] = OrderedDict()  # the least recently used first
        self._held: dict[Handle, Kept] = {}  # some of which may have been removed
        self._by_mark: dict[str, dict[str, None]] = {}  # mark -> keys
        self._pinned: set[str] = set()
        self.bytes = {"device": 0, "host": 0}

    def get(self, key: str) -> Kept | None:
        """What is kept under the key; counts as no use."""
        return self._kept.get(key)

    def every(self) -> list[Kept]:
        """All, the least recently used first."""
        return list(self._kept.values())

    def used(self, kept: Kept) -> None:
        """Makes it the most recently used."""
        self._kept.move_to_end(kept.handle.key)

    def keep(self, kept: Kept) -> None:
        """Adds what is on the devices, under a key that is free."""
        self._kept[kept.handle.key] = kept
        for mark in kept.marks:
            self._by_mark.setdefault(mark, {})[kept.handle.key] = None
        self.bytes["device"] += kept.bytes

    def forget(self, kept: Kept) -> None:
        """Takes it away at once; what is held takes its room until it is released."""
        del self._kept[kept.handle.key]
        for mark in kept.marks:
            keys = self._by_mark[mark]
            del keys[kept.handle.key]
            if not keys:
                del self._by_mark[mark]
        if kept.host is not None:
            self.bytes["host"] -= kept.host.bytes
        elif not kept.holds:
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
        if self._kept.get(handle.key) is not kept:
            self.bytes["device"] -= kept.bytes

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

    def make_room(self, wanted: int, but: Kept | None = None) -> bool:
        """Moves what is not held off the devices until `wanted` more bytes fit; False if they cannot.

        `but` stays where it is.
        """
        most, staying = self._most["device"], {*self._held.values(), *([but] if but and but.device else [])}
        if sum(kept.bytes for kept in staying) + wanted > most:
            return False
        for kept in self.every():
            if self.bytes["device"] + wanted <= most:
                break
            if kept.device is not None and kept not in staying:
                self._off_devices(kept, but)
        return self.bytes["device"] + wanted <= most

    def to_devices(self, kept: Kept) -> bool:
        """Brings it to the devices if it is on the host; False where they have no room."""
        if kept.host is None:
            return True
        if not self.make_room(kept.bytes, kept):
            return False
        kept.device, self.bytes["host"] = self._moves.to_devices(kept.host), self.bytes["host"] - kept.host.bytes
        kept.host = None
        self.bytes["device"] += kept.bytes
        return True

    def _off_devices(self, kept: Kept, but: Kept | None) -> None:
        """To the host, or away where that has no room; what is pinned then stays where it is."""
        assert kept.device is not None
        if not self._room_on_host(sum(array.nbytes for array in jax.tree.leaves(kept.device)), but):
            if kept.handle.key not in self._pinned:
                self._drop(kept)
            return
        kept.host, kept.device = self._moves.to_host(kept.device), None
        self.bytes["device"] -= kept.bytes
        self.bytes["host"] += kept.host.bytes

    def _room_on_host(self, wanted: int, but: Kept | None) -> bool:
        sizes = {kept: kept.host.bytes for kept in self._kept.values() if kept.host is not None}
        free = [kept for kept in sizes if kept is not but and kept.handle.key not in self._pinned]
        if self.bytes["host"] - sum(sizes[kept] for kept in free) + wanted > self._most["host"]:
            return False
        for kept in free:
            if self.bytes["host"] + wanted <= self._most["host"]:
                break
            self._drop(kept)
        return True

    def _drop(self, kept: Kept) -> None:
        self._dropped(kept)
        self.forget(kept)
