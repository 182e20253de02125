# SPDX-License-Identifier: Apache-2.0
"""Requests that come together, where the devices have room for little: all of them end, and none is read twice."""

from dataclasses import replace

import pytest

from rapid_jax.config import CacheConfig, ComputeConfig, ModelsConfig, RapidConfig
from rapid_jax.engine.drafter_room import DrafterRoom
from rapid_jax.engine.engine import Engine
from rapid_jax.engine.heads import Name
from rapid_jax.engine.models import Models
from rapid_jax.engine.reader import read
from rapid_jax.engine.request import Done, Event, Failed, Piece, Question, Request, Tokens
from rapid_jax.retrieval.config import RetrievalConfig
from rapid_jax.runtime.errors import TooLarge
from rapid_jax.runtime.mesh_config import MeshConfig
from rapid_jax.speculative.config import SamplingSettings, SpeculationConfig
from rapid_jax.speculative.rounds import Rounds
from tests.retrieval import encoders
from tests.tiny_models import save_decoder, words

WORDS = 90
MOST_STEPS = 1500  # of an engine that goes on


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Models:
    folder = tmp_path_factory.mktemp("tiny")
    target = save_decoder(folder / "model", sizes={"num_hidden_layers": 1})
    given = ModelsConfig(target=str(target), encoder=str(encoders.save(folder / "encoder", "bert")))
    cache = CacheConfig(
        folder=str(folder / "cache"), host_gib=0.0, disk_gib=0.0, prefixes=False, programs=False, embeddings=False
    )
    config = RapidConfig(
        models=given,
        retrieval=RetrievalConfig(chunk_tokens=64, min_tokens=128),
        speculation=SpeculationConfig(mode="target", gamma=2, lookup="off", rounds_per_read=1),
        sampling=SamplingSettings(temperature=0.0, max_new_tokens=10),
        compute=ComputeConfig(prefill_chunk=64),
        cache=cache,
    )
    return Models(config, quiet=True)


def engine_with(models: Models, documents: float, *, mode: str = "target", prefill_first: bool = False) -> Engine:
    """Room for so many documents of `WORDS` words, on the devices alone."""
    config = replace(models.config, speculation=replace(models.config.speculation, mode=mode))
    sized = Engine(config, models, quiet=True)
    with sized.read(asked(sized, 0).request) as (job, _):
        assert job.reading is not None
        size = sized.prefixes.bytes_for(len(job.reading.long.head))
    cache = replace(config.cache, device_gib=documents * size / 2**30)
    return Engine(replace(config, cache=cache), models, prefill_first=prefill_first, quiet=True)


class asked:
    """A question about the document of that number, and its events."""

    def __init__(self, engine: Engine, number: int, count: int = WORDS):
        self.events: list[Event] = []
        self.request = Request.of(Question(words(count, seed=number), "w1 w2?"), engine.config)

    def of(self, engine: Engine) -> "asked":
        self.ticket = engine.submit(self.request, self.events.append)
        return self

    @property
    def answer(self):
        assert self.events and isinstance(self.events[-1], Done), self.events
        return self.events[-1].answer

    @property
    def has_tokens(self) -> bool:
        return any(isinstance(event, Piece) for event in self.events)


def finish(engine: Engine, requests: list[asked]) -> None:
    for _ in range(MOST_STEPS):
        if all(one.ticket.job.ended for one in requests):
            return
        engine.step()
    raise AssertionError(f"nothing goes on: {[len(one.events) for one in requests]}")


@pytest.mark.parametrize("mode", ["target", "lossless"])
@pytest.mark.parametrize("prefill_first", [False, True])
@pytest.mark.parametrize("room", [1.5, 2.5])
def test_questions_about_more_documents_than_there_is_room_for(models, mode, prefill_first, room):
    engine = engine_with(models, room, mode=mode, prefill_first=prefill_first)
    first = asked(engine, 0).of(engine)
    finish(engine, [first])
    # The first one waits for the room of a document that the second asks about again.
    rest = [asked(engine, number).of(engine) for number in (1, 0, 2, 1)]
    finish(engine, rest)
    assert [one.answer.token_ids for one in rest if one.request == first.request] == [first.answer.token_ids]
    assert engine.is_idle and engine.prefixes.bytes()["device"] <= room * first_size(engine)


def first_size(engine: Engine) -> int:
    with engine.read(asked(engine, 0).request) as (job, _):
        assert job.reading is not None
        return engine.prefixes.bytes_for(len(job.reading.long.head))


@pytest.mark.parametrize("mode", ["target", "lossless"])
def test_those_that_come_together_about_a_new_document_read_it_once(models, mode):
    engine = engine_with(models, 4.5, mode=mode)
    together = [asked(engine, 5).of(engine) for _ in range(3)]
    finish(engine, together)
    assert [one.answer.prefix_reused for one in together] == [False, True, True]
    assert len({tuple(one.answer.token_ids) for one in together}) == 1


