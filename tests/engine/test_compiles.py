# SPDX-License-Identifier: Apache-2.0
"""After the warm-up no request of the declared sizes compiles anything."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import jax
import pytest

from rapid_jax.config import CacheConfig, ComputeConfig, ModelsConfig, RapidConfig
from rapid_jax.engine import warm_up as warm_up_module
from rapid_jax.engine.engine import Engine
from rapid_jax.engine.lane import LaneKey
from rapid_jax.engine.models import Models
from rapid_jax.engine.request import Chat, Done, Event, Piece, Question, Request, Tokens
from rapid_jax.engine.rooms import room_of_document
from rapid_jax.engine.service import RunningEngine
from rapid_jax.engine.warm_up import WarmUp, _document, warm_up
from rapid_jax.model.load import open_checkpoint
from rapid_jax.retrieval.config import RetrievalConfig
from rapid_jax.runtime.errors import InputError
from rapid_jax.speculative.config import SamplingSettings, SpeculationConfig
from rapid_jax.speculative.rounds import Rounds
from rapid_jax.speculative.schedule import Observation
from rapid_jax.speculative.state import Plan
from tests.compiled import compiled
from tests.retrieval import encoders
from tests.tiny_models import save_decoder, words

LIMIT = 24
LENGTH = 220  # tokens, as words(90) has: with the template around it, six chunks of the prefill
SHORT = 90  # as words(30) has
SHORTEST = 16  # a quarter of a chunk


@pytest.fixture(scope="module")
def warm(request: pytest.FixtureRequest) -> WarmUp:
    """Two rows of one document; with `--fuzz 2` or more four rows, and two documents of two sizes at once."""
    more = request.config.getoption("--fuzz") > 1
    return WarmUp((LENGTH, SHORT)[: 1 + more], rows=2 + 2 * more, documents=1 + more, chats=(SHORTEST, 40))


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> RapidConfig:
    folder: Path = tmp_path_factory.mktemp("tiny")
    target = save_decoder(folder / "model", sizes={"num_hidden_layers": 1})
    return RapidConfig(
        models=ModelsConfig(target=str(target), encoder=str(encoders.save(folder / "encoder", "bert"))),
        retrieval=RetrievalConfig(chunk_tokens=64, min_tokens=128),
        speculation=SpeculationConfig(gamma=2, lookup="off", rounds_per_read=1),
        sampling=SamplingSettings(temperature=0.9, max_new_tokens=LIMIT),
        compute=ComputeConfig(prefill_chunk=64),
        cache=CacheConfig(folder=str(folder / "cache"), prefixes=False, programs=False),
    )


@pytest.fixture(scope="module")
def engine(config: RapidConfig, warm: WarmUp) -> RunningEngine:
    engine = RunningEngine(config, Models(config, quiet=True), warm=warm)
    said: list[str] = []
    jax.clear_caches()  # of this process: programs of the same shapes would not be compiled
    with compiled() as found:
        engine.warm_up(said.append)
    assert len(said) == 1 + 4 * len((*warm.lengths, *warm.chats))
    assert "jit(_run_rounds)" in found and engine.is_idle
    return engine


@pytest.fixture(scope="module")
def plain(config: RapidConfig, engine: RunningEngine) -> RunningEngine:
    """Documents of two sizes, two at once, that the target answers about alone."""
    config = replace(config, speculation=replace(config.speculation, mode="target"))
    plain = RunningEngine(config, engine.models, warm=WarmUp((LENGTH, SHORT), documents=2))
    plain.warm_up(lambda text: None)
    return plain


def asked(engine: RunningEngine, number: int) -> Request:
    """One of many about documents of the same size: of each setting another value."""
    sampling = [
        {"temperature": 0.0},
        {"temperature": 0.9, "top_k": 5},
        {"temperature": 0.7, "top_p": 0.8, "repetition_penalty": 1.3},
        {"temperature": 0.0, "repetition_penalty": 1.2, "penalize": "all"},
        {"temperature": 1.2, "min_p": 0.05, "top_k": 500},
    ][number % 5]
    speculation = [
        {"mode": "rapid"},
        {"mode": "rapid", "eta": 20.0, "guard": "paper", "alpha": 0.3},
        {"mode": "lossless"},
        {"mode": "phat", "eta": 2.0, "guard": "none"},
        {"mode": "rapid", "confidence_stop": 0.2},
    ][(number + 2 * (number // 5)) % 5]
    settings = replace(
        engine.config,
        speculation=replace(engine.config.speculation, **speculation),
        sampling=SamplingSettings(max_new_tokens=LIMIT - 3 * (number % 4), seed=number, **sampling),
        stop=("w7", "zz")[: number % 3],
    )
    question = Question(words(90 - number % 3, seed=number // 4), "w12 w34 " * (1 + number % 6) + "?")
    return Request.of(question, settings, logprobs=(None, None, 0, 3)[number % 4], owner=str(number % 2))


class Heard:
    """The events of a request."""

    def __init__(self, engine: RunningEngine, request: Request):
        self.events: list[Event] = []
        self.ticket = engine.submit(request, self.events.append)

    def until_it_says_something(self, engine: RunningEngine) -> None:
        while not (self.ticket.job.ended or any(isinstance(event, Piece) for event in self.events)):
            engine.step()


def test_the_programs_are_counted():
    with compiled() as found:
        jax.jit(lambda x: x * 2 + 41)(jax.numpy.zeros(3)).block_until_ready()
    assert any("lambda" in name for name in found)


def test_no_request_alone_compiles_anything(engine: RunningEngine):
    for number in range(20):
        with compiled() as found:
            heard = Heard(engine, asked(engine, number))
            engine.run([heard.ticket])
        assert isinstance(heard.events[-1], Done), heard.events[-1]
        assert found == [], f"request {number}"


def test_nor_do_requests_that_come_and_go(engine: RunningEngine, warm: WarmUp):
    """In each group the rows are filled up one by one, while others answer; some are taken back."""
    for start in range(0, 24, warm.rows):
        same = [
            replace(asked(engine, start + at), prompt=asked(engine, start).prompt, owner="") for at in range(warm.rows)
        ]
        with compiled() as found:
            heard = []
            for request in same:
                heard.append(Heard(engine, request))
                heard[-1].until_it_says_something(engine)
            heard[start % warm.rows].ticket.cancel()
            engine.step()
            late = Heard(engine, replace(same[0], sampling=replace(same[0].sampling, seed=77)))
            engine.run([one.ticket for one in (*heard, late)])
        assert found == [], f"requests {start} to {start + warm.rows}"
        assert isinstance(late.events[-1], Done) and engine.is_idle


def test_nor_do_requests_about_as_many_documents_as_declared(engine: RunningEngine, warm: WarmUp):
    for start in range(0, 32, 8):
        with compiled() as found:
            heard = [Heard(engine, asked(engine, start + 4 * at)) for at in range(warm.documents)]
            engine.run([one.ticket for one in heard])
        assert found == []
        assert all(isinstance(one.events[-1], Done) for one in heard)


def test_nor_do_shorter_documents(engine: RunningEngine, plain: RunningEngine):
    """Down to a quarter of a declared length; they have its room, and what is common to two is copied there."""
    for number, count in enumerate((88, 74, 60, 46)):
        for of in (engine, plain):
            request = replace(asked(engine, number), speculation=of.config.speculation)
            prompts = [Question(words(count + more, seed=7), "w12 w34?") for more in (0, 1)]
            with compiled() as found:
                for prompt in prompts:
                    heard = Heard(of, replace(request, prompt=prompt))
                    of.run([heard.ticket])
                    assert isinstance(heard.events[-1], Done), heard.events[-1]
            assert found == [], f"{count} words"


def test_a_chat_about_a_document_is_kept_and_has_room_as_a_question_about_it(plain: RunningEngine):
    """As the server asks: else its requests would have programs of their own, and rows beyond the declared ones."""
    for count in (75, 46, 18):
        messages, found = [{"role": "user", "content": "w12 w34?"}], []
        for prompt in (Question(words(count, seed=11), "w12 w34?"), Chat(messages, document=words(count, seed=12))):
            with plain.read(Request.of(prompt, plain.config)) as (_, prepared):
                assert prepared.handle is not None, f"{count} words"
                found.append(prepared.key.slots)
        assert found[0] == found[1] and found[0] in plain.sharing.declared, f"{count} words"


def test_what_is_shorter_yet_or_has_no_room_for_more_takes_its_own():
    assert room_of_document(100, {400, 401}) == 400 and room_of_document(100, {401, 99}) == 100
    assert room_of_document(100, set()) == 100 and room_of_document(100, {100, 128}) == 100


def test_nor_do_chats(engine: RunningEngine, warm: WarmUp):
    """Without a document there is nothing to retrieve: the target answers alone, several of them in one program."""
    for start in range(0, 20, warm.rows):
        chats = [
            replace(
                asked(engine, start + at), prompt=Chat([{"role": "user", "content": words(3 * at + 2, seed=start)}])
            )
            for at in range(warm.rows)
        ]
        with compiled() as found:
            heard = [Heard(engine, chat) for chat in chats]
            engine.run([one.ticket for one in heard])
        assert all(isinstance(one.events[-1], Done) for one in heard), heard[0].events[-1]
        assert found == [], f"chats {start} to {start + warm.rows}"


def test_nor_do_more_chats_than_declared(engine: RunningEngine, warm: WarmUp):
    """Those for which no row is free wait for one."""
    for start in range(0, 20, 5):
        with compiled() as found:
            chats = [
                replace(asked(engine, start + at), prompt=Tokens([5 + start + at] * (SHORTEST - at)), logprobs=None)
                for at in range(2 * warm.rows + 1)
            ]
            heard = [Heard(engine, chat) for chat in chats]
            engine.run([one.ticket for one in heard])
        assert all(isinstance(one.events[-1], Done) for one in heard), heard[0].events[-1]
        assert found == [] and engine.is_idle


class Joins:
    """Counts the lanes that are there at once, and the rows that join larger ones, while nothing is compiled."""

    def __init__(self, engine: RunningEngine, monkeypatch: pytest.MonkeyPatch):
        self._engine, self.lanes, self.across = engine, 0, 0
        joined = engine.sharing.joined

        def counted(key: LaneKey, lane: LaneKey) -> None:
            self.across += key != lane
            joined(key, lane)

        monkeypatch.setattr(engine.sharing, "joined", counted)

    def check(self, requests: list[Request]) -> None:
        """Asks all at once, and each once another says something, in either order."""
        for order in (requests, requests[::-1]):
            for waits in (False, True):
                with compiled() as found:
                    heard = []
                    for request in order:
                        heard.append(Heard(self._engine, request))
                        if waits:
                            heard[-1].until_it_says_something(self._engine)
                        self.lanes = max(self.lanes, len(self._engine._lanes))
                    self._engine.run([one.ticket for one in heard])
                assert found == [] and self._engine.is_idle
                assert all(isinstance(one.events[-1], Done) for one in heard), heard[0].events[-1]


def test_nor_do_chats_of_several_sizes_side_by_side(engine: RunningEngine, warm: WarmUp, monkeypatch):
    """A smaller one joins the larger ones' lane; a larger one that comes later has its own."""
    joins = Joins(engine, monkeypatch)
    for start in range(0, 20, warm.rows):
        sizes = [(SHORTEST - start % 5, 40 - start % 7)[at % 2] for at in range(warm.rows)]
        joins.check(
            [replace(asked(engine, start + at), prompt=Tokens([5 + start + at] * n)) for at, n in enumerate(sizes)]
        )
    assert joins.lanes == 2 and joins.across > 2


