# SPDX-License-Identifier: Apache-2.0
"""Whoever else talks at the port where processes meet, and a process that does not say what processes say."""

import contextlib
import os
import random
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from rapid_jax.runtime import distributed, meeting
from rapid_jax.runtime.distributed import LOST_PEER, Run
from rapid_jax.runtime.errors import Again, InputError
from rapid_jax.runtime.meeting import ADDRESS, COUNT, INDEX, TOKEN, Seat, met

SOON_S = 20.0  # on a busy machine


def seats(count: int = 2, token: str = "") -> list[Seat]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    names = {ADDRESS: f"127.0.0.1:{port}", COUNT: str(count), TOKEN: token}
    found = [Seat.of(names | {INDEX: str(index)}) for index in range(count)]
    return [seat for seat in found if seat is not None]


class Meeting(threading.Thread):
    """A process's part of the meeting, in a thread."""

    def __init__(self, seat: Seat, patience: float = SOON_S):
        super().__init__(daemon=True)
        self._seat, self._patience = seat, patience
        self.peers: dict[int, socket.socket] = {}
        self.error: InputError | None = None
        self.start()

    def run(self) -> None:
        try:
            self.peers = met(self._seat, self._patience)
        except InputError as error:
            self.error = error

    def ended(self) -> "Meeting":
        self.join(2 * SOON_S)
        assert not self.is_alive()
        return self

    def close(self) -> None:
        for connection in self.ended().peers.values():
            connection.close()


def knock(seat: Seat) -> socket.socket:
    """A connection to process 0, once it listens."""
    limit = time.monotonic() + SOON_S
    while True:
        try:
            return socket.create_connection((seat.host, seat.port), timeout=SOON_S)
        except ConnectionRefusedError:
            assert time.monotonic() < limit
            time.sleep(0.01)