@pytest.mark.parametrize(("mode", "names"), [("target", 1), ("lossless", 1), ("retrieval", 0)])
def test_a_request_s_document_is_named_once(models, mode, names, monkeypatch):
    """Its tokens are hashed for that: milliseconds of a long one."""
    made, of = [], Name.of
    monkeypatch.setattr(Name, "of", lambda *args: made.append(args) or of(*args))
    engine = Engine(replace(models.config, speculation=replace(models.config.speculation, mode=mode)), models)
    for reused in (False, True):
        one = asked(engine, 0).of(engine)
        finish(engine, [one])
        assert one.answer.prefix_reused == (reused and names > 0) and len(made) == names
        made.clear()


@pytest.mark.parametrize("what", ["target", "lossless", "retrieval", "chat"])
def test_what_needs_no_new_room_does_not_wait_for_another_s_document_to_be_read(models, what):
    """A question whose document is there, though the drafter reads; one that reads what is retrieved; a chat."""
    engine = engine_with(models, 30.0, mode="lossless")
    finish(engine, [asked(engine, 0).of(engine)])
    long = asked(engine, 1, 5 * WORDS).of(engine)
    for _ in range(3):
        engine.step()
    short = asked(engine, 0)
    mode = replace(engine.config.speculation, mode="target" if what == "chat" else what)
    prompt = Tokens(list(range(3, 20))) if what == "chat" else short.request.prompt
    sampling = replace(engine.config.sampling, max_new_tokens=4)
    short.request = replace(short.request, prompt=prompt, speculation=mode, sampling=sampling)
    finish(engine, [short.of(engine)])
    assert short.answer.token_ids and not long.has_tokens
    finish(engine, [long])


def on_device(engine: Engine) -> int:
    return engine.prefixes.bytes()["device"]


def test_a_document_counts_from_its_first_chunk_and_no_longer_where_it_is_taken_back(models):
    engine = engine_with(models, 1.5)
    one = asked(engine, 0).of(engine)
    while not on_device(engine):
        engine.step()
    assert not one.has_tokens and engine.prefixes.tier(name_of(engine, 0).key) is None
    one.ticket.cancel()
    finish(engine, [one])
    assert on_device(engine) == 0
    finish(engine, [asked(engine, 0).of(engine)])
    assert on_device(engine) == engine.prefixes.bytes_for(name_of(engine, 0).tokens)


@pytest.mark.parametrize("prefill_first", [False, True])
def test_documents_that_are_read_side_by_side_stay_within_the_bound(models, prefill_first, monkeypatch):
    """One is asked about while another is read for later: it waits for that one's room, and is not told too large."""
    engine, most = engine_with(models, 1.5, prefill_first=prefill_first), []
    hold = engine.prefixes.hold  # of what has just been kept
    monkeypatch.setattr(engine.prefixes, "hold", lambda handle: (hold(handle), most.append(on_device(engine))))
    one = asked(engine, 0).of(engine)
    for _ in range(2):  # as far as the first chunk
        engine.step()
    engine.prefill(asked(engine, 1).request)
    finish(engine, [one])
    assert one.answer.token_ids and max(most) == engine.prefixes.bytes_for(name_of(engine, 0).tokens)


def name_of(engine: Engine, number: int) -> Name:
    reading = read(engine.models, engine.config, asked(engine, number).request)
    return engine.prefixes.name(reading.long.head)


def test_who_waits_for_room_that_one_who_passes_holds_gets_it(models):
    engine = engine_with(models, 1.5, mode="lossless")
    finish(engine, [asked(engine, 0).of(engine)])
    both = [asked(engine, number).of(engine) for number in (0, 1)]
    finish(engine, both)
    assert [one.answer.prefix_reused for one in both] == [True, False]


def test_that_room_will_not_be_there_is_told_although_chats_run(models):
    """What is pinned leaves the devices for nobody, and a chat holds no document."""
    engine = engine_with(models, 1.5)
    finish(engine, [asked(engine, 0).of(engine)])
    engine.prefixes.pin(name_of(engine, 0).key, pinned=True)
    large, chats = asked(engine, 1).of(engine), []
    for number in range(60):
        if not large.ticket.job.ended:
            chat = asked(engine, number)
            chat.request = replace(chat.request, prompt=Tokens(list(range(3, 20))))
            chats.append(chat.of(engine))
            engine.step()
    assert isinstance(large.events[-1], Failed) and isinstance(large.events[-1].error, TooLarge)
    finish(engine, chats)
    assert all(chat.answer.token_ids for chat in chats)


