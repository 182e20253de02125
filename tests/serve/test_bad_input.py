# SPDX-License-Identifier: Apache-2.0
"""Requests that cannot be answered: the right status, OpenAI's form, and the server goes on."""

import json

import httpx
import openai
import pytest

from tests.serve.conftest import Running, running
from tests.serve.engine import NAME, Engine

ASK = {"model": NAME, "messages": [{"role": "user", "content": "what is it"}]}
JSON = {"Content-Type": "application/json"}


@pytest.fixture
def http(served: Running):
    with served.http() as found:
        yield found


def user(*contents: object) -> dict:
    return {"messages": [{"role": "user", "content": content} for content in contents]}


@pytest.mark.parametrize(
    ("more", "status", "param"),
    [
        ({"model": "gpt-4"}, 404, "model"),
        ({"model": None}, 400, "model"),
        ({"messages": []}, 400, "messages"),
        ({"messages": "hello"}, 400, "messages"),
        (user(""), 400, "messages"),
        (user("before", " \n"), 400, "messages"),
        (user(3), 400, "messages.0.content"),
        (user([]), 400, "messages.0.content"),
        (user([{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]), 400, "messages.0.content.0.type"),
        (user("\ud800"), 400, "messages.0.content"),
        ({"messages": [{"role": "tool", "content": "x"}]}, 400, "messages.0.role"),
        ({"document": ""}, 400, "document"),
        ({"document": "  "}, 400, "document"),
        ({"document": []}, 400, "document"),
        ({"document": ["not an id"]}, 400, "document"),
        ({"document": "doc-0123456789abcdef01234567"}, 404, "document"),
        ({"document": "x", "messages": [{"role": "assistant", "content": "x"}]}, 400, "messages"),
        ({"document": "word " * 20_000}, 413, None),
        ({"max_tokens": 100_000}, 413, None),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, 400, "max_tokens"),
        ({"temperature": -0.1}, 400, "temperature"),
        ({"temperature": 2.5}, 400, "temperature"),
        ({"temperature": "hot"}, 400, "temperature"),
        ({"temperature": 1e-9}, 400, None),
        ({"temperature": float("nan")}, 400, "temperature"),
        ({"top_p": 0}, 400, "top_p"),
        ({"stop": ["x"] * 17}, 400, "stop"),
        ({"stop": [""]}, 400, "stop.0"),
        ({"stop": "x" * 1000}, 400, "stop"),
        ({"n": 0}, 400, "n"),
        ({"n": 17}, 400, "n"),
        ({"seed": 1.5}, 400, "seed"),
        ({"seed": 2**80}, 400, "seed"),
        ({"logprobs": 3}, 400, "logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs"),
        ({"top_logprobs": 2}, 400, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, 400, "stream_options"),
        ({"mode": "fast"}, 400, "mode"),
        ({"eta": -1}, 400, "eta"),
        ({"gamma": 65}, 400, "gamma"),
        ({"gamma": "many"}, 400, "gamma"),
        ({"retrieval": "off", "mode": "rapid"}, 400, "retrieval"),
        ({"retrieval": {"use": "draft"}, "mode": "target"}, 400, "retrieval"),
        ({"retrieval": {"threshold": 2}}, 400, "retrieval.threshold"),
        ({"retrieval": {"chunk_tokens": 8}}, 400, "retrieval.chunk_tokens"),
        ({"tools": [{"type": "function"}]}, 400, "tools"),
        ({"frequency_penalty": 0.5}, 400, "frequency_penalty"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format.type"),
        ({"temprature": 0.5}, 400, "temprature"),
    ],
)
def test_a_chat_that_cannot_be_answered(served: Running, http, more: dict, status: int, param: str | None):
    for stream in (False, True):
        if stream and "stream_options" in more:
            continue
        content = json.dumps(ASK | more | ({"stream": True} if stream else {}))
        got = http.post("/v1/chat/completions", content=content, headers=JSON)
        error = got.json()["error"]
        assert (got.status_code, error["param"]) == (status, param), error
        assert error["type"] == "invalid_request_error" and set(error) == {"message", "type", "param", "code"}
        assert "\n" not in error["message"]
    assert served.engine.idle()
    assert http.post("/v1/chat/completions", json=ASK).status_code == 200


@pytest.mark.parametrize(
    ("content", "headers", "status"),
    [
        (b"", JSON, 400),
        (b"{", JSON, 400),
        (b"[]", JSON, 400),
        (b"null", JSON, 400),
        (b"\xff\xfe", JSON, 400),
        (b'{"model": ' + b"9" * 5000 + b"}", JSON, 400),
        (b"[" * 100_000, JSON, 400),
        (b'{"metadata": ' + b"[" * 70 + b"]" * 70 + b"}", JSON, 400),
        (b"{}", {"Content-Type": "text/plain"}, 415),
        (b"model=tiny", {"Content-Type": "application/x-www-form-urlencoded"}, 415),
        (b"{}", {}, 415),
    ],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/documents", "/tokenize"])
def test_a_body_that_is_no_request(http: httpx.Client, path: str, content: bytes, headers: dict, status: int):
    got = http.post(path, content=content, headers=headers)
    assert got.status_code == status
    assert got.json()["error"]["type"] == "invalid_request_error"


def test_paths_and_methods_that_are_not_there(http: httpx.Client):
    for method, path, status in [("GET", "/v1/nothing", 404), ("GET", "/v1/completions", 405), ("PUT", "/health", 405)]:
        got = http.request(method, path)
        assert (got.status_code, got.json()["error"]["type"]) == (status, "invalid_request_error")


def test_a_fault_of_the_servers_own_says_nothing_of_what_was_asked(served: Running, http, caplog, capfd):
    ask = ASK | user("fault about pelicans")
    for stream in (False, True):
        got = http.post("/v1/chat/completions", json=ask | {"stream": stream})
        assert (got.status_code, got.json()["error"]["code"]) == (500, "internal_error")
    out, err = capfd.readouterr()
    assert "RuntimeError" in caplog.text  # where it arose
    for told in (got.text, caplog.text, out, err):
        assert "pelicans" not in told


def test_nothing_that_is_handed_in_or_asked_is_logged(caplog, capfd):
    with running() as found, found.http() as http:
        made = http.post("/v1/documents", json={"text": "all about pelicans", "name": "pelicans"}).json()
        http.post("/v1/documents", files={"file": ("pelicans.pdf", b"%PDF- pelicans")})
        http.post("/v1/chat/completions", json=ASK | user("pelicans?") | {"document": made["id"]})
        http.post("/v1/chat/completions", json=ASK | user("pelicans? refused"))
        http.post("/v1/chat/completions", content=b'{"pelicans', headers=JSON)
        http.get("/v1/documents/pelicans")
        said = found.said
    out, err = capfd.readouterr()
    for told in (caplog.text, out, err, " ".join(said)):
        assert "pelicans" not in told and made["id"] not in told


def test_a_full_queue_says_when_to_come_again():
    engine = Engine()
    with running(engine) as found, found.http() as http:
        engine.held.clear()
        got = http.post("/v1/chat/completions", json=ASK | {"n": 13})
        assert (got.status_code, got.headers["Retry-After"]) == (429, "2")
        assert (got.json()["error"]["type"], got.json()["error"]["code"]) == ("rate_limit_error", "queue_full")
        assert engine.idle()  # of thirteen none is left behind
        engine.held.set()
        assert http.post("/v1/chat/completions", json=ASK | {"n": 12}).status_code == 200
        engine.held.clear()
        with found.openai() as client, pytest.raises(openai.RateLimitError):
            client.chat.completions.create(model=NAME, messages=[{"role": "user", "content": "x"}], n=13)


def test_a_client_that_falls_silent_is_told_so():
    import socket

    with running(body_seconds=0.2) as found:
        port = int(found.url.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
            head = "POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            connection.sendall(f'{head}Content-Length: 100\r\n\r\n{{"prompt"'.encode())
            assert connection.recv(1000).startswith(b"HTTP/1.1 408")


def test_counting_tokens(http: httpx.Client):
    from tests.serve.engine import CONTEXT, tokenizer

    got = http.post("/tokenize", json={"model": NAME, "prompt": "the document"}).json()
    assert got == {"tokens": (ids := tokenizer().encode("the document")), "count": len(ids), "max_model_len": CONTEXT}
    chat = [{"role": "user", "content": "the document"}]
    assert http.post("/tokenize", json={"messages": chat}).json()["tokens"] == tokenizer().encode(
        tokenizer().chat(chat)
    )
    for wrong in ({}, {"prompt": "x", "messages": chat}):
        assert http.post("/tokenize", json=wrong).status_code == 400
    assert http.post("/tokenize", json={"prompt": "x", "model": "gpt-4"}).status_code == 404
