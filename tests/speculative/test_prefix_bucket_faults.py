# SPDX-License-Identifier: Apache-2.0
"""Prefixes in a bucket that does not answer, and of processes that are killed, late or in each other's way."""

import contextlib
import json
import os
import threading
import time
from types import SimpleNamespace

import pytest

from rapid_jax.engine.heads import StoredHeads
from rapid_jax.runtime import agreement, array_store, breaker, buckets, gs_writes
from rapid_jax.runtime.array_store import Damaged
from rapid_jax.runtime.distributed import Late
from rapid_jax.runtime.errors import Again, InputError, Unavailable
from rapid_jax.runtime.sealed import sealed
from rapid_jax.speculative import prefix_bucket, prefix_index
from rapid_jax.speculative.prefix_bucket import PrefixBucket
from rapid_jax.speculative.prefix_folder import PrefixFolder
from rapid_jax.speculative.prefix_manifest import Manifest
from rapid_jax.speculative.prefix_store import PrefixStore
from tests.bucket_server import Killed, killed_at
from tests.engine.prefix_cases import LENGTH, MESHES, cache_of, decoder_on, tokens
from tests.engine.prefix_cases import prefix_of as prefix_on
from tests.speculative.test_prefix_bucket import names, said, store_at
from tests.speculative.test_prefix_store import LARGE, key_of, loaded_from, prefix_of

PREFIX = prefix_of("unrolled")
LATER = 2 * prefix_bucket._ABANDONED_S


@pytest.fixture
def unreachable(monkeypatch) -> list[str]:
    """Nothing answers; what was asked."""
    asked: list[str] = []

    def silent(place: str, *_, **__):
        asked.append(place)
        raise Unavailable(f"{place}: the store cannot be reached")

    monkeypatch.setattr(buckets, "call", silent)
    monkeypatch.setattr(gs_writes, "call", silent)
    return asked


@contextlib.contextmanager
def later(seconds: float):
    """So many seconds later by the clock of the bucket's index."""
    with pytest.MonkeyPatch.context() as patch:
        clock = SimpleNamespace(time=lambda: time.time() + seconds, monotonic=lambda: time.monotonic() + seconds)
        patch.setattr(prefix_bucket, "time", clock)
        yield


def index_of(bucket, place) -> dict:
    return json.loads(bucket.get(f"{place.prefix}prefixes/index.json"))


def test_a_store_that_says_nothing_is_given_up(monkeypatch):
    for name in ("LOW_SPEED_TIME_SECONDS", "LOW_SPEED_LIMIT_BYTES", "CONNECT_TIMEOUT_SECONDS"):
        monkeypatch.delenv(f"TENSORSTORE_CURL_{name}", raising=False)
    buckets.prepare_libraries()
    assert {name: value for name, value in os.environ.items() if name.startswith("TENSORSTORE_CURL_")} == {
        "TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS": "60",
        "TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES": "1",
        "TENSORSTORE_CURL_CONNECT_TIMEOUT_SECONDS": "20",
    }


def test_a_process_that_waits_for_a_store_is_waited_for_and_then_the_run_starts_again(tmp_path, monkeypatch):
    given = []

    def settle(mine, judge, *, patience):
        given.append(patience)
        if len(given) > 1:
            raise Late("expected a word of process 1")
        return judge([mine, mine])

    monkeypatch.setattr(agreement, "running", lambda: SimpleNamespace(count=2, leads=True, settle=settle))
    store = PrefixStore(tmp_path, LARGE, quiet=True)
    with pytest.raises(Again):
        store.save(key_of(), PREFIX)
    assert given == [agreement.READING_S] * 2


def test_a_store_that_cannot_be_reached_is_probed_aside_at_growing_intervals(place, unreachable, caplog, monkeypatch):
    store, now = store_at(place), [0.0]
    monkeypatch.setattr(breaker, "time", SimpleNamespace(monotonic=lambda: now[0]))
    assert not store.has(key_of()) and len(unreachable) == 1
    assert "not used until the store answers again" in said(caplog)
    store.save(key_of(), PREFIX)
    assert loaded_from(store) is None and not store.has(key_of()) and store.bytes() == 0 and store.version() is None
    assert len(unreachable) == 1 and not caplog.records
    for count, later in enumerate((15.1, 30.1, 60.1, 120.1, 240.1, 240.1), start=2):
        now[0] += later - 0.2
        assert not store.has(key_of()) and len(unreachable) == count - 1
        now[0] += 0.2
        assert not store.has(key_of())
        probed()
        assert len(unreachable) == count and not caplog.records
    monkeypatch.undo()  # it can be reached again
    monkeypatch.setattr(breaker, "time", SimpleNamespace(monotonic=lambda: now[0] + 241))
    assert not store.has(key_of())
    probed()
    assert not store._entries.absent and "answers again" in said(caplog)
    store.save(key_of(), PREFIX)
    assert store.has(key_of())


