# SPDX-License-Identifier: Apache-2.0
"""A bucket on this machine: an emulator of Google Cloud Storage, and before it a proxy that fails as it is told to."""

import http.client
import json
import re
import threading
import time
import urllib.request
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from gcp_storage_emulator.server import create_server

BUCKET = "models"
# What the proxy does with a request, by its path; None: it passes on what the emulator answers.
Fault = Callable[[str], str | None]


class BucketServer:
    """The emulator and the proxy. `url` is the proxy's; `fault` decides what fails, `asked` has every path."""

    def __init__(self) -> None:
        self._emulator = create_server("127.0.0.1", 0, in_memory=True, default_bucket=BUCKET)
        self._emulator._api.daemon = True
        self._emulator.start()
        self.port: int = self._emulator._api._httpd.server_address[1]
        self._proxy = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._proxy.daemon_threads = True
        self._proxy.owner = self  # pyright: ignore[reportAttributeAccessIssue]
        threading.Thread(target=self._proxy.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._proxy.server_address[1]}"
        self.heal()

    def heal(self) -> None:
        """Nothing fails from now on, and nothing was asked yet."""
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

    def generation(self, path: str) -> str:
        """The generation that the object of a download's path has now."""
        place = path.partition("?")[0].removeprefix("/download")
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{place}") as answer:
            return json.load(answer)["generation"]

    def close(self) -> None:
        """Ends both."""
        self._proxy.shutdown()
        self._proxy.server_close()
        self._emulator.stop()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        owner: BucketServer = self.server.owner  # pyright: ignore[reportAttributeAccessIssue]
        owner.asked.append(self.path)
        fault = owner.fault(self.path)
        if fault is not None and fault.isdigit():
            self._answer(
                int(fault), json.dumps({"error": {"code": int(fault), "message": f"told to say {fault}"}}).encode()
            )
            return
        if fault == "slow":
            time.sleep(0.2)
        # The emulator ignores which generation is asked for; the service has only the one that there is.
        wanted = re.search(r"[?&]generation=(\d+)", self.path)
        if wanted is not None and owner.generation(self.path) != wanted[1]:
            self._answer(404, b"No such object")
            return
        inner = http.client.HTTPConnection("127.0.0.1", owner.port)
        inner.request(
            "GET", self.path, headers={name: value for name, value in self.headers.items() if name == "Range"}
        )
        answer = inner.getresponse()
        body = answer.read()
        inner.close()
        if fault == "flip" and body:
            body = body[:-1] + bytes([body[-1] ^ 1])
        self._answer(answer.status, body[:-1] if fault == "short" else body, cut=fault == "cut")

    def _answer(self, status: int, body: bytes, *, cut: bool = False) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if cut else body)
        self.close_connection = cut

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""
