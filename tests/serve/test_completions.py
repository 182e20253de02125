# SPDX-License-Identifier: Apache-2.0
"""Text completions through the openai client, and scoring as evaluations do it."""

from operator import itemgetter

import openai
import pytest

from rapid_jax.engine.request import Tokens
from tests.serve.conftest import Running, running
from tests.serve.engine import NAME, logprobs_of, tokenizer

PROMPT = "the document"


def complete(client: openai.OpenAI, **more):
    return client.completions.create(**{"model": NAME, "prompt": PROMPT, "seed": 3} | more)


def test_a_completion_has_openais_form(client: openai.OpenAI, served: Running):
    got = complete(client)
    assert (got.object, got.choices[0].text, got.choices[0].finish_reason) == (
        "text_completion",
        "tokens seed 3",
        "stop",
    )
    ids = tokenizer().encode(PROMPT)
    assert got.usage is not None and got.usage.prompt_tokens == len(ids)
    request = served.engine.requests[-1]
    assert request.prompt == Tokens(ids)
    assert (request.speculation.mode, request.sampling.max_new_tokens) == ("target", 16)


def test_prompts_are_texts_or_token_ids_one_or_several(client: openai.OpenAI, served: Running):
    ids = tokenizer().encode(PROMPT)
    for prompt, count in [(ids, 1), ([PROMPT, "other"], 2), ([ids, ids[:1]], 2)]:
        before = len(served.engine.requests)
        got = complete(client, prompt=prompt, n=2)
        assert [choice.index for choice in got.choices] == list(range(2 * count))
        assert [choice.text for choice in got.choices] == ["tokens seed 3", "tokens seed 4"] * count
        assert served.engine.requests[before].prompt == Tokens(ids)


def test_special_tokens_of_a_prompt_are_read_and_echoed(client: openai.OpenAI, served: Running):
    got = complete(client, prompt="<|im_start|>user", echo=True)
    assert served.engine.requests[-1].prompt.ids[0] == tokenizer().id_of("<|im_start|>")
    assert got.choices[0].text == "<|im_start|>usertokens seed 3"


def test_a_stream_joins_to_the_completion(client: openai.OpenAI):
    for more in ({}, {"echo": True}, {"echo": True, "logprobs": 2}, {"logprobs": 2}):
        whole = complete(client, **more).choices[0]
        chunks = list(complete(client, stream=True, stream_options={"include_usage": True}, **more))
        choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
        assert "".join(choice.text for choice in choices) == whole.text
        assert (choices[-1].finish_reason, chunks[-1].usage) == ("stop", complete(client, **more).usage)
        if "logprobs" in more:
            for name in ("tokens", "token_logprobs", "text_offset", "top_logprobs"):
                joined = [one for choice in choices for one in getattr(choice.logprobs, name)]
                assert joined == getattr(whole.logprobs, name), name


def test_an_echo_has_the_log_probabilities_of_the_prompt(client: openai.OpenAI):
    ids = tokenizer().encode(PROMPT)
    got = complete(client, echo=True, logprobs=2, max_tokens=1).choices[0]
    assert got.text.startswith(PROMPT)
    told = got.logprobs
    assert len(told.tokens) == len(ids) + 1
    assert (told.token_logprobs[0], told.top_logprobs[0]) == (None, None)
    assert told.token_logprobs[1:-1] == [logprobs_of(one, 2).logprob for one in ids[1:]]
    assert all(got.text[at:].startswith(text) for at, text in zip(told.text_offset, told.tokens, strict=True))


def test_a_prompt_is_scored_without_an_answer(client: openai.OpenAI, served: Running):
    before = len(served.engine.requests)
    got = complete(client, echo=True, logprobs=1, max_tokens=0)
    assert (got.choices[0].text, got.usage.completion_tokens) == (PROMPT, 0)
    assert len(got.choices[0].logprobs.tokens) == got.usage.prompt_tokens
    assert len(served.engine.requests) == before
    chunks = list(complete(client, echo=True, max_tokens=0, stream=True))
    assert [(one.choices[0].text, one.choices[0].finish_reason) for one in chunks] == [(PROMPT, "length")]


def test_an_evaluation_finds_the_log_likelihood_and_whether_it_is_greedy(client: openai.OpenAI):
    """What lm-evaluation-harness's local-completions does with the answer: the last token is the generated one."""
    contexts, continuations = ["the answer is", "the seed is"], [" in the document", " forever"]
    ids = [tokenizer().encode(a) + tokenizer().encode(b) for a, b in zip(contexts, continuations, strict=True)]
    sizes = [len(tokenizer().encode(text)) for text in contexts]
    got = complete(client, prompt=ids, temperature=0, max_tokens=1, logprobs=1, echo=True, seed=1234).model_dump()
    for choice, size, prompt in zip(sorted(got["choices"], key=itemgetter("index")), sizes, ids, strict=True):
        scores, tops = (choice["logprobs"][name][size:-1] for name in ("token_logprobs", "top_logprobs"))
        truth = [logprobs_of(one, 1) for one in prompt[size:]]
        assert sum(scores) == pytest.approx(sum(one.logprob for one in truth))
        greedy = all(score == max(top.values()) for score, top in zip(scores, tops, strict=True))
        assert greedy == all(one.token_id == one.top[0][0] for one in truth)


def test_a_stream_begins_although_its_answer_takes_long():
    with running(first_seconds=0.1) as found, found.openai() as client:
        found.engine.held.clear()
        chunks = iter(complete(client, echo=True, stream=True))
        assert next(chunks).choices[0].text == PROMPT
        found.engine.held.set()
        assert "".join(chunk.choices[0].text for chunk in chunks) == "tokens seed 3"


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": ["x", ""]}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [320]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [10**30]}, "prompt"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"best_of": 2}, "best_of"),
        ({"suffix": "x"}, "suffix"),
        ({"logprobs": 21}, "logprobs"),
        ({"prompt": ["x"] * 100, "n": 2}, "n"),
        ({"extra_body": {"document": "x"}}, "document"),
    ],
)
def test_a_field_that_cannot_be_used_is_named(client: openai.OpenAI, more: dict, param: str):
    with pytest.raises(openai.BadRequestError) as caught:
        complete(client, **more)
    assert (caught.value.param or "").split(".")[0] == param


def test_what_never_fits_is_refused(client: openai.OpenAI):
    for more in ({"max_tokens": 10**6}, {"prompt": [5] * 5000}, {"prompt": [5] * 5000, "echo": True, "logprobs": 1}):
        with pytest.raises(openai.APIStatusError) as caught:
            complete(client, **more)
        assert (caught.value.status_code, caught.value.code) == (413, "context_length_exceeded")
