# SPDX-License-Identifier: Apache-2.0
"""Requests side by side: each gets the tokens that it gets alone, whoever is beside it, comes late or goes."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rapid_jax.attention.attend import attend_self
from rapid_jax.attention.strategy import Strategy
from rapid_jax.config import CacheConfig, ComputeConfig, ModelsConfig, RapidConfig
from rapid_jax.engine.engine import Engine
from rapid_jax.engine.errors import Draining, QueueFull
from rapid_jax.engine.reader import read
from rapid_jax.engine.request import Cancelled, Chat, Done, Event, Failed, Piece, Question, Request, Retrieved, Tokens
from rapid_jax.model.decoder import Decoder
from rapid_jax.retrieval.config import RetrievalConfig
from rapid_jax.runtime.errors import InputError
from rapid_jax.speculative.config import SamplingSettings, SpeculationConfig
from tests.retrieval import encoders
from tests.tiny_models import save_decoder, words

DOCUMENTS = [words(90, seed=seed) for seed in range(3)]
QUESTIONS = ["w12 w34 w56?", "w1?", "w3 w4 w5 w6?", "w80 w2?"]
LIMIT = 12


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> RapidConfig:
    folder: Path = tmp_path_factory.mktemp("tiny")
    target = save_decoder(folder / "model", sizes={"num_hidden_layers": 1})
    encoder = encoders.save(folder / "encoder", "bert")
    return RapidConfig(
        models=ModelsConfig(target=str(target), encoder=str(encoder)),
        retrieval=RetrievalConfig(chunk_tokens=64, min_tokens=128),
        speculation=SpeculationConfig(gamma=3, lookup="off", rounds_per_read=1),
        sampling=SamplingSettings(temperature=0.9, max_new_tokens=LIMIT),
        compute=ComputeConfig(prefill_chunk=64),
        cache=CacheConfig(folder=str(folder / "cache"), prefixes=False, programs=False),
    )


@pytest.fixture(scope="module")
def engine(config) -> Engine:
    engine = Engine(config, quiet=True, prefill_first=False)
    engine.models.load(config.speculation)
    return engine


def test_owners_share_the_embeddings_of_public_documents_alone(config, engine, monkeypatch):
    """As they do keys and values: else the time that a request takes would tell what others have asked about."""
    made, embed = [], engine.models.embedder.embed_windows
    counted = lambda texts, *more: made.append(texts) or embed(texts, *more)  # noqa: E731
    monkeypatch.setattr(engine.models.embedder, "embed_windows", counted)
    new = []
    for owner, public in (("a", False), ("b", False), ("a", False), ("a", True), ("b", True), ("c", True)):
        asked = Request.of(Question(words(90, seed=9), "w1?"), config, owner=owner, public=public)
        assert read(engine.models, config, asked).selection is not None
        new.append(len(made) == 1)
        made.clear()
    assert new == [True, True, False, True, False, False]


class Heard:
    """The events of a request."""

    def __init__(self, engine: Engine, request: Request):
        self.events: list[Event] = []
        self.ticket = engine.submit(request, self.events.append)

    @property
    def last(self) -> Event:
        return self.events[-1]

    @property
    def tokens(self) -> list[int]:
        assert isinstance(self.last, Done), self.last
        return self.last.answer.token_ids

    @property
    def pieces(self) -> list[Piece]:
        return [event for event in self.events if isinstance(event, Piece)]


def request(config: RapidConfig, number: int, **changes) -> Request:
    """One of four that have little in common but their models; two each are about the same document."""
    sampling = [
        {"temperature": 0.0},
        {"temperature": 0.9, "top_k": 5},
        {"temperature": 0.7, "top_p": 0.8, "repetition_penalty": 1.3},
        {"temperature": 1.2, "min_p": 0.05},
    ][number % 4]
    speculation = [
        {"mode": "rapid", "gamma": 3},
        {"mode": "lossless", "gamma": 3},
        {"mode": "phat", "gamma": 3, "eta": 2.0, "guard": "none"},
        {"mode": "rapid", "gamma": 1, "guard": "paper", "eta": 20.0},
    ][number % 4]
    settings = replace(
        config,
        speculation=replace(config.speculation, **speculation),
        sampling=SamplingSettings(max_new_tokens=LIMIT - number % 3, seed=number, **sampling),
    )
    prompt = Question(DOCUMENTS[number % 2], QUESTIONS[number % len(QUESTIONS)])
    return replace(Request.of(prompt, settings), **changes)


@pytest.fixture(scope="module")
def alone(engine, config) -> list[list[int]]:
    """The tokens of each request with nobody beside it."""
    found = []
    for number in range(4):
        heard = Heard(engine, request(config, number))
        engine.run([heard.ticket])
        found.append(heard.tokens)
    assert len({tuple(tokens) for tokens in found}) == 4
    return found


def test_each_has_the_tokens_that_it_has_alone(engine, config, alone):
    together = [Heard(engine, request(config, number)) for number in range(4)]
    engine.run([heard.ticket for heard in together])
    assert [heard.tokens for heard in together] == alone
    assert engine.is_idle
    for heard in together:
        assert isinstance(heard.events[0], Retrieved)
        answer = heard.last.answer  # type: ignore[union-attr]
        assert "".join(piece.text for piece in heard.pieces) == answer.text
        assert [token for piece in heard.pieces for token in piece.token_ids] == answer.token_ids
        assert [origin for piece in heard.pieces for origin in piece.origins] == answer.origins


def test_who_joins_late_and_who_goes_concerns_nobody_else(engine, config, alone):
    first = [Heard(engine, request(config, number)) for number in (0, 1)]
    while not all(heard.pieces for heard in first):
        engine.step()
    late = [Heard(engine, request(config, number)) for number in (2, 3)]
    first[1].ticket.cancel()
    engine.run([heard.ticket for heard in (*first, *late)])
    assert isinstance(first[1].last, Failed) and isinstance(first[1].last.error, Cancelled)
    said = [token for piece in first[1].pieces for token in piece.token_ids]
    assert len(said) < len(alone[1]) and said == alone[1][: len(said)]
    assert [heard.tokens for heard in (first[0], *late)] == [alone[at] for at in (0, 2, 3)]
    assert engine.is_idle


@pytest.mark.parametrize("seen", ["new", "declared"])
def test_sizes_side_by_side_have_the_tokens_that_they_have_alone(config, engine, seen):
    """A smaller row is copied into a larger lane; a larger one, or one of a declared size, has a lane of its own."""
    engine = Engine(config, engine.models, quiet=True, prefill_first=False)
    longer = SamplingSettings(temperature=0.0, max_new_tokens=60)
    asked = [
        replace(request(config, 1), prompt=Question(words(count, seed=5), QUESTIONS[number]), sampling=longer)
        for number, count in enumerate((200, 90, 400))
    ]
    alone = []
    for one in asked:
        heard = Heard(engine, one)
        while not (engine._lanes or heard.ticket.job.ended):
            engine.step()
        (key,) = engine._lanes
        if seen == "declared":
            engine.sharing.declared[key.slots] = {(1, 1)}
        engine.run([heard.ticket])
        alone.append(heard.tokens)
    together, lanes = [], []
    for one in asked:
        together.append(Heard(engine, one))
        while not (together[-1].pieces or together[-1].ticket.job.ended):
            engine.step()
        lanes.append(len(engine._lanes))
    assert lanes == ([1, 1, 2] if seen == "new" else [1, 2, 3])
    engine.run([heard.ticket for heard in together])
    assert [heard.tokens for heard in together] == alone
    assert len(engine.sharing.pairs) == (seen == "new") and engine.is_idle


def test_those_that_draft_nothing_have_the_tokens_that_they_have_alone(config, engine):
    """At a gamma of 0 there is a drafter all the same, in mode target none whatever the gamma."""
    engine = Engine(config, engine.models, quiet=True)
    asked = []
    for mode, gamma in (("lossless", 0), ("target", "auto")):
        speculation = replace(config.speculation, mode=mode, gamma=gamma)
        asked.append(replace(request(config, 2), speculation=speculation))
    together = [Heard(engine, one) for one in asked]
    engine.run([heard.ticket for heard in together])
    alone = Heard(engine, asked[1])
    engine.run([alone.ticket])
    assert [heard.tokens for heard in together] == [alone.tokens] * 2


def test_cancelled_before_it_began_or_while_its_prompt_is_read(engine, config, alone):
    waiting, running = (Heard(engine, request(config, number)) for number in (1, 0))
    waiting.ticket.cancel()
    engine.step()
    running.ticket.cancel()
    other = Heard(engine, request(config, 2))
    engine.run([heard.ticket for heard in (waiting, running, other)])
    assert waiting.events[-1:] and isinstance(waiting.last, Failed) and isinstance(running.last, Failed)
    assert other.tokens == alone[2] and engine.is_idle


def test_a_documents_keys_and_values_are_made_once_and_shared(config):
    engine = Engine(config, quiet=True)
    engine.models.load(config.speculation)
    asked = [replace(request(config, 0), prompt=Question(DOCUMENTS[2], question)) for question in QUESTIONS[:2]]
    heard = [Heard(engine, one) for one in asked]
    engine.run([one.ticket for one in heard])
    answers = [one.last.answer for one in heard]  # type: ignore[union-attr]
    assert [answer.prefix_reused for answer in answers] == [False, True]
    head = len(answers[0].reading.long.head)
    assert engine.prefixes.bytes()["device"] == engine.prefixes.bytes_for(head)


def test_owners_share_no_keys_and_values_but_of_what_is_public(engine, config):
    prompt = Question(words(90, seed=8), QUESTIONS[0])
    reused = []
    for owner, public in (("a", False), ("a", False), ("b", False), ("", True), ("b", True)):
        heard = Heard(engine, replace(request(config, 0), prompt=prompt, owner=owner, public=public))
        engine.run([heard.ticket])
        reused.append(heard.last.answer.prefix_reused)  # type: ignore[union-attr]
    assert reused == [False, True, False, False, True]


def test_a_request_at_fault_fails_alone(engine, config, alone):
    bad = [
        Heard(engine, replace(request(config, 0), prompt=prompt))
        for prompt in (Question("", "w1?"), Question(DOCUMENTS[0], " "), Tokens([1, 10**6]), Chat([], None))
    ]
    good = Heard(engine, request(config, 1))
    engine.run([heard.ticket for heard in (*bad, good)])
    for heard in bad:
        assert isinstance(heard.last, Failed) and isinstance(heard.last.error, InputError), heard.last
    assert good.tokens == alone[1]


def test_the_queue_has_an_end(config, engine):
    short = Engine(config, engine.models, queue=2, quiet=True)
    heard = [Heard(short, request(config, number)) for number in range(2)]
    with pytest.raises(QueueFull):
        Heard(short, request(config, 2))
    for one in heard:
        one.ticket.cancel()
    short.run([one.ticket for one in heard])
    short.refuse()
    with pytest.raises(Draining):
        Heard(short, request(config, 2))


def log_softmax_after(decoder: Decoder, tokens: list[int]) -> np.ndarray:
    """[T, V] after each of the tokens, which are read at once, without a cache."""
    pos_BT = jnp.arange(len(tokens))[None]
    attend = attend_self(pos_BT, Strategy(block=1024))
    hidden_BTD, _ = decoder.hidden(jnp.asarray([tokens]), pos_BT, attend)
    return np.asarray(jax.nn.log_softmax(decoder.logits(hidden_BTD)[0]))


def test_log_probabilities_are_the_models_own(engine, config):
    """By the logits of the prompt and the answer read at once."""
    settings = replace(config, speculation=SpeculationConfig(mode="target"))
    one = replace(Request.of(Question(DOCUMENTS[0], QUESTIONS[0]), settings), logprobs=4)
    heard, beside = Heard(engine, one), Heard(engine, replace(one, logprobs=None))
    engine.run([heard.ticket, beside.ticket])
    answer = heard.last.answer  # type: ignore[union-attr]
    assert answer.token_ids == beside.tokens
    prompt = answer.reading.long.tokens
    want = log_softmax_after(engine.models.target.decoder, [*prompt, *answer.token_ids])[len(prompt) - 1 : -1]
    assert [each.token_id for each in answer.logprobs] == answer.token_ids
    for row, each in zip(want, answer.logprobs, strict=True):
        np.testing.assert_allclose(each.logprob, row[each.token_id], atol=2e-4)
        best = np.argsort(-row)[:4]
        assert [token for token, _ in each.top] == best.tolist()
        np.testing.assert_allclose([value for _, value in each.top], row[best], atol=2e-4)
    told = [each for piece in heard.pieces for each in piece.logprobs or []]
    assert told == answer.logprobs
