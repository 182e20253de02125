# SPDX-License-Identifier: Apache-2.0
"""Requests with every value replaced by others: each is asked of the engine or refused by name, and nothing breaks."""

import json
from typing import Any

import pytest
from pydantic import BaseModel

from rapid_jax.config import RapidConfig
from rapid_jax.engine.request import Request
from rapid_jax.serve.asked import chat_requests, read_documents
from rapid_jax.serve.bodies import _parse
from rapid_jax.serve.completions import prompt_ids
from rapid_jax.serve.errors import api_error_of
from rapid_jax.serve.fields import ChatRequest, CompletionRequest, DocumentRequest, TokenizeRequest
from rapid_jax.serve.service import Service
from tests.json_mutations import mutations, no_hang
from tests.serve.engine import NAME, Engine

CHAT = {
    "model": NAME,
    "messages": [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "what"}], "tool_calls": None},
    ],
    "document": ["doc-1"],
    "retrieval": {"use": "draft", "min_tokens": 100, "compression": 8, "threshold": 0.1, "max_chunks": 3},
    **{"mode": "rapid", "eta": 3.0, "gamma": 4, "guard": "code", "origins": True},
    **{"temperature": 0.5, "top_p": 0.9, "top_k": 3, "min_p": 0.1, "repetition_penalty": 1.1, "seed": 1},
    **{"n": 2, "stop": ["x"], "max_tokens": 5, "logprobs": True, "top_logprobs": 2},
    **{"stream": True, "stream_options": {"include_usage": True}, "tools": [], "logit_bias": {}, "user": "me"},
    **{"presence_penalty": 0, "response_format": {"type": "text"}, "metadata": {"x": "y"}},
}
COMPLETION = {
    **{"model": NAME, "prompt": [[5, 6], [7]], "max_tokens": 5, "logprobs": 2, "echo": True},
    **{"stop": "x", "n": 2, "best_of": 1, "suffix": "", "temperature": 0, "seed": 2},
}
TOKENIZE = {"model": NAME, "messages": [{"role": "user", "content": "what"}], "add_special_tokens": True}
DOCUMENT = {"text": "a text", "name": "a", "public": True, "pinned": False, "expires_in": 5}


@pytest.fixture(scope="module")
def service() -> Service:
    engine = Engine()
    engine.documents.get = lambda id, *, owner="": "a text"
    engine.documents.info = lambda id, *, owner="": Engine().documents.add("a text")
    return Service(engine, RapidConfig())


def outcome(service: Service, kind: type[BaseModel], value: Any) -> list[Request] | int:
    """What the engine would be asked, or the status of the refusal. Raises whatever would be an error 500."""
    try:
        with no_hang():
            body = _parse(json.dumps(value).encode(), kind)
            if isinstance(body, ChatRequest):
                read = read_documents(body.document, service.engine.documents, "")
                return chat_requests(body, read, service.defaults, "")
            if isinstance(body, CompletionRequest):
                prompt_ids(body, service)
            return []
    except Exception as error:
        known = api_error_of(error)
        if known is None:
            raise
        assert known.message.isprintable() and len(known.message) <= 500
        json.dumps(known.to_json(), ensure_ascii=False).encode()
        return known.status


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (ChatRequest, CHAT),
        (CompletionRequest, COMPLETION),
        (TokenizeRequest, TOKENIZE),
        (DocumentRequest, DOCUMENT),
    ],
)
def test_a_changed_request_is_asked_or_refused(service: Service, kind: type[BaseModel], value: dict):
    assert isinstance(outcome(service, kind, value), list)
    found = [outcome(service, kind, changed) for _, changed in mutations(value)]
    refused = [one for one in found if isinstance(one, int)]
    assert set(refused) == {400}
    assert len(found) // 3 < len(refused) < len(found)