def test_nor_do_documents_of_several_sizes_side_by_side(plain: RunningEngine, monkeypatch):
    joins = Joins(plain, monkeypatch)
    for number in range(20):
        about = [Question(words(count, seed=number), "w12 w34?") for count in (30, 90)]
        one = replace(asked(plain, number), speculation=plain.config.speculation)
        joins.check([replace(one, prompt=question) for question in about])
    assert joins.lanes == 2 and joins.across > 2


def test_nor_do_documents_of_several_sizes_with_a_drafter(engine: RunningEngine, warm: WarmUp, monkeypatch):
    """Where only one at once is declared there is one size."""
    joins = Joins(engine, monkeypatch)
    for number in range(0, 20, 5):
        questions = [Question(words(90 - 60 * at, seed=number), "w12 w34?") for at in range(len(warm.lengths))]
        joins.check([replace(asked(engine, number + at), prompt=one) for at, one in enumerate(questions)])
    assert (joins.across > 0) == (warm.documents > 1)


def test_nor_do_log_probabilities_of_prompts(engine: RunningEngine):
    for count in (2, SHORTEST, SHORTEST + 1, 40, 64, LENGTH - 20, LENGTH):
        with compiled() as found:
            future = engine.score([7, *range(3, 2 + count)], 3)
            while not future.done():
                engine._score()
        assert len(future.result()) == count
        assert found == [], f"{count} tokens"


