"""A server that answers as the Hugging Face hub does where a model is fetched: its description, and its files."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from limbeck.models import hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubServer(http.server.ThreadingHTTPServer):
    """Models by name: folders of files. `log` holds what was requested, `ranges` the bytes of files that were sent in
    part; `gated` and `broken` say what is refused, and after how many bytes of a file the connection ends."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.models: dict[str, Path] = {}
        self.log: list[str] = []
        self.ranges: list[tuple[str, int]] = []
        self.gated: set[str] = set()
        self.broken: dict[str, int] = {}

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def fetched(self) -> list[str]:
        """The files that were sent, whole or in part."""
        return [line.rsplit("/", 1)[1] for line in self.log if line.startswith("GET") and "/resolve/" in line]


class HubHandler(http.server.BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.server.log.append(f"GET {self.path}")
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            self.describe("/".join(parts[2:4]), parts[5] if parts[4:5] == ["revision"] else "main")
        else:
            self.send_file("/".join(parts[:2]), "/".join(parts[4:]), body=True)

    def do_HEAD(self) -> None:
        parts = self.path.split("?")[0].strip("/").split("/")
        self.send_file("/".join(parts[:2]), "/".join(parts[4:]), body=False)

    def describe(self, name: str, revision: str) -> None:
        folder = self.server.models.get(name)
        if name in self.server.gated:
            self.refuse(403, "GatedRepo")
        elif folder is None:
            self.refuse(401, "RepoNotFound")
        elif revision not in ("main", COMMIT):
            self.refuse(404, "RevisionNotFound")
        else:
            files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
            siblings = [{"rfilename": file} for file in files]
            content = {"id": name, "sha": COMMIT, "siblings": siblings, "private": False, "tags": [], "downloads": 0}
            self.send_bytes(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def refuse(self, status: int, code: str) -> None:
        self.send_bytes(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code})

    def send_file(self, name: str, file: str, body: bool) -> None:
        path = self.server.models[name] / file if name in self.server.models else None
        if path is None or not path.is_file():
            return self.refuse(404, "EntryNotFound")
        content = path.read_bytes()
        headers: dict[str, Any] = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": COMMIT,
                                   "Accept-Ranges": "bytes"}  # fmt: skip
        if not body:
            return self.send_bytes(200, b"", headers | {"Content-Length": len(content)})
        part, whole = content, len(content)
        if "Range" in self.headers:
            begin, _, end = self.headers["Range"].removeprefix("bytes=").partition("-")
            part = content[int(begin) : int(end) + 1 if end else whole]
            headers["Content-Range"] = f"bytes {begin}-{int(begin) + len(part) - 1}/{whole}"
            self.server.ranges.append((path.name, len(part)))
        limit = self.server.broken.pop(path.name, None)
        self.send_bytes(206 if "Range" in self.headers else 200, part if limit is None else part[:limit],
                        headers | {"Content-Length": len(part)})  # fmt: skip
        if limit is not None:
            self.close_connection = True

    def send_bytes(self, status: int, content: bytes, headers: dict[str, Any]) -> None:
        self.send_response(status)
        for key, value in ({"Content-Length": len(content)} | headers).items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *args: Any) -> None:
        """Quiet."""


@contextlib.contextmanager
def serving(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A server in the hub's place, and an empty cache."""
    server = HubServer()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    for name, value in {
        "ENDPOINT": server.address,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.address + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(cache),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_PROGRESS_BARS": True,
        "HF_HUB_DISABLE_XET": True,
    }.items():
        monkeypatch.setattr(constants, name, value)
    hub.hub_folder.cache_clear()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
        hub.hub_folder.cache_clear()
