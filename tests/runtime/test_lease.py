# SPDX-License-Identifier: Apache-2.0
"""One run at a time in a folder of a bucket: a rival is refused, and let in when the first is gone or silent."""

import itertools
import json
import os
import subprocess
import sys
import time

import pytest

from rapid_jax.runtime import lease as module
from rapid_jax.runtime.errors import Again, InputError, Unavailable
from rapid_jax.runtime.gs_writes import write
from rapid_jax.runtime.lease import Lease
from rapid_jax.runtime.run_folder import LEASE, working_in
from rapid_jax.runtime.storage import bytes_of, working_place
from tests.bucket_server import BUCKET

pytestmark = pytest.mark.usefixtures("no_waits")
_COUNT = itertools.count()
SHORT = {"renew_s": 0.05, "expires_s": 0.6}


@pytest.fixture
def folder(bucket):
    return working_place(f"gs://{BUCKET}/leased {next(_COUNT)}", "folder")


@pytest.fixture
def elsewhere(monkeypatch):
    """Nobody is on this machine, as far as leases say: what is not renewed has to be watched."""
    monkeypatch.setattr(module, "_machine", lambda: "")


def held_by(folder, **who) -> None:
    """A lease that nobody renews."""
    write(BUCKET, f"{folder.key}/{LEASE}", json.dumps({"host": "far", "pid": 7, "nonce": "x"} | who).encode())


def test_a_rival_is_refused_and_let_in_when_the_first_is_gone(folder):
    with working_in(folder, "train"):
        started = time.monotonic()
        with pytest.raises(
            InputError, match=rf"^{folder}: expected no other run there, got that of process {os.getpid()}"
        ):
            working_in(folder, "export").__enter__()
        assert time.monotonic() - started < 5
        with working_in(folder / "round-1", "train"):
            pass
    assert bytes_of(folder / LEASE) is None
    with working_in(folder, "train"):
        pass


def test_a_run_of_another_machine_is_watched_and_refused_when_it_is_renewed(folder, elsewhere):
    words = "which is at work: wait for it, or choose another run folder"
    with Lease(folder / LEASE, **SHORT), pytest.raises(InputError, match=words):
        Lease(folder / LEASE, **SHORT).__enter__()


def test_one_that_is_silent_is_taken_over_after_a_while(folder, elsewhere, monkeypatch):
    monkeypatch.setattr(module, "_TOLD_S", 0.1)
    held_by(folder)
    said, started = [], time.monotonic()
    with Lease(folder / LEASE, say=said.append, **SHORT):
        assert time.monotonic() - started >= 0.6
    assert len(said) == 1 and "the run of process 7 of far did not say goodbye: waiting up to 1 s" in said[0]


def test_a_process_of_this_machine_that_is_gone_is_not_waited_for(folder):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    held_by(folder, machine=module._machine(), pid=ended.pid, started="1")
    started = time.monotonic()
    with working_in(folder, "train"):
        assert time.monotonic() - started < 5


def test_a_lease_that_could_not_be_deleted_is_in_nobodys_way(folder, bucket):
    bucket.fault = lambda asked: "503" if asked.startswith("DELETE") else None
    with working_in(folder, "pairs"):
        pass
    assert bytes_of(folder / LEASE) is not None
    started = time.monotonic()
    with working_in(folder, "train"):
        assert time.monotonic() - started < 5


@pytest.mark.parametrize("content", [b"what is this", b'{"pid": "seven", "host": "far"}', b"{}", b"[]"])
def test_what_is_no_lease_is_watched_too(folder, content):
    write(BUCKET, f"{folder.key}/{LEASE}", content)
    with Lease(folder / LEASE, **SHORT):
        pass


def test_a_holder_that_was_taken_over_or_cannot_renew_is_told(folder, bucket):
    lost = []
    with Lease(folder / LEASE, lost=lost.append, **SHORT):
        held_by(folder)
        deadline = time.monotonic() + 10
        while not lost and time.monotonic() < deadline:
            time.sleep(0.02)
    assert "another run has taken this folder over: ending" in lost[0]
    assert b"far" in (bytes_of(folder / LEASE) or b"")  # the other's is left
    lost.clear()
    with Lease(folder / LEASE, lost=lost.append, **SHORT):
        bucket.fault = lambda asked: "503"
        deadline = time.monotonic() + 10
        while not lost and time.monotonic() < deadline:
            time.sleep(0.02)
    assert "could not be renewed for 0 s" in lost[0]


def test_a_lost_reply_and_a_busy_store_lose_no_lease(folder, bucket):
    faults, lost = itertools.cycle(["lost", "503", "hang up", None, None]), []
    bucket.fault = lambda asked: next(faults) if asked.startswith("POST") else None
    with Lease(folder / LEASE, lost=lost.append, renew_s=0.02, expires_s=30):
        time.sleep(0.5)
    assert not lost
    bucket.heal()
    assert bytes_of(folder / LEASE) is None


@pytest.mark.parametrize(
    ("fault", "words"), [("403", "no permission to write there"), ("401", "does not accept the credentials")]
)
def test_no_permission_is_one_line(fault, words, folder, bucket):
    bucket.fault = lambda asked: fault if asked.startswith("POST") else None
    with pytest.raises(InputError, match=words):
        working_in(folder, "train").__enter__()


def test_a_file_in_the_place_of_a_stage_is_refused(folder, bucket):
    bucket.put(f"{folder.key}/train", "x")
    with pytest.raises(InputError, match="train: expected a folder or nothing there, got a file"):
        working_in(folder, "train").__enter__()
    assert bytes_of(folder / LEASE) is None


def test_a_store_that_fails_while_a_run_works_ends_it_with_a_status_to_start_it_again(folder):
    with pytest.raises(Again) as ended, working_in(folder, "train"):
        raise Unavailable("gs://models/x: the store failed")
    assert ended.value.code == 75
    assert ended.value.reason == "gs://models/x: the store failed: nothing is lost, the run can be started again"
    assert bytes_of(folder / LEASE) is None
    with pytest.raises(InputError, match="wrong"), working_in(folder, "train"):
        raise InputError("wrong")


@pytest.mark.parametrize(("fault", "kind"), [("503", Unavailable), ("hang up", Unavailable), ("403", InputError)])
def test_what_may_pass_is_known_from_what_will_not(fault, kind, folder, bucket):
    bucket.fault = lambda asked: fault
    with pytest.raises(InputError) as failed:
        write(BUCKET, f"{folder.key}/x", b"")
    assert type(failed.value) is kind
