# SPDX-License-Identifier: Apache-2.0
"""Chats through the openai client."""

from dataclasses import replace

import openai
import pytest

from rapid_jax.engine.request import Chat
from tests.serve.conftest import Running
from tests.serve.engine import NAME, selected, tokenizer

DOCUMENT = "The lighthouse stands on the cape. " * 20
ASK = [{"role": "user", "content": "where is the lighthouse"}]


def ask(client: openai.OpenAI, **more):
    return client.chat.completions.create(**{"model": NAME, "messages": ASK, "seed": 7} | more)


def test_an_answer_has_openais_form(client: openai.OpenAI):
    got = ask(client)
    choice = got.choices[0]
    assert (got.object, got.model, len(got.choices)) == ("chat.completion", NAME, 1)
    assert (choice.message.role, choice.message.content) == ("assistant", "where is the lighthouse seed 7")
    assert (choice.finish_reason, choice.logprobs) == ("stop", None)
    assert got.usage is not None and got.usage.total_tokens == got.usage.prompt_tokens + got.usage.completion_tokens
    assert got.usage.completion_tokens == len(tokenizer().encode_quoted(choice.message.content or "")) + 1


def test_a_stream_joins_to_the_answer_and_ends_with_the_usage(client: openai.OpenAI):
    whole = ask(client)
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert len(chunks) > 4  # it came in pieces
    reasons = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    assert reasons[-1] == "stop" and set(reasons[:-1]) == {None}
    assert chunks[-1].choices == [] and chunks[-1].usage is not None and chunks[-1].usage == whole.usage
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_without_stream_options_there_is_no_usage(client: openai.OpenAI):
    assert all(chunk.choices and chunk.usage is None for chunk in ask(client, stream=True))


def test_several_choices_have_seeds_that_follow_each_other(client: openai.OpenAI):
    got = ask(client, n=3)
    assert [choice.message.content for choice in got.choices] == [
        f"where is the lighthouse seed {n}" for n in (7, 8, 9)
    ]
    texts = ["", "", ""]
    for chunk in ask(client, n=3, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [choice.message.content for choice in got.choices]


def test_what_a_model_thinks_comes_apart_where_it_is_asked_to(client: openai.OpenAI):
    thinking = {"extra_body": {"chat_template_kwargs": {"enable_thinking": True}, "origins": True}}
    got = ask(client, **thinking).choices[0]
    assert got.message.content == "where is the lighthouse seed 7"
    assert got.message.model_extra == {"reasoning_content": "of where is the lighthouse"}
    assert "".join(span["text"] for span in got.model_extra["rapid"]["origins"]) == got.message.content
    deltas = [chunk.choices[0].delta for chunk in ask(client, stream=True, **thinking)]
    thoughts = [delta.model_extra.get("reasoning_content", "") for delta in deltas]
    assert "".join(thoughts).strip() == "of where is the lighthouse" and len([x for x in thoughts if x]) > 1
    assert "".join(delta.content or "" for delta in deltas) == got.message.content
    off = ask(client, extra_body={"chat_template_kwargs": {"enable_thinking": False}}).choices[0].message
    assert "reasoning_content" not in off.to_dict()


def test_without_a_seed_each_request_has_its_own(client: openai.OpenAI, served: Running):
    ask(client, seed=None)
    ask(client, seed=None)
    first, second = served.engine.requests[-2:]
    assert first.sampling.seed != second.sampling.seed
    ask(client, seed=-1)
    assert served.engine.requests[-1].sampling.seed == 2**32 - 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_text_ends_the_answer(client: openai.OpenAI, stream: bool):
    got = ask(client, stop=["lighthouse"], stream=stream)
    if stream:
        assert "".join(chunk.choices[0].delta.content or "" for chunk in got) == "where is the "
    else:
        assert got.choices[0].message.content == "where is the "
        assert got.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_the_limit_ends_the_answer(client: openai.OpenAI, name: str):
    got = ask(client, **{name: 4})
    assert (got.choices[0].finish_reason, got.usage.completion_tokens) == ("length", 4)


def test_log_probabilities_come_with_each_token(client: openai.OpenAI):
    got = ask(client, logprobs=True, top_logprobs=3, max_tokens=5)
    content = got.choices[0].logprobs.content
    assert "".join(one.token for one in content) == got.choices[0].message.content
    assert len(content) == 5 and all(len(one.top_logprobs) == 3 for one in content)
    assert bytes(content[0].bytes).decode() == content[0].token
    assert all(one.logprob <= one.top_logprobs[0].logprob for one in content)
    streamed = []
    for chunk in ask(client, logprobs=True, top_logprobs=3, max_tokens=5, stream=True):
        streamed += chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else []
    assert streamed == content
    assert ask(client, logprobs=True).choices[0].logprobs.content[0].top_logprobs == []


def test_what_concerns_the_answer_reaches_the_engine(client: openai.OpenAI, served: Running):
    more = {
        "mode": "phat",
        "eta": 3.5,
        "gamma": 4,
        "guard": "paper",
        "top_k": 5,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
    }
    ask(client, temperature=0.5, top_p=0.9, stop="x", extra_body=more)
    got = served.engine.requests[-1]
    how, sampling = got.speculation, got.sampling
    assert (how.mode, how.eta, how.gamma, how.guard) == ("phat", 3.5, 4, "paper")
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.9, 5, 0.1)
    assert (sampling.repetition_penalty, sampling.seed, got.stop, got.logprobs) == (1.1, 7, ("x",), None)
    ask(client, extra_body={"top_k": -1, "gamma": "auto"})
    assert (served.engine.requests[-1].sampling.top_k, served.engine.requests[-1].speculation.gamma) == (0, "auto")


