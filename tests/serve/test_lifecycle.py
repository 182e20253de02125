# SPDX-License-Identifier: Apache-2.0
"""Clients that go away, and a server that begins and ends."""

import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import httpx
import pytest

from rapid_jax.config import RapidConfig
from rapid_jax.runtime.errors import InputError
from rapid_jax.serve.errors import ApiError
from rapid_jax.serve.server import get_ready, listen, serve
from rapid_jax.serve.service import Service
from rapid_jax.serve.settings import ServeSettings
from tests.serve.conftest import Running, running
from tests.serve.engine import NAME, Engine

ROOT = Path(__file__).resolve().parents[2]
FOREVER = {"model": NAME, "messages": [{"role": "user", "content": "forever"}], "max_tokens": 3000}
SHORT = {"model": NAME, "messages": [{"role": "user", "content": "what"}]}


def metric(http: httpx.Client, name: str) -> float:
    """The sum of a figure over its labels."""
    lines = http.get("/metrics").text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if re.match(rf"{re.escape(name)}[{{ ]", line))


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize("n", [1, 3])
def test_who_leaves_a_stream_takes_the_request_back(path: str, n: int):
    engine = Engine(round_seconds=0.01)
    ask = FOREVER | {"n": n, "stream": True}
    if path == "/v1/completions":
        engine._answer = lambda job, real=engine._answer: real(_forever(job))  # prompts of ids say nothing
        ask = {"model": NAME, "prompt": "x", "max_tokens": 3000, "n": n, "stream": True}
    with running(engine) as found, found.http() as http:
        with http.stream("POST", path, json=ask) as got:
            lines = got.iter_lines()
            assert [next(lines) for _ in range(8)]
            assert engine.stats().running == n
        assert engine.idle(3)
        assert engine.cancelled == n
        assert http.post("/v1/chat/completions", json=SHORT).status_code == 200


def _forever(job):
    from dataclasses import replace

    from rapid_jax.engine.request import Chat

    return replace(job, request=replace(job.request, prompt=Chat(FOREVER["messages"])))


def test_who_hangs_up_while_it_waits_takes_the_request_back():
    engine = Engine(round_seconds=0.01)
    with running(engine) as found, found.http() as http:
        with pytest.raises(httpx.ReadTimeout):
            http.post("/v1/chat/completions", json=FOREVER, timeout=0.3)
        assert engine.idle(3) and engine.cancelled == 1
        engine.held.clear()  # nor does one stay in the queue
        with pytest.raises(httpx.ReadTimeout):
            http.post("/v1/chat/completions", json=FOREVER | {"stream": True}, timeout=0.3)
        assert engine.idle(3) and engine.cancelled == 2


