# SPDX-License-Identifier: Apache-2.0
"""Several processes as one run: all are there before anything starts, and none outlives another.

JAX's own rendezvous waits for ever for a host that never comes, and a device that waits for a dead one never answers.
So the processes first meet at the coordinator's address, in plain sockets (meeting.py). These stay open as long as the
run: what must not differ is compared over them, and when a process dies its sockets close, the others read that and
end. What is said is a line: "say" and a JSON text, "bye", or the status that the run ends with and why; "all" and why
where all have met the same, and each ends by itself.
"""

import contextlib
import json
import os
import queue
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import BinaryIO

from rapid_jax.runtime.errors import AGAIN, Again, InputError, legible
from rapid_jax.runtime.json_input import parse_json
from rapid_jax.runtime.meeting import Seat, met

LOST_PEER = AGAIN  # the run may be started again
INTERRUPTED = 130
_INPUT_ERROR = 2
_SAY, _GOODBYE, _ALL = "say", "bye", "all"
_GRACE_S = 1.0  # for news of a process whose end made something here fail
_CLEARING_S = 10.0  # for a process to take away what it made, where all have met what ends them
_PATIENCE_S = 300.0
_MOST_BYTES = 1 << 20  # of a line
_MOST_CHARACTERS = 2000  # of a reason

_running: list["Run"] = []  # the runs that this process is in: at most one


class Disagreement(InputError):
    """What is wrong is between the processes, and all of them have met it: each is left the time to clear up."""


class Late(InputError):
    """A process has said nothing for as long as it was waited for."""


