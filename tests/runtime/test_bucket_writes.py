# SPDX-License-Identifier: Apache-2.0
"""Objects are written whole or not at all, once, whatever the store does; folders count when all is there."""

import itertools
import os

import pytest

from rapid_jax.runtime import buckets, files, gs_writes
from rapid_jax.runtime.bucket_writes import ABSENT, Taken
from rapid_jax.runtime.errors import InputError, Unavailable
from rapid_jax.runtime.files import LocalFolder, may_replace, new_folder, replace_file
from rapid_jax.runtime.gs_writes import delete, upload, write
from rapid_jax.runtime.storage import bytes_of, files_below, working_place
from tests.bucket_server import BUCKET, Killed, killed_at

pytestmark = pytest.mark.usefixtures("no_waits")
_COUNT = itertools.count()


@pytest.fixture
def folder(bucket):
    return working_place(f"gs://{BUCKET}/write {next(_COUNT)}", "folder")


def on_write(fault: str, times: int = 1_000_000):
    left = [times]

    def decide(asked: str) -> str | None:
        if asked.startswith(("POST", "PUT", "DELETE")) and left[0] > 0:
            left[0] -= 1
            return fault
        return None

    return decide


@pytest.mark.parametrize("match", [None, ABSENT])
@pytest.mark.parametrize("fault", ["429", "500", "503", "408", "hang up", "lost", "slow"])
def test_what_fails_for_a_while_is_written_once(fault, match, folder, bucket):
    bucket.fault = on_write(fault, 3)
    made = write(BUCKET, f"{folder.key}/a", b"hello", match=match)
    assert bytes_of(folder / "a") == b"hello" and (folder / "a").found() == made
    bucket.fault = on_write(fault, 3)
    delete(BUCKET, f"{folder.key}/a", match=made.generation)
    assert bytes_of(folder / "a") is None


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("503", "the store failed, asked several times: told to say 503"),
        ("hang up", "the store cannot be reached"),
        ("401", "the store does not accept the credentials"),
        ("403", "no permission to write there: expected the role Storage Object User"),
    ],
)
def test_what_goes_on_failing_is_one_line(fault, words, folder, bucket, capfd):
    bucket.fault = on_write(fault)
    for attempt in (lambda: write(BUCKET, f"{folder.key}/a", b"x"), lambda: (folder / "a").unlink()):
        with pytest.raises(InputError) as error:
            attempt()
        assert str(error.value).startswith(f"{folder}/a: {words}") and str(error.value).isprintable()
    bucket.heal()
    assert bytes_of(folder / "a") is None and capfd.readouterr() == ("", "")


def test_a_store_that_says_nothing_is_given_up_and_asked_again(folder, bucket, monkeypatch):
    """It takes each connection, and never answers."""
    write(BUCKET, f"{folder.key}/there", b"hello")
    monkeypatch.setattr(buckets, "_SILENCE_S", 0.1)
    buckets.client.cache_clear()
    try:
        bucket.fault = lambda asked: "silent"
        for attempt in (lambda: write(BUCKET, f"{folder.key}/a", b"x"), lambda: (folder / "there").read_bytes()):
            bucket.asked.clear()
            with pytest.raises(Unavailable, match=r"^gs://.*: the store cannot be reached: ") as error:
                attempt()
            assert str(error.value).isprintable() and len(bucket.asked) == 6
        left = [2]

        def decide(asked: str) -> str | None:
            left[0] -= 1
            return "silent" if left[0] >= 0 else None

        bucket.fault = decide
        write(BUCKET, f"{folder.key}/a", b"hello", match=ABSENT)
        assert bytes_of(folder / "a") == b"hello"
    finally:
        buckets.client.cache_clear()


def test_a_bucket_that_is_not_there_is_named(bucket, tmp_path):
    (tmp_path / "a").write_bytes(b"x")
    for attempt in (lambda: write("absent", "a", b"x"), lambda: upload("absent", "a", tmp_path / "a")):
        with pytest.raises(InputError, match=r"^gs://absent: no such bucket$"):
            attempt()


