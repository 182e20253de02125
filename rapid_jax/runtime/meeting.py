# SPDX-License-Identifier: Apache-2.0
"""Where the processes of a run meet, before JAX starts: process 0 listens, the others knock until it lets them go on.

A process says "INDEX COUNT" and, where the environment has a token, its digest; the answer is "go" when all are there,
or "no" and a reason. Whoever says anything else, too much or nothing at all is a stranger: turned away, and not missed.
"""

import contextlib
import ipaddress
import os
import re
import selectors
import socket
import struct
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from hmac import compare_digest

from rapid_jax.runtime.errors import InputError, legible
from rapid_jax.runtime.files import digest

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
TOKEN = "RAPID_RUN_TOKEN"
_GO, _NO = "go", "no"
_GREETING_S = 3.0  # for the greeting of whoever connects, from its first byte to its last
_GREETING_BYTES = 100
_REASON_BYTES = 400
_MOST_CALLERS = 256  # that have not greeted yet; the oldest goes when another comes
_MOST_PROCESSES = 65536
_WAITING = 256  # connections that the system holds until they are accepted
_SENDING_S = 10  # until a process that reads nothing is given up
_GREETING = re.compile(rb"([0-9]{1,5}) ([0-9]{1,5})(?: ([0-9a-f]{64}))?\n")


@dataclass(frozen=True)
class Seat:
    """Which process of how many this is, and where they meet."""

    host: str
    port: int
    count: int
    index: int
    token: str = field(default="", repr=False)  # a digest of the secret that the processes of a run share

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> "Seat | None":
        """What the environment says: None for a process alone. InputError for a part of it, or nonsense."""
        given = {name: environment[name] for name in (ADDRESS, COUNT, INDEX) if environment.get(name)}
        if not given:
            hosts = [name for name in environment.get("TPU_WORKER_HOSTNAMES", "").split(",") if name]
            if len(hosts) > 1:
                raise InputError(
                    f"this machine is one of {len(hosts)} of a TPU slice, and a process on it alone would wait for the "
                    "others for ever: start them all with launch/tpu.sh run"
                )
            return None
        missing = [name for name in (ADDRESS, COUNT, INDEX) if name not in given]
        if missing:
            raise InputError(f"expected {', '.join((ADDRESS, COUNT, INDEX))} together, {', '.join(missing)} not set")
        host, _, number = given[ADDRESS].rpartition(":")
        port, count, index = map(_whole, (number, given[COUNT], given[INDEX]))
        if not host or port is None or not 0 < port < 65536:
            raise InputError(f"{ADDRESS}: expected HOST:PORT, got {given[ADDRESS]!a:.200}")
        if count is None or not 0 < count <= _MOST_PROCESSES:
            raise InputError(f"{COUNT}: expected a number from 1 to {_MOST_PROCESSES}, got {given[COUNT]!a:.200}")
        if index is None or index >= count:
            raise InputError(f"{INDEX}: expected a number below {COUNT} = {count}, got {given[INDEX]!a:.200}")
        secret = environment.get(TOKEN, "").encode(errors="surrogateescape")
        return cls(host.strip("[]"), port, count, index, digest(secret) if secret else "")

    @property
    def is_local(self) -> bool:
        """Whether all processes are on this machine, as the address says."""
        with contextlib.suppress(ValueError):
            return ipaddress.ip_address(self.host).is_loopback
        return self.host == "localhost"


def _whole(text: str) -> int | None:
    return int(text) if re.fullmatch("[0-9]{1,5}", text) else None


