# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
Expert tables that stay on a disk, for models larger than memory.

`from_pretrained` maps a checkpoint into memory, where page faults read missing rows one after the other. With
[`keep_tables_on_disk`], the distinct rows of a batch of tokens are read from the file together. Rows in the page cache
are copied, and the disk reads the others in parallel. The operating system's page cache is the cache of hot rows. It
takes the free memory, or what a limit of the process's control group leaves.
"""

import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..arguments.check_types import check_types
from ..experts import expert_tables
from .native import COMPILE_VARIABLE, call, load_library, refuse_index
from .quantized_rows import QuantizedRows, dequantize, readable_rows


@dataclass
class DiskMeter:
    """
    Counters of the rows that are read from the tables of a model.

    Attributes:
        num_rows (`int`): Rows that were read. A row that several tokens of a batch share counts once.
        num_cached (`int`): Number of these rows that were in the page cache.
        num_bytes (`int`): Bytes of these rows. A disk reads whole sectors, and the page cache whole pages.
        seconds (`float`): Time of reading. It overlaps with the model's own work if a prompt is run in pieces.
    """

    num_rows: int = 0
    num_cached: int = 0
    num_bytes: int = 0
    seconds: float = 0.0

    def reset(self) -> None:
        """Reset the counters."""
        vars(self).update(vars(DiskMeter()))

    @property
    def hit_rate(self) -> float:
        """The share of rows that were in the page cache, NaN if none was read."""
        return self.num_cached / self.num_rows if self.num_rows else float("nan")


class DiskRows:
    """
    Reads the rows of a table from its file, `(...) -> (..., width)`, in place of the table's forward.

    Args:
        name (`str`): Name of the table in its model.
        table (`nn.Module`): An `nn.Embedding`, or a quantized table, whose rows are mapped from a file.
        meter ([`DiskMeter`])
        buffer_bytes (`int`): See [`keep_tables_on_disk`].

    Raises:
        `ValueError`: if the table has an adapter or a hook, is on a disk already, or is not mapped from a file.
        `OSError`: if the file cannot be read, or has been replaced by another.
    """

    def __init__(self, name: str, table: nn.Module, meter: DiskMeter, buffer_bytes: int):
        rows: Any = readable_rows(table)
        if rows is None:
            reason = "is on a disk already" if is_on_disk(table) else "has an adapter or a hook"
            raise ValueError(f"The expert table {name} {reason}.")
        self.scales: Any = None
        if isinstance(rows, QuantizedRows):
            # Reading scales from the file would be a second read of a few bytes for each row.
            self.scales, rows = rows._replace(integers=None, scales=rows.scales.clone()), rows.integers
        self.num_rows, self.width = rows.shape
        self.dtype, self.row_bytes = rows.dtype, rows.shape[1] * rows.itemsize
        self.meter, self.buffer_bytes = meter, buffer_bytes
        path, self.offset, inode = _place_in_file(name, rows)
        self.file = open(path, "rb", buffering=0)  # noqa: SIM115 as long as the model
        # Otherwise the system would take reads of sorted rows for a sequential read, and read far ahead.
        os.posix_fadvise(self.file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        self.state = self._state()
        is_another = os.fstat(self.file.fileno()).st_ino != inode
        if is_another or self.state[0] < self.offset + self.num_rows * self.row_bytes:
            raise OSError(f"{path} is not the file any more that the expert table {name} was loaded from.")

    def __deepcopy__(self, memo):
        return self  # the file is only read

    def __reduce__(self):
        raise TypeError("A model with tables on a disk cannot be pickled: load it, and call `keep_tables_on_disk`.")

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        distinct, places = rows.long().unique(return_inverse=True)
        (found,) = read_together([self], distinct)
        return dequantize(found.select(places)) if isinstance(found, QuantizedRows) else found[places]

    def _state(self):
        status = os.fstat(self.file.fileno())
        return status.st_size, status.st_mtime_ns

    def begin(self, rows: torch.Tensor) -> tuple:
        """Read the rows that are in the page cache, and request the others, which [`DiskRows.finish`] awaits."""
        if self._state() != self.state:
            raise OSError(f"{self.file.name} has changed since the model was loaded: load it again.")
        if len(rows) and not 0 <= int(rows[0]) <= int(rows[-1]) < self.num_rows:
            refuse_index(rows, self.num_rows)
        output = torch.empty(len(rows), self.width, dtype=self.dtype, device="cpu")
        missing = torch.empty(len(rows), dtype=torch.uint8, device="cpu")
        arguments = self.file.fileno(), self.offset, rows, len(rows), output, missing, self.row_bytes
        num_missing = call("read_cached_rows", *arguments)
        self.meter.num_rows += len(rows)
        self.meter.num_cached += len(rows) - num_missing
        self.meter.num_bytes += output.nbytes
        return num_missing, arguments

    def finish(self, num_missing: int, arguments: tuple) -> torch.Tensor | QuantizedRows:
        """Wait for the rows that [`DiskRows.begin`] has requested, and return all."""
        failed = call("read_missing_rows", *arguments) if num_missing else 0
        if failed:
            reason = os.strerror(failed) if failed > 0 else "it has ended"
            raise OSError(f"An expert's row could not be read from {self.file.name}: {reason}.")
        rows, output = arguments[2], arguments[4]
        return (
            output if self.scales is None else self.scales._replace(integers=output, scales=self.scales.scales[rows])
        )


def _place_in_file(name, tensor):
    """The path of the file that a tensor is mapped from, the tensor's offset there, and the file's inode."""
    address = tensor.data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, _, offset, _, inode, *path = line.split(maxsplit=5)
        start, end = (int(each, 16) for each in span.split("-"))
        if start <= address < end and path and path[0].startswith("/"):
            return path[0], int(offset, 16) + address - start, int(inode)
    raise ValueError(
        f"The expert table {name} is not mapped from a file. Load the model with `from_pretrained`, on a CPU and in "
        "the dtype of its checkpoint."
    )


def read_together(readers: list[DiskRows], rows: torch.Tensor) -> list[torch.Tensor | QuantizedRows]:
    """Read the same rows, distinct and sorted, of several tables. All are requested before the first is awaited."""
    start = time.perf_counter()
    begun = [reader.begin(rows) for reader in readers]
    found = [reader.finish(*each) for reader, each in zip(readers, begun, strict=True)]
    readers[0].meter.seconds += time.perf_counter() - start
    return found


def is_on_disk(table: nn.Module) -> bool:
    """Whether [`keep_tables_on_disk`] keeps a table on a disk."""
    return isinstance(vars(table).get("forward"), DiskRows)


def pieces_from_disk(
    rows: torch.Tensor, tables: list[nn.Module | None]
) -> Iterator[tuple[slice, torch.Tensor, list[torch.Tensor | QuantizedRows | None]]]:
    """
    Read the rows of a pool's tables in pieces of as many tokens as half of the buffer holds. The rows of a piece are
    read while the caller computes with the previous piece.

    Args:
        rows (`torch.Tensor` of shape `(num_tokens, num_active)`)
        tables (`list`): Tables that are on a disk, or `None`.

    Yields:
        `tuple`: the tokens of the piece, the places of their rows in what was read, and what was read of each table.
    """
    places_of = [place for place, table in enumerate(tables) if table is not None]
    if any(each.requires_grad for place in places_of for each in tables[place].parameters()):
        raise ValueError("Tables that are kept on a disk cannot be trained: load the model again to train them.")
    readers: list[DiskRows] = [vars(tables[place])["forward"] for place in places_of]
    bytes_per_token = rows.shape[1] * sum(reader.row_bytes for reader in readers)
    step = max(readers[0].buffer_bytes // 2 // max(bytes_per_token, 1), 1)
    pieces = [slice(start, start + step) for start in range(0, max(len(rows), 1), step)]

    def read(piece):
        distinct, places = rows[piece].unique(return_inverse=True)
        found: list[Any] = [None] * len(tables)
        for place, each in zip(places_of, read_together(readers, distinct), strict=True):
            found[place] = each
        return piece, places, found

    if len(pieces) == 1:
        yield read(pieces[0])
        return
    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(read, pieces[0])
        for piece in pieces[1:]:
            current = following.result()
            following = pool.submit(read, piece)
            yield current
        yield following.result()


@check_types
def keep_tables_on_disk(model: nn.Module, buffer_bytes: int = 2**26) -> DiskMeter:
    """
    Let a model read the rows of its experts from its checkpoint as it needs them, instead of keeping their tables in
    memory. This freezes the tables. All other parameters are copied to memory and may be trained. So may protected
    experts that are added later.

    Changes to tables, before or after this call, are not in the file and have no effect. Call this right after
    `from_pretrained`.

    Args:
        model (`nn.Module`):
            A model with PEER or PKM layers that `from_pretrained` has mapped into memory: on a CPU, in the dtype of
            its checkpoint. Its tables may be quantized in the checkpoint.
        buffer_bytes (`int`, *optional*, defaults to 64 MB):
            Memory for the rows of a forward pass. A prompt that needs more is run in pieces. Where gradients are
            computed, all rows of a forward pass are held until the backward pass.

    Returns:
        [`DiskMeter`]: counts what is read from now on.

    Raises:
        `ValueError`: if the model has no expert tables, or one of them is not mapped from a file, or has an adapter.
        `OSError`: if the file cannot be read, on systems other than Linux, and without the C kernels. In a forward
            pass also if the file has changed since.

    ```python
    >>> model = PeerForCausalLM.from_pretrained(folder)
    >>> meter = keep_tables_on_disk(model)
    >>> model.generate(**prompt)
    >>> meter.num_bytes, meter.hit_rate
    ```
    """
    if buffer_bytes < 1:
        raise ValueError(f"`buffer_bytes` must be at least 1, got {buffer_bytes}.")
    if sys.platform != "linux" or load_library() is None:
        raise OSError(f"Tables are read from a disk on Linux and by C kernels only, see {COMPILE_VARIABLE}.")
    meter, tables = DiskMeter(), expert_tables(model)
    if not tables:
        raise ValueError(f"{type(model).__name__} has no expert tables.")
    readers = {table: DiskRows(name, table, meter, buffer_bytes) for name, table in tables.items()}
    in_tables = {parameter for table in tables.values() for parameter in table.parameters()}
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor not in in_tables:  # also mapped: if the file were cut short, the process would end
            tensor.data = tensor.data.clone()
    for table, reader in readers.items():
        table.requires_grad_(False)
        setattr(table, "forward", reader)  # noqa: B010
    return meter