def probed() -> None:
    for thread in threading.enumerate():
        if thread.name == "probe":
            thread.join()


def test_a_store_that_takes_connections_and_says_nothing_holds_nobody(bucket, place, caplog, monkeypatch):
    monkeypatch.setattr(prefix_index, "_ANSWER_S", 0.2)
    bucket.fault = lambda asked: "silent"
    store, began = store_at(place), time.monotonic()
    assert not store.has(key_of())
    waited, began = time.monotonic() - began, time.monotonic()
    store.save(key_of(), PREFIX)
    assert loaded_from(store) is None
    assert waited < 2 and time.monotonic() - began < 0.1
    assert said(caplog).endswith("/index.json: the store cannot be reached: no answer in time")


def test_a_document_on_the_devices_is_found_without_the_store(bucket, place):
    decoder = decoder_on(MESHES["one device"])
    cache = cache_of(decoder, place, disk_gib=1.0)
    one, other = (cache.name(tokens(LENGTH, seed=seed)) for seed in (0, 1))
    cache.put(one, prefix_on(decoder, tokens(LENGTH)))
    bucket.heal()
    assert cache.on_devices(one.key) and not cache.on_devices(other.key) and not bucket.asked
    for _ in range(5):
        cache.tier(other.key)
    assert len(bucket.asked) <= 2


def test_only_damage_of_the_very_entry_is_removed(bucket, place, monkeypatch, caplog):
    for words, error in (
        ("DATA_LOSS: x", Damaged),
        ("NOT_FOUND: x", Damaged),
        ("FAILED_PRECONDITION: 412", InputError),
    ):
        with pytest.raises(error), array_store.refusals(place):
            raise ValueError(words)
    for words in ("OUT_OF_RANGE: 416", "INVALID_ARGUMENT: x", "FAILED_PRECONDITION: Not a directory"):
        with pytest.raises(OSError), array_store.refusals(place if False else array_store.Path("x")):
            raise ValueError(words)
    store, read = store_at(place), PrefixStore._read
    store.save(key_of(), PREFIX)

    def overtaken(self, *given):
        other = store_at(place)
        other.remove(key_of())
        other.save(key_of(), PREFIX)
        return read(self, *given)

    monkeypatch.setattr(PrefixStore, "_read", overtaken)
    assert loaded_from(store) is None and "unusable" in said(caplog)
    monkeypatch.setattr(PrefixStore, "_read", read)
    assert loaded_from(store) is not None, "what another has written meanwhile stays"
    assert not PrefixBucket(place / "prefixes", LARGE).remove(key_of(), "0" * 16) and store_at(place).has(key_of())


def test_an_entry_on_a_disk_that_another_has_written_meanwhile_stays(tmp_path):
    store, entries = PrefixStore(tmp_path, LARGE, quiet=True), PrefixFolder(tmp_path, LARGE)
    store.save(key_of(), PREFIX)
    before = Manifest.inside_of(tmp_path / key_of(), key_of())
    store.remove(key_of())
    store.save(key_of(), PREFIX)
    for inside in (before, ""):
        assert not entries.remove(key_of(), inside) and store.has(key_of())
    with entries.reading(key_of()) as there:
        assert there and not entries.remove(key_of()) and store.has(key_of())
    assert entries.remove(key_of(), Manifest.inside_of(tmp_path / key_of(), key_of())) and not store.has(key_of())
    store.save(key_of(), PREFIX)
    (tmp_path / key_of() / "manifest.json").write_text("{")
    assert not entries.remove(key_of(), before) and entries.remove(key_of(), "") and store.keys() == []


def test_what_was_written_to_its_end_is_entered_by_who_comes_next(bucket, place, monkeypatch):
    store = store_at(place)
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Killed):
        # The index is told of what is written; then come the manifest, and the index that names the entry.
        killed_at(2, patch, "write", "delete", "delete_all")
        store.save(key_of(), PREFIX)
    assert not index_of(bucket, place)["entries"]
    bucket.heal()
    store_at(place).save(key_of(), PREFIX)
    assert not [asked for asked in bucket.asked if asked.startswith("POST") and "BKSH" in asked]
    assert list(index_of(bucket, place)["entries"]) == [key_of()] and not index_of(bucket, place)["unfinished"]
    assert loaded_from(store_at(place)) is not None