GREETINGS = [
    *(b"1 2\n", b"1 3\n", b"0 2\n", b"-1 2\n", b"+1 2\n", b"1_0 2\n", b"\xc2\xb2 2\n", b"9" * 5000 + b" 2\n"),
    *(b"1 2 token\n", b"1 2 " + b"0" * 64 + b"\n", b"1 2\n1 2\n", b" 1 2\n", b"1  2\n", b"1 2", b"", b"\n"),
    *(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01", b"\xff\xfe\n"),
    *(b"x" * 100_000, b"\x1b[31m 2\n"),
]


def test_strangers_of_every_kind_change_nothing(monkeypatch):
    """Some hold the connection without a word, or with a byte now and then; the two processes meet at once."""
    monkeypatch.setattr(meeting, "_GREETING_S", 0.5)
    zero, one = seats(token="secret")
    first = Meeting(zero)
    held = [knock(zero) for _ in GREETINGS]
    for connection, greeting in zip(held, GREETINGS, strict=True):
        with contextlib.suppress(OSError):  # it may have been turned away by then
            connection.sendall(greeting)
    slow = knock(zero)
    for byte in b"1 2 0123456789":
        with contextlib.suppress(OSError):
            slow.sendall(bytes([byte]))
        time.sleep(0.1)
    assert first.is_alive()
    assert is_closed(slow)  # turned away though it went on speaking
    begun = time.monotonic()
    second = Meeting(one)
    for part in (first, second):
        part.ended()
    assert time.monotonic() - begun < 5 and list(first.peers) == [1] and list(second.peers) == [0]
    for connection in (*held, slow):
        connection.close()
    for part in (first, second):
        part.close()


def test_more_strangers_than_are_heard_at_once_keep_nobody_out(monkeypatch):
    monkeypatch.setattr(meeting, "_MOST_CALLERS", 8)
    zero, one = seats()
    first = Meeting(zero)
    held = [knock(zero) for _ in range(60)]
    second = Meeting(one)
    assert list(second.ended().peers) == [0] and list(first.ended().peers) == [1]
    for connection in held:
        connection.close()
    for part in (first, second):
        part.close()


def test_another_token_or_none_takes_no_seat():
    for theirs in ("other", ""):
        zero, one = seats(token="secret")
        first = Meeting(zero, patience=1)
        second = Meeting(Seat(one.host, one.port, 2, 1, seats(token=theirs)[1].token), patience=1)
        assert str(second.ended().error) == f"127.0.0.1:{one.port}: process 0 has another RAPID_RUN_TOKEN, or none"
        said = str(first.ended().error)
        assert said.endswith("missing 1 (1 greeted with another RAPID_RUN_TOKEN than process 0 has, or none)")
        assert "secret" not in f"{one!r} {said}"


def test_who_is_missing_is_named():
    zero, _, two, _ = seats(4)
    first, third = Meeting(zero, patience=1), Meeting(two, patience=1)
    assert str(first.ended().error) == f"expected 4 processes at port {zero.port} within 1 s, got 2: missing 1, 3"
    assert str(third.ended().error) == (
        f"process 2: the 4 processes of this run did not meet at 127.0.0.1:{zero.port} within 1 s"
    )


def test_who_comes_again_has_the_seat_and_who_has_gone_has_none():
    zero, one, two = seats(3)
    first = Meeting(zero)
    gone = knock(zero)
    gone.sendall(b"1 3\n")
    time.sleep(0.1)
    gone.close()
    eager = knock(zero)
    eager.sendall(b"1 3\n")
    time.sleep(0.1)
    eager.sendall(b"go\n")  # before its turn: as good as gone
    assert is_closed(eager)
    stale = knock(zero)
    stale.sendall(b"2 3\n")
    third = Meeting(two)
    assert is_closed(stale)
    second = Meeting(one)
    assert [sorted(part.ended().peers) for part in (first, second, third)] == [[1, 2], [0], [0]]
    for part in (first, second, third):
        part.close()
    eager.close()
    stale.close()


class Server(threading.Thread):
    """A stranger at the coordinator's address: says the same to everybody."""

    def __init__(self, seat: Seat, said: bytes):
        super().__init__(daemon=True)
        self._said = said
        self.server = socket.create_server((seat.host, seat.port))
        self.start()

    def run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self.server.accept()
                with connection:
                    connection.sendall(self._said)
                    connection.settimeout(0.05)
                    with contextlib.suppress(OSError):
                        connection.recv(100)


@pytest.mark.parametrize("said", [b"", b"0 ok\n", b"gone\n", b"x" * 200_000, b"\x1b[2J\n", b"go", b"\xff\n"])
def test_a_stranger_at_the_address_ends_the_wait_with_one_line(said):
    _, one = seats()
    server = Server(one, said)
    error = Meeting(one, patience=0.1).ended().error
    server.server.close()
    assert str(error) == f"process 1: the 2 processes of this run did not meet at 127.0.0.1:{one.port} within 0 s"


def test_what_it_says_against_a_process_is_no_command_to_the_terminal():
    _, one = seats()
    server = Server(one, b"no \x1b]0;title\x07 \xff\n")
    error = Meeting(one, patience=5).ended().error
    server.server.close()
    assert str(error) == rf"127.0.0.1:{one.port}: \x1b]0;title\x07 {chr(0xFFFD)}"


@pytest.fixture
def seated(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[bytes], tuple[int, str]]]:
    """How process 0 ends when process 1 says this and goes: (status, last line)."""
    lines: list[bytes] = []
    status: list[int] = []
    over = threading.Event()
    opened: list[socket.socket] = []

    def leave(code: int) -> None:
        status.append(code)
        over.set()

    monkeypatch.setattr(os, "write", lambda _, line: lines.append(line))
    monkeypatch.setattr(os, "_exit", leave)

    def end(said: bytes) -> tuple[int, str]:
        for kept in (lines, status, over):
            kept.clear()
        ours, theirs = socket.socketpair()
        opened.extend((ours, theirs))
        theirs.settimeout(0.5)
        Run(Seat("127.0.0.1", 1, 2, 0), {1: ours})
        with contextlib.suppress(OSError):  # it has heard enough
            theirs.sendall(said)
        theirs.close()
        if said.split(b"\n")[0] == b"bye":
            assert not over.wait(0.2)
            return 0, ""
        assert over.wait(SOON_S)
        (line,) = lines
        return status[0], line.decode()

    yield end
    for connection in opened:
        connection.close()


