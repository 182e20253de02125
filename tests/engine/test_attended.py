# SPDX-License-Identifier: Apache-2.0
"""Requests that draft from the target's own cache: their answers, side by side, with nothing retrieved."""

from dataclasses import replace

import pytest

from rapid_jax.config import CacheConfig, ComputeConfig, ModelsConfig, RapidConfig
from rapid_jax.engine.engine import Engine
from rapid_jax.engine.request import Done, Event, Question, Request, Tokens
from rapid_jax.runtime.errors import InputError
from rapid_jax.speculative.config import SamplingSettings, SpeculationConfig
from tests.tiny_models import save_decoder, words

LONG, SHORT = words(160, seed=1), words(60, seed=2)  # of more blocks than are chosen, and of no more
PROMPTS = (
    Question(LONG, "w12 w34 w56?"),
    Question(SHORT, "w1?"),
    Question(LONG, "w3 w4 w5 w6?"),
    Tokens(range(3, 250)),
)


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> Engine:
    folder = tmp_path_factory.mktemp("tiny")
    target = save_decoder(folder / "model", sizes={"num_hidden_layers": 1})
    config = RapidConfig(
        models=ModelsConfig(target=str(target), drafter="attended", encoder=str(folder / "none")),
        speculation=SpeculationConfig("lossless", gamma=3, lookup="off", attended_tokens=128, attended_rounds=2),
        sampling=SamplingSettings(temperature=0.9, max_new_tokens=16),
        compute=ComputeConfig(prefill_chunk=64),
        cache=CacheConfig(folder=str(folder / "cache"), prefixes=False, programs=False),
    )
    engine = Engine(config, quiet=True, prefill_first=False)
    engine.models.load(config.speculation)
    return engine


def asked(engine: Engine, number: int, mode: str = "lossless") -> Request:
    """Requests of even numbers are greedy."""
    speculation = replace(engine.config.speculation, mode=mode)
    sampling = replace(engine.config.sampling, seed=number)
    sampling = sampling if number % 2 else replace(sampling, temperature=0.0)
    config = replace(engine.config, speculation=speculation, sampling=sampling)
    return Request.of(PROMPTS[number], config)


def answers(engine: Engine, requests: list[Request], steps: int = 0) -> list:
    """Of requests that come so many steps after each other."""
    events: list[list[Event]] = [[] for _ in requests]
    tickets = []
    for request, heard in zip(requests, events, strict=True):
        tickets.append(engine.submit(request, heard.append))
        for _ in range(steps):
            engine.step()
    engine.run(tickets)
    assert all(isinstance(heard[-1], Done) for heard in events), events
    return [heard[-1].answer for heard in events]  # type: ignore[union-attr]


def test_each_has_the_answer_that_it_has_alone_and_greedy_ones_are_the_targets(engine):
    alone = [answers(engine, [asked(engine, number)])[0] for number in range(len(PROMPTS))]
    together = answers(engine, [asked(engine, number) for number in range(len(PROMPTS))], steps=4)
    assert [answer.token_ids for answer in together] == [answer.token_ids for answer in alone]
    assert [answer.generation.accepted for answer in together] == [answer.generation.accepted for answer in alone]
    for number, answer in enumerate(alone):
        assert answer.selection is None and answer.draft_tokens == 0 and answer.generation.drafted[0] > 0
        if number % 2 == 0:
            assert answer.token_ids == answers(engine, [asked(engine, number, "target")])[0].token_ids
    accepted, drafted = (
        sum(getattr(answer.generation, name)[0] for answer in alone) for name in ("accepted", "drafted")
    )
    assert 0 < accepted < drafted


def test_a_request_whose_drafts_would_move_the_target_is_refused(engine):
    with pytest.raises(InputError, match=r"models.drafter attended .* expected speculation.mode lossless, or eta 0"):
        asked(engine, 0, "rapid")
    bare = replace(asked(engine, 0), speculation=SpeculationConfig("rapid", eta=3.0))
    with pytest.raises(InputError, match=r"got rapid with eta 3"):
        engine.submit(bare, lambda event: None)
