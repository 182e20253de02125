# SPDX-License-Identifier: Apache-2.0
"""Several processes as one run: all are there before anything starts, and none outlives another.

JAX's own rendezvous waits for ever for a host that never comes, and a device that waits for a dead one never answers.
So the processes first meet at the coordinator's address, in plain sockets: the first one knows who is missing. The
sockets stay open as long as the run: when a process dies its sockets close, the others read that and end.
"""

import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass

from rapid_jax.runtime.errors import InputError

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
LOST_PEER = 75  # exit status EX_TEMPFAIL: the run may be started again
_GOODBYE, _GO = b"bye\n", b"go\n"
_GRACE_S = 3.0


@dataclass(frozen=True)
class Seat:
    """Which process of how many this is, and where they meet."""

    host: str
    port: int
    count: int
    index: int

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
        host, _, port = given[ADDRESS].rpartition(":")
        if not host or not port.isdigit():
            raise InputError(f"{ADDRESS}: expected HOST:PORT, got {given[ADDRESS]!r}")
        if not (given[COUNT].isdigit() and given[INDEX].isdigit() and int(given[INDEX]) < int(given[COUNT])):
            raise InputError(f"{INDEX}: expected a number below {COUNT} = {given[COUNT]}, got {given[INDEX]!r}")
        return cls(host.strip("[]"), int(port), int(given[COUNT]), int(given[INDEX]))


class Run:
    """This process among those of its run, as a context: when it is left, the others are told goodbye and why.

    When another process ends without that, this one says so and ends with status 75 at once: JAX would abort it, or its
    main thread waits for a device that will never answer. One that ends because of an InputError takes the others with
    it too, with its own reason and status 2.
    """

    def __init__(self, seat: Seat | None = None, peers: Mapping[int, socket.socket] | None = None):
        self.leads = seat is None or seat.index == 0
        self._seat, self._peers = seat, dict(peers or {})
        for index, connection in self._peers.items():
            threading.Thread(target=self._listen, args=(index, connection), daemon=True).start()

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if kind is None or issubclass(kind, InputError):
            word = _GOODBYE if kind is None else f"{error}\n".encode()
            for connection in self._peers.values():
                with contextlib.suppress(OSError):
                    connection.sendall(word)
        elif self._peers and issubclass(kind, Exception):
            time.sleep(_GRACE_S)  # if the reason is a process that has ended, the listener says it better

    def _listen(self, index: int, connection: socket.socket) -> None:
        said = b""
        with contextlib.suppress(OSError):
            while more := connection.recv(4096):
                said += more
        if said == _GOODBYE or self._seat is None:
            return
        others = f"rapid: process {index} of {self._seat.count} has ended"
        if said:
            time.sleep(_GRACE_S)  # most often this process finds the same
            os.write(2, f"{others}: {said.decode().strip()}\n".encode())
            os._exit(2)
        os.write(2, f"{others}, and process {self._seat.index} cannot go on without it\n".encode())
        os._exit(LOST_PEER)


def start(*, patience: float = 300.0) -> Run:
    """Joins the processes that the environment names; returns at once in a process alone.

    Raises InputError, naming who is missing, if not all come within `patience` seconds.
    """
    seat = Seat.of(os.environ)
    if seat is None:
        return Run()
    peers = _gather(seat, patience) if seat.index == 0 else _join(seat, patience)

    _keep_standard_output()

    import jax

    jax.distributed.initialize(f"{seat.host}:{seat.port}", seat.count, seat.index, initialization_timeout=int(patience))
    return Run(seat, peers)


def _keep_standard_output() -> None:
    """Leaves standard output to Python alone: Gloo, which connects CPU processes, writes notes to it from C."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = os.fdopen(kept, "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors, buffering=1)


def _gather(seat: Seat, patience: float) -> dict[int, socket.socket]:
    """The first process: waits for all the others, then lets them go on at once."""
    peers: dict[int, socket.socket] = {}
    deadline = time.monotonic() + patience
    with socket.create_server(("", seat.port), family=_family(seat.host), backlog=seat.count) as server:
        while len(peers) < seat.count - 1:
            server.settimeout(max(deadline - time.monotonic(), 0.01))
            try:
                connection, _ = server.accept()
                connection.settimeout(10)
                word = connection.recv(16)
            except TimeoutError:
                missing = sorted(set(range(1, seat.count)) - peers.keys())
                if time.monotonic() < deadline:
                    continue  # somebody knocked and said nothing
                raise InputError(
                    f"expected {seat.count} processes at port {seat.port} within {patience:.0f} s, got "
                    f"{len(peers) + 1}: missing {', '.join(map(str, missing))}"
                ) from None
            if word.strip().isdigit() and 0 < int(word) < seat.count and int(word) not in peers:
                peers[int(word)] = connection
            else:
                connection.close()
    for connection in peers.values():
        connection.sendall(_GO)
        _keep_alive(connection)
    return peers


def _join(seat: Seat, patience: float) -> dict[int, socket.socket]:
    """Another process: knocks until the first one is there, then waits for the word to go on."""
    deadline = time.monotonic() + patience
    while True:
        try:
            connection = socket.create_connection((seat.host, seat.port), timeout=5)
            connection.sendall(f"{seat.index}\n".encode())
            connection.settimeout(
                max(deadline - time.monotonic(), 1) + 5
            )  # the first process knows more of who is late
            if connection.recv(16) == _GO:
                _keep_alive(connection)
                return {0: connection}
        except OSError:
            pass
        if time.monotonic() > deadline:
            raise InputError(
                f"process {seat.index}: the {seat.count} processes of this run did not meet at {seat.host}:{seat.port} "
                f"within {patience:.0f} s"
            )
        time.sleep(0.2)


def _family(host: str) -> socket.AddressFamily:
    return socket.getaddrinfo(host, None)[0][0]


def _keep_alive(connection: socket.socket) -> None:
    """A machine that vanishes closes nothing: probe it after 30 s of silence, give it up after a minute."""
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
