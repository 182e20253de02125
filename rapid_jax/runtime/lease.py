# SPDX-License-Identifier: Apache-2.0
"""One run at a time in a folder of a bucket: an object that its run renews while it lives, and deletes when it ends.

No clocks are compared. Whoever finds a lease watches it: one that changes is held, one that has not changed for
`EXPIRES_S` is nobody's, and taken over where it is still of the generation that was watched. Its holder ends itself
well before that when it could not renew. A holder on the same machine whose process is gone is not waited for.
"""

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from rapid_jax.runtime import bucket_writes, buckets, command_line
from rapid_jax.runtime.bucket_place import BucketPlace
from rapid_jax.runtime.distributed import LOST_PEER
from rapid_jax.runtime.errors import Busy, InputError, legible
from rapid_jax.runtime.json_input import Fields, parse_object

RENEW_S: Final = 10.0
EXPIRES_S: Final = 60.0
_GIVEN_UP: Final = 0.75  # of EXPIRES_S without a renewal: the holder ends
_LOOK_S: Final = 1.0
_TOLD_S: Final = 2.0  # a wait that is longer is said
_HELD: Final[set[str]] = set()  # nonces of the leases that this process holds
_OTHERS: Final = "wait for it, or choose another run folder"


def _end(reason: str) -> None:
    """Ends this process without another write: the folder may be another run's."""
    os.write(2, f"{legible(reason)}\n".encode())
    os._exit(LOST_PEER)


class Lease:
    """The lease at a place, held while the context is. `lost` is called, in another thread, if it is no longer.

    Entering raises Busy if another run holds it, and InputError where the store does not let it be written.
    """

    def __init__(
        self,
        place: BucketPlace,
        *,
        renew_s: float = RENEW_S,
        expires_s: float = EXPIRES_S,
        lost: Callable[[str], None] = _end,
        say: Callable[[str], None] = command_line.say,
    ):
        self._place, self._renew_s, self._expires_s, self._lost, self._say = place, renew_s, expires_s, lost, say
        self._nonce, self._count = secrets.token_hex(16), 0
        self._left = threading.Event()
        self._generation = bucket_writes.ABSENT
        self._renewed = time.monotonic()

    def __enter__(self) -> "Lease":
        self._acquire()
        _HELD.add(self._nonce)
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._renewing, self._watching)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()
        _HELD.discard(self._nonce)
        self._threads[0].join()  # a renewal that is under way is no longer ours to interrupt
        with contextlib.suppress(InputError):  # then it expires
            bucket_writes.delete(self._place, match=self._generation)

    def _acquire(self) -> None:
        watched, since, told = "", time.monotonic(), False
        while True:
            found = self._place.store.object_at(self._place.bucket, self._place.key)
            if found is None:
                match = bucket_writes.ABSENT
            else:
                match = found.generation
                now, holder = time.monotonic(), self._holder(found)
                if holder is not None and _is_gone(holder):
                    pass
                elif watched not in ("", match) or (holder is not None and _is_here(holder)):
                    raise Busy(
                        f"{self._place.parent}: expected no other run there, got that of {_name_of(holder)}, which is "
                        f"at work: {_OTHERS}"
                    )
                elif not watched or now - since < self._expires_s:
                    since, watched = (since, watched) if watched else (now, match)
                    if not told and now - since > _TOLD_S:
                        told = True
                        self._say(
                            f"{self._place.parent}: the run of {_name_of(holder)} did not say goodbye: waiting up to "
                            f"{self._expires_s:.0f} s to see whether it is at work"
                        )
                    time.sleep(min(_LOOK_S, self._expires_s / 10))
                    continue
            with contextlib.suppress(bucket_writes.Taken):  # another was faster: look at what it wrote
                self._write(match)
                return

    def _holder(self, found: buckets.Object) -> Fields | None:
        data = bytearray(found.size)
        try:
            self._place.store.read_into(self._place.bucket, found, 0, memoryview(data))
            holder = parse_object(bytes(data), str(self._place))
            holder.whole("pid", 0)
        except InputError:  # renewed or removed meanwhile, or no lease of ours
            return None
        return holder

    def _write(self, match: str) -> None:
        started, self._count = time.monotonic(), self._count + 1
        content = {**_process(), "nonce": self._nonce, "renewals": self._count}
        data = json.dumps(content).encode()
        self._generation = bucket_writes.write(self._place, data, match=match).generation
        self._renewed = started

    def _renewing(self) -> None:
        while not self._left.wait(self._renew_s):
            try:
                self._write(self._generation)
            except bucket_writes.Taken:
                self._lost(f"{self._place.parent}: another run has taken this folder over: ending")
                return
            except InputError:  # the store fails: `_watching` says when that is too long
                continue

    def _watching(self) -> None:
        limit = _GIVEN_UP * self._expires_s
        while not self._left.wait(min(_LOOK_S, limit / 4)):
            if time.monotonic() - self._renewed > limit:
                self._lost(f"{self._place}: could not be renewed for {limit:.0f} s, another run may take over: ending")
                return


def _process() -> dict[str, str | int]:
    """Who this process is: for people, and for others on this machine."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "machine": _machine(), "started": _started(os.getpid())}


def _machine() -> str:
    """This boot of this machine and the numbering of processes that this one is in; empty where that is not known."""
    with contextlib.suppress(OSError):
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    return ""


def _started(pid: int) -> str:
    """When a process of this machine began, in ticks; empty if there is none or it has ended."""
    with contextlib.suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if fields[0] in ("Z", "X") else fields[19]
    return ""


def _is_ours(holder: Fields) -> bool:
    return bool(_machine()) and holder.get("machine") == _machine()


def _is_here(holder: Fields) -> bool:
    return _is_ours(holder) and _started(holder.whole("pid", 0)) == holder.get("started")


def _is_gone(holder: Fields) -> bool:
    """Whether its process has ended, or is this one and has left it: it could not be deleted."""
    left = holder.get("pid") == os.getpid() and holder.get("nonce") not in _HELD
    return _is_ours(holder) and (left or _started(holder.whole("pid", 0)) != holder.get("started"))


def _name_of(holder: Fields | None) -> str:
    return "another process" if holder is None else f"process {holder.get('pid')} of {legible(str(holder.get('host')))}"
