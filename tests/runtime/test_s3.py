# SPDX-License-Identifier: Apache-2.0
"""What lies in a bucket of S3 is read as what lies on a disk."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from rapid_jax.documents import read_document
from rapid_jax.model.hf_names import weights
from rapid_jax.model.load import open_checkpoint
from rapid_jax.runtime import buckets, s3
from rapid_jax.runtime.errors import InputError, Unavailable
from rapid_jax.runtime.files import digest_file
from rapid_jax.runtime.settings_file import merged, read_chain
from rapid_jax.runtime.storage import files_below, place_of
from tests.tiny_models import save_decoder, words


@pytest.fixture(scope="module")
def both(s3_bucket, tmp_path_factory):
    """(a folder on this machine, the same in the bucket)."""
    folder: Path = tmp_path_factory.mktemp("disk")
    save_decoder(folder / "Llama")
    (folder / "in" / "deep").mkdir(parents=True)
    (folder / "in" / "deep" / "b.txt").write_text("b")
    (folder / "in" / "book.txt").write_text(words(300))
    (folder / "base.yaml").write_text("a: 1\nb: 2\n")
    (folder / "in" / "run.yaml").write_text("base: ../base.yaml\nb: 3\n")
    for path in folder.rglob("*"):
        if path.is_file():
            s3_bucket.put_object(Bucket="models", Key=f"all/{path.relative_to(folder)}", Body=path.read_bytes())
    return folder, place_of("s3://models/all/", "place")


def test_folders_and_files_are_those_on_a_disk(both, s3_bucket, monkeypatch):
    here, there = both
    assert files_below(there) == files_below(here)
    assert sorted(place.name for place in (there / "in").iterdir()) == ["book.txt", "deep", "run.yaml"]
    assert str(there / "in") == "s3://models/all/in" and (there / "in").is_dir() and not (there / "in").is_file()
    assert (there / "in" / "book.txt").read_bytes() == (here / "in" / "book.txt").read_bytes()
    assert there != place_of("gs://models/all", "place")
    assert merged(read_chain(there / "in" / "run.yaml")) == {"a": 1, "b": 3}
    monkeypatch.setattr(buckets, "_PIECE", 100)  # several pieces
    assert place_of("s3://models/all/in/book.txt", "x").read_bytes() == (here / "in" / "book.txt").read_bytes()
    listed, kept = s3.listed, there.store.listed("models", "all/in/", deep=True)
    monkeypatch.setattr(
        s3, "call", lambda place, method, call=s3.call, **asked: call(place, method, **asked, MaxKeys=1)
    )
    assert listed("models", "all/in/", deep=True) == kept  # a page an object
    s3_bucket.put_object(Bucket="models", Key="copy", Body=(here / "in" / "book.txt").read_bytes())
    assert digest_file(place_of("s3://models/copy", "x")) == digest_file(there / "in" / "book.txt")


def test_a_model_and_a_document_are_read_in_place(both):
    (one, tokenizer), (two, other) = (open_checkpoint(str(place / "Llama")) for place in both)
    assert one.config == two.config and tokenizer.fingerprint == other.fingerprint
    for weight in weights(one.config):
        np.testing.assert_array_equal(one.read(weight.key), two.read(weight.key))
    texts = [read_document(str(place / "in" / "book.txt")) for place in both]
    assert texts[0] == texts[1]


def test_an_object_that_was_replaced_is_noticed(both, s3_bucket):
    place = place_of("s3://models/changed", "x")
    s3_bucket.put_object(Bucket="models", Key="changed", Body=b"one")
    with place.open() as file:
        s3_bucket.put_object(Bucket="models", Key="changed", Body=b"two")
        with pytest.raises(buckets.Replaced, match=r"^s3://models/changed: was replaced or removed while it was read$"):
            file.read()


def test_what_is_not_there_or_cannot_be_asked_is_one_line(s3_bucket, monkeypatch):
    for name, said in (
        ("s3://models/no.txt", "s3://models/no.txt: cannot be read: no such file"),
        ("s3://no-such-bucket/x", "s3://no-such-bucket: no such bucket"),
    ):
        with pytest.raises(InputError, match=f"^{said}$"):
            place_of(name, "x").read_bytes()
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    s3.client.cache_clear()
    monkeypatch.setattr("s3fs.core.asyncio.sleep", no_sleep)
    with pytest.raises(Unavailable, match=r"^s3://models/x: the store cannot be reached: "):
        place_of("s3://models/x", "x").is_file()
    s3.client.cache_clear()


@pytest.fixture
def odd_store(s3_bucket, monkeypatch):
    """A store that answers GET as `mode` says, with a status or half of what it announces, and counts the requests."""

    class Handler(BaseHTTPRequestHandler):
        mode, count = "", 0

        def do_HEAD(self) -> None:
            self.answer(200)

        def do_GET(self) -> None:
            Handler.count += 1
            if Handler.mode.isdigit():
                self.answer(int(Handler.mode), 0)
            else:
                self.answer(200)
                self.wfile.write(b"x" * 50)
            self.close_connection = True

        def answer(self, status: int, size: int = 100) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(size))
            self.send_header("ETag", '"x"')
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            del format, args

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        threading.Thread(target=listening.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{listening.server_address[1]}")
        monkeypatch.setattr("s3fs.core.asyncio.sleep", no_sleep)
        s3.client.cache_clear()
        yield Handler
        s3.client.cache_clear()
        listening.shutdown()


@pytest.mark.parametrize(
    ("mode", "most", "said"),
    [
        ("503", 6, "the store failed, asked several times: "),
        ("500", 6, "the store failed, asked several times: "),
        ("half", 3, "the store cannot be reached: "),
    ],
)
def test_what_fails_is_asked_again_on_one_level(odd_store, mode, most, said):
    odd_store.mode, odd_store.count = mode, 0
    with pytest.raises(Unavailable, match=f"^s3://models/x: {said}"):
        place_of("s3://models/x", "x").read_bytes()
    assert odd_store.count == most


async def no_sleep(seconds: float) -> None:
    del seconds


class Answered(Exception):
    """As botocore says it."""

    def __init__(self, status: int, code: str):
        super().__init__(f"An error occurred ({code})")
        self.response = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}


@pytest.mark.parametrize(
    ("status", "code", "kind", "said"),
    [
        (403, "AccessDenied", InputError, "no permission to read it: expected s3:GetObject and s3:ListBucket"),
        (403, "InvalidAccessKeyId", InputError, "the store does not accept the credentials: aws configure"),
        (400, "ExpiredToken", InputError, "the store does not accept the credentials: aws configure"),
        (503, "SlowDown", Unavailable, "the store failed, asked several times: An error"),
        (400, "Odd", InputError, "the store refused it: An error"),
        (409, "Other", s3.Conflict, "another is writing it at the same time"),
    ],
)
def test_what_the_store_refuses_is_one_line(status, code, kind, said):
    with pytest.raises(InputError, match=f"^s3://b/x: {said}") as error:
        s3.refuse("s3://b/x", OSError("translated") if status == 0 else Answered(status, code))
    assert type(error.value) is kind
