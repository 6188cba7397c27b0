"""A small Hub on this machine: the endpoints that huggingface_hub's own client needs to make, fill and read a model."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

Files = dict[str, bytes]


@dataclass
class Repository:
    commits: dict[str, Files] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, files: Mapping[str, bytes], ref: str = "main") -> str:
        whole = {**self.files(ref), **files}
        digest = hashlib.sha1(repr(sorted(whole.items())).encode(), usedforsecurity=False).hexdigest()
        self.commits[digest] = whole
        self.refs[ref] = digest
        return digest

    def files(self, revision: str = "main") -> Files:
        """Return the files of a branch, a tag or a commit; none where there is no such thing."""
        return self.commits.get(self.refs.get(revision, revision), {})


@dataclass
class Hub:
    """The repositories of a server by id, which of them nobody may read, what it was asked, and the bytes it sent."""

    url: str
    repositories: dict[str, Repository] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    writable: bool = True
    requests: list[str] = field(default_factory=list)
    sent: int = 0


class RefusedError(Exception):
    """An answer other than success: its status, its code, and more of its content."""


class Handler(BaseHTTPRequestHandler):
    """Answers requests out of the server's `Hub`."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        routes: dict[str, Callable[..., Any]] = {
            r"GET /api/models/([^/]+/[^/]+)/revision/([^/]+)": lambda *of: {"id": of[0], "sha": self._read(*of)[0]},
            r"GET /api/models/([^/]+/[^/]+)/tree/([^/]+)": lambda *of: [*map(_entry, self._read(*of)[1].items())],
            r"(?:GET|HEAD) /([^/]+/[^/]+)/resolve/([^/]+)/(.+)": self._resolve,
            r"POST /api/repos/create": self._create,
            r"POST /api/validate-yaml": lambda: {"errors": [], "warnings": []},
            r"POST /api/models/([^/]+/[^/]+)/preupload/([^/]+)": self._preupload,
            r"POST /api/models/([^/]+/[^/]+)/commit/([^/]+)": self._commit,
        }
        self.extra = {"Content-Type": "application/json"}
        try:
            for pattern, route in routes.items():
                if (match := re.fullmatch(pattern, self.hub.requests[-1])) is not None:
                    content = route(*match.groups())
                    return self._send(200, content if isinstance(content, bytes) else json.dumps(content).encode())
            raise RefusedError(404, "RouteNotFound", {})
        except RefusedError as refused:
            status, code, content = refused.args
            self.extra = {"X-Error-Code": code, "X-Error-Message": code}
            self._send(status, json.dumps(content).encode())

    do_HEAD = do_POST = do_GET

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""

    def _send(self, status: int, content: bytes) -> None:
        self.send_response(status)
        for name, value in {**self.extra, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _read(self, repo_id: str, revision: str) -> tuple[str, Files]:
        if repo_id not in self.hub.repositories:
            raise RefusedError(404, "RepoNotFound", {})
        if repo_id in self.hub.gated:
            raise RefusedError(403, "GatedRepo", {})
        repository = self.hub.repositories[repo_id]
        commit = repository.refs.get(revision, revision)
        if commit not in repository.commits:
            raise RefusedError(404, "RevisionNotFound", {})
        return commit, repository.commits[commit]

    def _resolve(self, repo_id: str, revision: str, name: str) -> bytes:
        commit, files = self._read(repo_id, revision)
        if name not in files:
            raise RefusedError(404, "EntryNotFound", {})
        content = files[name]
        self.extra = {"ETag": f'"{_oid(content)}"', "X-Repo-Commit": commit}
        if (asked := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))) is not None:
            content = content[int(asked[1]) : int(asked[2]) + 1]
        self.hub.sent += len(content) if self.command == "GET" else 0
        return content

    def _create(self) -> dict[str, Any]:
        if not self.hub.writable:
            raise RefusedError(403, "Forbidden", {})
        repo_id = "{organization}/{name}".format(**json.loads(self.body))
        url = f"{self.hub.url}/{repo_id}"
        if repo_id in self.hub.repositories:
            raise RefusedError(409, "RepoExists", {"url": url})
        self.hub.repositories[repo_id] = Repository()
        self.hub.repositories[repo_id].commit({".gitattributes": b""})
        return {"url": url}

    def _preupload(self, *_: str) -> dict[str, Any]:
        files = json.loads(self.body)["files"]
        return {"files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files]}

    def _commit(self, repo_id: str, revision: str) -> dict[str, Any]:
        entries = [json.loads(line) for line in self.body.splitlines()]
        files = [entry["value"] for entry in entries if entry["key"] == "file"]
        self._read(repo_id, "main")
        content = {file["path"]: base64.b64decode(file["content"]) for file in files}
        commit = self.hub.repositories[repo_id].commit(content, revision)
        return {"commitUrl": f"{self.hub.url}/{repo_id}/commit/{commit}", "commitOid": commit}


def _oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _entry(file: tuple[str, bytes]) -> dict[str, Any]:
    return {"type": "file", "path": file[0], "size": len(file[1]), "oid": _oid(file[1])}


def point_client_at(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")


@contextmanager
def running_hub(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Keep the machine's cache and token out of it, and no bar on the screen, and work in a directory."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(directory / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    monkeypatch.chdir(directory)
    with ThreadingHTTPServer(("127.0.0.1", 0), type("HubHandler", (Handler,), {})) as server:
        hub = Hub(f"http://127.0.0.1:{server.server_address[1]}")
        server.RequestHandlerClass.hub = hub  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        point_client_at(hub.url, monkeypatch)
        try:
            yield hub
        finally:
            server.shutdown()