def test_what_a_request_leaves_out_is_the_servers_own(client: openai.OpenAI, served: Running):
    ask(client)
    got, own = served.engine.requests[-1], served.service.defaults
    assert got.speculation == own.speculation
    assert (got.sampling.temperature, got.sampling.max_new_tokens) == (None, own.sampling.max_new_tokens)


@pytest.mark.parametrize(("retrieval", "mode"), [("draft", "rapid"), ("only", "retrieval"), ("off", "target")])
def test_who_reads_what_is_retrieved(client: openai.OpenAI, served: Running, retrieval: str, mode: str):
    ask(client, extra_body={"retrieval": retrieval})
    assert served.engine.requests[-1].speculation.mode == mode


def test_what_is_retrieved_is_each_requests_own(client: openai.OpenAI, served: Running):
    ask(client)
    assert served.engine.requests[-1].retrieval is None
    ask(client, extra_body={"retrieval": {"use": "only", "min_tokens": 100, "max_chunks": 3}})
    got, own = served.engine.requests[-1], served.service.defaults.retrieval
    assert got.speculation.mode == "retrieval"
    assert got.retrieval == replace(own, min_tokens=100, max_chunks=3)


def test_the_roles_and_parts_of_messages(client: openai.OpenAI, served: Running):
    first = ask(client)
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]},
        first.choices[0].message.model_dump(),  # as it came
        {"role": "user", "content": "three", "name": "somebody"},
    ]
    ask(client, messages=messages)
    prompt = served.engine.requests[-1].prompt
    assert isinstance(prompt, Chat)
    assert [(one["role"], one["content"]) for one in prompt.messages] == [
        ("system", "be brief"),
        ("user", "one two"),
        ("assistant", "where is the lighthouse seed 7"),
        ("user", "three"),
    ]


def test_a_document_by_text_id_and_ids(client: openai.OpenAI, served: Running):
    other = "Another text about the sea."
    ids = [served.engine.documents.add(text).id for text in (DOCUMENT, other)]
    for given, read in [(DOCUMENT, DOCUMENT), (ids[0], DOCUMENT), (ids, f"{DOCUMENT}\n\n{other}")]:
        ask(client, extra_body={"document": given})
        assert served.engine.requests[-1].prompt.document == read