def met(seat: Seat, patience: float) -> dict[int, socket.socket]:
    """Open connections of this process, by the index of the other: of process 0 to all, of another to process 0.

    Raises InputError, naming who is missing, if not all come within `patience` seconds.
    """
    try:
        socket.getaddrinfo(seat.host, seat.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:  # UnicodeError: a part of the name that is empty or too long
        reason = error.strerror if isinstance(error, OSError) else "not a name of a host"
        raise InputError(f"{ADDRESS}: no host {seat.host!a:.200}: {reason}") from error
    return _gather(seat, patience) if seat.index == 0 else _joined(seat, patience)


def _gather(seat: Seat, patience: float) -> dict[int, socket.socket]:
    """The first process: waits for all the others, then lets them go on at once."""
    deadline = time.monotonic() + patience
    with _listening(seat) as server, _Door(seat, server) as door:
        while not door.all_are_there():
            if time.monotonic() > deadline:
                lacking = sorted(set(range(1, seat.count)) - door.peers.keys())
                missing = ", ".join(map(str, lacking[:20])) + (" ..." if len(lacking) > 20 else "")
                raise InputError(
                    f"expected {seat.count} processes at port {seat.port} within {patience:.0f} s, got "
                    f"{len(door.peers) + 1}: missing {missing}{door.remark}"
                )
            door.attend(min(deadline - time.monotonic(), 0.5))
        peers, door.peers = door.peers, {}
    for connection in peers.values():
        _keep_open(connection)
        with contextlib.suppress(OSError):  # who has just ended is noticed by its listener
            connection.sendall(f"{_GO}\n".encode())
    return peers


@contextlib.contextmanager
def _listening(seat: Seat) -> Iterator[socket.socket]:
    """A server at the port: of this machine alone where the address is, else of every network that it is in."""
    try:
        if seat.is_local and seat.host != "localhost":
            family = socket.AF_INET6 if ":" in seat.host else socket.AF_INET
            server = socket.create_server((seat.host, seat.port), family=family, backlog=_WAITING)
        else:
            both = socket.has_dualstack_ipv6()
            family = socket.AF_INET6 if both else socket.AF_INET
            server = socket.create_server(("", seat.port), family=family, backlog=_WAITING, dualstack_ipv6=both)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else error
        raise InputError(f"{ADDRESS}: process 0 cannot listen at port {seat.port}: {reason}") from error
    with server:
        server.setblocking(False)
        yield server


@dataclass
class _Caller:
    """Somebody who has not greeted yet."""

    deadline: float
    said: bytes = b""


class _Door:
    """Who has come to process 0; nobody's silence or flood keeps another waiting."""

    def __init__(self, seat: Seat, server: socket.socket):
        self._seat, self._server = seat, server
        self._callers: dict[socket.socket, _Caller] = {}  # the oldest first
        self._watched = selectors.DefaultSelector()
        self._watched.register(server, selectors.EVENT_READ)
        self._without_token = 0
        self.peers: dict[int, socket.socket] = {}

    def __enter__(self) -> "_Door":
        return self

    def __exit__(self, *_: object) -> None:
        for connection in (*self._callers, *self.peers.values()):
            connection.close()
        self._watched.close()

    @property
    def remark(self) -> str:
        """What the user may have to mend."""
        found = self._without_token
        return f" ({found} greeted with another {TOKEN} than process 0 has, or none)" if found else ""

    def all_are_there(self) -> bool:
        """Whether all have come, and none has gone again."""
        if len(self.peers) == self._seat.count - 1:
            self.attend(0.0)
        return len(self.peers) == self._seat.count - 1

    def attend(self, seconds: float) -> None:
        """Hears whoever speaks within so many seconds."""
        for key, _ in self._watched.select(max(seconds, 0.0)):
            assert isinstance(key.fileobj, socket.socket)
            if key.fileobj is self._server:
                self._accept()
            elif key.fileobj in self._callers:
                self._hear(key.fileobj)
            elif key.fileobj in self.peers.values():  # else it was sent away an instant ago
                self._miss(key.fileobj)
        now = time.monotonic()
        for connection in [caller for caller, state in self._callers.items() if state.deadline < now]:
            self._turn_away(connection)

    def _accept(self) -> None:
        try:
            connection, _ = self._server.accept()
        except OSError:  # gone again, or no file is left for it
            time.sleep(0.01)
            return
        connection.setblocking(False)
        if len(self._callers) == _MOST_CALLERS:
            self._turn_away(next(iter(self._callers)))
        self._callers[connection] = _Caller(time.monotonic() + _GREETING_S)
        self._watched.register(connection, selectors.EVENT_READ)

    def _hear(self, connection: socket.socket) -> None:
        caller = self._callers[connection]
        try:
            more = connection.recv(_GREETING_BYTES)
        except BlockingIOError:
            return
        except OSError:
            more = b""
        caller.said += more
        if more and b"\n" not in caller.said and len(caller.said) < _GREETING_BYTES:
            return
        greeting = _GREETING.fullmatch(caller.said)
        index = None if greeting is None else self._seat_of(greeting, connection)
        if index is None:
            self._turn_away(connection)
            return
        del self._callers[connection]
        if index in self.peers:  # one that was started again has left the older behind
            self._miss(self.peers[index])
        self.peers[index] = connection

    def _seat_of(self, greeting: re.Match[bytes], connection: socket.socket) -> int | None:
        """The index of a process of this run; None, and a word to it, for one of another."""
        index, count = int(greeting[1]), int(greeting[2])
        reason = ""
        if not compare_digest(greeting[3] or b"", self._seat.token.encode()):
            self._without_token += 1
            reason = f"process 0 has another {TOKEN}, or none"
        elif count != self._seat.count or not 0 < index < count:
            reason = f"process 0 is one of {self._seat.count}, got process {index} of {count}"
        if not reason:
            return index
        with contextlib.suppress(OSError):
            connection.sendall(f"{_NO} {reason}\n".encode())
        return None

    def _turn_away(self, connection: socket.socket) -> None:
        del self._callers[connection]
        self._watched.unregister(connection)
        connection.close()

    def _miss(self, connection: socket.socket) -> None:
        """A process that has ended, or speaks though it is not its turn."""
        self.peers = {index: peer for index, peer in self.peers.items() if peer is not connection}
        self._watched.unregister(connection)
        connection.close()


def _joined(seat: Seat, patience: float) -> dict[int, socket.socket]:
    """Another process: knocks until the first one is there, then waits for the word to go on."""
    deadline = time.monotonic() + patience
    greeting = f"{seat.index} {seat.count} {seat.token}".rstrip() + "\n"
    while True:
        with contextlib.suppress(OSError):
            connection = socket.create_connection((seat.host, seat.port), timeout=5)
            with contextlib.ExitStack() as closing:
                closing.enter_context(connection)
                connection.sendall(greeting.encode())
                # 5: the first process knows better who is late
                word, _, reason = _answer(connection, max(deadline, time.monotonic() + 1) + 5).partition(" ")
                if word == _NO:
                    raise InputError(f"{seat.host}:{seat.port}: {legible(reason)}")
                if word == _GO:
                    _keep_open(connection)
                    closing.pop_all()
                    return {0: connection}
        if time.monotonic() > deadline:
            raise InputError(
                f"process {seat.index}: the {seat.count} processes of this run did not meet at {seat.host}:{seat.port} "
                f"within {patience:.0f} s"
            )
        time.sleep(0.2)


def _answer(connection: socket.socket, deadline: float) -> str:
    """What comes before a newline, and no more of it; empty if the connection or the time ends first."""
    said = b""
    while len(said) < _REASON_BYTES and (left := deadline - time.monotonic()) > 0:
        connection.settimeout(left)
        more = connection.recv(1)
        if more == b"\n":
            return said.decode(errors="replace")
        if not more:
            break
        said += more
    return ""


def _keep_open(connection: socket.socket) -> None:
    """A machine that vanishes closes nothing: probe it after 30 s of silence, give it up after a minute."""
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", _SENDING_S, 0))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