@pytest.mark.parametrize("renewed", [False, True])
def test_a_writer_that_another_took_for_dead_makes_no_entry(bucket, place, caplog, monkeypatch, renewed):
    commit = PrefixBucket.commit

    def late(entries, key, arrays, *given):
        with later(LATER):
            if renewed:
                entries.renew(key, arrays)
            store_at(place)._entries.clean()
        commit(entries, key, arrays, *given)

    monkeypatch.setattr(PrefixBucket, "commit", late)
    store_at(place).save(key_of(), PREFIX)
    assert store_at(place).has(key_of()) == renewed and not index_of(bucket, place)["unfinished"]
    if not renewed:
        assert "another process has removed it" in said(caplog)
        assert names(bucket, place) == ["prefixes/index.json"]


def test_marks_that_could_not_be_read_are_read_again(place, monkeypatch):
    store, read = store_at(place), Manifest.read
    store.save(key_of(), PREFIX, ("a", "b"))
    heads = StoredHeads(store)
    monkeypatch.setattr(Manifest, "read", lambda *_: (_ for _ in ()).throw(InputError("a failure")))
    assert heads.find(["a", "b"], 0) == (0, "")
    monkeypatch.setattr(Manifest, "read", read)
    assert heads.find(["a", "b"], 0) == (2, key_of())
    monkeypatch.setattr(PrefixBucket, "version", lambda _: None)
    assert heads.find(["a", "b"], 0) == (2, key_of())
    monkeypatch.setattr(PrefixBucket, "version", lambda _: "another")
    monkeypatch.setattr(PrefixBucket, "keys", lambda _: (_ for _ in ()).throw(Unavailable("a failure")))
    assert heads.find(["a", "b"], 0) == (2, key_of())


def test_a_use_is_noted_now_and_then_and_what_others_write_stays(bucket, place):
    store = store_at(place)
    store.save(key_of(), PREFIX)
    bucket.heal()
    assert loaded_from(store) is not None and not [asked for asked in bucket.asked if asked.startswith("POST")]
    with later(prefix_bucket._USED_S + 1):
        store._entries.used(key_of())
    assert [asked for asked in bucket.asked if asked.startswith("POST")]
    entries = PrefixBucket(place / "prefixes", LARGE)
    entries.remove(key_of())
    with entries.writing(key_of(), 1) as arrays:
        for name in (f"{arrays.name}/piece", "left"):
            bucket.put(f"{place.prefix}prefixes/{key_of()}/{name}", b"x")
        entries._delete(f"{key_of()}/manifest.json")
        assert names(bucket, place) == [
            f"prefixes/{key_of()}/{arrays.name}/piece",
            "prefixes/index.json",
        ]


def test_the_newest_stays_if_it_fits(place, monkeypatch):
    store = store_at(place)
    for number in (0, 1):
        store.save(key_of(number), PREFIX)
    each = store.bytes() // 2
    entries = PrefixBucket(place / "prefixes", each)
    monkeypatch.setattr(PrefixBucket, "remove", lambda *_: False)
    assert entries.make_room(0, newest=key_of(1)) == []
    monkeypatch.undo()
    assert [entry.path.name for entry in entries.make_room(1, newest=key_of(1))] == [key_of(0)]


def test_what_one_process_does_not_want_none_commits(tmp_path, monkeypatch):
    def settle(mine, judge, *, patience):
        return judge([mine, mine.replace("true", "false") if mine.startswith('["", true') else mine])

    monkeypatch.setattr(agreement, "running", lambda: SimpleNamespace(count=2, leads=True, settle=settle))
    store = PrefixStore(tmp_path, LARGE, quiet=True)
    store.save(key_of(), PREFIX)
    assert store.keys() == []


def test_a_manifest_names_a_folder_of_its_entry(tmp_path):
    store = PrefixStore(tmp_path, LARGE, quiet=True)
    store.save(key_of(), PREFIX)
    path = tmp_path / key_of() / "manifest.json"
    fields = json.loads(path.read_text())
    del fields["sha256"]
    path.write_bytes(sealed(fields | {"inside": "../other/arrays"}, key_of()))
    with pytest.raises(Damaged, match="inside"):
        Manifest.read(tmp_path / key_of(), key_of())