def test_a_precondition_keeps_another_generation(folder, bucket):
    name = f"{folder.key}/a"
    first = write(BUCKET, name, b"one", match=ABSENT)
    with pytest.raises(Taken, match=f"^{folder}/a: expected to be the only writer"):
        write(BUCKET, name, b"two", match=ABSENT)
    second = write(BUCKET, name, b"two", match=first.generation)
    with pytest.raises(Taken):
        write(BUCKET, name, b"three", match=first.generation)
    delete(BUCKET, name, match=first.generation)
    assert bytes_of(folder / "a") == b"two" and (folder / "a").found() == second


@pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")  # of gcsfs
def test_a_large_file_goes_in_pieces_and_its_last_reply_may_be_lost(folder, bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(gs_writes, "_AT_ONCE", 1 << 20)
    data = os.urandom(6 << 20)
    (tmp_path / "large").write_bytes(data)

    for fault in (None, "503", "lost", "hang up"):
        bucket.fault, name = on_write(fault, 2) if fault else bucket.fault, f"{folder.key}/{fault}"
        upload(BUCKET, name, tmp_path / "large")
        bucket.heal()
        assert bucket.get(name) == data
    bucket.fault = on_write("403")
    with pytest.raises(InputError, match="no permission to write there"):
        upload(BUCKET, f"{folder.key}/no", tmp_path / "large")


def test_a_file_is_replaced_when_all_of_it_is_there(folder, bucket):
    for data in (b"one", b"two"):
        with replace_file(folder / "a") as path:
            path.write_bytes(data)
        assert bytes_of(folder / "a") == data
    with pytest.raises(KeyboardInterrupt), replace_file(folder / "a") as path:
        path.write_bytes(b"thr")
        raise KeyboardInterrupt
    assert bytes_of(folder / "a") == b"two"


def made(folder, *names: str) -> None:
    with new_folder(folder, known_by="config") as file:
        for name in (*names, "config"):
            with file(name) as path:
                path.write_bytes(name.encode())


@pytest.mark.parametrize("kind", ["disk", "bucket"])
def test_a_folder_takes_the_place_of_another(kind, folder, tmp_path):
    place = folder / "export" if kind == "bucket" else tmp_path / "export"
    assert may_replace(place, known_by="config")
    made(place, "a", "b")
    assert files_below(place) == {"a": 1, "b": 1, "config": 6} and may_replace(place, known_by="config")
    made(place, "c")
    assert files_below(place) == {"c": 1, "config": 6}
    made(place.parent / "other")
    with replace_file(place.parent / "strange" / "x") as path:
        path.write_bytes(b"x")
    assert not may_replace(place.parent / "strange", known_by="config")
    assert not may_replace(place / "c", known_by="config")


@pytest.mark.parametrize("moment", range(9))
def test_a_folder_that_was_left_half_written_is_none_and_may_be_replaced(moment, folder, monkeypatch):
    made(folder, "a", "b")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_at(moment, patch, "write", "delete", "delete_all")
        made(folder, "c", "d")
        raise Killed
    there = {name for name in files_below(folder) if name != files._UNFINISHED}
    assert "config" not in there or there in ({"a", "b", "config"}, {"c", "d", "config"})
    assert may_replace(folder, known_by="config")
    made(folder, "e")
    assert files_below(folder) == {"config": 6, "e": 1}


def test_what_only_writes_to_a_disk_is_copied(folder, tmp_path, bucket):
    here = LocalFolder(folder / "events")
    (here.path / "in").mkdir()
    (here.path / "in" / "a").write_bytes(b"1")
    here.push()
    (here.path / "in" / "a").write_bytes(b"12")
    (here.path / "b").write_bytes(b"3")
    here.push()
    assert files_below(folder / "events") == {"b": 1, "in/a": 2}
    bucket.heal()
    here.push()
    assert not bucket.asked
    assert LocalFolder(tmp_path).path == tmp_path
