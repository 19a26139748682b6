# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Texts of packages: reading files, holding out files, and dividing what is held out."""

from studies.common import corpora
from studies.common.corpora import CORPORA, Corpus, load_corpus


def test_held_out_files_are_chosen_by_their_names(monkeypatch, tmp_path):
    def load(**contents):
        for name, content in contents.items():
            (tmp_path / f"{name}.txt").write_text(content)
        return load_corpus("made up")

    monkeypatch.setattr(corpora, "fetch_package", lambda registry, name: tmp_path)
    monkeypatch.setitem(CORPORA, "made up", Corpus("debian", "made-up", "**/*.txt", "none"))
    datasets = load(**{f"{i}": f"text {i}" for i in range(200)})
    held_out = datasets["validation"]["file"]
    assert 8 < len(held_out) < 35 and not set(held_out) & set(datasets["train"]["file"])
    assert all(row["text"] == f"text {row['file'][:-4]}" for split in datasets.values() for row in split)
    assert load(new="one more")["validation"]["file"][:5] == held_out[:5]