def test_what_never_fits_is_told_although_others_run(models):
    engine = engine_with(models, 1.5)
    running = asked(engine, 0).of(engine)
    while not running.has_tokens:
        engine.step()
    large = asked(engine, 1, 5 * WORDS).of(engine)
    finish(engine, [large])
    assert isinstance(large.events[-1], Failed) and isinstance(large.events[-1].error, TooLarge)
    finish(engine, [running])
    assert running.answer.token_ids


def test_a_short_document_takes_its_own_room_where_there_will_not_be_more(models):
    """It would else have the room of one that programs are there for, which a pinned document takes."""
    engine = engine_with(models, 1.8)
    first = asked(engine, 0).of(engine)
    finish(engine, [first])
    (kept,) = engine.prefixes._tiers.every()
    engine.prefixes.sizes = {engine.prefixes.slots(kept.handle)}
    engine.prefixes.pin(kept.handle.key, pinned=True)
    short, other = asked(engine, 1, 30), asked(engine, 2)
    finish(engine, [short.of(engine), other.of(engine)])
    assert short.answer.token_ids and isinstance(other.events[-1], Failed)
    engine.prefixes.pin(kept.handle.key, pinned=False)
    finish(engine, [again := asked(engine, 3, 30).of(engine)])
    sizes = {engine.prefixes.slots(one.handle) for one in engine.prefixes._tiers.every()}
    assert again.answer.token_ids and sizes == engine.prefixes.sizes, "as much as there are programs for"


def test_who_has_waited_for_room_does_not_read_what_lies_on_the_host(models):
    engine = engine_with(models, 1.5)
    cache = replace(engine.config.cache, host_gib=1.0)
    engine = Engine(replace(engine.config, cache=cache), models, quiet=True)
    finish(engine, [asked(engine, 0).of(engine)])
    running = asked(engine, 1).of(engine)
    while not running.has_tokens:
        engine.step()
    again = asked(engine, 0).of(engine)
    finish(engine, [running, again])
    assert again.answer.prefix_reused


@pytest.fixture(scope="module")
def apart(models: Models, tmp_path_factory) -> Models:
    """The drafter has a device of its own."""
    drafter = save_decoder(tmp_path_factory.mktemp("drafter"), seed=1, sizes={"num_hidden_layers": 1})
    given = replace(models.config.models, drafter=str(drafter))
    return Models(replace(models.config, models=given, mesh=MeshConfig(), drafter_mesh=MeshConfig()), quiet=True)


def with_drafter_room(models: Models, rows: float) -> tuple[Engine, DrafterRoom, list[int]]:
    """Room for so many prompts of the drafter; and what was taken of it, whenever some was."""
    engine, most = engine_with(models, 4.5, mode="lossless"), []
    prefilling = engine._preparer._prefilling
    with engine.read(asked(engine, 0).request):
        size = prefilling.drafter_room.taken
    assert size > 0 and prefilling.drafter_room.taken == 0
    room = prefilling.drafter_room = DrafterRoom(models.drafter.decoder, int(rows * size))
    reads = prefilling.drafter

    def noted(*args, **how):
        assert how["room"] >= engine.config.retrieval.min_tokens, "as large for every document of these slots"
        most.append(room.taken)
        return reads(*args, **how)

    prefilling.drafter = noted
    return engine, room, most


def test_a_drafter_on_devices_of_its_own_reads_no_more_than_they_have_room_for(apart: Models):
    engine, room, most = with_drafter_room(apart, 2.5)
    together = [asked(engine, number).of(engine) for number in (0, 1, 2, 0, 1)]
    finish(engine, together)
    assert all(one.answer.token_ids for one in together) and len(most) == 5
    assert 2 * max(most) > room.most >= max(most) and room.taken == 0


def test_a_drafter_s_room_comes_back_in_whatever_way_a_request_ends(apart: Models, monkeypatch):
    engine, room, _ = with_drafter_room(apart, 1.5)
    one, other = asked(engine, 0).of(engine), asked(engine, 1).of(engine)
    while not one.has_tokens:
        engine.step()
    assert room.taken and not other.has_tokens
    one.ticket.cancel()
    finish(engine, [one])
    while not room.taken:  # the other one's, which is being read
        engine.step()
    other.ticket.cancel()
    finish(engine, [other])
    assert room.taken == 0
    monkeypatch.setattr(Rounds, "advance", lambda *args: 1 // 0)
    finish(engine, [failed := asked(engine, 2).of(engine)])
    assert isinstance(failed.events[-1], Failed) and room.taken == 0
    room.most = 1
    finish(engine, [large := asked(engine, 2).of(engine)])
    assert isinstance(large.events[-1], Failed) and isinstance(large.events[-1].error, TooLarge)
    assert "too large for the drafter's devices" in str(large.events[-1].error) and engine.is_idle