def test_the_sizes_that_lanes_come_to_have():
    assert WarmUp().sizes() == [(1, 1)]
    assert WarmUp(rows=3).sizes() == [(1, 1), (1, 2), (1, 4)]
    assert WarmUp(rows=4, documents=2).sizes() == [(1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (2, 4)]
    assert WarmUp(rows=16, documents=16).sizes()[-1] == (16, 1)
    for wrong in ({"lengths": (8,)}, {"chats": (8,)}, {"rows": 17}, {"documents": 0}):
        with pytest.raises(InputError, match="to warm up for"):
            WarmUp(**wrong)


@pytest.mark.parametrize("length", [16, 220, 1024, 8192])
def test_a_document_of_a_length_has_it_for_a_tokenizer_that_joins_words(smollm2_path, length):
    _, tokenizer = open_checkpoint(smollm2_path)
    target = SimpleNamespace(tokenizer=tokenizer, config=SimpleNamespace(context_size=8192))
    engine = cast("Engine", SimpleNamespace(models=SimpleNamespace(target=target)))
    assert tokenizer.counts([_document(engine, length)]) == [length]


def test_a_length_beyond_the_models_context_is_refused_before_its_text_is_made(engine: RunningEngine):
    for what in (WarmUp(lengths=(10**9,)), WarmUp(chats=(10**9,))):
        said: list[str] = []
        with pytest.raises(InputError, match=r"at most the model's context of \d+ tokens, got 1000000000"):
            warm_up(engine, what, said.append)
        assert said == []


def test_on_an_accelerator_a_round_of_every_program_is_run(config, engine, monkeypatch):
    """Also of those behind a round that has ended the answer."""
    found, advance = [], Rounds.advance

    def seen(rounds: Rounds, plan: Plan, count: int) -> Observation:
        found.append((plan, advance(rounds, plan, count).rounds))
        return advance(rounds, plan, 0)

    settings = replace(config.speculation, mode="target", lookup="auto"), replace(config.sampling, max_new_tokens=1)
    config = replace(config, speculation=settings[0], sampling=settings[1])
    with monkeypatch.context() as patch:
        patch.setattr(warm_up_module, "platform_of", lambda mesh: "gpu")
        one = RunningEngine(config, engine.models, warm=WarmUp((SHORT,), rows=2))
        patch.setattr(warm_up_module, "_ask", lambda engine, request: None)
        patch.setattr(Rounds, "advance", seen)
        one.warm_up(lambda text: None)
    assert len(found) == 2 * 2 * 3 and all(run == 1 for _, run in found), "plain and copying, of two sizes, three rules"
