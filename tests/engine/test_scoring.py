# SPDX-License-Identifier: Apache-2.0
"""Prompts that are scored by a running engine, beside requests that it answers."""

from itertools import pairwise
from pathlib import Path

import pytest

from rapid_jax.config import CacheConfig, ComputeConfig, ModelsConfig, RapidConfig
from rapid_jax.engine import scoring
from rapid_jax.engine.errors import Draining
from rapid_jax.engine.request import Done, Event, Failed, Request, Tokens
from rapid_jax.engine.service import RunningEngine
from rapid_jax.runtime.errors import InputError
from rapid_jax.speculative.config import SamplingSettings, SpeculationConfig
from tests.tiny_models import save_decoder

CHUNK, LIMIT = 32, 40
IDS = [7, *range(3, 202)]


@pytest.fixture
def engine(tmp_path: Path) -> RunningEngine:
    target = save_decoder(tmp_path / "model", sizes={"num_hidden_layers": 1})
    config = RapidConfig(
        models=ModelsConfig(target=str(target)),
        speculation=SpeculationConfig(mode="target", lookup="off", rounds_per_read=1),
        sampling=SamplingSettings(temperature=0.0, max_new_tokens=LIMIT),
        compute=ComputeConfig(prefill_chunk=CHUNK),
        cache=CacheConfig(folder=str(tmp_path / "cache"), prefixes=False, programs=False),
    )
    return RunningEngine(config)


def test_rounds_go_on_between_the_chunks_of_a_prompt_that_is_scored(engine: RunningEngine, monkeypatch):
    happened: list[str] = []
    scored, step = scoring._score_chunk, engine.step
    monkeypatch.setattr(scoring, "_score_chunk", lambda *work: (happened.append("chunk"), scored(*work))[1])
    monkeypatch.setattr(engine, "step", lambda: (happened.append("step"), step())[1])
    events: list[Event] = []
    engine.submit(Request.of(Tokens(IDS[:20]), engine.config), events.append)
    score = engine.score(IDS, 2)
    engine.start()
    assert len(score.result(120)) == len(IDS)
    assert engine.drain(120) and isinstance(events[-1], Done)
    chunks = [place for place, what in enumerate(happened) if what == "chunk"]
    assert len(chunks) == -(-len(IDS) // CHUNK)
    assert all(later > before + 1 for before, later in pairwise(chunks[:3])), happened


def test_what_cannot_be_scored_does_not_stop_the_others(engine: RunningEngine):
    wrong, taken_back, right = engine.score([10**6], 0), engine.score(IDS, 0), engine.score(IDS[:9], 1)
    taken_back.cancel()
    engine.start()
    assert len(right.result(120)) == 9
    with pytest.raises(InputError, match="token"):
        wrong.result(120)
    assert taken_back.cancelled()
    engine.stop()


def test_an_engine_that_stops_leaves_nobody_waiting(engine: RunningEngine):
    waiting = engine.score(IDS, 0)
    engine._stopped = True
    engine.start()
    with pytest.raises(Draining):
        waiting.result(120)


def test_a_prompt_that_nobody_wants_any_more_is_left(engine: RunningEngine):
    score = engine.score(IDS, 0)
    engine._score()
    assert score.cancel()
    engine._score()
    assert not engine._scoring
    engine.stop()
    with pytest.raises(Draining):
        engine.score(IDS, 0)


def test_a_thread_that_dies_leaves_nobody_waiting(engine: RunningEngine, monkeypatch):
    monkeypatch.setattr(engine, "step", lambda: 1 / 0)
    monkeypatch.setattr("threading.excepthook", lambda args: None)
    assert not engine.has_failed
    events: list[Event] = []
    engine.submit(Request.of(Tokens(IDS[:20]), engine.config), events.append)
    score = engine.score(IDS, 0)
    engine.start()
    with pytest.raises(Draining):
        score.result(120)
    engine._thread.join(120)
    assert isinstance(events[-1], Failed) and isinstance(events[-1].error, ZeroDivisionError)
    for again in (lambda: engine.score(IDS, 0), lambda: engine.submit(Request.of(Tokens(IDS), engine.config), print)):
        with pytest.raises(Draining):
            again()
    engine.stop()
    assert engine.has_failed
