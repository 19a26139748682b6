# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Text files: how the named ones are found and read, and which of them cannot be read."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from glob import escape, glob, has_magic
from pathlib import Path

import numpy as np
import pyarrow
from datasets import Dataset, Features, IterableDataset, Value, concatenate_datasets, load_dataset
from datasets.exceptions import DatasetGenerationError

from common.command_line import UsageError


logger = logging.getLogger(__name__)

# The loaders of `load_dataset` by the suffix of a file's name. Any other file is text.
LOADERS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
COMPRESSIONS = {".bz2", ".gz", ".xz", ".zst"}

# Further suffixes that are read in a folder. A file with any suffix can be named, by its path or by a pattern.
TEXT_SUFFIXES = {".adoc", ".markdown", ".md", ".mdx", ".org", ".rst", ".tex", ".text", ".txt"}

# A larger file is read by lines, not at once.
LARGE_BYTES = 4 << 20

# Column that says whether a text ends with a row. Without the column, each row is a whole text.
ENDS = "ends_text"


@dataclass(frozen=True)
class Part:
    """
    Rows that are of one kind.

    Args:
        dataset (`Dataset` or `IterableDataset`)
        num_rows (`int`, *optional*): Number of rows, if it is known.
        are_lines (`bool`): Whether the rows are the lines of one text.
    """

    dataset: Dataset | IterableDataset
    num_rows: int | None = None
    are_lines: bool = False


def find_files(names: list[str]) -> list[str]:
    """
    Find the files that names of files, folders and patterns stand for, except empty ones.

    A folder stands for the data or text files in it and in its subfolders, of the kind that is most frequent there.
    Names that begin with a dot are skipped. A name that contains `://` is left to `load_dataset`.

    Raises:
        `UsageError`: if there is no such file, or if it is empty.
    """
    files: dict[str, None] = {}
    for name in names:
        found = _files_of(name)
        empty = [file for file in found if "://" not in file and not Path(file).stat().st_size]
        if found == empty:
            raise UsageError(f"{name} is empty." if found == [name] else f"All files of {name} are empty.")
        if empty:
            logger.warning(f"Left out, as they are empty: {_shortened(empty)}")
        files |= dict.fromkeys(file for file in found if file not in empty)
    return list(files)


def _files_of(name):
    path = Path(name).expanduser()
    if "://" in name or path.is_file():
        return [name if "://" in name else str(path)]
    if path.is_dir():
        found = [file for file in path.rglob("*") if file.is_file() and _is_shown(file.relative_to(path))]
        found = [str(file) for file in found if loader_of(file) != "text" or _suffix(file) in TEXT_SUFFIXES]
        files = _most_frequent_kind(name, found)
        expected = " ".join(sorted([*LOADERS, *TEXT_SUFFIXES]))
        missing = (
            f"There is no text in the folder {name}, only other files than {expected}: name them by a pattern, for "
            f"example '{name}/*'."
        )
    elif has_magic(name):
        files = [file for file in glob(str(path), recursive=True) if Path(file).is_file()]
        missing = f"No file matches {name}: two asterisks, as in 'folder/**/*.md', stand for folders in folders."
    else:
        files, missing = [], f"There is no file or folder {name}."
    if not files:
        raise UsageError(missing)
    return sorted(files)


def _most_frequent_kind(folder, files):
    """The files of a folder's most frequent kind. If data and text tie, data is read: text may only describe it."""
    kinds = _by_loader(files)
    if not kinds:
        return []
    kind = max(kinds, key=lambda loader: (len(kinds[loader]), loader != "text"))
    left_out = [file for file in files if file not in kinds[kind]]
    if left_out:
        logger.warning(f"Only files of {kind} in {folder} are read. Left out: {_shortened(sorted(left_out))}.")
    return kinds[kind]


def _by_loader(files):
    found: dict[str, list[str]] = {}
    for file in files:
        found.setdefault(loader_of(file), []).append(file)
    return found


def _is_shown(path):
    return not any(part.startswith(".") for part in path.parts)


def _suffix(file):
    path = Path(file)
    return (Path(path.stem) if path.suffix.lower() in COMPRESSIONS else path).suffix.lower()


def loader_of(file: str | Path) -> str:
    """The loader of `load_dataset` that reads a file: `"csv"`, `"json"`, `"parquet"` or `"text"`."""
    return LOADERS.get(_suffix(file), "text")


