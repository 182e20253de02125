# SPDX-License-Identifier: Apache-2.0
"""Keys and values that another thread copies to the host and saves, while they are asked for and removed."""

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from rapid_jax.config import CacheConfig, ComputeConfig, ModelsConfig, RapidConfig
from rapid_jax.engine.aside import NAME
from rapid_jax.engine.engine import Engine
from rapid_jax.engine.host_prefixes import HostMoves
from rapid_jax.engine.models import Models
from rapid_jax.engine.prefixes import Found, PrefixCache, RoomLater
from rapid_jax.engine.request import Done, Event, Piece, Question, Request
from rapid_jax.engine.saving import SavingRate
from rapid_jax.engine.service import RunningEngine
from rapid_jax.speculative.config import SamplingSettings, SpeculationConfig
from rapid_jax.speculative.prefix_store import PrefixStore
from tests.engine.prefix_cases import (
    LENGTH,
    MESHES,
    cache_of,
    check_head,
    check_same,
    decoder_on,
    prefix_of,
    tokens,
)
from tests.tiny_models import save_decoder, words


class Gate:
    """What a slow copy or a slow disk waits for."""

    def __init__(self):
        self.reached, self.open = threading.Event(), threading.Event()

    def before(self, work, error: Exception | None = None):
        """The method, which waits, and then maybe fails."""

        def slow(*args, **named):
            self.reached.set()
            assert self.open.wait(60)
            if error is not None:
                raise error
            return work(*args, **named)

        return slow


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.open.set()


@pytest.fixture
def slow_disk(gate: Gate, monkeypatch) -> Gate:
    monkeypatch.setattr(PrefixStore, "save", gate.before(PrefixStore.save))
    return gate


@pytest.fixture
def slow_copy(gate: Gate, monkeypatch) -> Gate:
    monkeypatch.setattr(HostMoves, "to_host", gate.before(HostMoves.to_host))
    return gate


def cache_for(decoder, folder: Path, *, device: float, host: float = 100.0, disk: bool = False) -> PrefixCache:
    """With room for so many prefixes in each tier."""
    each = cache_of(decoder, folder).bytes_for(LENGTH) / 2**30
    return cache_of(
        decoder, folder, aside=True, device_gib=device * each, host_gib=host * each, disk_gib=1.0 if disk else 0.0
    )


def put(cache: PrefixCache, decoder, *seeds: int) -> list:
    return [cache.put(cache.name(head := tokens(LENGTH, seed)), prefix_of(decoder, head)) for seed in seeds]


def tiers(cache: PrefixCache, *seeds: int) -> list[str | None]:
    return [cache.tier(cache.name(tokens(LENGTH, seed)).key) for seed in seeds]


def ended(cache: PrefixCache, gate: Gate) -> None:
    gate.open.set()
    while cache.moving:
        cache.wait(60)
        cache.make_room(0)


def found(cache: PrefixCache, seed: int) -> Found:
    """Asks until there is room."""
    while True:
        try:
            return cache.find(cache.name(tokens(LENGTH, seed)))
        except RoomLater:
            cache.wait(60)


def test_room_is_free_once_the_copy_is_there_and_not_before(decoder, tmp_path: Path, size, slow_copy: Gate):
    cache = cache_for(decoder, tmp_path, device=2.5)
    put(cache, decoder, 0, 1)
    assert not cache.make_room(size) and cache.moving and slow_copy.reached.wait(60)
    assert tiers(cache, 0, 1) == ["device", "device"] and cache.bytes()["device"] == 2 * size
    assert not cache.make_room(2 * size) and cache.bytes()["device"] == 2 * size, "one at a time"
    ended(cache, slow_copy)
    assert tiers(cache, 0, 1) == ["host", "device"]
    assert cache.bytes() == {"device": size, "host": size, "disk": 0} and cache.make_room(size)
    check_same(found(cache, 0).prefix, prefix_of(decoder, tokens(LENGTH, 0)))
    assert cache.bytes() == {"device": 2 * size, "host": 0, "disk": 0}


