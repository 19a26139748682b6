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
Memory that is read and written by rows: advice to the operating system, and reuse. Where the system takes no advice,
nothing changes.
"""

import ctypes
import functools
import mmap
import sys
import threading

import torch

from .library_releases import storage_use_count


# Huge pages are 2 MB: less memory than a few of them is not worth a system call.
LEAST_BYTES = 2**23


@functools.cache  # a handle of the process itself
def _libc():
    return ctypes.CDLL(None, use_errno=True)


def _advise(tensor, advice):
    size = tensor.numel() * tensor.element_size()
    # A tensor subclass, quantized or sharded, may have no memory of its own.
    has_memory = tensor.device.type == "cpu" and type(tensor) in (torch.Tensor, torch.nn.Parameter)
    if sys.platform != "linux" or not has_memory or size < LEAST_BYTES:
        return tensor
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (tensor.data_ptr() + size - start) // mmap.PAGESIZE * mmap.PAGESIZE
    _libc().madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), ctypes.c_int(advice))
    return tensor


def advise_huge_pages(tensor: torch.Tensor) -> torch.Tensor:
    """
    Let memory that was just allocated come in pages of 2 MB as it is first written: fewer page faults then, and fewer
    TLB misses from then on. Return the tensor.
    """
    return _advise(tensor, mmap.MADV_HUGEPAGE) if hasattr(mmap, "MADV_HUGEPAGE") else tensor


def advise_random_access(tensor: torch.Tensor) -> torch.Tensor:
    """
    Let a read of a row of a tensor that is mapped from a file load that row, not its neighbors. Return the tensor.
    """
    return _advise(tensor, mmap.MADV_RANDOM)


def advise_whole_access(tensor: torch.Tensor) -> torch.Tensor:
    """Undo [`advise_random_access`], before all of a tensor is read. Return the tensor."""
    return _advise(tensor, mmap.MADV_NORMAL)


class ReusedMemory:
    """
    Memory for the gradients of one step that is used again for those of the next, once no tensor refers to it:
    touching fresh memory for the first time costs more than computing the gradients. It stays allocated until
    `release`.

    Whether a tensor refers to a block is read from the reference counts of its storage. Nothing else tells: a gradient
    may be kept by autograd, a hook, an optimizer, another thread or a view, and PyTorch has no callback for the end of
    the last of them (a `weakref.finalize` of a tensor fires while views of its storage live on). A count that is too
    high only costs memory, as the block stays taken. One that is too low would let the next gradient overwrite one
    that is in use, silently. Counts are hence compared for equality with those of a block that was just made: what
    PyTorch counts differently in a later release, it counts differently in both, and a reference too many makes them
    unequal.
    """

    def __init__(self):
        self._blocks: list[_Block] = []
        self._lock = threading.Lock()

    def empty(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        """Return an uninitialized tensor of this shape on the CPU."""
        count = torch.Size(shape).numel()
        size = count * dtype.itemsize
        if size < LEAST_BYTES:
            return torch.empty(shape, dtype=dtype)
        with self._lock:
            free = [block for block in self._blocks if block.is_free()]
            block = next((block for block in free if size <= block.size <= 2 * size), None)
            if block is None:
                # All free blocks are too small, or too large: let them go.
                self._blocks = [block for block in self._blocks if block not in free]
                block = _Block(size + size // 8)
                if block.references_when_free is not None:
                    self._blocks.append(block)
            return block.memory[:size].view(dtype).view(shape)

    def release(self) -> None:
        """Free the blocks that no tensor refers to."""
        with self._lock:
            self._blocks = [block for block in self._blocks if not block.is_free()]


class _Block:
    def __init__(self, size: int):
        self.size = size
        self.memory = advise_huge_pages(torch.empty(size, dtype=torch.uint8))
        self.storage = self.memory.untyped_storage()
        self.references_when_free = self._references()

    def is_free(self) -> bool:
        """Whether no tensor but its own uses the memory, in this process or in one that it was sent to."""
        return self._references() == self.references_when_free and not self.memory.is_shared()

    def _references(self):
        """Of tensors, and of Python to the storage itself. `None` if torch does not count them."""
        uses = storage_use_count(self.storage)
        return None if uses is None else (uses, sys.getrefcount(self.storage))
