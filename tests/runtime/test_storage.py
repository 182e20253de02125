# SPDX-License-Identifier: Apache-2.0
"""Places in a bucket: what is read from them, and one clear line for everything that a store may do wrong."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rapid_jax.runtime import buckets, files, storage
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.input_files import open_regular
from rapid_jax.runtime.storage import BucketPlace, local_path, place_of

pytestmark = pytest.mark.usefixtures("no_waits")

BIG = bytes(range(256)) * (18 << 12)  # 18 MiB, three pieces


@pytest.fixture(scope="module")
def folder(bucket_server):
    bucket_server.put("folder/a.txt", "hello")
    bucket_server.put("folder/in ner/b ü#?.bin", BIG)
    bucket_server.put("folder/empty", b"")
    return "gs://models/folder"


def in_bucket(text: str) -> BucketPlace:
    place = place_of(text, "place")
    assert isinstance(place, BucketPlace)
    return place


@pytest.fixture(params=["disk", "bucket"])
def place(request, bucket, folder, tmp_path):
    """The same folder in both kinds of places."""
    if request.param == "bucket":
        return place_of(folder, "place")
    (tmp_path / "in ner").mkdir()
    (tmp_path / "a.txt").write_bytes(b"hello")
    (tmp_path / "in ner" / "b ü#?.bin").write_bytes(BIG)
    (tmp_path / "empty").write_bytes(b"")
    return place_of(str(tmp_path), "place")


def test_both_kinds_of_places_read_alike(place):
    big = place / "in ner" / "b ü#?.bin"
    assert sorted(path.name for path in place.iterdir()) == ["a.txt", "empty", "in ner"]
    assert [path.name for path in place.glob("*/b*")] == [big.name]
    assert (place.is_dir(), place.is_file(), big.is_dir(), big.is_file()) == (True, False, False, True)
    assert not (place / "absent").exists() and not (place / "a").exists() and (place / "in ner").is_dir()
    assert (big.name, big.suffix, str(big.parent)) == ("b ü#?.bin", ".bin", f"{place}/in ner")
    assert (place / "a.txt").read_bytes() == b"hello" and (place / "empty").read_bytes() == b""
    assert big.read_bytes() == BIG and storage.size_of(big) == len(BIG)
    into = memoryview(bytearray(len(BIG)))
    assert storage.read_into(big, 5, into) == len(BIG) - 5 and into[:-5] == BIG[5:]
    assert storage.read_into(big, len(BIG), into) == 0
    with storage.open_file(big, ahead=1000) as file:
        assert (file.seek(0, 2), file.seek(3), file.read(4), file.tell()) == (len(BIG), 3, BIG[3:7], 7)
        assert file.read() == BIG[7:] and file.read(1) == b""
    with open_regular(big) as file:
        assert b"".join(iter(lambda: file.read(1 << 20), b"")) == BIG


def test_a_range_is_read_and_no_other_byte(bucket, folder):
    place = in_bucket(folder) / "in ner" / "b ü#?.bin"
    before = buckets.TRAFFIC.bytes_read
    assert storage.read_into(place, 1000, memoryview(bytearray(50))) == 50
    assert buckets.TRAFFIC.bytes_read - before == 50


def test_a_folder_is_looked_at_once(bucket, folder):
    place = in_bucket(folder)
    assert place.is_dir()
    assert [(place / name).is_file() for name in ("a.txt", "b", "config.json")] == [True, False, False]
    assert len(bucket.asked) == 1


def test_long_lists_come_in_pages(bucket, folder, monkeypatch):
    pages = [
        {"items": [{"name": "f/", "size": "0", "generation": "1"}], "nextPageToken": "more"},
        {"items": [{"name": "f/a", "size": "3", "generation": "1"}], "prefixes": ["f/b/"]},
    ]
    monkeypatch.setattr(buckets, "call", lambda *_, **asked: pages["pageToken" in asked])
    assert sorted(path.name for path in in_bucket("gs://models/f").iterdir()) == ["a", "b"]


def on_download(fault: str, times: int = 1_000_000):
    left = [times]

    def decide(path: str) -> str | None:
        if path.startswith("/download/") and left[0] > 0:
            left[0] -= 1
            return fault
        return None

    return decide


@pytest.mark.parametrize("fault", ["429", "500", "503", "408", "cut", "slow"])
def test_what_fails_for_a_while_is_asked_again(fault, bucket, folder, no_waits):
    place = in_bucket(folder) / "in ner" / "b ü#?.bin"
    bucket.fault = on_download(fault, 3)
    assert place.read_bytes() == BIG
    assert len(no_waits) == (0 if fault == "slow" else 3)


@pytest.mark.parametrize(
    ("fault", "attempts", "words"),
    [
        ("429", 6, "the store failed, asked several times: told to say 429"),
        ("503", 6, "the store failed, asked several times: told to say 503"),
        ("502", 6, "the store cannot be reached"),
        ("cut", 6, "the store cannot be reached"),
        ("401", 1, "the store does not accept the credentials"),
        ("403", 1, "no permission to read it: expected the role Storage Object Viewer"),
        ("418", 1, "the store refused it: told to say 418"),
        ("short", 1, "expected 5 bytes from byte 0 on, got 4"),
        ("flip", 1, "damaged on its way"),
    ],
)
def test_what_goes_on_failing_is_one_line(fault, attempts, words, bucket, folder, capfd):
    place = in_bucket(folder) / "a.txt"
    bucket.fault = on_download(fault)
    with pytest.raises(InputError) as error:
        place.read_bytes()
    assert str(error.value).startswith(f"{place}: {words}") and str(error.value).isprintable()
    assert len([path for path in bucket.asked if path.startswith("/download/")]) == attempts
    assert capfd.readouterr() == ("", "")


def test_an_object_that_changes_between_two_ranges_is_noticed(bucket):
    place = in_bucket(bucket.put("changing", BIG))
    with place.open() as file:
        assert file.read(100) == BIG[:100]
        bucket.put("changing", BIG)
        with pytest.raises(InputError, match=r"gs://models/changing: was replaced or removed while it was read"):
            file.read()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gs://absent/a", "gs://absent: no such bucket"),
        ("gs://models/absent", "gs://models/absent: cannot be read: no such file"),
        ("gs://models/folder", "gs://models/folder: cannot be read: expected a file, got a folder"),
        ("gs://models", "gs://models: cannot be read: expected a file, got a folder"),
    ],
)
def test_what_is_not_there_is_said(name, words, bucket, folder):
    with pytest.raises(InputError, match=f"^{words}$"):
        in_bucket(name).read_bytes()


@pytest.mark.parametrize("name", ["gs://bucket/run", "gs:/bucket/run", "GS://bucket/run", "s3:/bucket/run"])
def test_where_a_bucket_is_only_written_to_the_line_says_so(name):
    with pytest.raises(InputError, match=r"^run: expected a path on this machine, got .*writing to a bucket is not"):
        local_path(name, "run")


@pytest.mark.parametrize("name", ["gs://", "gs:///a", "gs://b/x", "gs://Bucket/x", "gs://bucket/a\nb", "gs:/bucket/a"])
def test_a_name_that_no_bucket_has_is_refused(name):
    with pytest.raises(InputError, match=r"^model: expected (gs://BUCKET/NAME|a path)") as error:
        place_of(name, "model")
    assert str(error.value).isprintable()


def test_nobody_at_the_address_is_one_line(monkeypatch):
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:9")
    monkeypatch.setattr(buckets, "client", buckets.client.__wrapped__)
    with pytest.raises(InputError, match=r"^gs://models/a: the store cannot be reached: Cannot connect"):
        in_bucket("gs://models/a").read_bytes()


def test_the_extra_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(buckets, "client", buckets.client.__wrapped__)
    monkeypatch.setitem(sys.modules, "gcsfs.core", None)
    with pytest.raises(InputError, match=r"^gs://models/a: a bucket needs gcsfs: .*\[cloud\]"):
        in_bucket("gs://models/a").read_bytes()


def test_an_object_is_known_by_the_stores_checksums(bucket, tmp_path):
    places = [in_bucket(bucket.put(name, data)) for name, data in (("one", "same"), ("two", "same"), ("three", "Same"))]
    bucket.heal()
    one, two, three = files.digests_of(places, tmp_path)
    assert one == two != three and not list(tmp_path.iterdir())
    assert not [path for path in bucket.asked if path.startswith("/download/")]


def test_no_client_is_imported_before_a_bucket_is_asked():
    code = (
        "import sys, rapid_jax.cli, rapid_jax.rapid, rapid_jax.runtime.storage as s; s.place_of('gs://models/a', 'x');"
        "found = {'gcsfs', 'fsspec', 'tensorflow', 'aiohttp'} & set(sys.modules); sys.exit(str(found) if found else 0);"
    )
    names = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    done = subprocess.run([sys.executable, "-c", code], env=names, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