@pytest.mark.parametrize("holds", [False, True])
def test_what_is_asked_for_while_it_is_copied_stays(decoder, tmp_path: Path, size, slow_copy: Gate, holds):
    cache = cache_for(decoder, tmp_path, device=2.5)
    first, _ = put(cache, decoder, 0, 1)
    assert not cache.make_room(size) and slow_copy.reached.wait(60)
    again = cache.find(cache.name(tokens(LENGTH, 0)))
    assert (again.tier, again.handle) == ("device", first)
    if holds:
        cache.hold(first)
    slow_copy.open.set()
    cache.wait(60)
    assert tiers(cache, 0, 1) == ["device", "device"]
    assert cache.bytes() == {"device": 2 * size, "host": 0, "disk": 0}
    assert not cache.make_room(size), "the other one goes now"
    ended(cache, slow_copy)
    assert tiers(cache, 0, 1) == ["device", "host"]


def test_what_is_dropped_counts_until_it_is_on_disk(decoder, tmp_path: Path, size, slow_disk: Gate):
    cache = cache_for(decoder, tmp_path, device=1.5, host=0, disk=True)
    put(cache, decoder, 0)
    assert not cache.make_room(size) and slow_disk.reached.wait(60)
    assert tiers(cache, 0) == ["device"] and cache.bytes() == {"device": size, "host": 0, "disk": 0}
    ended(cache, slow_disk)
    assert tiers(cache, 0) == ["disk"] and cache.make_room(size)
    assert cache.bytes()["device"] == 0 and cache.bytes()["disk"] > 0
    check_head(found(cache, 0).prefix, decoder, tokens(LENGTH, 0), LENGTH)


def test_what_is_evicted_while_it_is_saved_from_the_host_is_served(decoder, tmp_path: Path, size, slow_disk: Gate):
    cache = cache_for(decoder, tmp_path, device=2.5, host=1.5, disk=True)
    put(cache, decoder, 0, 1)
    assert not cache.make_room(size)
    while cache.moving:  # to the host: nothing is saved yet
        cache.wait(60)
    assert tiers(cache, 0, 1) == ["host", "device"] and not slow_disk.reached.is_set()
    assert not cache.make_room(2 * size) and slow_disk.reached.wait(60), "the host has no room for both"
    again = cache.find(cache.name(tokens(LENGTH, 0)))
    assert again.tier == "host"
    check_same(again.prefix, prefix_of(decoder, tokens(LENGTH, 0)))
    assert cache.bytes() == {"device": 2 * size, "host": size, "disk": 0}, "its arrays there are still read"
    slow_disk.open.set()
    cache.wait(60)
    assert tiers(cache, 0, 1) == ["device", "device"]
    assert cache.bytes()["host"] == 0 and cache.bytes()["disk"] > 0


def test_who_needs_room_for_what_is_kept_asks_again(decoder, tmp_path: Path, size, slow_disk: Gate):
    cache = cache_for(decoder, tmp_path, device=1.5, host=1.5, disk=True)
    slow_disk.open.set()
    for seed in range(4):
        assert found(cache, seed).prefix is None
        while not cache.make_room(size):
            assert cache.moving
            cache.wait(60)
        put(cache, decoder, seed)
    assert tiers(cache, 0, 1, 2, 3) == ["disk", "disk", "host", "device"]
    with pytest.raises(RoomLater):
        cache.find(cache.name(tokens(LENGTH, 2)))
    for seed in (2, 0, 3, 1):
        again = found(cache, seed)
        assert again.tokens == LENGTH
        check_head(again.prefix, decoder, tokens(LENGTH, seed), LENGTH)
    assert cache.bytes()["device"] == size and cache.bytes()["host"] <= 1.5 * size


@pytest.mark.parametrize("late", [False, True])
def test_what_is_removed_while_it_is_saved_is_not_on_disk(
    decoder, tmp_path: Path, size, slow_disk: Gate, monkeypatch, late
):
    """Late: in the very moment in which it is given its name."""
    if late:
        write = PrefixStore._write
        monkeypatch.setattr(PrefixStore, "_write", lambda *args: write(*args[:-1], lambda: True))
    cache = cache_for(decoder, tmp_path, device=1.5, host=0, disk=True)
    (first,) = put(cache, decoder, 0)
    assert not cache.make_room(size) and slow_disk.reached.wait(60)
    cache.remove(first.key)
    assert tiers(cache, 0) == [None] and cache.find(cache.name(tokens(LENGTH, 0))).prefix is None
    assert cache.bytes()["device"] == size, "it is still read"
    ended(cache, slow_disk)
    assert cache.bytes() == {"device": 0, "host": 0, "disk": 0} and tiers(cache, 0) == [None]
    assert list((tmp_path / "prefixes").iterdir()) == []