def test_citations_have_their_places_in_each_document(client: openai.OpenAI, served: Running):
    texts = [DOCUMENT, "Another text about the sea."]
    ids = [served.engine.documents.add(text).id for text in texts]
    rapid = ask(client, extra_body={"document": ids}).choices[0].model_extra["rapid"]
    joined = "\n\n".join(texts)
    chunks = selected(joined).chunks
    assert len(rapid["citations"]) == 3  # the second of the two chunks is of both documents
    for citation in rapid["citations"]:
        text = dict(zip(ids, texts, strict=True))[citation["document"]]
        assert citation["text"] == text[citation["start"] : citation["end"]]
    assert "\n\n".join(one["text"] for one in rapid["citations"][1:]) == chunks[1].text
    assert rapid["citations"][0]["score"] == 0.5
    assert (
        ask(client, extra_body={"document": ids, "mode": "target"}).choices[0].model_extra["rapid"]["citations"] == []
    )


def test_a_stream_tells_citations_before_the_answer_and_how_it_was_made_at_its_end(client: openai.OpenAI):
    chunks = [
        chunk.choices[0] for chunk in ask(client, stream=True, extra_body={"document": DOCUMENT, "origins": True})
    ]
    told = [choice.model_extra.get("rapid") or {} for choice in chunks]
    first = next(number for number, choice in enumerate(chunks) if choice.delta.content)
    assert len(next(one for one in told[:first] if "citations" in one)["citations"]) == 2
    assert (told[-1]["acceptance"], told[-1]["mode"]) == (0.8, "rapid")
    spans = [span for one in told for span in one.get("origins", [])]
    assert "".join(span["text"] for span in spans) == "".join(choice.delta.content or "" for choice in chunks)
    assert {span["origin"] for span in spans} == {"lookup", "draft", "correction", "bonus"}


def test_origins_come_on_request(client: openai.OpenAI):
    plain, told = (ask(client, extra_body=more).choices[0] for more in ({}, {"origins": True}))
    assert "origins" not in plain.model_extra["rapid"]
    spans = told.model_extra["rapid"]["origins"]
    assert "".join(span["text"] for span in spans) == told.message.content
    assert told.model_extra["rapid"]["acceptance"] == 0.8


def test_an_error_within_a_stream_is_told_in_it(client: openai.OpenAI):
    got = []
    with pytest.raises(openai.APIError, match="broken one"):
        for chunk in ask(client, stream=True, messages=[{"role": "user", "content": "a broken answer is wanted here"}]):
            got.append(chunk)
    assert len(got) > 1


@pytest.mark.parametrize("stream", [False, True])
def test_what_the_engine_refuses_later_has_its_status_all_the_same(client: openai.OpenAI, stream: bool):
    with pytest.raises(openai.BadRequestError, match="a refused one"):
        ask(client, stream=stream, messages=[{"role": "user", "content": "refused"}])


def test_the_models(client: openai.OpenAI):
    assert [one.id for one in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).owned_by == "rapid_jax"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")


def test_a_prompt_of_an_evaluation_is_one_message_with_the_mode_beside_it(served: Running):
    """What lm-evaluation-harness's local-chat-completions sends with --gen_kwargs mode=lossless,eta=10."""
    prompt = f"Answer from the passages.\n\n{DOCUMENT}\n\nQuestion: where is it?\nAnswer:"
    body = {"messages": [{"role": "user", "content": prompt}], "model": NAME, "max_tokens": 16, "temperature": 0.0}
    with served.http() as http:
        got = http.post("/v1/chat/completions", json=body | {"stop": [], "seed": 1234, "mode": "lossless", "eta": 10})
    assert got.status_code == 200 and got.json()["choices"][0]["message"]["content"]
    asked = served.engine.requests[-1]
    assert isinstance(asked.prompt, Chat) and asked.prompt.document is None
    assert [message["content"] for message in asked.prompt.messages] == [prompt]
    assert (asked.speculation.mode, asked.speculation.eta, asked.sampling.temperature) == ("lossless", 10.0, 0.0)
    assert (asked.sampling.max_new_tokens, asked.sampling.seed) == (16, 1234)
