# SPDX-License-Identifier: Apache-2.0
"""What is written to a bucket of S3 is whole or absent, by one run at a time, as in one of Google's."""

import contextlib
import itertools
import json

import pytest

from rapid_jax.runtime import bucket_writes, s3, s3_writes
from rapid_jax.runtime.append_log import log_at, open_log
from rapid_jax.runtime.bucket_place import BucketPlace
from rapid_jax.runtime.bucket_writes import ABSENT, Taken, write
from rapid_jax.runtime.errors import Busy, InputError, Unavailable
from rapid_jax.runtime.files import new_folder, replace_file
from rapid_jax.runtime.lease import Lease
from rapid_jax.runtime.links import follow_link, make_link
from rapid_jax.runtime.run_folder import LEASE, working_in, write_once
from rapid_jax.runtime.storage import bytes_of, files_below, working_place
from rapid_jax.speculative import prefix_bucket
from rapid_jax.speculative.prefix_store import PrefixStore
from tests.speculative.test_prefix_store import LARGE, check_same, emptied, key_of, loaded_from, prefix_of

pytestmark = pytest.mark.usefixtures("s3_bucket")
_COUNT = itertools.count()


@pytest.fixture
def folder() -> BucketPlace:
    place = working_place(f"s3://models/write {next(_COUNT)}", "folder")
    assert isinstance(place, BucketPlace)
    return place


def test_a_precondition_keeps_another_version(folder):
    place = folder / "a"
    first = write(place, b"one", match=ABSENT)
    with pytest.raises(Taken, match=rf"^{place}: expected to be the only writer, but another process"):
        write(place, b"two", match=ABSENT)
    second = write(place, b"two", match=first.generation)
    for gone in (place, folder / "none"):
        with pytest.raises(Taken):
            write(gone, b"three", match=first.generation)
    bucket_writes.delete(place, match=first.generation)
    assert bytes_of(place) == b"two" and place.found() == second
    bucket_writes.delete(place, match=second.generation)
    place.unlink()
    assert bytes_of(place) is None and files_below(folder) == {}
    with pytest.raises(InputError, match=r"^s3://no-such-bucket: no such bucket$"):
        write(working_place("s3://no-such-bucket/a", "a"), b"x")


def test_a_write_whose_reply_was_lost_is_ours_if_its_bytes_are_there(folder, monkeypatch):
    call, times = s3_writes.call, []

    def twice(place, method, **asked):
        if method == "put_object":
            times.append(call(place, method, **asked))
        return call(place, method, **asked)

    write(folder / "first", b"", match=ABSENT)
    monkeypatch.setattr(s3_writes, "call", twice)
    made = write(folder / "a", b"hello", match=ABSENT)
    assert made == (folder / "a").found() and len(times) == 1
    assert write(folder / "a", b"hello again", match=made.generation) == (folder / "a").found()
    monkeypatch.setattr(s3_writes, "call", lambda *_, **__: (_ for _ in ()).throw(s3.Conflict("x")))
    with pytest.raises(Unavailable, match="others wrote it each time"):
        write(folder / "b", b"", match=ABSENT)


@pytest.mark.parametrize(("ignored", "method"), [("IfNoneMatch", ""), ("IfMatch", "put_object"), ("IfMatch", "delete")])
def test_a_store_that_keeps_no_conditions_is_refused(ignored, method, folder, monkeypatch):
    call = s3_writes.call

    def careless(place, asked_for, **asked):
        if asked_for.startswith(method):
            asked.pop(ignored, None)
        return call(place, asked_for, **asked)

    monkeypatch.setattr(s3_writes, "_TRIED", set())
    monkeypatch.setattr(s3_writes, "call", careless)
    name = {"IfNoneMatch": "If-None-Match", "IfMatch": "If-Match"}[ignored]
    for _ in range(2):
        with pytest.raises(InputError, match=f"^s3://models: this store does not keep {name}"), Lease(folder / LEASE):
            pass
    assert files_below(folder) == {}


def test_one_run_at_a_time_works_in_a_folder(folder):
    with working_in(folder, "pairs"):
        assert json.loads(bytes_of(folder / LEASE) or b"")["renewals"] == 1
        with pytest.raises(Busy, match="expected no other run there"), working_in(folder, "pairs"):
            pass
    assert files_below(folder) == {}
    lost: list[str] = []
    with Lease(folder / LEASE, renew_s=0.05, lost=lost.append) as lease:
        write(folder / LEASE, b"another's")
        lease._threads[0].join(10)
    assert lost and "another run has taken this folder over" in lost[0] and bytes_of(folder / LEASE) == b"another's"


def test_a_log_grows_and_is_joined(folder, monkeypatch):
    lines = [f"line {number}\n".encode() for number in range(6)]
    log = log_at(folder / "log")
    for line in lines[:4]:
        log.append(line)
    other = log_at(folder / "log")
    assert other.read() == b"".join(lines[:4])
    log.append(lines[4])
    with pytest.raises(Taken):
        other.append(lines[5])
    log.truncate(log.size - 2)
    assert log_at(folder / "log").read() == b"".join(lines[:5])[:-2]
    log.truncate(log.size - 5)
    log.join()
    assert list(files_below(folder)) == ["log"]
    with open_log(folder / "log", ahead=10) as file:
        assert file.read() == b"".join(lines[:4])
    log.remove()
    assert files_below(folder) == {}


def test_files_and_folders_count_when_they_are_whole(folder, monkeypatch):
    monkeypatch.setattr(s3_writes, "_AT_ONCE", 5 << 20)
    data = bytes(range(256)) * (11 << 12)
    with replace_file(folder / "large") as here:  # in parts
        here.write_bytes(data)
    assert bytes_of(folder / "large") == data
    with contextlib.suppress(KeyError), replace_file(folder / "large"):
        raise KeyError
    assert bytes_of(folder / "large") == data
    with new_folder(folder / "out", known_by="config.json") as file:
        for name in ("a", "config.json"):
            with file(name) as here:
                here.write_text(name)
    assert files_below(folder / "out") == {"a": 1, "config.json": 11}
    assert write_once(folder / "once", b"1") == write_once(folder / "once", b"2") == b"1"
    make_link(folder / "run" / "pairs", folder / "shared")
    assert follow_link(folder / "run" / "pairs") == folder / "shared"


def test_documents_keys_and_values_are_kept(folder, monkeypatch, caplog):
    store = PrefixStore(folder / "prefixes", LARGE, quiet=True)
    store.save(key_of(), prefix_of("unrolled"))
    check_same(loaded_from(store), emptied(prefix_of("unrolled")))
    other = PrefixStore(folder / "prefixes", LARGE, quiet=True)
    assert other.keys() == [key_of()] and other.bytes() > 0
    piece = next(place for place in folder.below() if "v_BKSH/c/1" in place.key)
    write(piece, (bytes_of(piece) or b"")[:-1] + b"?")
    assert loaded_from(other) is None and "unusable and will be computed again" in caplog.text
    assert list(files_below(folder)) == [f"prefixes/{prefix_bucket.MANIFEST.replace('manifest', 'index')}"]
