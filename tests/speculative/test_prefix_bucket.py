# SPDX-License-Identifier: Apache-2.0
"""Prefixes in a bucket: read back exactly, whole or absent whenever a process is killed, within their bound."""

import contextlib
import itertools
import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from rapid_jax.cli import main
from rapid_jax.config import CacheConfig, RapidConfig
from rapid_jax.runtime import bucket_writes, settings
from rapid_jax.runtime.files import cache_dir, cache_place
from rapid_jax.speculative import prefix_bucket, prefix_index
from rapid_jax.speculative.prefix_store import PrefixStore
from tests.bucket_server import Killed, killed_at
from tests.engine.prefix_cases import LENGTH, MESHES, cache_of, check_head, decoder_on, tokens
from tests.engine.prefix_cases import prefix_of as prefix_on
from tests.speculative.test_prefix_store import LARGE, check_same, emptied, key_of, loaded_from, prefix_of


def store_at(place, most: int = LARGE) -> PrefixStore:
    return PrefixStore(place / "prefixes", most, quiet=True)


def names(bucket, place) -> list[str]:
    return [name.removeprefix(place.prefix) for name in bucket.names(place.prefix)]


def said(caplog) -> str:
    """The one warning, which is not the emulator's."""
    (message,) = [record.getMessage() for record in caplog.records if record.name.startswith("rapid_jax")]
    caplog.clear()
    return message


def test_what_is_read_is_what_was_written_or_nothing(bucket, place, caplog):
    store = store_at(place)
    assert loaded_from(store) is None
    store.save(key_of(), prefix_of("stacked"))
    check_same(loaded_from(store), emptied(prefix_of("unrolled")))
    assert store.keys() == [key_of()] and store.has(key_of()) and store.bytes() > 0
    piece = next(name for name in names(bucket, place) if name.endswith("v_BKSH/c/1/0/0/0"))
    for damaged in (b"short", bucket.get(place.prefix + piece)[:-1] + b"?"):
        bucket.put(place.prefix + piece, damaged)
        assert loaded_from(store) is None and "unusable and will be computed again" in said(caplog)
        assert names(bucket, place) == ["prefixes/index.json"]
        store.save(key_of(), prefix_of("unrolled"))
        check_same(loaded_from(store), emptied(prefix_of("unrolled")))
        piece = next(name for name in names(bucket, place) if name.endswith("v_BKSH/c/1/0/0/0"))
    bucket.fault = lambda asked: "403" if "BKSH" in asked else None
    assert loaded_from(store) is None and "told to say 403" in said(caplog)
    store.save(key_of(1), prefix_of("unrolled"))
    assert "could not be stored" in said(caplog) and store.keys() == [key_of()], "not to be read is no damage"
    bucket.heal()
    assert loaded_from(store) is not None


def test_the_least_recently_used_go_first(place, monkeypatch):
    store, clock = store_at(place), itertools.count()
    monkeypatch.setattr(
        prefix_bucket, "time", SimpleNamespace(time=lambda: 1000.0 * next(clock), monotonic=time.monotonic)
    )
    for number in range(3):
        store.save(key_of(number), prefix_of("unrolled"))
    assert loaded_from(store, 0) is not None
    each = store.bytes() // 3
    store_at(place, 3 * each).save(key_of(3), prefix_of("unrolled"))
    store = store_at(place)  # another's changes are seen 2 s later
    assert set(store.keys()) == {key_of(0), key_of(2), key_of(3)}, "0 was read last, 1 was the oldest"
    store.remove(key_of(2))
    assert set(store.keys()) == {key_of(0), key_of(3)} and loaded_from(store, 2) is None


