# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Texts that example scripts train on: files of several kinds, held-out parts, blocks that end where texts end."""

import json
import tokenize
from itertools import chain
from pathlib import Path

import datasets
import pytest
from datasets import Dataset

from common import text_files
from common.library_sources import library_files
from common.text_data import (
    DataTrainingArguments,
    load_datasets,
    standard_library,
    text_column,
    tokenize_into_blocks,
    train_tokenizer,
)
from common.text_files import find_files, load_parts


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def notes(tmp_path):
    """A folder with three notes and what is not read of it."""
    folder = tmp_path / "notes"
    for name in ("more", ".git"):
        (folder / name).mkdir(parents=True)
    for name, text in (("b.md", "two\n" * 30), ("more/a.txt", "one\n" * 30), ("c.MD", "\ufeffthree\r\n")):
        (folder / name).write_bytes(text.encode())
    for name in ("picture.png", ".git/notes.md", "settings.json"):
        (folder / name).write_text("{}")
    return folder


def test_standard_library():
    splits = standard_library()
    train, held_out = (set(splits[name]["file"]) for name in ("train", "validation"))
    assert not train & held_out and 0.02 < len(held_out) / len(train) < 0.1
    assert not any("test" in name.split("/") or "site-packages" in name for name in train | held_out)
    first, again = splits["train"][0], standard_library()
    assert all(again[name]["file"] == splits[name]["file"] for name in splits)
    with tokenize.open(Path(library_files()[0], first["file"])) as file:
        assert first["text"] == file.read()


def test_the_standard_library_whole():
    assert list(standard_library(0)) == ["train"]


def test_files_that_are_read(notes):
    def names(*patterns):
        return [file.removeprefix(f"{notes}/") for file in find_files([str(notes / each) for each in patterns])]

    (notes / "empty.md").touch()
    assert names("") == ["b.md", "c.MD", "more/a.txt"]
    assert names("**/*.[mt]*", "b.md") == ["b.md", "more/a.txt"]  # each once
    assert names("picture.png") == ["picture.png"]  # as it is named
    (notes / "more" / "rows.jsonl.gz").write_text("{}")
    assert names("more") == ["more/rows.jsonl.gz"]  # data comes before its description


def tokens_of(args, streaming, split="train"):
    """The tokenizer of a text, and all of its tokens."""
    dataset = load_datasets(args, streaming)[split]
    tokenizer = train_tokenizer(load_datasets(args)["train"], text_column(dataset, args), 280, 64)
    blocks = tokenize_into_blocks(dataset, tokenizer, 1, args)
    return tokenizer, list(chain.from_iterable(block["input_ids"] for block in blocks))


@pytest.mark.parametrize("streaming", [False, True])
class TestTexts:
    @pytest.mark.parametrize("large_bytes", [1 << 20, 50])
    def test_files_end(self, notes, streaming, large_bytes, monkeypatch):
        """Each file ends once, whole or read by its lines. A mark of the encoding is no text."""
        monkeypatch.setattr(text_files, "LARGE_BYTES", large_bytes)
        args = DataTrainingArguments(train_file=[str(notes)], validation_split_percentage=0)
        tokenizer, tokens = tokens_of(args, streaming)
        parts = tokenizer.decode(tokens).split("<|endoftext|>")
        assert sorted(parts) == sorted(["", "one\n" * 30, "two\n" * 30, "three\n"]) and parts[-1] == ""

    def test_names_with_brackets_are_no_patterns(self, tmp_path, streaming):
        for name in ("a [1].md", "[id].md", "1.md"):
            (tmp_path / name).write_text(name)
        args = DataTrainingArguments(train_file=[str(tmp_path / "a [1].md"), str(tmp_path / "[id].md")])
        assert {row["text"] for row in load_parts(args.train_file, "utf-8", streaming)[0].dataset} == {
            "a [1].md",
            "[id].md",
        }

    def test_lines_of_large_files_are_held_out_in_runs(self, tmp_path, streaming, monkeypatch):
        monkeypatch.setattr(text_files, "LARGE_BYTES", 50)
        lines = [f"line {i}\n" for i in range(1200)]
        (tmp_path / "a.txt").write_text("".join(lines))
        splits = load_datasets(DataTrainingArguments(train_file=str(tmp_path)), streaming)
        held_out = [row["text"] for row in splits["validation"]]
        assert held_out == (lines[:50] + lines[1000:1050] if streaming else lines[:60])
        assert [row["text"] for row in splits["train"]] == [line for line in lines if line not in held_out] + [""]

    @pytest.mark.parametrize("source", ["train_file", "dataset_name"])
    def test_rows_are_held_out(self, tmp_path, source, streaming):
        rows = tmp_path / "rows" / "train.csv"
        rows.parent.mkdir()
        rows.write_text("text\n" + "\n".join(f"row {i}" for i in range(200)))
        named = {source: str(rows if source == "train_file" else rows.parent)}
        splits = load_datasets(DataTrainingArguments(**named, validation_split_percentage=10), streaming)
        train, held_out = ([row["text"] for row in splits[name]] for name in ("train", "validation"))
        assert (len(train), len(held_out)) == (180, 20)
        assert sorted(train + held_out) == sorted(f"row {i}" for i in range(200))

    def test_rows_of_data_end(self, tmp_path, streaming):
        rows = [{"id": i, "text": text} for i, text in enumerate(["one", None, "two<|endoftext|>", ""])]
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
        for name in ("rows.jsonl", "rows.parquet"):
            args = DataTrainingArguments(train_file=str(tmp_path / name), validation_split_percentage=0)
            tokenizer, tokens = tokens_of(args, streaming)
            end = "<|endoftext|>"
            assert tokenizer.decode(tokens) == f"one{end}{end}two{end}{end}"


def test_blocks_hold_the_text_and_its_ends(tmp_path):
    (tmp_path / "rows.csv").write_text("id,body\n" + "\n".join(f"{i},text {i}" for i in range(40)))
    args = DataTrainingArguments(train_file=str(tmp_path / "rows.csv"), text_column_name="body")
    dataset = load_datasets(args)["train"]
    tokenizer, other = (train_tokenizer(dataset, "body", 300, 64) for _ in range(2))
    assert tokenizer.backend_tokenizer.to_str() == other.backend_tokenizer.to_str()
    blocks = tokenize_into_blocks(dataset, tokenizer, 16, args)
    assert all(len(block["input_ids"]) == 16 and block["labels"] == block["input_ids"] for block in blocks)
    text = tokenizer.decode(list(chain.from_iterable(blocks["input_ids"])))
    assert "<|endoftext|>".join(dataset["body"]).startswith(text)
    assert len(blocks) == sum(len(ids) + 1 for ids in tokenizer(dataset["body"][:]).input_ids) // 16
