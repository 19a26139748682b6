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
"""Folders, patterns and files of several kinds become texts that end, and what cannot be read is named."""

import json
import logging
from itertools import chain

import datasets
import pytest
from datasets import Dataset

from common import text_files
from common.command_line import UsageError
from common.text_data import DataTrainingArguments, load_datasets, text_column, tokenize_into_blocks, train_tokenizer
from common.text_files import errors_name_the_file, find_files, load_parts


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def notes(tmp_path):
    """A folder with three notes and what is not read of it."""
    folder = tmp_path / "notes"
    (folder / "more").mkdir(parents=True)
    (folder / ".git").mkdir()
    for name, text in (("b.md", "two\n" * 30), ("more/a.txt", "one\n" * 30), ("c.MD", "\ufeffthree\r\n" * 1)):
        (folder / name).write_bytes(text.encode())
    for name in ("picture.png", ".git/notes.md", "settings.json"):
        (folder / name).write_text("{}")
    return folder


def names(files, folder):
    return [file.removeprefix(f"{folder}/") for file in files]


class TestFiles:
    def test_folder_gives_its_text(self, notes, caplog):
        (notes / "empty.md").touch()
        assert names(find_files([str(notes)]), notes) == ["b.md", "c.MD", "more/a.txt"]
        assert f"Left out: {notes}/settings.json" in caplog.text
        assert f"as they are empty: {notes}/empty.md" in caplog.text

    def test_data_in_a_folder_comes_before_its_description(self, tmp_path):
        (tmp_path / "README.md").write_text("Rows.")
        (tmp_path / "rows.jsonl.gz").write_text("{}")
        assert names(find_files([str(tmp_path)]), tmp_path) == ["rows.jsonl.gz"]

    def test_patterns_and_files_are_found_once(self, notes):
        found = find_files([str(notes / "**" / "*.[mt]*"), str(notes / "b.md"), "https://hub/rows.jsonl"])
        assert names(found, notes) == ["b.md", "more/a.txt", "https://hub/rows.jsonl"]
        assert names(find_files([str(notes / "picture.png")]), notes) == ["picture.png"]

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("no.md", "There is no file or folder {folder}/no.md"),
            ("*.rst", r"No file matches {folder}/\*.rst"),
            ("more/pictures", "There is no text in the folder {folder}/more/pictures"),
            ("empty.md", "{folder}/empty.md is empty"),
            ("empty*", r"All files of {folder}/empty\* are empty"),
        ],
    )
    def test_nothing_to_read_is_said(self, notes, name, message):
        (notes / "more/pictures").mkdir()
        (notes / "more/pictures/a.png").touch()
        (notes / "empty.md").touch()
        (notes / "empty2.md").touch()
        with pytest.raises(UsageError, match=message.format(folder=notes)):
            find_files([str(notes / name)])

    def test_kinds_are_not_mixed(self, notes):
        with pytest.raises(
            UsageError, match="1 of text such as .*b.md, 1 of json such as .*settings.json: choose one"
        ):
            load_parts([str(notes / "b.md"), str(notes / "settings.json")], "utf-8", streaming=False)


def tokens_of(args, streaming, split="train", block_size=4):
    """The tokenizer of a text, and all tokens of its blocks."""
    dataset = load_datasets(args, streaming)[split]
    tokenizer = train_tokenizer(load_datasets(args)["train"], text_column(dataset, args), 280, 64)
    blocks = tokenize_into_blocks(dataset, tokenizer, block_size, args)
    return tokenizer, list(chain.from_iterable(block["input_ids"] for block in blocks))