@pytest.mark.parametrize("of", ["save", "remove"])
def test_killed_at_any_write_an_entry_is_whole_or_absent_and_an_hour_later_nothing_is_left(bucket, place, of):
    store, hour = store_at(place), prefix_bucket._ABANDONED_S
    for moment in itertools.count():
        if of == "remove" and not store.has(key_of()):
            store.save(key_of(), prefix_of("unrolled"))
        ended = False
        with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Killed):
            killed_at(moment, patch, "write", "delete", "delete_all")
            store.save(key_of(), prefix_of("unrolled")) if of == "save" else store.remove(key_of())
            ended = True
        found = loaded_from(store)
        assert (found is not None) == store.has(key_of())
        if found is not None:
            check_same(found, emptied(prefix_of("unrolled")))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                prefix_bucket, "time", SimpleNamespace(time=lambda: time.time() + 2 * hour, monotonic=time.monotonic)
            )
            store_at(place)._entries.clean()
        there = {name.split("/")[1] for name in names(bucket, place)}
        assert there <= {"index.json", *([key_of()] if found is not None else [])}
        if ended:
            break
        if of == "save":
            store.remove(key_of())
    assert moment > 2


def test_an_index_that_is_lost_or_replaced_meanwhile_is_made_again(bucket, place, monkeypatch):
    monkeypatch.setattr(prefix_index, "_KNOWN_S", 0.0)
    store = store_at(place)
    store.save(key_of(), prefix_of("unrolled"))
    index = f"{place.prefix}prefixes/index.json"
    for spoil in ((place / "prefixes" / "index.json").unlink, lambda: bucket.put(index, b"{")):
        spoil()
        assert store.keys() == [key_of()] and loaded_from(store) is not None
    write, waits, others = bucket_writes.write, [], iter([1, 2])

    def overtaken(at, data: bytes, **asked):
        if at.name == "index.json" and (number := next(others, None)):
            monkeypatch.setattr(bucket_writes, "write", write)
            store_at(place).save(key_of(number), prefix_of("unrolled"))
            monkeypatch.setattr(bucket_writes, "write", overtaken)
        return write(at, data, **asked)

    monkeypatch.setattr(bucket_writes, "write", overtaken)
    patched = SimpleNamespace(time=time.time, sleep=waits.append, monotonic=time.monotonic)
    monkeypatch.setattr(prefix_index, "time", patched)
    store.save(key_of(3), prefix_of("unrolled"))
    assert set(store.keys()) == {key_of(number) for number in range(4)} and waits


def test_documents_are_found_there_and_the_command_tells_of_them(bucket, place, tmp_path: Path, monkeypatch, capsys):
    decoder, head = decoder_on(MESHES["one device"]), tokens(LENGTH)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("RAPID_JAX_CACHE", str(place))
    assert cache_place(None) == place and cache_dir(None) == tmp_path / "rapid_jax"
    cache = cache_of(decoder, cache_place(None), disk_gib=1.0)
    cache.put(cache.name(head), prefix_on(decoder, head))
    cache.save()
    reader = decoder_on(MESHES["context 2"], "stacked")
    other = cache_of(reader, place, disk_gib=1.0)
    assert other.tier(other.name(head).key) == "disk" and other.bytes()["disk"] > 0
    check_head(other.find(other.name(head)).prefix, reader, head, LENGTH)
    longer = [*head[:40], *tokens(100, seed=9)]
    third = cache_of(reader, place, disk_gib=1.0)
    assert third.find(third.name(longer)).tokens == 32

    settings.save(RapidConfig(cache=CacheConfig(folder=str(place))), tmp_path / "run.yaml")
    for more in ([], ["--config", str(tmp_path / "run.yaml")]):
        assert main(["cache", "list", "--json", *more]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["prefixes"] == str(place) and found["kinds"]["prefixes"]["entries"] == 1
    piece = next(name for name in names(bucket, place) if name.endswith("k_BKSH/c/0/0/0/0"))
    assert main(["cache", "verify"]) == 0
    bucket.put(place.prefix + piece, bucket.get(place.prefix + piece)[::-1])
    assert main(["cache", "verify", "--remove"]) == 1
    assert f"damaged, removed: {place}/prefixes/" in capsys.readouterr().out
    assert main(["cache", "clear"]) == 0 and names(bucket, place) == ["prefixes/index.json"]
