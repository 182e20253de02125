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
import traceback
from collections.abc import Mapping
from dataclasses import dataclass

from rapid_jax.runtime.errors import InputError

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
LOST_PEER = 75  # exit status EX_TEMPFAIL: the run may be started again
INTERRUPTED = 130
_GOODBYE, _GO, _NO = "bye", "go", "no"
_GRACE_S = 1.0  # for news of a process whose end made something here fail
_GREETING_S = 3.0  # for a word from whoever connects


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
        if not host or not port.isdigit() or not 0 < int(port) < 65536:
            raise InputError(f"{ADDRESS}: expected HOST:PORT, got {given[ADDRESS]!r}")
        if not (given[COUNT].isdigit() and given[INDEX].isdigit() and int(given[INDEX]) < int(given[COUNT])):
            raise InputError(f"{INDEX}: expected a number below {COUNT} = {given[COUNT]}, got {given[INDEX]!r}")
        return cls(host.strip("[]"), int(port), int(given[COUNT]), int(given[INDEX]))


class Run:
    """This process among those of its run, as a context in which all its work is done.

    Left without an error, it tells the others goodbye. Left with one, it tells them why and ends at once, and so do
    they, each with one line: status 2 for an InputError, else 75. When a process ends without a word, the others end
    with status 75: JAX would abort them, or their main thread waits for a device that will never answer.
    """

    def __init__(self, seat: Seat | None = None, peers: Mapping[int, socket.socket] | None = None, name: str = "rapid"):
        self.leads = seat is None or seat.index == 0
        self.count = 1 if seat is None else seat.count
        self._seat, self._peers, self._name = seat, dict(peers or {}), name
        self._ending = threading.Lock()  # held, for good, by who ends this process: it is done once
        for index, connection in self._peers.items():
            threading.Thread(target=self._listen, args=(index, connection), daemon=True).start()

    def start_jax(self) -> None:
        """Has JAX join the processes, for the devices of all; nothing for a process alone."""
        if self._seat is None:
            return
        _keep_standard_output()

        import jax

        seat = self._seat
        host = f"[{seat.host}]" if ":" in seat.host else seat.host
        jax.distributed.initialize(f"{host}:{seat.port}", seat.count, seat.index)

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if self._seat is None or not self._peers:
            return
        if error is None or isinstance(error, SystemExit):  # all of them have agreed to leave
            self._end_once()
            self._tell(_GOODBYE)
            return
        me = f"process {self._seat.index} of {self._seat.count}"
        if not isinstance(error, InputError | KeyboardInterrupt):
            time.sleep(_GRACE_S)  # if the reason is a process that has ended, the listener says it better
        self._end_once()  # the others end by what they are told, and that is not to end this one
        if isinstance(error, InputError):
            self._tell(f"2 {me} has ended: {error}")
            self._end(2, str(error))
        if isinstance(error, KeyboardInterrupt):
            self._tell(f"{LOST_PEER} {me} was interrupted")
            self._end(INTERRUPTED, "interrupted")
        self._tell(f"{LOST_PEER} {me} has failed")
        traceback.print_exception(error)
        self._end(1, f"{me} has failed")

    def _tell(self, word: str) -> None:
        line = " ".join(word.split()) + "\n"
        for connection in self._peers.values():
            with contextlib.suppress(OSError):
                connection.sendall(line.encode())

    def _end_once(self) -> None:
        """Goes on if nothing else is ending this process; else waits for that."""
        self._ending.acquire()

    def _listen(self, index: int, connection: socket.socket) -> None:
        word = _line_from(connection)
        if word == _GOODBYE or self._seat is None or not self._ending.acquire(blocking=False):
            return
        code, _, reason = word.partition(" ")
        if not code.isdigit():
            code, reason = str(LOST_PEER), f"process {index} of {self._seat.count} has ended without a word"
        if self.leads:  # the others know this process alone
            self._tell(f"{code} {reason}")
        self._end(int(code), reason)

    def _end(self, status: int, reason: str) -> None:
        """Without JAX's own farewell, which waits for minutes for processes that are gone."""
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        os.write(2, f"{self._name}: {' '.join(reason.split())}\n".encode())
        os._exit(status)


