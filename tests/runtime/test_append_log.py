# SPDX-License-Identifier: Apache-2.0
"""Logs on a disk and in a bucket are the same to who uses them, and a kill at any moment leaves what was appended."""

import itertools

import pytest

from rapid_jax.runtime import append_log, bucket_writes
from rapid_jax.runtime.append_log import has_log, log_at, logs_in, open_log
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.storage import working_place
from tests.bucket_server import Killed, killed_at

pytestmark = pytest.mark.usefixtures("no_waits")
LINES = [b"line %d %s\n" % (number, b"x" * number) for number in range(6)]
_COUNT = itertools.count()


@pytest.fixture(params=["disk", "bucket"])
def folder(request, bucket, tmp_path):
    if request.param == "disk":
        return tmp_path
    return working_place(f"gs://models/log {next(_COUNT)}", "folder")


@pytest.fixture
def in_bucket(bucket):
    return working_place(f"gs://models/log {next(_COUNT)}", "folder")


def filled(place, lines=LINES):
    log = log_at(place)
    ends = [log.append(line) for line in lines]
    assert ends == list(itertools.accumulate(map(len, lines)))
    return log


def test_what_was_appended_is_read(folder):
    place = folder / "a b.jsonl"
    assert not has_log(place) and log_at(place).read() == b"" and log_at(place).size == 0
    log = filled(place)
    for _ in range(2):  # in parts, and joined
        assert has_log(place) and log.read() == log_at(place).read() == b"".join(LINES)
        assert log_at(place).size == sum(map(len, LINES))
        with open_log(place, ahead=100) as file:
            assert list(file) == LINES
        assert [found.name for found in logs_in(folder, "a*.jsonl")] == ["a b.jsonl"] and not logs_in(folder, "b*")
        log.join()
    assert place.read_bytes() == b"".join(LINES) and [path.name for path in folder.iterdir()] == ["a b.jsonl"]
    assert log.append(b"more\n") == log_at(place).size and log_at(place).read() == b"".join([*LINES, b"more\n"])
    log_at(place).remove()
    assert not has_log(place)


def test_a_log_that_is_joined_while_another_process_reads_it_is_read_whole(in_bucket, monkeypatch):
    log, read = filled(in_bucket / "log"), append_log.PartsLog.read

    def late(reader):
        monkeypatch.setattr(append_log.PartsLog, "read", read)
        log.join()
        return read(reader)

    monkeypatch.setattr(append_log.PartsLog, "read", late)
    with open_log(in_bucket / "log", ahead=100) as file:
        assert list(file) == LINES


@pytest.mark.parametrize("joined", [0, 3, 6])
@pytest.mark.parametrize("size", [0, 5, len(LINES[0]), len(b"".join(LINES[:3])), len(b"".join(LINES[:4])) + 2, 10**6])
def test_what_is_cut_away_is_gone_and_what_comes_next_lies_behind_the_rest(folder, joined, size):
    log = filled(folder / "log", LINES[:joined])
    log.join()
    for line in LINES[joined:]:
        log.append(line)
    whole = b"".join(LINES)
    again = log_at(folder / "log")
    again.truncate(size)
    assert log_at(folder / "log").read() == again.read() == whole[:size]
    again.append(b"next")
    assert log_at(folder / "log").read() == whole[:size] + b"next"


def test_many_parts_are_joined_on_the_way(in_bucket, bucket, monkeypatch):
    monkeypatch.setattr(append_log, "_MOST_PARTS", 4)
    filled(in_bucket / "log")
    assert [name.rpartition("/")[2] for name in bucket.names(f"{in_bucket.key}/")] == [
        "log",
        "000000000000038",
        "000000000000050",
    ]
    assert log_at(in_bucket / "log").read() == b"".join(LINES)


@pytest.mark.parametrize("moment", range(14))
def test_a_kill_at_any_moment_leaves_a_log_that_goes_on(in_bucket, moment, monkeypatch):
    """Appending, cutting and joining: each request may be the last one."""
    place, known = in_bucket / "log", [b""]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_at(moment, patch, "write", "delete")
        log = log_at(place)
        for line in LINES[:4]:
            known.append(known[-1] + line)
            log.append(line)
        known.append(known[2])
        log.truncate(len(known[2]))
        log.join()
        known.append(known[2] + LINES[5])
        log.append(LINES[5])
        log.join()
        known.append(b"")
        log.remove()
        raise Killed
    log = log_at(place)
    assert log.read() in known
    before = log.read()
    log.append(b"on\n")
    log.join()
    assert place.read_bytes() == log_at(place).read() == before + b"on\n"
    assert [path.name for path in in_bucket.iterdir()] == ["log"]


def test_a_lost_reply_is_no_second_part(in_bucket, bucket):
    log, lost = filled(in_bucket / "log"), []

    def once(asked: str) -> str | None:
        if asked.startswith("POST") and not lost:
            lost.append(asked)
            return "lost"
        return None

    bucket.fault = once
    log.append(b"more\n")
    assert lost and log_at(in_bucket / "log").read() == b"".join([*LINES, b"more\n"])


def test_of_two_writers_the_second_is_refused(in_bucket):
    one, other = filled(in_bucket / "log"), log_at(in_bucket / "log")
    one.append(b"first\n")
    with pytest.raises(InputError, match=r"log\.parts/0+63: expected to be the only writer, but another process"):
        other.append(b"second\n")
    assert log_at(in_bucket / "log").read().endswith(b"first\n")


def test_a_part_that_is_missing_is_told(in_bucket, bucket):
    filled(in_bucket / "log")
    names = bucket.names(f"{in_bucket.key}/log.parts/")
    bucket_writes.delete(in_bucket.at(names[2]))
    with pytest.raises(InputError, match=r"log: expected a part from byte 17 on, got one from byte 27 on"):
        log_at(in_bucket / "log")


@pytest.mark.parametrize("left", [(0,), (2,), (0, 2), (1, 3), (0, 1, 2, 3)])
def test_what_a_killed_join_left_comes_back_by_no_cut(in_bucket, bucket, left):
    place = in_bucket / "log"
    log = filled(place, LINES[:4])
    parts = [(part.name, LINES[at]) for at, part in enumerate(log._parts)]
    log.join()
    for at in left:
        name, line = parts[at]
        bucket_writes.write(place.at(name), line, match=bucket_writes.ABSENT)
    whole = b"".join(LINES[:4])
    assert log_at(place).read() == whole
    kept = whole[: len(LINES[0])]
    log_at(place).truncate(len(kept))
    for _ in range(3):
        assert log_at(place).read() == kept
        kept += b"on\n"
        log_at(place).append(b"on\n")
