# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Texts of packages: reading files, holding out files, and the error if a package cannot be downloaded."""

import pytest
from datasets import Dataset

from studies.common import corpora
from studies.common.corpora import CORPORA, Corpus, load_corpus, split_documents


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


class TestSplitDocuments:
    def test_parts_share_no_document_and_are_of_about_equal_length(self):
        lengths = [40, 1000, 300, 20, 500, 310, 5, 0]
        rows = [{"file": f"{i}", "body": f"{i} " * (length // 2)} for i, length in enumerate(lengths)]
        first, second = split_documents(Dataset.from_list(rows), "body")
        assert first["file"][:] == ["0", "1", "3", "6", "7"] and second["file"][:] == ["2", "4", "5"]
        assert sorted([*first, *second], key=lambda row: row["file"]) == rows

    def test_a_single_document_is_divided_into_its_halves(self):
        text = "a line\n" * 50 + "and no more"
        parts = split_documents(Dataset.from_list([{"file": "x", "text": text}]), "text")
        (first,), (second,) = (list(part) for part in parts)
        assert first["text"] + second["text"] == text and abs(len(first["text"]) - len(second["text"])) <= 1
        assert first["file"] == second["file"] == "x"
