# SPDX-License-Identifier: Apache-2.0
"""The server over the engine itself, with tiny random models: the same answers as without a server."""

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import openai
import pytest

from rapid_jax.config import CacheConfig, ComputeConfig, ModelsConfig, RapidConfig
from rapid_jax.engine.models import Models
from rapid_jax.engine.request import Done, Event, Question, Request
from rapid_jax.engine.service import RunningEngine
from rapid_jax.retrieval.config import RetrievalConfig
from rapid_jax.speculative.config import SamplingSettings, SpeculationConfig
from tests.retrieval import encoders
from tests.serve.conftest import KEYS, Running, running
from tests.tiny_models import save_decoder, words

DOCUMENT, QUESTION, LIMIT = words(90), "w12 w34 w56?", 12


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> RapidConfig:
    folder: Path = tmp_path_factory.mktemp("tiny")
    target, encoder = save_decoder(folder / "model"), encoders.save(folder / "encoder", "bert")
    return RapidConfig(
        models=ModelsConfig(target=str(target), encoder=str(encoder)),
        retrieval=RetrievalConfig(chunk_tokens=64, min_tokens=128),
        speculation=SpeculationConfig(gamma=3, lookup="off", rounds_per_read=1),
        sampling=SamplingSettings(temperature=0.0, max_new_tokens=LIMIT),
        compute=ComputeConfig(prefill_chunk=64),
        cache=CacheConfig(folder=str(folder / "cache"), prefixes=False, programs=False),
    )


class Unwarmed(RunningEngine):
    """Compiles when it is asked: each test needs few programs."""

    def warm_up(self, report) -> None:
        del report


@pytest.fixture(scope="module")
def found(config) -> Iterator[Running]:
    engine = Unwarmed(config, Models(config, quiet=True), queue=3)
    with running(engine, KEYS, config=config, drain_seconds=10) as found:
        yield found


@pytest.fixture(scope="module")
def client(found: Running) -> openai.OpenAI:
    return found.openai(KEYS[0])


def ask(client: openai.OpenAI, **more):
    body = {"model": "model", "messages": [{"role": "user", "content": QUESTION}], "seed": 5}
    return client.chat.completions.create(**body | {"extra_body": {"document": DOCUMENT}} | more)


def test_the_answer_is_the_engines_own(config, found: Running, client: openai.OpenAI):
    events: list[Event] = []
    sampling = replace(config.sampling, seed=5)
    request = Request.of(Question(DOCUMENT, QUESTION), replace(config, sampling=sampling))
    ticket = found.engine.submit(request, events.append)
    got = ask(client, extra_body={"document": DOCUMENT, "origins": True})
    while not ticket.job.ended:
        time.sleep(0.01)
    assert isinstance(events[-1], Done)
    answer = events[-1].answer
    choice = got.choices[0]
    assert choice.message.content == answer.text
    assert len(answer.token_ids) <= LIMIT and answer.text
    assert got.usage is not None and got.usage.prompt_tokens == answer.target_tokens
    told = choice.model_extra["rapid"]
    assert "".join(span["text"] for span in told["origins"]) == answer.text
    chunks = [(chunk.start, chunk.end, chunk.text) for chunk in answer.selection.chunks]
    assert [(one["start"], one["end"], one["text"]) for one in told["citations"]] == chunks
    stream = ask(client, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == answer.text


def test_a_document_is_prefilled_once_for_its_questions(found: Running, client: openai.OpenAI):
    with found.http(KEYS[0]) as http:
        id = http.post("/v1/documents", json={"text": words(90, seed=9)}).json()["id"]
        assert http.get(f"/v1/documents/{id}").json()["state"] == "uploaded"
        reused = [
            ask(client, extra_body={"document": id}).choices[0].model_extra["rapid"]["document_reused"]
            for _ in range(2)
        ]
        assert reused == [False, True]
        assert http.get(f"/v1/documents/{id}").json()["state"] == "prefilled"
    with found.openai(KEYS[1]) as other:
        again = ask(other, extra_body={"document": words(90, seed=9)}).choices[0]
        assert not again.model_extra["rapid"]["document_reused"]  # another key's: time would tell


def test_log_probabilities_of_a_prompt_are_those_of_the_answer_that_made_it(client: openai.OpenAI):
    how = {"model": "model", "temperature": 0, "logprobs": 2}
    made = client.completions.create(prompt="w1 w2 w3", max_tokens=6, **how).choices[0]
    prompt = client.completions.create(prompt="w1 w2 w3", max_tokens=1, echo=True, **how).choices[0].logprobs
    count = len(prompt.tokens) - 1
    assert prompt.token_logprobs[count] == pytest.approx(made.logprobs.token_logprobs[0], abs=1e-3)
    assert made.logprobs.token_logprobs == [max(top.values()) for top in made.logprobs.top_logprobs]  # greedy
    assert len(made.logprobs.tokens) == 6
    whole = client.completions.create(prompt="w1 w2 w3" + made.text, max_tokens=0, echo=True, **how).choices[0].logprobs
    if whole.tokens[count:] == made.logprobs.tokens:  # the text is parted into tokens as it was made
        assert whole.token_logprobs[count:] == pytest.approx(made.logprobs.token_logprobs, abs=1e-3)


def test_who_leaves_frees_the_row(found: Running, client: openai.OpenAI):
    stream = ask(client, stream=True, max_tokens=1500, extra_body={"retrieval": "off"})
    next(iter(stream))
    stream.close()
    end = time.monotonic() + 10
    while found.engine.stats().running and time.monotonic() < end:
        time.sleep(0.02)
    stats = found.engine.stats()
    assert (stats.running, stats.waiting) == (0, 0)
    assert ask(client).choices[0].finish_reason in ("stop", "length")


@pytest.mark.parametrize(
    ("more", "status"),
    [
        ({"max_tokens": 100_000}, 413),
        ({"extra_body": {"document": words(3000)}}, 413),
        ({"messages": [{"role": "user", "content": "w1 " * 3000}], "extra_body": {"retrieval": "off"}}, 413),
        ({"messages": [{"role": "system", "content": "x"}], "extra_body": {}}, 400),
        ({"extra_body": {"document": "doc-0123456789abcdef01234567"}}, 404),
        ({"temperature": 1e-9}, 400),
    ],
)
def test_what_cannot_be_answered_has_its_status(client: openai.OpenAI, more: dict, status: int):
    with pytest.raises(openai.APIStatusError) as caught:
        ask(client, **more)
    assert caught.value.status_code == status
    assert ask(client).choices[0].message.content


def test_a_chat_without_a_document_is_answered_by_the_target_alone(client: openai.OpenAI):
    long = ask(client, messages=[{"role": "user", "content": "w1 " * 300}], extra_body={})  # and no question behind it
    assert long.usage is not None and long.usage.prompt_tokens > 300
    alone, *others = (ask(client, extra_body={"mode": mode}) for mode in ("target", "rapid", "lossless", "retrieval"))
    for other in others:
        assert other.choices[0].message == alone.choices[0].message