@pytest.mark.parametrize("streaming", [False, True])
class TestTexts:
    @pytest.mark.parametrize("large_bytes", [1 << 20, 50])
    def test_files_end(self, notes, streaming, large_bytes, monkeypatch):
        """Each file ends once, whole or read by its lines. A mark of the encoding is no text."""
        monkeypatch.setattr(text_files, "LARGE_BYTES", large_bytes)
        args = DataTrainingArguments(train_file=[str(notes)], validation_split_percentage=0)
        tokenizer, tokens = tokens_of(args, streaming, block_size=1)
        parts = tokenizer.decode(tokens).split("<|endoftext|>")
        assert sorted(parts) == sorted(["", "one\n" * 30, "two\n" * 30, "three\n"])
        assert parts[-1] == ""

    def test_few_texts_give_their_beginnings(self, notes, streaming):
        args = DataTrainingArguments(
            train_file=[str(notes / "b.md"), str(notes / "more")], validation_split_percentage=10
        )
        splits = load_datasets(args, streaming)
        train, held_out = ([row["text"] for row in splits[split]] for split in ("train", "validation"))
        assert (train, held_out) == (["two\n" * 26, "one\n" * 26], ["two\n" * 4, "one\n" * 4])
        tokenizer, tokens = tokens_of(args, streaming, "validation", block_size=1)
        assert tokenizer.decode(tokens) == "two\n" * 4 + "one\n" * 4  # the texts go on

    def test_lines_of_large_files_are_held_out_in_runs(self, tmp_path, streaming, monkeypatch):
        monkeypatch.setattr(text_files, "LARGE_BYTES", 50)
        lines = [f"line {i}\n" for i in range(1200)]
        (tmp_path / "a.txt").write_text("".join(lines))
        splits = load_datasets(DataTrainingArguments(train_file=str(tmp_path)), streaming)
        held_out = [row["text"] for row in splits["validation"]]
        assert held_out == (lines[:50] + lines[1000:1050] if streaming else lines[:60])
        rest = [row["text"] for row in splits["train"]]
        assert rest == [line for line in lines if line not in held_out] + [""]

    def test_rows_of_data_end(self, tmp_path, streaming):
        rows = [{"id": i, "text": text} for i, text in enumerate(["one", None, "two<|endoftext|>", ""])]
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
        for name in ("rows.jsonl", "rows.parquet"):
            args = DataTrainingArguments(train_file=str(tmp_path / name), validation_split_percentage=0)
            tokenizer, tokens = tokens_of(args, streaming, block_size=1)
            end = "<|endoftext|>"
            assert tokenizer.decode(tokens) == f"one{end}{end}two{end}{end}"

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("a.md", b"caf\xe9\n", "a.md is not in utf-8, invalid continuation byte at 0xe9: .*--encoding latin-1"),
            ("a.jsonl", b'{"text": "a"}\n{broken\n', "a.jsonl is not the json that its name says: .*JSON"),
            ("a.parquet", b"PAR1", "a.parquet is not the parquet that its name says: .*magic|.*smaller"),
            ("a.jsonl", b"\n", "a.jsonl has no rows"),
        ],
    )
    def test_what_cannot_be_read_is_named(self, tmp_path, streaming, name, content, message):
        good = {"a.md": b"good\n", "a.jsonl": b'{"text": "b"}\n'}.get(name)
        if good is not None and content != b"\n":
            (tmp_path / f"0{name[1:]}").write_bytes(good)
        (tmp_path / name).write_bytes(content)
        args = DataTrainingArguments(train_file=str(tmp_path))
        with pytest.raises(UsageError, match=message), errors_name_the_file(args.files, args.encoding):
            rows = load_datasets(args, streaming)["train"]
            next(iter(rows))
            list(rows)

    def test_other_encodings_are_read(self, tmp_path, streaming):
        (tmp_path / "a.md").write_bytes("café\n".encode("latin-1"))
        args = DataTrainingArguments(train_file=str(tmp_path), encoding="latin-1", validation_split_percentage=0)
        (row,) = load_datasets(args, streaming)["train"]
        assert row["text"] == "café\n"


def test_columns_of_text():
    dataset = Dataset.from_dict({"id": [1], "body": ["a"]})
    for data in (dataset, dataset.to_iterable_dataset()):
        assert text_column(data, DataTrainingArguments()) == "body"
        with pytest.raises(UsageError, match=r"'id' does not hold text, .*another --text_column_name of \['body'\]"):
            text_column(data, DataTrainingArguments(text_column_name="id"))
    with pytest.raises(UsageError, match=r"No column holds text, the columns are \['id'\]"):
        text_column(dataset.remove_columns("body"), DataTrainingArguments())


def test_tokenizers_without_an_end_of_text_are_told(caplog):
    dataset = Dataset.from_dict({"text": ["one two three"]})
    tokenizer = train_tokenizer(dataset, "text", 280, 64)
    tokenizer.eos_token = None
    with caplog.at_level(logging.WARNING):
        tokenize_into_blocks(dataset, tokenizer, 1, DataTrainingArguments())
    assert "the model cannot learn where texts end" in caplog.text


def test_cards_say_from_where_a_pattern_begins(tmp_path):
    named = [str(tmp_path / "notes"), str(tmp_path / "licenses" / "*"), "a/b/**/*.md", f"{tmp_path.anchor}*.txt"]
    arguments = DataTrainingArguments(train_file=named)
    assert arguments.description == "files of notes, `licenses/*`, `b/**/*.md`, `*.txt`"