def load_parts(names: list[str], encoding: str, streaming: bool) -> list[Part]:
    """
    Load the files that the names stand for, see [`find_files`].

    A text file is one row, `text`. A text file above 4 MiB is a part of its own, with a row for each line and a last,
    empty row that ends the text. In files of other kinds, each row is a text.

    Raises:
        `UsageError`: if the files are of several kinds, or if one cannot be read.
    """
    files = find_files(names)
    kinds = _by_loader(files)
    if len(kinds) > 1:
        found = ", ".join(f"{len(each)} of {loader} such as {each[0]}" for loader, each in kinds.items())
        raise UsageError(
            f"{' '.join(names)} has files of several kinds, {found}: choose one, by a pattern such as 'folder/*.md'."
        )
    ((loader, files),) = kinds.items()
    options = _options(loader, encoding)
    with errors_name_the_file(names, encoding, ValueError):
        if loader != "text":
            dataset = load_dataset(loader, data_files=_exact(files), split="train", streaming=streaming, **options)
            return [Part(dataset, None if streaming else len(dataset))]
        large = [file for file in files if _is_large(file)]
        whole = [file for file in files if file not in large]
        parts = [_lines_of(file, options, streaming) for file in large]
        if whole:
            dataset = load_dataset(
                "text", data_files=_exact(whole), split="train", streaming=streaming, sample_by="document", **options
            )
            parts.append(Part(dataset, len(whole)))
        return parts


def _exact(files):
    """Escape names of files, which `load_dataset` reads as patterns."""
    return [file if "://" in file else escape(file) for file in files]


def _options(loader, encoding):
    if loader == "parquet":
        return {}
    # Some editors begin UTF-8 files with a byte-order mark.
    return {"encoding": "utf-8-sig" if loader == "text" and encoding == "utf-8" else encoding}


def _is_large(file):
    return "://" in file or Path(file).stat().st_size > LARGE_BYTES


def _lines_of(file, options, streaming):
    lines = load_dataset(
        "text", data_files=_exact([file]), split="train", streaming=streaming, keep_linebreaks=True, **options
    )
    end = Dataset.from_dict({"text": [""], ENDS: [True]})
    dataset = concatenate_datasets([with_ends(lines, False), end.to_iterable_dataset() if streaming else end])
    return Part(dataset, None if streaming else len(dataset), are_lines=True)


def with_ends(dataset: Dataset | IterableDataset, value: bool) -> Dataset | IterableDataset:
    """Adds the column that says whether a text ends with a row, unless there is one."""
    if ENDS in (dataset.column_names or ()):
        return dataset
    if isinstance(dataset, Dataset):
        return dataset.add_column(ENDS, np.full(len(dataset), value))
    features = dataset.features and Features({**dataset.features, ENDS: Value("bool")})
    return dataset.map(_add_ends, features=features, fn_kwargs={"value": value})


def _add_ends(row, value):
    return {**row, ENDS: value}


def joined(datasets: list[Dataset | IterableDataset]) -> Dataset | IterableDataset:
    """Joins datasets with and without the column that says where texts end."""
    if any(ENDS in (dataset.column_names or ()) for dataset in datasets):
        datasets = [with_ends(dataset, True) for dataset in datasets]
    return datasets[0] if len(datasets) == 1 else concatenate_datasets(datasets)


@contextmanager
def errors_name_the_file(names: list[str], encoding: str, *exceptions: type[Exception]) -> Iterator[None]:
    """
    Raise `UsageError` with the name of the file that could not be read, in place of errors of `datasets` and of
    `exceptions`. Files are read again only after such an error.
    """
    try:
        yield
    except UsageError:
        raise
    except (DatasetGenerationError, StopIteration, UnicodeDecodeError, pyarrow.ArrowException, *exceptions):
        for file in find_files(names):
            _check_readable(file, encoding)
        raise


def _check_readable(file, encoding):
    loader = loader_of(file)
    try:
        options = {"split": "train", "streaming": True, **_options(loader, encoding)}
        rows = load_dataset(loader, data_files=_exact([file]), **options)
        num_rows = sum(1 for _ in rows)
    except StopIteration:
        num_rows = 0
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{file} is not in {encoding}, {error.reason} at 0x{error.object[error.start]:02x}: name its encoding, "
            "such as --encoding latin-1, or convert it."
        ) from None
    except (ValueError, pyarrow.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"{file} is not the {loader} that its name says: {reason}") from None
    if not num_rows:
        raise UsageError(f"{file} has no rows.")


def _shortened(files):
    return ", ".join(files[:3]) + (f" and {len(files) - 3} more" if len(files) > 3 else "")