def meet(*, name: str = "rapid", patience: float = 300.0) -> Run:
    """Joins the processes that the environment names; returns at once in a process alone. Needs no jax.

    `name` begins this process's last line where another ends it. Raises InputError, naming who is missing, if not all
    come within `patience` seconds.
    """
    seat = Seat.of(os.environ)
    if seat is None:
        return Run()
    return Run(seat, _gather(seat, patience) if seat.index == 0 else _join(seat, patience), name)


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
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    both = socket.has_dualstack_ipv6()
    with socket.create_server(("", seat.port), family=family, backlog=seat.count, dualstack_ipv6=both) as server:
        while True:
            peers = {index: connection for index, connection in peers.items() if _is_there(connection)}
            if len(peers) == seat.count - 1:
                break
            server.settimeout(min(max(deadline - time.monotonic(), 0.01), 1.0))
            with contextlib.suppress(OSError):
                connection, _ = server.accept()
                index = _welcome(connection, seat)
                if index is not None:
                    peers[index] = connection  # the newest: one that was started again has left the older behind
            if time.monotonic() > deadline:
                missing = sorted(set(range(1, seat.count)) - peers.keys())
                raise InputError(
                    f"expected {seat.count} processes at port {seat.port} within {patience:.0f} s, got "
                    f"{len(peers) + 1}: missing {', '.join(map(str, missing))}"
                )
    for connection in peers.values():
        with contextlib.suppress(OSError):  # who has just ended is noticed by its listener
            connection.sendall(f"{_GO}\n".encode())
            _keep_alive(connection)
    return peers


def _welcome(connection: socket.socket, seat: Seat) -> int | None:
    """Which process has connected; None for a stranger, who is turned away."""
    connection.settimeout(_GREETING_S)
    with contextlib.suppress(OSError):
        words = _line_from(connection).split()
        if len(words) == 2 and all(word.isdigit() for word in words):
            index, count = map(int, words)
            if count == seat.count and 0 < index < count:
                return index
            connection.sendall(f"{_NO} process 0 is one of {seat.count}, got process {index} of {count}\n".encode())
    connection.close()
    return None


def _is_there(connection: socket.socket) -> bool:
    connection.setblocking(False)
    try:
        return connection.recv(1, socket.MSG_PEEK) != b""
    except BlockingIOError:
        return True
    except OSError:
        return False


def _join(seat: Seat, patience: float) -> dict[int, socket.socket]:
    """Another process: knocks until the first one is there, then waits for the word to go on."""
    deadline = time.monotonic() + patience
    while True:
        try:
            connection = socket.create_connection((seat.host, seat.port), timeout=5)
            connection.sendall(f"{seat.index} {seat.count}\n".encode())
            connection.settimeout(max(deadline - time.monotonic(), 1) + 5)  # the first process knows better who is late
            word, _, reason = _line_from(connection).partition(" ")
            if word == _GO:
                _keep_alive(connection)
                return {0: connection}
            connection.close()
            if word == _NO:
                raise InputError(f"{seat.host}:{seat.port}: {reason}")
        except socket.gaierror as error:
            raise InputError(f"{ADDRESS}: no host {seat.host}: {error.strerror}") from error
        except OSError:
            pass
        if time.monotonic() > deadline:
            raise InputError(
                f"process {seat.index}: the {seat.count} processes of this run did not meet at {seat.host}:{seat.port} "
                f"within {patience:.0f} s"
            )
        time.sleep(0.2)


def _line_from(connection: socket.socket) -> str:
    """What comes before a newline, and no more of it; empty if the connection ends first."""
    said = b""
    with contextlib.suppress(OSError):
        while (more := connection.recv(1)) and more != b"\n":
            said += more
        if more:
            return said.decode(errors="replace")
    return ""


def _keep_alive(connection: socket.socket) -> None:
    """A machine that vanishes closes nothing: probe it after 30 s of silence, give it up after a minute."""
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