def test_what_is_removed_while_it_is_copied_and_comes_again_is_another(decoder, tmp_path: Path, size, slow_copy: Gate):
    cache = cache_for(decoder, tmp_path, device=2.5)
    (first,) = put(cache, decoder, 0)
    cache.hold(first)
    cache.release(first)
    assert not cache.make_room(2 * size) and slow_copy.reached.wait(60)
    cache.remove(first.key)
    (again,) = put(cache, decoder, 0)
    assert again != first and cache.bytes()["device"] == 2 * size
    cache.hold(again)
    ended(cache, slow_copy)
    assert tiers(cache, 0) == ["device"] and cache.bytes() == {"device": size, "host": 0, "disk": 0}
    cache.release(again)


@pytest.mark.parametrize("of", ["copy", "save"])
def test_what_cannot_be_moved_is_dropped_with_one_line(decoder, tmp_path: Path, size, caplog, monkeypatch, gate, of):
    what, name = (HostMoves, "to_host") if of == "copy" else (PrefixStore, "save")
    monkeypatch.setattr(what, name, gate.before(None, MemoryError("no\nmore")))
    gate.open.set()
    cache = cache_for(decoder, tmp_path, device=1.5, host=100.0 if of == "copy" else 0, disk=True)
    put(cache, decoder, 0)
    assert not cache.make_room(size)
    cache.wait(60)
    assert cache.make_room(size) and tiers(cache, 0) == [None]
    assert cache.bytes() == {"device": 0, "host": 0, "disk": 0}
    said = [record.getMessage() for record in caplog.records]
    assert said == ["keys and values of a document could not be moved off the devices: MemoryError: no more"]


def test_on_several_devices_nothing_is_saved_from_them_by_another_thread(tmp_path: Path, monkeypatch):
    decoder, threads = decoder_on(MESHES["context 2"]), []
    save = PrefixStore.save

    def noted(*args, **named):
        threads.append(threading.current_thread())
        return save(*args, **named)

    monkeypatch.setattr(PrefixStore, "save", noted)
    size = cache_of(decoder, tmp_path).bytes_for(LENGTH)
    cache = cache_for(decoder, tmp_path, device=1.5, host=0, disk=True)
    put(cache, decoder, 0)
    assert cache.make_room(size) and tiers(cache, 0) == ["disk"]
    assert threads == [threading.main_thread()]


LIMIT, QUESTION = 40, "w12 w34 w56?"


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Models:
    folder: Path = tmp_path_factory.mktemp("tiny")
    target = save_decoder(folder / "model", sizes={"num_hidden_layers": 1})
    return Models(RapidConfig(models=ModelsConfig(target=str(target)), compute=ComputeConfig(prefill_chunk=64)))


@pytest.fixture
def config(models: Models, tmp_path: Path) -> RapidConfig:
    """Room for two documents on the devices, and none on the host."""
    config = replace(
        models.config,
        speculation=SpeculationConfig(mode="target", lookup="off", rounds_per_read=1),
        sampling=SamplingSettings(temperature=0.0, max_new_tokens=LIMIT),
    )
    engine = Engine(config, models, quiet=True)
    heard = Heard(engine, config, 0)
    engine.run([heard.ticket])
    each = engine.prefixes.bytes()["device"]
    cache = CacheConfig(folder=str(tmp_path / "cache"), device_gib=2.5 * each / 2**30, host_gib=0.0, programs=False)
    return replace(config, cache=cache)


class Heard:
    """The events of a question about a document."""

    def __init__(self, engine: Engine, config: RapidConfig, seed: int):
        self.events: list[Event] = []
        request = Request.of(Question(words(90, seed=seed), QUESTION), config)
        self.ticket = engine.submit(request, self.events.append)

    @property
    def answer(self):
        assert isinstance(self.events[-1], Done), self.events
        return self.events[-1].answer


