# Copyright 2026 The PEER for Transformers authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""
A stand-in for the Hugging Face Hub on 127.0.0.1, so that tests can push and pull with the real client.

It holds model repositories in memory and answers what `huggingface_hub` asks for when Transformers pushes or loads a
model: creating a repository, uploading over plain LFS, committing to `main`, listing and downloading. Anything else
(datasets, branches, pull requests, xet) is answered by an error.
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
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


USER = "user"
BRANCH = "main"
LFS_SUFFIXES = (".bin", ".ckpt", ".gguf", ".h5", ".model", ".msgpack", ".npz", ".onnx", ".pt", ".pth", ".safetensors")
LARGEST_REGULAR_FILE = 10_000_000


def _sha1(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class HubError(Exception):
    """A refusal: its status and message, and the code by which the client tells one missing thing from another."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status = status
        self.code = code
        self.headers = headers or {}

    def response(self) -> "Response":
        """The message goes into a header too: the answer to a HEAD request has no body to carry it."""
        message = str(self).encode("ascii", "backslashreplace").decode()
        headers = {**self.headers, "X-Error-Message": message}
        if self.code is not None:
            headers["X-Error-Code"] = self.code
        return Response.of_json({"error": message}, self.status, headers)


@dataclass(frozen=True)
class Request:
    """One HTTP request, read whole."""

    method: str
    path: str
    query: dict[str, list[str]]
    headers: Message
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

    @classmethod
    def of_range(cls, data: bytes, wanted: str | None, headers: dict[str, str]) -> "Response":
        """The part of `data` that a `Range: bytes=FIRST-[LAST]` header wants, or all of it without such a header."""
        bounds = re.fullmatch(r"bytes=(\d+)-(\d*)", wanted or "")
        if bounds is None or int(bounds[1]) >= len(data):
            return cls(data, 200, headers)
        first, last = int(bounds[1]), min(int(bounds[2] or len(data)), len(data) - 1)
        return cls(data[first : last + 1], 206, {**headers, "Content-Range": f"bytes {first}-{last}/{len(data)}"})


@dataclass(frozen=True)
class File:
    """A committed file: git keeps its content, or only a pointer to it if it went through LFS."""

    data: bytes
    is_lfs: bool

    @property
    def pointer(self) -> bytes:
        oid, size = _sha256(self.data), len(self.data)
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {size}\n".encode()

    @property
    def blob_id(self) -> str:
        blob = self.pointer if self.is_lfs else self.data
        return _sha1(b"blob %d\0" % len(blob) + blob)

    @property
    def etag(self) -> str:
        """What the client names the file in its cache by, and compares with a local file to see if it changed."""
        return _sha256(self.data) if self.is_lfs else self.blob_id

    @property
    def lfs(self) -> dict[str, Any] | None:
        """The LFS metadata; a tree calls the sha256 `oid`, a list of siblings calls it `sha256`."""
        if not self.is_lfs:
            return None
        return {"oid": self.etag, "sha256": self.etag, "size": len(self.data), "pointerSize": len(self.pointer)}


class Repository:
    """The commits of one model repository, from an empty first one on, and the LFS objects uploaded to it."""

    def __init__(self, repo_id: str, private: bool):
        self.repo_id = repo_id
        self.private = private
        self.objects: dict[str, bytes] = {}
        self.commits: dict[str, dict[str, File]] = {}
        self.head = ""
        self.add_commit({}, "initial commit")

    def add_commit(self, files: dict[str, File], summary: str) -> None:
        tree = {path: file.blob_id for path, file in files.items()}
        sha = _sha1(json.dumps([self.repo_id, self.head, summary, tree]).encode())
        self.commits[sha] = files
        self.head = sha

    def at(self, revision: str) -> tuple[str, dict[str, File]]:
        """The commit, and its files, that a branch name or a commit sha stands for."""
        sha = self.head if revision == BRANCH else revision
        if sha not in self.commits:
            raise HubError(404, f"Invalid rev id: {revision!r}", "RevisionNotFound")
        return sha, self.commits[sha]

    def apply(self, files: dict[str, File], key: str, value: dict[str, Any]) -> None:
        """Makes one operation of a commit on `files`, or refuses it."""
        path = value.get("path")
        if key == "header":
            if not self.head.startswith(value.get("parentCommit", "")):
                raise HubError(412, "A commit has happened since. Please refresh and try again.")
        elif key == "file":
            files[path] = File(base64.b64decode(value["content"]), is_lfs=False)
        elif key == "lfsFile":
            data = self.objects.get(value["oid"])
            if data is None or len(data) != value.get("size", len(data)):
                raise HubError(400, f"LFS object {value['oid']} of {path!r} was not uploaded with the size given")
            files[path] = File(data, is_lfs=True)
        elif key == "deletedFile":
            if files.pop(path, None) is None:
                raise HubError(404, f"A file with this name doesn't exist: {path!r}", "EntryNotFound")
        else:
            raise HubError(400, f"Operation {key!r} is not supported")


class HubServer:
    """
    A Hub with one user, whose `token` is asked for by every write and by every look at a private repository.

    The client reads `HF_ENDPOINT` when it is imported, so it has to run in another process, under `environment`:

        with HubServer() as hub:
            subprocess.run([sys.executable, "push.py"], env={**os.environ, **hub.environment(tmp_path)}, check=True)
            assert "config.json" in hub.files("user/repo")
    """

    def __init__(self):
        self.token = f"hf_{secrets.token_hex(17)}"
        self._repositories: dict[str, Repository] = {}
        self._uploads: dict[str, tuple[Repository, str, int]] = {}
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
        """The files of the head commit of a repository, which must exist."""
        repository = self._repositories[repo_id]
        return {path: file.data for path, file in repository.commits[repository.head].items()}

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
                    if needs_token and not self._is_user(request):
                        raise HubError(401, "Invalid credentials in Authorization header")
                    parts = {name: unquote(text) for name, text in match.groupdict().items() if text is not None}
                    return answer(self, request, **parts)
            raise HubError(404, f"This stand-in for the Hub does not answer {request.method} {request.path!r}")
        except HubError as error:
            return error.response()

    def _is_user(self, request: Request) -> bool:
        return request.headers.get("authorization") == f"Bearer {self.token}"

    def _repository(self, request: Request, repo_id: str) -> Repository:
        """A repository, if it exists for whoever asks."""
        repository = self._repositories.get(repo_id)
        if repository is None or (repository.private and not self._is_user(request)):
            raise HubError(404, f"Repository not found: {repo_id!r}", "RepoNotFound")
        return repository

    def _whoami(self, request: Request) -> Response:
        return Response.of_json({"type": "user", "name": USER, "fullname": USER, "orgs": []})

    def _create(self, request: Request) -> Response:
        asked = json.loads(request.body)
        if asked.get("type", "model") != "model":
            raise HubError(400, "Only model repositories are supported")
        repo_id = f"{asked.get('organization') or USER}/{asked['name']}"
        url = f"{self.endpoint}/{repo_id}"
        with self._lock:
            if repo_id in self._repositories:
                return Response.of_json({"error": "You already created this model repo", "url": url}, 409)
            self._repositories[repo_id] = Repository(repo_id, private=asked.get("visibility") == "private")
        return Response.of_json({"url": url})

    def _validate_card(self, request: Request) -> Response:
        """Accepts any card: the client asks before every commit of a README.md."""
        return Response.of_json({"errors": [], "warnings": []})

    def _preupload(self, request: Request, repo_id: str, revision: str) -> Response:
        """Says how each file has to come, and what is there already: the client skips a file that did not change."""
        _, files = self._repository(request, repo_id).at(revision)
        answers = []
        for asked in json.loads(request.body)["files"]:
            path = asked["path"]
            is_lfs = path.endswith(LFS_SUFFIXES) or asked["size"] > LARGEST_REGULAR_FILE
            oid = files[path].etag if path in files else None
            mode = "lfs" if is_lfs else "regular"
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return Response.of_json({"files": answers})

    def _lfs_batch(self, request: Request, repo_id: str) -> Response:
        """
        Gives an address to upload to for each object that is not there yet.

        The client sends no token along with the object, so the address itself is the permission: nobody can guess it.
        """
        repository = self._repository(request, repo_id)
        answers = []
        for asked in json.loads(request.body)["objects"]:
            oid, size = asked["oid"], asked["size"]
            answer = {"oid": oid, "size": size}
            if oid not in repository.objects:
                permission = secrets.token_urlsafe()
                self._uploads[permission] = (repository, oid, size)
                answer["actions"] = {"upload": {"href": f"{self.endpoint}/lfs/{permission}"}}
            answers.append(answer)
        return Response.of_json({"transfer": "basic", "objects": answers})

    def _lfs_upload(self, request: Request, permission: str) -> Response:
        if permission not in self._uploads:
            raise HubError(401, "Nobody was given this address to upload to")
        repository, oid, size = self._uploads[permission]
        if len(request.body) != size or _sha256(request.body) != oid:
            raise HubError(400, f"The object received is not the one announced: sha256 {oid}, {size} bytes")
        repository.objects[oid] = request.body
        return Response()

    def _commit(self, request: Request, repo_id: str, revision: str) -> Response:
        """Makes all operations on a copy of the files of the head, which becomes the new head if none is refused."""
        repository = self._repository(request, repo_id)
        if revision != BRANCH or "create_pr" in request.query:
            raise HubError(400, f"Commits are only taken to the branch {BRANCH!r}, without a pull request")
        operations = [json.loads(line) for line in request.body.splitlines()]
        with self._lock:
            files = dict(repository.commits[repository.head])
            for operation in operations:
                repository.apply(files, operation["key"], operation["value"])
            repository.add_commit(files, operations[0]["value"]["summary"])
            sha = repository.head
        return Response.of_json({"commitOid": sha, "commitUrl": f"{self.endpoint}/{repo_id}/commit/{sha}"})

    def _info(self, request: Request, repo_id: str, revision: str = BRANCH) -> Response:
        repository = self._repository(request, repo_id)
        sha, files = repository.at(revision)
        siblings = [{"rfilename": path} for path in sorted(files)]
        if "blobs" in request.query:
            for sibling in siblings:
                file = files[sibling["rfilename"]]
                sibling |= {"size": len(file.data), "blobId": file.blob_id, "lfs": file.lfs}
        info = {"id": repo_id, "author": repo_id.split("/")[0], "sha": sha, "private": repository.private}
        return Response.of_json({**info, "tags": [], "siblings": siblings})

    def _tree(self, request: Request, repo_id: str, revision: str, folder: str = "") -> Response:
        """Lists what a folder holds, and with `recursive` also what its folders hold."""
        sha, files = self._repository(request, repo_id).at(revision)
        prefix = f"{folder}/" if folder else ""
        recursive = request.query.get("recursive") == ["true"]
        entries = {}
        for path in sorted(path for path in files if path.startswith(prefix)):
            file, steps = files[path], path.removeprefix(prefix).split("/")
            for depth in range(1, len(steps) if recursive else min(len(steps), 2)):
                inner = prefix + "/".join(steps[:depth])
                entries[inner] = {"type": "directory", "path": inner, "oid": _sha1(inner.encode()), "size": 0}
            if recursive or len(steps) == 1:
                size = len(file.data)
                entries[path] = {"type": "file", "path": path, "oid": file.blob_id, "size": size, "lfs": file.lfs}
        if folder and not entries:
            raise HubError(404, f"{folder!r} does not exist on {revision!r}", "EntryNotFound", {"X-Repo-Commit": sha})
        return Response.of_json(list(entries.values()))

    def _resolve(self, request: Request, repo_id: str, revision: str, path: str) -> Response:
        sha, files = self._repository(request, repo_id).at(revision)
        headers = {"X-Repo-Commit": sha}
        if path not in files:
            raise HubError(404, f"{path!r} does not exist on {revision!r}", "EntryNotFound", headers)
        file = files[path]
        headers |= {"ETag": f'"{file.etag}"', "Accept-Ranges": "bytes"}
        if file.is_lfs:
            headers |= {"X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": str(len(file.data))}
        return Response.of_range(file.data, request.headers.get("range"), headers)


_REPO = r"(?P<repo_id>[^/]+(?:/[^/]+)?)"
_REVISION = r"(?P<revision>[^/]+)"
_ROUTES: tuple[tuple[str, str, bool, Callable[..., Response]], ...] = (
    # Method, path, whether the token is needed, who answers.
    ("GET", "/api/whoami-v2", True, HubServer._whoami),
    ("POST", "/api/repos/create", True, HubServer._create),
    ("POST", "/api/validate-yaml", False, HubServer._validate_card),
    ("POST", f"/api/models/{_REPO}/preupload/{_REVISION}", True, HubServer._preupload),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", True, HubServer._lfs_batch),
    ("PUT", "/lfs/(?P<permission>[^/]+)", False, HubServer._lfs_upload),
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
