# SPDX-License-Identifier: Apache-2.0
"""A bucket on this machine: an emulator of Google Cloud Storage, and before it a proxy that fails as it is told to."""

import contextlib
import http.client
import itertools
import json
import re
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from rapid_jax.runtime import bucket_writes

BUCKET = "models"


class Killed(BaseException):
    """The process is gone: no handler of errors sees it."""


def killed_at(moment: int, monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """From the call number `moment` of these functions of bucket_writes on nothing happens: the process is gone."""
    left = itertools.count()

    def dying(do: Callable) -> Callable:
        def call(*given, **asked):
            if next(left) >= moment:
                raise Killed
            return do(*given, **asked)

        return call

    for name in names:
        monkeypatch.setattr(bucket_writes, name, dying(getattr(bucket_writes, name)))


# What the proxy does with a request, by its path, of one that writes with the method before it ("POST /upload/..."):
# a status to answer, "slow", "cut", "short", "flip", "hang up" (before it happens), "lost" (after it), "silent" (no
# answer, and the connection stays, until the bucket is healed); None: nothing.
Fault = Callable[[str], str | None]


class BucketServer:
    """The emulator and the proxy. `url` is the proxy's; `fault` decides what fails, `asked` has every path."""

    def __init__(self) -> None:
        # Here: a GPU's machine runs tests that import this file's names, and has no emulator.
        from gcp_storage_emulator.server import create_server

        self._emulator = create_server("127.0.0.1", 0, in_memory=True, default_bucket=BUCKET)
        self._emulator._api.daemon = True
        self._emulator.start()
        self.port: int = self._emulator._api._httpd.server_address[1]
        self._proxy = _Proxy(("127.0.0.1", 0), _Handler)
        self._proxy.daemon_threads = True
        self._proxy.owner = self  # pyright: ignore[reportAttributeAccessIssue]
        threading.Thread(target=self._proxy.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._proxy.server_address[1]}"
        self.writing = threading.Lock()  # a precondition is looked at and the write done in one
        self.uploaded: dict[str, tuple[http.client.HTTPResponse, bytes]] = {}  # by the path of an upload in pieces
        self.healed = threading.Event()
        self.heal()

    def heal(self) -> None:
        """Nothing fails from now on, and nothing was asked yet."""
        self.healed.set()
        self.healed = threading.Event()
        self.fault: Fault = lambda path: None
        self.asked: list[str] = []

    def put(self, name: str, data: bytes | str) -> str:
        """Writes an object; its place."""
        head = (
            f"--==0==\nContent-Type: application/json\n\n{json.dumps({'name': name})}\n--==0==\nContent-Type: a/b\n\n"
        )
        body = head.encode() + (data.encode() if isinstance(data, str) else data) + b"\n--==0==--"
        place = f"http://127.0.0.1:{self.port}/upload/storage/v1/b/{BUCKET}/o?uploadType=multipart"
        kind = {"Content-Type": 'multipart/related; boundary="==0=="'}
        urllib.request.urlopen(urllib.request.Request(place, body, kind)).close()
        return f"gs://{BUCKET}/{name}"

    def put_folder(self, folder: Path, name: str) -> str:
        """Writes every file of a folder; its place."""
        for path in folder.rglob("*"):
            if path.is_file():
                self.put(f"{name}/{path.relative_to(folder).as_posix()}", path.read_bytes())
        return f"gs://{BUCKET}/{name}"

    def generation(self, path: str) -> str | None:
        """The generation that the object of a download's path has now; None where there is none."""
        place = path.partition("?")[0].removeprefix("/download")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{place}") as answer:
                return json.load(answer)["generation"]
        except urllib.error.HTTPError:
            return None

    def holds(self, path: str) -> bool:
        """Whether the precondition in the path of a write holds, which the emulator does not look at."""
        place, _, query = path.partition("?")
        asked = dict(urllib.parse.parse_qsl(query))
        if (wanted := asked.get("ifGenerationMatch")) is None:
            return True
        name = urllib.parse.quote(asked["name"], safe="") if "name" in asked else place.rpartition("/o/")[2]
        bucket = place.partition("/b/")[2].partition("/")[0]
        return (self.generation(f"/storage/v1/b/{bucket}/o/{name}") or "0") == wanted

    def names(self, under: str = "") -> list[str]:
        """What is in the bucket."""
        place = f"http://127.0.0.1:{self.port}/storage/v1/b/{BUCKET}/o?prefix={urllib.parse.quote(under)}"
        with urllib.request.urlopen(place) as answer:
            return sorted(item["name"] for item in json.load(answer).get("items", []))

    def get(self, name: str) -> bytes:
        """An object's bytes."""
        place = f"http://127.0.0.1:{self.port}/storage/v1/b/{BUCKET}/o/{urllib.parse.quote(name, safe='')}?alt=media"
        with urllib.request.urlopen(place) as answer:
            return answer.read()

    def close(self) -> None:
        """Ends both."""
        self._proxy.shutdown()
        self._proxy.server_close()
        self._emulator.stop()


class _Proxy(ThreadingHTTPServer):
    request_queue_size = 128  # TensorStore connects as often at once, and waits a second where it is refused

    def handle_error(self, request: object, client_address: object) -> None:
        """Nothing is said of clients that went away."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each answer waits 40 ms

    def do_GET(self) -> None:
        self._pass_on("GET", b"")

    def do_POST(self) -> None:
        self._pass_on("POST", self._sent())

    def do_PUT(self) -> None:
        self._pass_on("PUT", self._sent())

    def do_DELETE(self) -> None:
        self._pass_on("DELETE", b"")

    def _sent(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            pieces = []
            while size := int(self.rfile.readline(), 16):
                pieces.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(pieces)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _pass_on(self, method: str, body: bytes) -> None:
        owner: BucketServer = self.server.owner  # pyright: ignore[reportAttributeAccessIssue]
        asked = self.path if method == "GET" else f"{method} {self.path}"
        owner.asked.append(asked)
        fault = owner.fault(asked)
        if fault is not None and fault.isdigit():
            self._answer(int(fault), _error(int(fault), f"told to say {fault}"))
            return
        if fault == "slow":
            time.sleep(0.2)
        if fault == "silent":
            owner.healed.wait()
        if fault in ("silent", "hang up"):
            self.close_connection = True
            return
        # The emulator ignores which generation is asked for, and does not say which one it gives.
        is_media, there = method == "GET" and "alt=media" in self.path, None
        with owner.writing if method != "GET" or is_media else contextlib.nullcontext():
            if method != "GET" and not owner.holds(self.path):
                self._answer(412, _error(412, "At least one of the pre-conditions you specified did not hold."))
                return
            if is_media:
                there = owner.generation(self.path)
                wanted = re.search(r"[?&](generation|ifGenerationNotMatch)=(\d+)", self.path)
                if wanted is not None and (there == wanted[2]) == (wanted[1] != "generation"):
                    self._answer(404 if wanted[1] == "generation" else 304, b"")
                    return
            # A piece that is sent again after the last one is answered as the last one was; the emulator has forgotten.
            if self.path not in owner.uploaded:
                answer, found = self._asked(owner.port, method, body)
                if "upload_id=" in self.path and answer.status == 200:
                    owner.uploaded[self.path] = answer, found
            else:
                answer, found = owner.uploaded[self.path]
        if fault == "lost":  # it has happened, and nobody hears of it
            self.close_connection = True
            return
        if fault == "flip" and found:
            found = found[:-1] + bytes([found[-1] ^ 1])
        own = ("connection", "transfer-encoding", "content-length", "date", "server")
        head = {name: value for name, value in answer.getheaders() if name.lower() not in own}
        head |= {} if there is None else {"x-goog-generation": there}
        self._answer(answer.status, found[:-1] if fault == "short" else found, cut=fault == "cut", **head)

    def _asked(self, port: int, method: str, body: bytes) -> tuple[http.client.HTTPResponse, bytes]:
        inner = http.client.HTTPConnection("127.0.0.1", port)
        passed = ("range", "content-range", "content-type", "host", "x-upload-content-type", "x-upload-content-length")
        head = {name: value for name, value in self.headers.items() if name.lower() in passed}
        inner.request(method, self.path, body=body if method in ("POST", "PUT") else None, headers=head)
        answer = inner.getresponse()
        found = answer.read()
        inner.close()
        return answer, found

    def _answer(self, status: int, body: bytes, *, cut: bool = False, **head: str) -> None:
        self.send_response(status)
        for name, value in head.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if cut else body)
        self.close_connection = self.close_connection or cut

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""


def _error(code: int, message: str) -> bytes:
    return json.dumps({"error": {"code": code, "message": message}}).encode()
