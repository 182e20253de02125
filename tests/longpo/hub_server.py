# SPDX-License-Identifier: Apache-2.0
"""As much of the Hugging Face hub as an upload asks of it; `files` is what a commit made, `asked` every request."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_right"


class HubServer:
    """Takes TOKEN alone; `fail` maps a part of a path to a status."""

    def __init__(self) -> None:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.daemon_threads = True
        self._server.owner = self  # pyright: ignore[reportAttributeAccessIssue]
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self.files: dict[str, bytes] = {}
        self.blobs: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.created: dict[str, Any] = {}
        self.fail: dict[str, int] = {}

    def close(self) -> None:
        """Ends it."""
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    do_POST = do_PUT = do_HEAD = do_GET

    def _answer(self) -> None:
        hub: HubServer = self.server.owner  # pyright: ignore[reportAttributeAccessIssue]
        body = self._body()
        hub.asked.append(f"{self.command} {self.path}")
        if status := next((status for part, status in hub.fail.items() if part in self.path), None):
            return self._send(status, {"error": "as told"})
        if not self.path.startswith("/blob/") and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._send(401, {"error": "Invalid credentials in Authorization header"})
        if self.command == "GET" and self.path.startswith("/api/models/"):
            return self._send(404, {"error": "Repository not found"})
        return self._send(200, self._found(hub, body))

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        found = b""
        while size := int(self.rfile.readline(), 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return found

    def _found(self, hub: HubServer, body: bytes) -> Any:
        if self.path == "/api/whoami-v2":
            return {"name": "user", "type": "user", "orgs": [], "auth": {"accessToken": {"role": "write"}}}
        if self.path == "/api/repos/create":
            hub.created = json.loads(body)
            return {"url": f"{hub.url}/user/{hub.created['name']}"}
        if self.path.endswith("/preupload/main"):
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = {name: "lfs" if name.endswith(".safetensors") else "regular" for name in names}
            return {"files": [{"path": n, "uploadMode": m, "shouldIgnore": False} for n, m in modes.items()]}
        if self.path.endswith("/info/lfs/objects/batch"):
            actions = [
                {**item, "actions": {"upload": {"href": f"{hub.url}/blob/{item['oid']}", "header": {}}}}
                for item in json.loads(body)["objects"]
            ]
            return {"transfer": "basic", "objects": actions}
        if self.path.startswith("/blob/"):
            hub.blobs[self.path.removeprefix("/blob/")] = body
            return {}
        if "/commit/main" in self.path:
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    hub.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    hub.files[value["path"]] = hub.blobs[value["oid"]]
            return {"commitUrl": f"{hub.url}/user/model/commit/1", "commitOid": "1" * 40, "success": True}
        return {}

    def _send(self, status: int, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        del format, args