def test_many_that_come_and_go_leave_nothing_behind():
    engine = Engine(round_seconds=0.001)
    with running(engine) as found, found.http() as http:

        def come_and_go(number: int) -> None:
            with (
                found.http() as own,
                own.stream("POST", "/v1/chat/completions", json=FOREVER | {"stream": True}) as got,
            ):
                for seen, _ in enumerate(got.iter_lines()):
                    if seen == number:
                        return

        for _ in range(3):
            threads = [threading.Thread(target=come_and_go, args=(number,)) for number in range(10)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(20)
            assert engine.idle(5)
        assert metric(http, "vllm:request_success_total") + metric(http, "rapid:requests_refused_total") >= 30
        assert (metric(http, "vllm:num_requests_running"), metric(http, "vllm:num_requests_waiting")) == (0, 0)


def test_the_figures_of_requests(served: Running):
    with served.http() as http:
        before = {name: metric(http, name) for name in ("vllm:prompt_tokens_total", "vllm:generation_tokens_total")}
        usage = http.post("/v1/chat/completions", json=SHORT | {"n": 2}).json()["usage"]
        assert (
            metric(http, "vllm:generation_tokens_total") - before["vllm:generation_tokens_total"]
            == usage["completion_tokens"]
        )
        assert (
            metric(http, "vllm:prompt_tokens_total") - before["vllm:prompt_tokens_total"] == 2 * usage["prompt_tokens"]
        )
        for name in ("vllm:time_to_first_token_seconds", "vllm:e2e_request_latency_seconds"):
            assert metric(http, f"{name}_count") == 2
        assert metric(http, "vllm:inter_token_latency_seconds_count") == usage["completion_tokens"] - 2 * 3
        assert (metric(http, "vllm:spec_decode_num_accepted_tokens_total"), metric(http, "rapid:rounds_total")) == (
            20,
            10,
        )
        text = http.get("/metrics").text
        assert 'rapid:kv_bytes{model_name="tiny",tier="host"} 2048.0' in text
        assert 'vllm:request_success_total{finished_reason="stop",model_name="tiny"} 2.0' in text


def test_a_request_is_counted_by_how_it_ended():
    ended = "vllm:request_success_total"
    with running() as found, found.http() as http:
        for content, stream in [("refused", False), ("refused", True), ("a broken answer is wanted here", False)]:
            ask = SHORT | {"messages": [{"role": "user", "content": content}], "stream": stream}
            assert http.post("/v1/chat/completions", json=ask).status_code == 400
        assert (metric(http, ended), metric(http, "rapid:requests_refused_total")) == (0, 3)
        http.post("/v1/chat/completions", json=SHORT)
        http.post("/v1/chat/completions", json=SHORT | {"max_tokens": 1})
        with pytest.raises(httpx.ReadTimeout):
            found.engine.held.clear()
            http.post("/v1/chat/completions", json=SHORT, timeout=0.2)
        assert found.engine.idle(3)
        lines = http.get("/metrics").text.splitlines()
        counted = {line for line in lines if line.startswith(ended)}
        labels = 'finished_reason="{}",model_name="tiny"'
        assert counted == {f"{ended}{{{labels.format(name)}}} 1.0" for name in ("stop", "length", "abort")}


def test_before_it_is_ready_it_says_so():
    with running(ready=False) as found, found.http() as http:
        assert http.get("/health").json() == {"status": "starting"}
        assert http.get("/ready").status_code == 503
        got = http.post("/v1/chat/completions", json=SHORT)
        assert (got.status_code, got.json()["error"]["code"]) == (503, "not_ready")
        get_ready(found.service, found.said.append)
        assert (http.get("/ready").status_code, http.get("/ready").json()) == (200, {"status": "ready"})
        assert http.post("/v1/chat/completions", json=SHORT).status_code == 200
        assert found.said[0] == "compiling nothing" and re.fullmatch(r"ready after \d+\.\d s", found.said[1])


def test_a_draining_server_ends_what_runs_and_takes_nothing_new():
    engine = Engine(round_seconds=0.005)
    with running(engine, drain_seconds=20) as found, found.http() as http, found.http() as other:
        with http.stream("POST", "/v1/chat/completions", json=FOREVER | {"stream": True, "max_tokens": 300}) as got:
            lines = got.iter_lines()
            next(lines)
            found.server.handle_exit(signal.SIGTERM, None)
            refused = other.post("/v1/chat/completions", json=SHORT)
            assert (refused.status_code, refused.headers["Retry-After"]) == (503, "5")
            assert refused.json()["error"]["code"] == "draining"
            assert other.post("/v1/documents", json={"text": "x"}).status_code == 503
            assert (other.get("/ready").status_code, other.get("/health").status_code) == (503, 200)
            assert [line for line in lines if line][-1] == "data: [DONE]"
        found.thread.join(5)
        assert not found.thread.is_alive()
        assert found.said[-1] == "all requests have ended"


def test_draining_ends_in_time():
    engine = Engine(round_seconds=0.02)
    with running(engine, drain_seconds=0.3) as found, found.http() as http:
        with http.stream("POST", "/v1/chat/completions", json=FOREVER | {"stream": True}) as got:
            lines = got.iter_lines()
            next(lines)
            start = time.monotonic()
            found.server.handle_exit(signal.SIGTERM, None)
            found.thread.join(10)
            assert not found.thread.is_alive() and time.monotonic() - start < 5
        assert found.said[-1] == "out of time: requests that still ran are lost"


PROGRAM = """
    import sys
    from rapid_jax.config import RapidConfig
    from rapid_jax.serve.server import serve
    from rapid_jax.serve.service import Service
    from rapid_jax.serve.settings import ServeSettings
    from tests.serve.engine import Engine
    service = Service(Engine(round_seconds=0.02), RapidConfig(), ServeSettings(port=0))
    sys.exit(serve(service, lambda text: print(text, flush=True)))
"""


def test_a_process_ends_by_a_signal_with_status_0_after_what_runs():
    command = [sys.executable, "-c", textwrap.dedent(PROGRAM)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        said = [process.stdout.readline() for _ in range(3)]
        url = said[0].split()[-1]
        ask = FOREVER | {"stream": True, "max_tokens": 60}
        with (
            httpx.Client(base_url=url, timeout=20) as http,
            http.stream("POST", "/v1/chat/completions", json=ask) as got,
        ):
            lines = got.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            assert [line for line in lines if line][-1] == "data: [DONE]"
        assert process.wait(10) == 0
        assert process.stdout.read().splitlines()[-1] == "all requests have ended"
        assert process.stderr.read() == ""


def test_an_engine_that_cannot_get_ready_ends_the_server():
    def fail(report):
        raise InputError("expected more memory, got less")

    engine, said = Engine(), []
    engine.warm_up = fail
    service = Service(engine, RapidConfig(), ServeSettings(port=0))
    assert serve(service, said.append) == 1
    assert said[1:] == ["not ready: expected more memory, got less"]
    with pytest.raises(ApiError, match="the engine has failed"):
        service.check_taking()


def test_a_warm_up_that_fails_because_the_server_ends_is_no_failure_of_it():
    def fail(report):
        service.phase = "draining"
        raise RuntimeError("an array is gone")

    engine, said = Engine(), []
    engine.warm_up = fail
    service = Service(engine, RapidConfig(), ServeSettings(port=0))
    get_ready(service, said.append)
    assert service.phase == "draining" and not said


def test_nothing_is_left_of_an_upload_when_the_process_is_killed(tmp_path: Path):
    command = [sys.executable, "-c", textwrap.dedent(PROGRAM)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        address = process.stdout.readline().rpartition("/")[2].strip()
        while "ready" not in process.stdout.readline():
            pass
        host, _, port = address.partition(":")
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            kind = "Content-Type: multipart/form-data; boundary=b"
            head = f"POST /v1/documents HTTP/1.1\r\nHost: localhost\r\n{kind}\r\nContent-Length: 9000000\r\n\r\n"
            part = '--b\r\nContent-Disposition: form-data; name="file"; filename="a.txt"\r\n\r\n'
            connection.sendall(f"{head}{part}".encode() + b"x" * (4 << 20))
            files = Path(f"/proc/{process.pid}/fd")
            end = time.monotonic() + 10
            while not any(str(tmp_path) in os.readlink(one) for one in files.iterdir()):  # it is on disk by now
                assert time.monotonic() < end
                time.sleep(0.02)
            process.kill()
            process.wait(10)
    assert list(tmp_path.iterdir()) == []


def test_an_address_that_is_taken_or_is_none_is_refused(served: Running):
    port = int(served.url.rpartition(":")[2])
    for settings in (ServeSettings(port=port), ServeSettings(host="no-such-host.invalid")):
        service = Service(served.engine, served.service.defaults, settings)
        with pytest.raises(InputError, match="cannot be listened on"):
            listen(service)
        service.close()