def test_a_slow_disk_keeps_nobody_else_waiting(config: RapidConfig, models: Models, slow_disk: Gate):
    engine = Engine(config, models, prefill_first=False, quiet=True)
    first = Heard(engine, config, 0)
    engine.run([first.ticket])
    running = Heard(engine, config, 1)
    while not any(isinstance(event, Piece) for event in running.events):
        engine.step()
    coming = Heard(engine, config, 2)
    while not slow_disk.reached.is_set():
        engine.step()
    said = len(running.events)
    engine.run([running.ticket])
    assert running.answer.token_ids and len(running.events) > said + 10, "rounds went on"
    assert not coming.ticket.job.ended and engine.prefixes.moving
    slow_disk.open.set()
    engine.run([coming.ticket])
    again = Heard(engine, config, 0)
    engine.run([again.ticket])
    assert not coming.answer.prefix_reused and again.answer.prefix_reused
    assert again.answer.token_ids == first.answer.token_ids


def started(config: RapidConfig, models: Models) -> RunningEngine:
    """An engine that has answered about two documents, and works."""
    engine = RunningEngine(config, models)
    engine.start()
    for seed in range(2):
        heard = Heard(engine, config, seed)
        while not heard.ticket.job.ended:
            time.sleep(0.01)
    return engine


def test_to_drain_waits_for_what_is_being_saved(config: RapidConfig, models: Models, slow_disk: Gate):
    engine = started(config, models)
    coming = Heard(engine, config, 2)
    assert slow_disk.reached.wait(60)
    drained: list[bool] = []
    draining = threading.Thread(target=lambda: drained.append(engine.drain(60)))
    draining.start()
    time.sleep(0.3)
    assert drained == [] and not coming.ticket.job.ended
    slow_disk.open.set()
    draining.join(60)
    assert drained == [True] and coming.answer.token_ids
    stored = list((Path(config.cache.folder) / "prefixes").iterdir())
    assert len(stored) == 3 and all((one / "manifest.json").is_file() for one in stored)


def test_to_drain_takes_no_longer_than_it_may_and_leaves_no_part(
    config: RapidConfig, models: Models, slow_disk, caplog
):
    engine = started(config, models)
    start = time.monotonic()
    assert engine.drain(0.5) and time.monotonic() - start < 5
    assert [line for line in caplog.messages if "2 prefixes" in line] == caplog.messages
    slow_disk.open.set()  # too late
    while any(thread.name == NAME for thread in threading.enumerate()):
        time.sleep(0.01)
    folder = Path(config.cache.folder) / "prefixes"
    assert slow_disk.reached.is_set() and not (folder.is_dir() and list(folder.iterdir()))


def test_requests_that_use_up_their_time_leave_what_storing_takes(config: RapidConfig, models: Models, monkeypatch):
    """Storing is reckoned to take longer than there is: half the time is its own, and suffices."""
    monkeypatch.setattr(PrefixCache, "saving_seconds", 1e6)
    step = Engine.step
    monkeypatch.setattr(Engine, "step", lambda engine: (time.sleep(0.15), step(engine)))
    engine, said = RunningEngine(config, models), []
    engine.start()
    heard = Heard(engine, config, 0)
    while not any(isinstance(event, Piece) for event in heard.events):
        time.sleep(0.01)
    assert not engine.drain(4.0, said.append), "the request has ended by itself"
    assert said == ["requests that run have 2 s, of 4; storing what was read the rest"]
    assert len(list((Path(config.cache.folder) / "prefixes").glob("*/manifest.json"))) == 1


def test_storing_is_reckoned_by_what_was_stored():
    rate = SavingRate()
    assert rate.seconds([]) == 0
    assert rate.seconds([10**9, 10**9]) == pytest.approx(1.5 * (2 * 0.5 + 2e9 / 2.5e8))
    rate.timed(10**6, lambda: time.sleep(0.02))
    assert 1.5 * (0.5 + 10 * 0.02) <= rate.seconds([10**7]) < 1.5 * (0.5 + 10 * 2.0)
