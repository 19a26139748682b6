# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
A stand-in for the Hugging Face Hub on 127.0.0.1, so that tests can push and pull with the real client.

It holds model repositories in memory, each with its last commit alone, and answers what `huggingface_hub` asks for when
Transformers pushes or loads a model. It asks for all files within the commit, so that none takes the way of large
files. Anything else (datasets, private repositories, branches, pull requests, deletions) is answered by an error.
"""

import base64
import hashlib
import json
import re
import secrets
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


USER = "user"
BRANCH = "main"


def _sha1(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


def _blob_id(data: bytes) -> str:
    """What git calls a file, by which the client sees whether it changed."""
    return _sha1(b"blob %d\0" % len(data) + data)


class HubError(Exception):
    """A refusal: its status and message, and the code by which the client tells one missing thing from another."""

    def __init__(self, status: int, message: str, code: str | None = None):
        super().__init__(message)
        self.status = status
        # In headers, as the answer to a HEAD request has no body to carry them.
        self.headers = {"X-Error-Message": message.encode("ascii", "backslashreplace").decode()}
        if code is not None:
            self.headers["X-Error-Code"] = code


@dataclass(frozen=True)
class Request:
    """One HTTP request, read whole."""

    method: str
    path: str
    query: dict[str, list[str]]
    headers: Any
    body: bytes


@dataclass(frozen=True)
class Response:
    """One HTTP answer; its Content-Length is that of `body`, also when the request is a HEAD."""

    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of_json(cls, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> "Response":
        return cls(json.dumps(value).encode(), status, {"Content-Type": "application/json", **(headers or {})})


class HubServer:
    """
    A Hub with one user, whose `token` is asked for by every write.

    The client reads `HF_ENDPOINT` when it is imported, so it has to run in another process, under `environment`:

        with HubServer() as hub:
            subprocess.run([sys.executable, "push.py"], env={**os.environ, **hub.environment(tmp_path)}, check=True)
            assert "config.json" in hub.files("user/repo")
    """

    def __init__(self):
        self.token = f"hf_{secrets.token_hex(17)}"
        self._repositories: dict[str, dict[str, bytes]] = {}
        self._lock = threading.Lock()
        self._server = _Server(self.respond)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "HubServer":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def files(self, repo_id: str) -> dict[str, bytes]:
        """The files of a repository, which must exist."""
        return dict(self._repositories[repo_id])

    def environment(self, home: Path) -> dict[str, str]:
        """
        The variables under which a process talks to this server, as its user, and keeps its caches below `home`.

        Xet is turned off because the client does not negotiate it: with `hf_xet` installed it uploads in no other way.
        """
        cache = home / "huggingface"
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_TOKEN": self.token,
            "HF_HOME": str(cache),
            "HF_HUB_CACHE": str(cache / "hub"),
            "HF_MODULES_CACHE": str(cache / "modules"),
            "HF_TOKEN_PATH": str(cache / "token"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "no_proxy": "127.0.0.1",
        }

    def respond(self, request: Request) -> Response:
        """Finds who answers a request, asks for the token where one is needed, and turns refusals into answers."""
        try:
            for method, pattern, needs_token, answer in _ROUTES:
                match = re.fullmatch(pattern, request.path)
                if match is not None and request.method == method:
                    if needs_token and request.headers.get("authorization") != f"Bearer {self.token}":
                        raise HubError(401, "Invalid credentials in Authorization header")
                    parts = {name: unquote(text) for name, text in match.groupdict().items() if text is not None}
                    return answer(self, request, **parts)
            raise HubError(404, f"This stand-in for the Hub does not answer {request.method} {request.path!r}")
        except HubError as error:
            return Response.of_json({"error": str(error)}, error.status, error.headers)

    def _commit_of(self, repo_id: str, revision: str) -> tuple[str, dict[str, bytes]]:
        """The last commit of a repository, by its sha and files."""
        if repo_id not in self._repositories:
            raise HubError(404, f"Repository not found: {repo_id!r}", "RepoNotFound")
        files = self._repositories[repo_id]
        sha = _sha1(json.dumps([repo_id, {path: _blob_id(data) for path, data in files.items()}]).encode())
        if revision not in (BRANCH, sha):
            raise HubError(404, f"Invalid rev id: {revision!r}", "RevisionNotFound")
        return sha, files

    def _whoami(self, request: Request) -> Response:
        return Response.of_json({"type": "user", "name": USER, "fullname": USER, "orgs": []})

    def _create(self, request: Request) -> Response:
        asked = json.loads(request.body)
        if asked.get("type", "model") != "model" or asked.get("visibility") == "private":
            raise HubError(400, "Only public model repositories are supported")
        repo_id = f"{asked.get('organization') or USER}/{asked['name']}"
        url = f"{self.endpoint}/{repo_id}"
        with self._lock:
            if repo_id in self._repositories:
                return Response.of_json({"error": "You already created this model repo", "url": url}, 409)
            self._repositories[repo_id] = {}
        return Response.of_json({"url": url})

    def _validate_card(self, request: Request) -> Response:
        """Accepts any card: the client asks before every commit of a README.md."""
        return Response.of_json({"errors": [], "warnings": []})

    def _preupload(self, request: Request, repo_id: str, revision: str) -> Response:
        """Says how each file has to come, and what is there already: the client skips a file that did not change."""
        _, files = self._commit_of(repo_id, revision)
        paths = [asked["path"] for asked in json.loads(request.body)["files"]]
        oids = {path: _blob_id(files[path]) if path in files else None for path in paths}
        common = {"uploadMode": "regular", "shouldIgnore": False}
        return Response.of_json({"files": [{"path": path, "oid": oid, **common} for path, oid in oids.items()]})

    def _commit(self, request: Request, repo_id: str, revision: str) -> Response:
        """Takes all files of a commit, or none."""
        if revision != BRANCH or "create_pr" in request.query:
            raise HubError(400, f"Commits are only taken to the branch {BRANCH!r}, without a pull request")
        _, files = self._commit_of(repo_id, revision)
        operations = [json.loads(line) for line in request.body.splitlines()]
        if not {operation["key"] for operation in operations} <= {"header", "file"}:
            raise HubError(400, "Commits may only add files")
        values = [operation["value"] for operation in operations if operation["key"] == "file"]
        with self._lock:
            files.update({value["path"]: base64.b64decode(value["content"]) for value in values})
        sha, _ = self._commit_of(repo_id, revision)
        return Response.of_json({"commitOid": sha, "commitUrl": f"{self.endpoint}/{repo_id}/commit/{sha}"})

    def _info(self, request: Request, repo_id: str, revision: str = BRANCH) -> Response:
        sha, files = self._commit_of(repo_id, revision)
        siblings = [{"rfilename": path} for path in sorted(files)]
        info = {"id": repo_id, "author": repo_id.split("/")[0], "sha": sha, "private": False}
        return Response.of_json({**info, "tags": [], "siblings": siblings})

    def _tree(self, request: Request, repo_id: str, revision: str, folder: str = "") -> Response:
        """Lists the files in a folder, those in its folders among them."""
        _, files = self._commit_of(repo_id, revision)
        found = {path: data for path, data in files.items() if path.startswith(f"{folder}/" if folder else "")}
        if folder and not found:
            raise HubError(404, f"{folder!r} does not exist on {revision!r}", "EntryNotFound")
        entries = [
            {"type": "file", "path": path, "oid": _blob_id(data), "size": len(data)} for path, data in found.items()
        ]
        return Response.of_json(entries)

    def _resolve(self, request: Request, repo_id: str, revision: str, path: str) -> Response:
        sha, files = self._commit_of(repo_id, revision)
        if path not in files:
            error = HubError(404, f"{path!r} does not exist on {revision!r}", "EntryNotFound")
            error.headers["X-Repo-Commit"] = sha
            raise error
        return Response(files[path], headers={"X-Repo-Commit": sha, "ETag": f'"{_blob_id(files[path])}"'})


_REPO = r"(?P<repo_id>[^/]+(?:/[^/]+)?)"
_REVISION = r"(?P<revision>[^/]+)"
_ROUTES: tuple[tuple[str, str, bool, Callable[..., Response]], ...] = (
    # Method, path, whether the token is needed, who answers.
    ("GET", "/api/whoami-v2", True, HubServer._whoami),
    ("POST", "/api/repos/create", True, HubServer._create),
    ("POST", "/api/validate-yaml", False, HubServer._validate_card),
    ("POST", f"/api/models/{_REPO}/preupload/{_REVISION}", True, HubServer._preupload),
    ("POST", f"/api/models/{_REPO}/commit/{_REVISION}", True, HubServer._commit),
    ("GET", f"/api/models/{_REPO}(?:/revision/{_REVISION})?", False, HubServer._info),
    ("GET", f"/api/models/{_REPO}/tree/{_REVISION}(?:/(?P<folder>[^/]+))?", False, HubServer._tree),
    ("GET", f"/{_REPO}/resolve/{_REVISION}/(?P<path>.+)", False, HubServer._resolve),
)


class _Server(ThreadingHTTPServer):
    """Listens on a free port and hands every request, read whole, to `respond`."""

    def __init__(self, respond: Callable[[Request], Response]):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.respond = respond

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away in the middle of an answer is no error of the server."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    """Reads requests from, and writes answers to, one kept-alive connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        method = "GET" if self.command == "HEAD" else self.command
        response = self.server.respond(Request(method, url.path, parse_qs(url.query), self.headers, body))
        self.send_response(response.status)
        for name, value in {**response.headers, "Content-Length": str(len(response.body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(response.body)

    do_HEAD = do_POST = do_PUT = do_GET

    def log_message(self, *arguments: object) -> None:
        """Keeps the requests out of the output of the tests."""
