# SPDX-License-Identifier: Apache-2.0
"""Who may ask: keys, names of the server, pages of other sites."""

from pathlib import Path

import httpx
import pytest

from rapid_jax.runtime.errors import InputError
from rapid_jax.serve.keys import Keys, read_keys
from rapid_jax.serve.settings import ServeSettings
from tests.serve.conftest import KEYS, Running, running

PROTECTED = [
    ("GET", "/v1/models"),
    ("GET", "/v1/models/tiny"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/documents"),
    ("GET", "/v1/documents"),
    ("GET", "/v1/documents/doc-1"),
    ("PATCH", "/v1/documents/doc-1"),
    ("DELETE", "/v1/documents/doc-1"),
    ("POST", "/tokenize"),
]


@pytest.mark.parametrize(
    "given", [None, "", "Bearer", "Bearer wrong-key-0123456789", f"Basic {KEYS[0]}", f"Bearer {KEYS[0]}x", KEYS[0]]
)
def test_without_a_key_nothing_is_answered(locked: Running, given: str | None):
    headers = {} if given is None else {"Authorization": given}
    with httpx.Client(base_url=locked.url, headers=headers) as http:
        for method, path in PROTECTED:
            got = http.request(method, path)
            assert (got.status_code, got.json()["error"]["code"]) == (401, "invalid_api_key"), (method, path)
            assert got.headers["WWW-Authenticate"] == "Bearer"
            assert all(key not in got.text for key in KEYS)


def test_every_route_of_the_api_is_protected(locked: Running):
    with locked.http() as http:
        paths = http.get("/openapi.json").json()["paths"]
    known = {(method.upper(), path) for path, methods in paths.items() for method in methods}
    opened = {("GET", path) for path in ("/health", "/ready", "/metrics")}
    shown = {
        (method, path.replace("doc-1", "{id}").replace("models/tiny", "models/{name}")) for method, path in PROTECTED
    }
    assert known == opened | shown


@pytest.mark.parametrize("key", KEYS)
def test_each_key_opens(locked: Running, key: str):
    with locked.http(key) as http, locked.openai(key) as client:
        assert http.get("/v1/models").status_code == 200
        assert client.models.list().data


def test_keys_have_owners_that_differ_and_say_nothing_of_the_key():
    keys = Keys(KEYS)
    owners = [keys.owner_of(f"Bearer {key}") for key in KEYS]
    assert len({*owners, "", None}) == 4
    assert Keys().owner_of(None) == Keys().owner_of("Bearer anything") == ""
    assert keys.owner_of("Bearer \udcff") is None
    assert Keys([*reversed(KEYS)]).owner_of(f"bearer  {KEYS[0]} ") == owners[0]


def test_keys_come_from_a_file_and_the_environment(tmp_path: Path):
    file = tmp_path / "keys"
    file.write_text(f"# mine\n\n{KEYS[0]}\n")
    keys = read_keys(file, {"RAPID_API_KEY": f" {KEYS[1]} ,"})
    assert all(keys.owner_of(f"Bearer {key}") for key in KEYS)
    assert not read_keys(None, {})
    assert read_keys(None, {"RAPID_API_KEY": KEYS[1]}).owner_of(f"Bearer {KEYS[0]}") is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected a key a line, got none"),
        (b"# none\n", "expected a key a line, got none"),
        (b"short\n", "at least 16"),
        (b"a key with spaces in it\n", "without spaces"),
        (f"{KEYS[0]}\n{KEYS[0]}\n".encode(), "got one twice"),
        ("sch\u00fcssel-0123456789".encode(), "expected keys in ASCII"),
    ],
)
def test_keys_that_keep_nobody_out_are_refused(tmp_path: Path, content: bytes, message: str):
    file = tmp_path / "keys"
    file.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read_keys(file, {})
    assert KEYS[0] not in str(caught.value)
    with pytest.raises(InputError, match="cannot be read"):
        read_keys(tmp_path / "none", {})


def test_a_page_of_another_site_is_refused(served: Running, locked: Running):
    for found, key in ((served, None), (locked, KEYS[0])):
        with found.http(key) as http:
            for origin in ("http://evil.example", "null", "http://127.0.0.1:1", "http://[bad"):
                form = {"files": {"file": ("a.txt", b"planted")}, "headers": {"Origin": origin}}
                got = http.post("/v1/documents", **form)
                assert (got.status_code, got.json()["error"]["code"]) == (403, "other_origin"), origin
            own = http.post("/v1/documents", json={"text": "mine"}, headers={"Origin": found.url})
            assert own.status_code == 200
            assert "access-control-allow-origin" not in own.headers


def test_a_name_that_leads_to_this_machine_by_trickery_is_refused(served: Running, locked: Running):
    with served.http() as http, locked.http(KEYS[0]) as keyed:
        for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", "[bad"):
            rebound = {"Host": host, "Origin": f"http://{host}"}
            assert http.get("/v1/documents", headers=rebound).status_code == 403
        for host in ("localhost", "LOCALHOST:8000", "127.0.0.1", "[::1]:8000"):
            assert http.get("/v1/documents", headers={"Host": host}).status_code == 200, host
        assert keyed.get("/v1/documents", headers={"Host": "proxy.example"}).status_code == 200
    with running(hosts=("proxy.example",)) as found, found.http() as http:
        assert http.get("/v1/documents", headers={"Host": "proxy.example"}).status_code == 200


def test_the_server_listens_on_this_machine_unless_told():
    assert ServeSettings().local and ServeSettings(host="::1").local and ServeSettings(host="localhost").local
    assert not ServeSettings(host="0.0.0.0").local and not ServeSettings(host="name.example").local


@pytest.mark.parametrize(
    "wrong",
    [
        {"host": ""},
        {"host": "a b"},
        {"port": -1},
        {"port": 65536},
        {"drain_seconds": float("nan")},
        {"body_mib": 0},
        {"upload_mib": 10**6},
        {"body_seconds": -1},
    ],
)
def test_settings_out_of_range_are_refused(wrong: dict):
    with pytest.raises(InputError, match=next(iter(wrong))):
        ServeSettings(**wrong)


def test_answers_are_not_kept_framed_or_taken_for_something_else(served: Running):
    with served.http() as http:
        for path in ("/", "/v1/models", "/nothing"):
            headers = http.get(path).headers
            assert (headers["X-Content-Type-Options"], headers["X-Frame-Options"]) == ("nosniff", "DENY")
            assert headers["Cache-Control"] == "no-store" and "default-src 'none'" in headers["Content-Security-Policy"]
            assert "server" not in headers