@pytest.mark.parametrize(
    ("said", "status", "line"),
    [
        (b"", LOST_PEER, "process 1 of 2 has ended without a word"),
        (b"2 process 1 of 2 has ended: no such file\n", 2, "process 1 of 2 has ended: no such file"),
        (b"75 process 1 of 2 has failed\n", LOST_PEER, "process 1 of 2 has failed"),
        (b"2 \x1b[31mred\x07\r\xc2\x9b2J\n", 2, r"\x1b[31mred\x07 \x9b2J"),
        (b"0 ok\n", LOST_PEER, "process 1 of 2 said what no process of a run says"),
        (b"\xc2\xb2 x\n", LOST_PEER, "process 1 of 2 said what no process of a run says"),
        (b"02 x\n", LOST_PEER, "process 1 of 2 said what no process of a run says"),
        (b"1000000000000000000000000 x\n", LOST_PEER, "process 1 of 2 said what no process of a run says"),
        (b"2 a word that is cut", LOST_PEER, "process 1 of 2 said what no process of a run says"),
        (b"say 1\nsay 2\nsay 3\n", LOST_PEER, "process 1 of 2 said what no process of a run says"),
        (b"x" * 3_000_000, LOST_PEER, "process 1 of 2 said what no process of a run says"),
        (b"bye\n", 0, ""),
    ],
)
def test_a_process_that_says_this_ends_the_run_so(seated, said, status, line):
    assert seated(said) == (status, f"rapid: {line}\n" if line else "")


def test_what_all_have_met_ends_a_process_that_does_not_end_by_itself(seated, monkeypatch):
    monkeypatch.setattr(distributed, "_CLEARING_S", 0.2)
    assert seated(b"all expected the same prompts\n") == (2, "rapid: expected the same prompts\n")


def test_a_reason_of_any_length_is_one_line(seated):
    status, line = seated(b"2 " + b"word\t" * 100_000 + b"\n")
    assert status == 2 and len(line) < 2100 and line.endswith("\n") and line.count("\n") == 1


@pytest.fixture
def pair() -> Iterator[tuple[Run, Run]]:
    ours, theirs = socket.socketpair()
    runs = Run(Seat("h", 1, 2, 0), {1: ours}, patience=SOON_S), Run(Seat("h", 1, 2, 1), {0: theirs}, patience=SOON_S)
    with runs[0], runs[1]:
        yield runs
    ours.close()
    theirs.close()


def test_all_get_what_is_made_of_the_words_of_all(pair):
    zero, one = pair
    got: list[str] = []
    for words in (("a", "b"), ("two  spaces\n", "\x1b \u20ac \ud800"), ("", "x" * 500_000)):
        other = threading.Thread(target=lambda words=words: got.append(one.settle(words[1], lambda _: "not asked")))
        other.start()
        assert zero.settle(words[0], "|".join) == "|".join(words)
        other.join(SOON_S)
        assert got[-1] == "|".join(words)


def test_a_process_whose_store_fails_ends_all_with_a_status_to_start_again(monkeypatch, capfd):
    ours, theirs = socket.socketpair()

    def left(status: int) -> None:
        raise KeyboardInterrupt(status)

    monkeypatch.setattr(distributed.os, "_exit", left)
    with pytest.raises(KeyboardInterrupt, match="75"), Run(Seat("h", 1, 2, 0), {1: ours}):
        raise Again("gs://b/x: the store failed")
    assert theirs.recv(999) == b"75 process 0 of 2 has ended: gs://b/x: the store failed\n"
    assert capfd.readouterr().err == "rapid: gs://b/x: the store failed\n"
    ours.close(), theirs.close()


def test_silence_ends_with_one_line(pair):
    zero, one = pair
    with pytest.raises(InputError, match=r"^expected a word of process 1 within 0 s, got none$"):
        zero.settle("a", "".join, patience=0.2)
    with pytest.raises(InputError, match=r"^expected a word of process 0 within 0 s, got none$"):
        one.settle("a", "".join, patience=0.2)


