"""A server in this process that answers as the Hugging Face Hub does, as far as pushing and loading a model needs it."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

COMMIT = "a" * 40
TOKEN = "hf_right"


@dataclass
class StubHub:
    """The repositories that the server holds, each with its files."""

    url: str = ""
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    private: set[str] = field(default_factory=set)


@contextmanager
def running() -> Iterator[StubHub]:
    """Run a server on a free port."""
    hub = StubHub()

    class Handler(_Handler):
        held = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    held: StubHub

    def log_message(self, *arguments: Any) -> None:
        """Print nothing."""

    # ---- answers

    def _send(self, status: int, content: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"content-length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, value: Any, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), content_type="application/json")

    def _refused(self, status: int, code: str, message: str) -> None:
        self._send(status, json.dumps({"error": message}).encode(), x_error_code=code, x_error_message=message)

    # ---- pushing

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        path = self.path.partition("?")[0]
        if self.headers.get("authorization") != f"Bearer {TOKEN}":
            self._refused(401, "InvalidToken", "Invalid credentials")
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif "/preupload/" in path:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self._json({"files": files})
        elif "/commit/" in path:
            self._commit(path.removeprefix("/api/models/").partition("/commit/")[0], body)
        else:
            self._json({"error": f"unknown: {path}"}, 404)

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        known = name in self.held.repositories
        self.held.repositories.setdefault(name, {})
        if asked.get("private") or asked.get("visibility") == "private":
            self.held.private.add(name)
        self._json({"url": f"{self.held.url}/{name}"}, 409 if known else 200)

    def _commit(self, repository: str, body: bytes) -> None:
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "header":
                self.held.messages.append(entry["value"]["summary"])
            elif entry["key"] == "file":
                content = base64.b64decode(entry["value"]["content"])
                self.held.repositories[repository][entry["value"]["path"]] = content
        url = f"{self.held.url}/{repository}/commit/{COMMIT}"
        self._json({"success": True, "commitUrl": url, "commitOid": COMMIT, "hookOutput": ""})

    # ---- loading

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path.startswith("/api/models/"):
            self._information(path.removeprefix("/api/models/").partition("/revision/")[0].partition("/tree/")[0])
        else:
            self._file(*path[1:].partition("/resolve/")[::2])

    do_HEAD = do_GET

    def _information(self, repository: str) -> None:
        if repository not in self.held.repositories:
            self._refused(404, "RepoNotFound", "Repository not found")
            return
        held = self.held.repositories[repository]
        if "/tree/" in self.path:
            self._json(
                [
                    {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                    for name, content in held.items()
                ]
            )
            return
        files = [{"rfilename": name} for name in held]
        self._json({"id": repository, "sha": COMMIT, "siblings": files, "private": False})

    def _file(self, repository: str, place: str) -> None:
        content = self.held.repositories.get(repository, {}).get(place.partition("/")[2])
        if content is None:
            self._refused(404, "EntryNotFound", "Entry not found")
            return
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        self._send(200, content, etag=etag, x_repo_commit=COMMIT, accept_ranges="bytes")
