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
"""The stand-in for the Hub, asked by the real client: what is pushed comes back, and nothing else gets in."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from hub_server import HubServer
from slow_tests import slow


REPO = "user/repo"
WEIGHTS = bytes(range(256)) * 8
FILES = {"README.md": b"# A card\n", "nested/deep/notes.txt": "déjà vu\n".encode(), "weights.bin": WEIGHTS}

PUSH = """
import sys
import torch
from huggingface_hub import ModelCard
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

folder = sys.argv[1]
words = Tokenizer(models.WordLevel({"[UNK]": 0, "one": 1, "two": 2, "three": 3}, unk_token="[UNK]"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")
sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
model = LlamaForCausalLM(LlamaConfig(vocab_size=4, **sizes)).eval()
model.generation_config.max_new_tokens = 7
card = ModelCard("---\\nlicense: apache-2.0\\n---\\n# Pushed card\\n")

model.save_pretrained(folder)
tokenizer.save_pretrained(folder)
card.save(f"{folder}/README.md")
torch.save(model(**tokenizer("three two one", return_tensors="pt")).logits, f"{folder}/../logits")

model.push_to_hub("user/repo")
tokenizer.push_to_hub("user/repo")
card.push_to_hub("user/repo")
"""

PULL = """
import json, sys
import torch
from huggingface_hub import ModelCard
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("user/repo").eval()
tokenizer = AutoTokenizer.from_pretrained("user/repo")
logits = model(**tokenizer("three two one", return_tensors="pt")).logits
print(json.dumps({
    "equal logits": torch.equal(logits, torch.load(sys.argv[1])),
    "max_new_tokens": model.generation_config.max_new_tokens,
    "hidden_size": AutoConfig.from_pretrained("user/repo").hidden_size,
    "license": ModelCard.load("user/repo").data.license,
}))
"""

# What the scripts below start with: each prints, as JSON, what came of what it tried.
CLIENT = """
import json, sys
from huggingface_hub import CommitOperationAdd, HfApi, get_session, hf_hub_download, snapshot_download
from huggingface_hub.lfs import UploadInfo, post_lfs_batch_info

api = HfApi()


def outcome(call, *arguments, **options):
    try:
        return call(*arguments, **options)
    except Exception as error:
        return {"type": type(error).__name__, "status": error.response.status_code, "message": str(error)}
"""

LIST_AND_DOWNLOAD = """
snapshot = snapshot_download("user/repo", local_dir=sys.argv[1])
info = api.model_info("user/repo", files_metadata=True)
linked = get_session().head(sys.argv[2]).headers
open(f"{sys.argv[1]}/../by_sha", "wb").write(
    open(hf_hub_download("user/repo", "nested/deep/notes.txt", revision=info.sha), "rb").read()
)
print(json.dumps({
    "files": api.list_repo_files("user/repo"),
    "sizes": {sibling.rfilename: sibling.size for sibling in info.siblings},
    "in LFS": [sibling.rfilename for sibling in info.siblings if sibling.lfs],
    "top": [entry.path for entry in api.list_repo_tree("user/repo")],
    "nested": [entry.path for entry in api.list_repo_tree("user/repo", "nested/deep")],
    "linked": [linked["X-Linked-Etag"], linked["X-Linked-Size"]],
    "part": get_session().get(sys.argv[2], headers={"Range": "bytes=2-5"}).content.hex(),
    "rest": get_session().get(sys.argv[2], headers={"Range": "bytes=2040-"}).content.hex(),
}))
"""

WRITE = """
uploaded = outcome(api.upload_file, path_or_fileobj=b"new", path_in_repo="new.bin", repo_id="user/repo")
created = outcome(api.create_repo, "user/other")
endpoint = api.endpoint
addresses = [f"{endpoint}/api/models/user/repo/{route}" for route in ("preupload/main", "commit/main")]
addresses.append(f"{endpoint}/user/repo.git/info/lfs/objects/batch")
raw = [get_session().post(address, headers=api._build_hf_headers(), content=sys.argv[1]) for address in addresses]
raw.append(get_session().put(f"{endpoint}/lfs/guessed", content=b"new"))
raw.append(get_session().get(f"{endpoint}/api/whoami-v2", headers=api._build_hf_headers()))
print(json.dumps([uploaded["status"], created["status"], *[answer.status_code for answer in raw]]))
"""

COMMIT_WITHOUT_THE_OBJECT = """
announced = UploadInfo.from_bytes(b"announced")
misjudged = UploadInfo(size=1, sample=b"", sha256=announced.sha256)
sent = []
for info, content in [(announced, b"different"), (misjudged, b"announced")]:
    [action], _, _ = post_lfs_batch_info([info], None, "model", "user/repo")
    sent.append(get_session().put(action["actions"]["upload"]["href"], content=content).status_code)

named = CommitOperationAdd("named.bin", b"announced")
named._upload_mode, named._is_uploaded = "lfs", True
operations = [CommitOperationAdd("beside.txt", b"beside"), named]
committed = outcome(api.create_commit, "user/repo", operations, commit_message="incomplete")
print(json.dumps({"sent": sent, "committed": committed, "head": api.model_info("user/repo").sha}))
"""

LOOK_FOR_WHAT_IS_MISSING = """
print(json.dumps({
    "repository": outcome(hf_hub_download, "user/missing", "README.md")["type"],
    "repository info": outcome(api.model_info, "user/missing")["type"],
    "file": outcome(hf_hub_download, "user/repo", "missing.txt")["type"],
    "folder": outcome(lambda: list(api.list_repo_tree("user/repo", "missing")))["type"],
    "revision": outcome(hf_hub_download, "user/repo", "README.md", revision="missing")["type"],
    "branch": outcome(api.model_info, "user/repo", revision="0" * 40)["type"],
    "commit": outcome(api.upload_file, path_or_fileobj=b"", path_in_repo="a", repo_id="user/missing")["type"],
}))
"""

CHANGE = """
first = api.model_info("user/repo").sha
unchanged = api.upload_folder(repo_id="user/repo", folder_path=sys.argv[1]).oid
changed = api.upload_folder(
    repo_id="user/repo", folder_path=sys.argv[1], path_in_repo="copy", delete_patterns="*", allow_patterns="*.bin"
).oid
api.delete_file("README.md", "user/repo", parent_commit=changed)
late = outcome(api.delete_file, "weights.bin", "user/repo", parent_commit=changed)
print(json.dumps({"first": first, "unchanged": unchanged, "changed": changed, "late": late["status"]}))
"""

CREATE = """
print(json.dumps({
    "user": api.whoami()["name"],
    "again": outcome(api.create_repo, "user/repo")["status"],
    "again, if missing": outcome(api.create_repo, "user/repo", exist_ok=True),
    "without a user": api.create_repo("short").repo_id,
    "private": api.create_repo("user/hidden", private=True).repo_id,
    "seen with the token": api.model_info("user/hidden").private,
    "seen without": outcome(api.model_info, "user/hidden", token=False)["type"],
}))
"""


def run_client(hub: HubServer, home: Path, script: str, *arguments: str | Path, **environment: str) -> str:
    """Runs a script in a process whose Hub is `hub`, and returns what it prints."""
    variables = {**os.environ, **hub.environment(home), **environment}
    command = [sys.executable, "-c", script, *map(str, arguments)]
    finished = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def ask(hub: HubServer, home: Path, script: str, *arguments: str | Path, **environment: str) -> Any:
    """Runs a script that only needs `huggingface_hub`, and reads the JSON it prints."""
    return json.loads(run_client(hub, home, CLIENT + script, *arguments, **environment))


def read_folder(folder: Path) -> dict[str, bytes]:
    """The files of a folder, without the hidden ones the client keeps beside its downloads."""
    paths = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    return {path.as_posix(): (folder / path).read_bytes() for path in paths if not path.as_posix().startswith(".")}


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as hub:
        yield hub


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A local folder that holds `FILES`."""
    for name, content in FILES.items():
        path = tmp_path / "folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "folder"


@pytest.fixture
def filled_hub(hub: HubServer, folder: Path, tmp_path: Path) -> HubServer:
    """A Hub on which `REPO` holds `FILES`."""
    upload = "api.create_repo('user/repo'); api.upload_folder(repo_id='user/repo', folder_path=sys.argv[1])"
    run_client(hub, tmp_path / "filling", CLIENT + upload, folder)
    return hub


@slow
def test_a_pulled_model_is_the_pushed_one(hub: HubServer, tmp_path: Path):
    saved = tmp_path / "saved"
    run_client(hub, tmp_path / "pusher", PUSH, saved)
    assert hub.files(REPO) == read_folder(saved)
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} < hub.files(REPO).keys()

    pulled = json.loads(run_client(hub, tmp_path / "puller", PULL, tmp_path / "logits"))
    assert pulled == {"equal logits": True, "max_new_tokens": 7, "hidden_size": 8, "license": "apache-2.0"}


def test_listings_and_downloads_show_the_head_commit(filled_hub: HubServer, tmp_path: Path):
    address = f"{filled_hub.endpoint}/{REPO}/resolve/main/weights.bin"
    seen = ask(filled_hub, tmp_path / "home", LIST_AND_DOWNLOAD, tmp_path / "snapshot", address, HF_TOKEN="")
    assert filled_hub.files(REPO) == FILES
    assert read_folder(tmp_path / "snapshot") == FILES
    assert (tmp_path / "by_sha").read_bytes() == FILES["nested/deep/notes.txt"]
    assert seen == {
        "files": list(FILES),
        "sizes": {name: len(content) for name, content in FILES.items()},
        "in LFS": ["weights.bin"],
        "top": ["README.md", "nested", "weights.bin"],
        "nested": ["nested/deep/notes.txt"],
        "linked": [f'"{sha256(WEIGHTS).hexdigest()}"', str(len(WEIGHTS))],
        "part": WEIGHTS[2:6].hex(),
        "rest": WEIGHTS[2040:].hex(),
    }


@pytest.mark.parametrize("token", ["", "hf_wrong"])
def test_a_write_without_the_token_is_refused(filled_hub: HubServer, tmp_path: Path, token: str):
    operations = [{"key": "header", "value": {"summary": "s"}}, {"key": "deletedFile", "value": {"path": "README.md"}}]
    body = "\n".join(map(json.dumps, operations))
    assert ask(filled_hub, tmp_path / "home", WRITE, body, HF_TOKEN=token) == [401] * 7
    assert filled_hub.files(REPO) == FILES
    with pytest.raises(KeyError):
        filled_hub.files("user/other")


def test_a_commit_that_names_a_missing_object_changes_nothing(filled_hub: HubServer, tmp_path: Path):
    before = ask(filled_hub, tmp_path / "home", "print(json.dumps(api.model_info('user/repo').sha))")
    seen = ask(filled_hub, tmp_path / "home", COMMIT_WITHOUT_THE_OBJECT)
    assert seen["sent"] == [400, 400]
    assert seen["committed"]["type"] == "BadRequestError"
    assert "'named.bin' was not uploaded" in seen["committed"]["message"]
    assert seen["head"] == before
    assert filled_hub.files(REPO) == FILES


def test_what_is_missing_has_the_error_of_the_client(filled_hub: HubServer, tmp_path: Path):
    assert ask(filled_hub, tmp_path / "home", LOOK_FOR_WHAT_IS_MISSING) == {
        "repository": "RepositoryNotFoundError",
        "repository info": "RepositoryNotFoundError",
        "file": "RemoteEntryNotFoundError",
        "folder": "RemoteEntryNotFoundError",
        "revision": "RevisionNotFoundError",
        "branch": "RevisionNotFoundError",
        "commit": "RepositoryNotFoundError",
    }


def test_a_commit_changes_what_it_says(filled_hub: HubServer, folder: Path, tmp_path: Path):
    seen = ask(filled_hub, tmp_path / "home", CHANGE, folder)
    assert seen["unchanged"] == seen["first"] != seen["changed"]
    assert seen["late"] == 412
    kept = {name: content for name, content in FILES.items() if name != "README.md"}
    assert filled_hub.files(REPO) == {**kept, "copy/weights.bin": WEIGHTS}


def test_a_repository_is_created_once(filled_hub: HubServer, tmp_path: Path):
    assert ask(filled_hub, tmp_path / "home", CREATE) == {
        "user": "user",
        "again": 409,
        "again, if missing": f"{filled_hub.endpoint}/{REPO}",
        "without a user": "user/short",
        "private": "user/hidden",
        "seen with the token": True,
        "seen without": "RepositoryNotFoundError",
    }


def test_the_server_stops():
    with HubServer() as hub:
        address = ("127.0.0.1", int(hub.endpoint.rpartition(":")[2]))
        socket.create_connection(address).close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address)