ODD = ["\u00b2", "\uff11", "-1", "+1", "1.0", "1e0", " 1", "1 ", "1_0", "0x1", "9" * 5000]
ODD += ["\x1b[2J", "nan", "\udcff", "\n1"]
NO_HOSTS = ["a..b", "x" * 70, "http://x", "\udcff", "\x1b[2J", ".", "no.such.host.invalid", "1.2.3.4.5"]


@pytest.mark.parametrize("name", [ADDRESS, COUNT, INDEX])
@pytest.mark.parametrize("value", ODD)
def test_an_odd_value_of_the_environment_is_one_line(name, value):
    right = {ADDRESS: "127.0.0.1:8476", COUNT: "1", INDEX: "0"}
    odd = f"127.0.0.1:{value}" if name == ADDRESS else value
    with pytest.raises(InputError) as error:
        Seat.of(right | {name: odd})
    said = str(error.value)
    assert said.startswith(f"{name}: expected ") and said.isascii() and said.isprintable() and len(said) < 400


@pytest.mark.parametrize("host", NO_HOSTS)
@pytest.mark.parametrize("index", ["0", "1"])
def test_a_host_that_is_none_is_one_line(host, index, monkeypatch):
    """No name is asked of a network."""

    def none_found(name, *rest, **how):
        name.encode("idna")  # what Python does first
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", none_found)
    seat = Seat.of({ADDRESS: f"{host}:8476", COUNT: "2", INDEX: index})
    assert seat is not None
    with pytest.raises(InputError, match=r"^JAX_COORDINATOR_ADDRESS: no host '") as error:
        met(seat, 1)
    assert str(error.value).isprintable()


def test_a_port_in_use_is_one_line():
    zero, _ = seats()
    with socket.create_server((zero.host, zero.port)), pytest.raises(InputError) as error:
        met(zero, 1)
    assert str(error.value) == f"{ADDRESS}: process 0 cannot listen at port {zero.port}: Address already in use"


def is_closed(connection: socket.socket) -> bool:
    try:
        return connection.recv(100) == b""
    except ConnectionResetError:
        return True


def garbage(rng: random.Random) -> bytes:
    """A greeting or a last line, or something like one."""
    said = bytearray(
        rng.choice([*GREETINGS, b"2 x\n", b"75 x\n", b"say {}\n", b'say "a"\n', b"bye\n", b"0 ok\n", b"go\n"])
    )
    for _ in range(rng.randrange(4)):
        at = rng.randrange(len(said) + 1)
        piece = rng.choice([bytes([rng.randrange(256)]), "\u00b2".encode(), b"\n", b" ", b"9" * 30, b"\x1b[2J", b"\0"])
        said[at : at + rng.randrange(3)] = piece
    return bytes(said)


def test_fuzzed_strangers_never_stop_the_meeting(request, monkeypatch):
    """Each round two processes with a token meet among strangers that say anything, at any pace, and may vanish."""
    monkeypatch.setattr(meeting, "_GREETING_S", 0.2)
    rng = random.Random(50)
    for _ in range(5 * request.config.getoption("--fuzz")):
        zero, one = seats(token="secret")
        first, held = Meeting(zero), []
        for _ in range(20):
            held.append(knock(zero))
            said = garbage(rng)
            with contextlib.suppress(OSError):
                for start in range(0, len(said), step := rng.choice([7, len(said) or 1])):
                    held[-1].sendall(said[start : start + step])
            if rng.random() < 0.5:
                held.pop().close()
        second = Meeting(one)
        assert list(first.ended().peers) == [1] and list(second.ended().peers) == [0], (first.error, second.error)
        for connection in held:
            connection.close()
        for part in (first, second):
            part.close()


def test_a_fuzzed_process_ends_the_run_with_a_known_status(request, seated):
    rng = random.Random(51)
    for _ in range(100 * request.config.getoption("--fuzz")):
        said = garbage(rng)
        status, line = seated(said)
        if said.split(b"\n")[0] == b"bye":
            continue
        assert status in (2, LOST_PEER) and re.fullmatch("rapid: .*\n", line) and line[:-1].isprintable(), (said, line)