class Run:
    """This process among those of its run, as a context in which all its work is done.

    Left without an error, it tells the others goodbye. Left with one, it tells them why and ends at once, and so do
    they, each with one line: status 2 for an InputError, else 75. When a process ends without a word, the others end
    with status 75: JAX would abort them, or their main thread waits for a device that will never answer.
    """

    def __init__(
        self,
        seat: Seat | None = None,
        peers: Mapping[int, socket.socket] | None = None,
        name: str = "rapid",
        patience: float = _PATIENCE_S,
    ):
        self.leads = seat is None or seat.index == 0
        self.count = 1 if seat is None else seat.count
        self._seat, self._peers, self._name, self._patience = seat, dict(peers or {}), name, patience
        self._ending = threading.Lock()  # held, for good, by who ends this process: it is done once
        self._said: dict[int, queue.Queue[str | None]] = {index: queue.Queue(1) for index in self._peers}
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

    def settle(self, mine: str, judge: Callable[[Sequence[str]], str], *, patience: float | None = None) -> str:
        """What `judge` makes, on process 0, of the texts that all processes give, in their order; the same on all.

        All must call it, in the same order of calls. Raises Late if one says nothing for `patience` seconds, or those
        of the meeting.
        """
        patience = self._patience if patience is None else patience
        if self.leads:
            verdict = judge([mine, *(self._heard(index, patience) for index in sorted(self._peers))])
            self._send(f"{_SAY} {json.dumps(verdict)}")
            return verdict
        self._send(f"{_SAY} {json.dumps(mine)}")
        return self._heard(0, patience)

    def _heard(self, index: int, patience: float) -> str:
        try:
            said = self._said[index].get(timeout=patience)
        except queue.Empty as error:
            raise Late(f"expected a word of process {index} within {patience:.0f} s, got none") from error
        if said is None:
            raise InputError(f"expected a word of process {index}, got its goodbye: does it run another command?")
        text = parse_json(said, f"process {index}")
        if not isinstance(text, str):
            raise InputError(f"process {index}: expected a JSON text, got another value")
        return text

    def __enter__(self) -> "Run":
        _running.append(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        _running.remove(self)
        if self._seat is None or not self._peers:
            return
        if error is None or (isinstance(error, SystemExit) and not isinstance(error, Again)):  # as all have agreed
            self._end_once()
            self._send(_GOODBYE)
            return
        me = f"process {self._seat.index} of {self._seat.count}"
        if not isinstance(error, InputError | Again | KeyboardInterrupt):
            time.sleep(_GRACE_S)  # if the reason is a process that has ended, the listener says it better
        self._end_once()  # the others end by what they are told, and that is not to end this one
        if isinstance(error, InputError):
            told = (_ALL, f"{error}") if isinstance(error, Disagreement) else (_INPUT_ERROR, f"{me} has ended: {error}")
            self._tell(*told)
            self._end(_INPUT_ERROR, str(error))
        if isinstance(error, Again):
            self._tell(LOST_PEER, f"{me} has ended: {error.reason}")
            self._end(AGAIN, error.reason)
        if isinstance(error, KeyboardInterrupt):
            self._tell(LOST_PEER, f"{me} was interrupted")
            self._end(INTERRUPTED, "interrupted")
        self._tell(LOST_PEER, f"{me} has failed")
        traceback.print_exception(error)
        self._end(1, f"{me} has failed")

    def _tell(self, status: int | str, reason: str) -> None:
        self._send(f"{status} {legible(reason)[:_MOST_CHARACTERS]}")

    def _send(self, line: str) -> None:
        for connection in self._peers.values():
            with contextlib.suppress(OSError):
                connection.sendall(f"{line}\n".encode())

    def _end_once(self) -> None:
        """Goes on if nothing else is ending this process; else waits for that."""
        self._ending.acquire()

    def _listen(self, index: int, connection: socket.socket) -> None:
        """Notes what another process says, until it ends or says what none of them would: then this one ends too."""
        with connection.makefile("rb") as lines:
            line = _line_of(lines)
            with contextlib.suppress(queue.Full):  # a second word before the first was heard: nobody's
                while line.startswith(f"{_SAY} ".encode()) and line.endswith(b"\n"):
                    self._said[index].put_nowait(line[len(_SAY) :].decode(errors="replace"))
                    line = _line_of(lines)
        if line == f"{_GOODBYE}\n".encode():
            with contextlib.suppress(queue.Full):
                self._said[index].put_nowait(None)  # nobody waits for a word of it
            return
        if line.startswith(f"{_ALL} ".encode()):
            time.sleep(_CLEARING_S)  # this process ends before that, unless something holds it
        if self._seat is None or not self._ending.acquire(blocking=False):
            return
        status, reason = self._ended_by(line, f"process {index} of {self._seat.count}")
        if self.leads:  # the others know this process alone
            self._tell(status, reason)
        self._end(status, reason)

    @staticmethod
    def _ended_by(line: bytes, who: str) -> tuple[int, str]:
        """(status, reason) of a process's last line."""
        code, _, reason = line.decode(errors="replace").partition(" ")
        for known, status in ((_ALL, _INPUT_ERROR), (str(_INPUT_ERROR), _INPUT_ERROR), (str(LOST_PEER), LOST_PEER)):
            if code == known and line.endswith(b"\n"):
                return status, reason
        return LOST_PEER, f"{who} has ended without a word" if not line else f"{who} said what no process of a run says"

    def _end(self, status: int, reason: str) -> None:
        """Without JAX's own farewell, which waits for minutes for processes that are gone."""
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        os.write(2, f"{self._name}: {legible(reason)[:_MOST_CHARACTERS]}\n".encode())
        os._exit(status)


def _line_of(lines: BinaryIO) -> bytes:
    """The next line with its end, or what there is of it: nothing where the connection ends."""
    try:
        return lines.readline(_MOST_BYTES)
    except OSError:  # reset
        return b""


def running() -> Run | None:
    """The run of several processes that this one is in the middle of, if it is in one that `meet` began."""
    return _running[-1] if _running else None


def meet(*, name: str = "rapid", patience: float = _PATIENCE_S) -> Run:
    """Joins the processes that the environment names; returns at once in a process alone. Needs no jax.

    `name` begins this process's last line where another ends it. Raises InputError, naming who is missing, if not all
    come within `patience` seconds.
    """
    seat = Seat.of(os.environ)
    return Run() if seat is None else Run(seat, met(seat, patience), name, patience)


def _keep_standard_output() -> None:
    """Leaves standard output to Python alone: Gloo, which connects CPU processes, writes notes to it from C."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = os.fdopen(kept, "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors, buffering=1)
