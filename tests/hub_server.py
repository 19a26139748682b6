# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
A stand-in for the Hugging Face Hub on 127.0.0.1, so that tests can push and pull with the real client.

It holds model repositories of one user in memory, each with its last commit alone, and answers what `huggingface_hub`
asks for when Transformers pushes or loads a model. It asks for all files within the commit, so that none takes the way
of large files. Anything else is answered by an error.
"""

import base64
import hashlib
import json
import re
import secrets
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote


USER = "user"
BRANCH = "main"


def _sha1(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


class HubError(Exception):
    """A refusal: its status and message, and the code by which the client tells one missing thing from another."""


class HubServer(ThreadingHTTPServer):
    """
    A Hub with one user, whose `token` is asked for by every write.

    The client reads `HF_ENDPOINT` when it is imported, so it has to run in another process, under `environment`:

        with HubServer() as hub:
            subprocess.run([sys.executable, "push.py"], env={**os.environ, **hub.environment(tmp_path)}, check=True)
            assert "config.json" in hub.files("user/repo")
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.token = f"hf_{secrets.token_hex(17)}"
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self._repositories: dict[str, dict[str, bytes]] = {}

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.shutdown()
        self.server_close()

    def files(self, repo_id: str) -> dict[str, bytes]:
        """The files of a repository, which must exist."""
        return dict(self._repositories[repo_id])

    def environment(self, home: Path) -> dict[str, str]:
        """
        The variables under which a process talks to this server, as its user, and keeps its caches below `home`.

        Xet is turned off because the client does not negotiate it: with `hf_xet` installed it uploads in no other way.
        """
        cache = home / "huggingface"
        folders = {"HF_HOME": "", "HF_HUB_CACHE": "hub", "HF_MODULES_CACHE": "modules", "HF_TOKEN_PATH": "token"}
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_TOKEN": self.token,
            **{name: str(cache / folder) for name, folder in folders.items()},
            "HF_HUB_OFFLINE": "0",
            **{f"HF_HUB_DISABLE_{name}": "1" for name in ("XET", "TELEMETRY", "UPDATE_CHECK")},
            "no_proxy": "127.0.0.1",
        }

    def respond(self, method: str, path: str, authorization: str | None, body: bytes) -> tuple[int, dict, Any]:
        """The status and headers of the answer to a request, and its body in bytes or what it is in JSON."""
        try:
            for of_method, pattern, needs_token, answer in _ROUTES:
                if method == of_method and (match := re.fullmatch(pattern, path)) is not None:
                    if needs_token and authorization != f"Bearer {self.token}":
                        raise HubError(401, "Invalid credentials in Authorization header", "")
                    parts = {name: unquote(text) for name, text in match.groupdict().items() if text is not None}
                    return answer(self, body, **parts)
            raise HubError(404, f"This stand-in for the Hub does not answer {method} {path!r}", "")
        except HubError as error:
            status, message, code = error.args
            # In headers, as the answer to a HEAD request has no body to carry them.
            return status, {"X-Error-Message": message, "X-Error-Code": code}, {"error": message}

    def _commit_of(self, repo_id: str, revision: str) -> tuple[str, dict[str, bytes]]:
        """The last commit of a repository, by its sha and files."""
        if repo_id not in self._repositories:
            raise HubError(404, f"Repository not found: {repo_id!r}", "RepoNotFound")
        files = self._repositories[repo_id]
        sha = _sha1(json.dumps([repo_id, {path: _sha1(data) for path, data in files.items()}]).encode())
        if revision not in (BRANCH, sha):
            raise HubError(404, f"Invalid rev id: {revision!r}", "RevisionNotFound")
        return sha, files

    def _create(self, body):
        asked = json.loads(body)
        repo_id = f"{asked.get('organization') or USER}/{asked['name']}"
        is_there = repo_id in self._repositories
        self._repositories.setdefault(repo_id, {})
        return 409 if is_there else 200, {}, {"url": f"{self.endpoint}/{repo_id}"}

    def _preupload(self, body, repo_id, revision):
        """Says that each file has to come within the commit."""
        common = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
        return 200, {}, {"files": [{"path": asked["path"], **common} for asked in json.loads(body)["files"]]}

    def _commit(self, body, repo_id, revision):
        """Takes all files of a commit, or none."""
        _, files = self._commit_of(repo_id, revision)
        operations = [json.loads(line) for line in body.splitlines()]
        if not {operation["key"] for operation in operations} <= {"header", "file"}:
            raise HubError(400, "Commits may only add files", "")
        values = [operation["value"] for operation in operations if operation["key"] == "file"]
        files.update({value["path"]: base64.b64decode(value["content"]) for value in values})
        sha, _ = self._commit_of(repo_id, BRANCH)
        return 200, {}, {"commitOid": sha, "commitUrl": f"{self.endpoint}/{repo_id}/commit/{sha}"}

    def _info(self, body, repo_id, revision=BRANCH):
        sha, files = self._commit_of(repo_id, revision)
        siblings = [{"rfilename": path} for path in sorted(files)]
        return 200, {}, {"id": repo_id, "sha": sha, "private": False, "tags": [], "siblings": siblings}

    def _tree(self, body, repo_id, revision, folder=""):
        """Lists the files in a folder, those in its folders among them."""
        _, files = self._commit_of(repo_id, revision)
        found = {path: data for path, data in files.items() if path.startswith(f"{folder}/" if folder else "")}
        if folder and not found:
            raise HubError(404, f"{folder!r} does not exist on {revision!r}", "EntryNotFound")
        entries = {path: {"oid": _sha1(data), "size": len(data)} for path, data in found.items()}
        return 200, {}, [{"type": "file", "path": path, **entry} for path, entry in entries.items()]

    def _resolve(self, body, repo_id, revision, path):
        sha, files = self._commit_of(repo_id, revision)
        if path not in files:
            raise HubError(404, f"{path!r} does not exist on {revision!r}", "EntryNotFound")
        return 200, {"X-Repo-Commit": sha, "ETag": f'"{_sha1(files[path])}"'}, files[path]


_REPO = r"(?P<repo_id>[^/]+(?:/[^/]+)?)"
_REVISION = r"(?P<revision>[^/]+)"
_ROUTES = (
    # Method, path, whether the token is needed, who answers.
    ("GET", "/api/whoami-v2", True, lambda hub, body: (200, {}, {"type": "user", "name": USER, "orgs": []})),
    ("POST", "/api/repos/create", True, HubServer._create),
    ("POST", "/api/validate-yaml", False, lambda hub, body: (200, {}, {"errors": [], "warnings": []})),  # any card
    ("POST", f"/api/models/{_REPO}/preupload/{_REVISION}", True, HubServer._preupload),
    ("POST", f"/api/models/{_REPO}/commit/{_REVISION}", True, HubServer._commit),
    ("GET", f"/api/models/{_REPO}(?:/revision/{_REVISION})?", False, HubServer._info),
    ("GET", f"/api/models/{_REPO}/tree/{_REVISION}(?:/(?P<folder>[^/]+))?", False, HubServer._tree),
    ("GET", f"/{_REPO}/resolve/{_REVISION}/(?P<path>.+)", False, HubServer._resolve),
)


class _Handler(BaseHTTPRequestHandler):
    """Reads requests from, and writes answers to, one kept-alive connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        method = "GET" if self.command == "HEAD" else self.command
        path = self.path.partition("?")[0]
        status, headers, content = self.server.respond(method, path, self.headers.get("Authorization"), body)
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_HEAD = do_POST = do_GET

    def log_message(self, *arguments: object) -> None:
        """Keeps the requests out of the output of the tests."""
